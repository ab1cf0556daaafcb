"""The space map of the data device: the references to each of its blocks (dm-space-map-disk).

`inc` and `dec` only remember what changes; `write` puts it into the bitmaps, as part of the commit or when there is much to
remember. Bitmaps are read when they are needed; the index, 16 bytes for 16320 blocks, is in memory.

Invariants: a block is given out only if it is free now and was free in the last commit, and once a transaction at most.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from nbdmap.errors import CorruptMetadata, OutOfSpace
from nbdmap.persist.blocks import Block
from nbdmap.persist.btree import Btree
from nbdmap.persist.space_map import (
    BITMAP,
    ENTRIES,
    INDEX_ENTRIES,
    INDEX_ENTRY,
    MANY,
    REF_COUNTS,
    Counts,
    Entry,
    Root,
    bitmaps_for,
    get_count,
    pack_counts,
    unpack_counts,
)
from nbdmap.persist.transaction import Transaction

Int64Array = npt.NDArray[np.int64]

REMEMBERED: Final = 1 << 16
"""Blocks whose changes are remembered before they are put into the bitmaps, a leaf's entries more or less."""


class DataMap:
    """The references to each block of another device. It adds itself to the transaction, which writes it."""

    def __init__(self, tx: Transaction, root: Root) -> None:
        self.tx = tx
        self.nr_blocks = root.nr_blocks
        self._nr_allocated = root.nr_allocated
        self._committed_free = root.nr_blocks - root.nr_allocated
        self._allocated = 0
        self._index = Btree(tx, INDEX_ENTRIES, root.index_block)
        self._ref_counts = Btree(tx, REF_COUNTS, root.ref_counts)
        self._entries = np.zeros(0, INDEX_ENTRY)
        self._deltas: dict[int, int] = {}
        self._given: defaultdict[int, list[int]] = defaultdict(list)
        """For each bitmap the entries that were given out in this transaction."""
        self._before: dict[int, int] = {}
        """Where a bitmap that has changed in this transaction was in the last commit; 0 if nowhere."""
        self._extended: set[int] = set()
        """Bitmaps that have to be written because the device has become larger."""
        self._cursor = 0
        self._open: tuple[int, bytearray] = -1, bytearray()
        """The bitmap that blocks are given out of, and 1 for each entry of it that can be."""
        tx.maps.append(self)

    @classmethod
    def create(cls, tx: Transaction, nr_blocks: int) -> Self:
        """The map of a data device with nothing on it. Raises OutOfSpace when its trees have no place."""
        index, ref_counts = Btree.create(tx, INDEX_ENTRIES).root, Btree.create(tx, REF_COUNTS).root
        one = cls(tx, Root(0, 0, index, ref_counts))
        one.extend(nr_blocks)
        return one

    @classmethod
    async def open(cls, tx: Transaction, root: bytes) -> Self:
        """Reads the index. Raises CorruptMetadata."""
        one = cls(tx, Root.unpack(root))
        parts = [(keys, np.frombuffer(data, INDEX_ENTRY)) async for keys, data in one._index.arrays()]
        keys = np.concatenate([keys for keys, _ in parts]) if parts else np.zeros(0, np.uint64)
        wanted = bitmaps_for(one.nr_blocks)
        if one._nr_allocated > one.nr_blocks:
            raise CorruptMetadata(f"the data space map has {one._nr_allocated} blocks in use of {one.nr_blocks}")
        if len(keys) != wanted or (keys != np.arange(wanted, dtype=np.uint64)).any():
            raise CorruptMetadata(f"the data space map's index has {len(keys)} entries, not those of {wanted} bitmaps")
        one._entries = np.concatenate([entries for _, entries in parts]) if parts else one._entries
        return one

    @property
    def nr_free(self) -> int:
        """Blocks that were free in the last commit, less those given out since."""
        return max(self._committed_free - self._allocated, 0)

    @property
    def root(self) -> bytes:
        """The 32 bytes for the superblock; right after `write`."""
        return Root(self.nr_blocks, self._nr_allocated, self._index.root, self._ref_counts.root).pack()

    def extend(self, nr_blocks: int) -> None:
        """Makes it a map of `nr_blocks`, not less than now; the new ones are free."""
        if len(self._entries) and nr_blocks > self.nr_blocks:
            self._entries[-1]["free"] = max(self._entries[-1]["free"], 1)  # thin_restore counts to the end of the device
            self._extended.add(len(self._entries) - 1)
        more = np.zeros(bitmaps_for(nr_blocks) - len(self._entries), INDEX_ENTRY)
        more["free"] = ENTRIES
        self._entries = np.concatenate([self._entries, more])
        self._committed_free += nr_blocks - self.nr_blocks
        self.nr_blocks = nr_blocks
        self._open = -1, bytearray()

    def inc(self, block: int) -> None:
        """One reference more."""
        self._deltas[block] = self._deltas.get(block, 0) + 1

    def dec(self, block: int) -> None:
        """One reference less. That it had one is checked when the change is written."""
        self._deltas[block] = self._deltas.get(block, 0) - 1

    def inc_all(self, blocks: Iterable[int]) -> None:
        """One reference more for each."""
        deltas = self._deltas
        for block in blocks:
            deltas[block] = deltas.get(block, 0) + 1

    def dec_all(self, blocks: Iterable[int]) -> None:
        """One reference less for each."""
        deltas = self._deltas
        for block in blocks:
            deltas[block] = deltas.get(block, 0) - 1

    async def count(self, block: int) -> int:
        """The references to a block now. For who makes changes: not beside a change or a commit."""
        if block >= self.nr_blocks:
            raise CorruptMetadata(f"data block {block}: the space map ends with {self.nr_blocks - 1}")
        number, entry = divmod(block, ENTRIES)
        where = int(self._entries[number]["block"])
        found = get_count((await self.tx.store.read(where, BITMAP)).data, entry) if where else 0
        if found == MANY:
            found = await self._many(block)
        return found + self._deltas.get(block, 0)

    async def _many(self, block: int) -> int:
        count = await self._ref_counts.lookup(block)
        if count is None:
            raise CorruptMetadata(f"the reference count of data block {block} is not in its tree")
        return count

    def next_block(self) -> int:
        """The block that `new_block` would give out, if that is known without reading; else -1."""
        number, start = divmod(self._cursor, ENTRIES)
        if self._open[0] != number or self._committed_free <= self._allocated:
            return -1
        entry = self._open[1].find(1, start)
        return number * ENTRIES + entry if entry >= 0 else -1

    async def new_block(self) -> int:
        """Gives out a block, with one reference. Raises OutOfSpace."""
        block = self.next_block()
        if block >= 0:
            return self.give(block)
        if self.nr_free:
            number, start = divmod(self._cursor, ENTRIES)
            for _ in range(len(self._entries) + 1):  # the first one twice: from the cursor on, and at last up to it
                if number == len(self._entries):
                    number, start = 0, 0
                if self._entries[number]["free"]:
                    if self._open[0] != number:
                        self._open = number, await self._free(number)
                    entry = self._open[1].find(1, start)
                    if entry >= 0:
                        return self.give(number * ENTRIES + entry)
                number, start = number + 1, 0
        raise OutOfSpace(f"none of the {self.nr_blocks} data blocks is free")

    def give(self, block: int) -> int:
        """Gives out `next_block()`, with one reference."""
        number, entry = divmod(block, ENTRIES)
        self._open[1][entry] = 0
        self._given[number].append(entry)
        self._allocated += 1
        self._cursor = block + 1
        self.inc(block)
        return block

    def free_behind(self, block: int, count: int) -> bytearray:
        """Of the blocks behind one that was just given out, `count` at most: 1 for each that can be given out, too."""
        entry = block % ENTRIES + 1
        return self._open[1][entry : entry + min(count, self.nr_blocks - block - 1)]

    def give_again(self, block: int) -> None:
        """Gives out a certain block, with one reference: one that its owner was given before, and whose reference was taken
        back for a commit that was to know nothing of it. Right after that commit, before anything else is given out."""
        number, entry = divmod(block, ENTRIES)
        self._given[number].append(entry)
        self._allocated += 1
        self.inc(block)

    def give_up(self, block: int) -> None:
        """Takes back what `give_again` did in this transaction: the block is free, as it was in the last commit."""
        number, entry = divmod(block, ENTRIES)
        self._given[number].remove(entry)
        self._allocated -= 1
        self.dec(block)
        if self._open[0] == number:
            self._open[1][entry] = 1

    async def _free(self, number: int) -> bytearray:
        """1 for each entry of a bitmap that can be given out."""
        free = await self._counts_at(int(self._entries[number]["block"])) == 0
        if number in self._before:
            free &= await self._counts_at(self._before[number]) == 0
        free[self.nr_blocks - number * ENTRIES :] = False
        free[self._given.get(number, [])] = False
        return bytearray(free.tobytes())

    async def _counts_at(self, where: int) -> Counts:
        if not where:
            return np.zeros(ENTRIES, np.uint8)
        return unpack_counts((await self.tx.store.read(where, BITMAP)).data)

    async def make_room(self) -> None:
        """As WrittenMap.make_room."""
        if len(self._deltas) > REMEMBERED:
            await self.write()

    async def write(self) -> None:
        """As WrittenMap.write."""
        blocks = np.fromiter(self._deltas.keys(), np.int64, len(self._deltas))
        deltas = np.fromiter(self._deltas.values(), np.int64, len(self._deltas))
        order = np.argsort(blocks)
        order = order[deltas[order] != 0]
        blocks, deltas = blocks[order], deltas[order]
        if len(blocks) and blocks[-1] >= self.nr_blocks:
            raise CorruptMetadata(f"data block {blocks[-1]} is referred to; the space map ends with {self.nr_blocks - 1}")
        numbers = sorted({*np.unique(blocks // ENTRIES).tolist(), *self._unwritten(), *self._extended})
        await self.tx.store.read_ahead(self._entries["block"][numbers].tolist(), BITMAP)
        for number in numbers:
            begin, end = np.searchsorted(blocks, [number * ENTRIES, (number + 1) * ENTRIES])
            await self._change(number, blocks[begin:end] - number * ENTRIES, deltas[begin:end])
        self._deltas.clear()
        self._extended.clear()

    def _unwritten(self) -> list[int]:
        """The bitmaps that are not on the disk yet."""
        return np.flatnonzero(self._entries["block"] == 0).tolist()

    async def _change(self, number: int, entries: Int64Array, deltas: Int64Array) -> None:
        """Writes the changed counts of one bitmap."""
        where = int(self._entries[number]["block"])
        self._before.setdefault(number, where)
        bitmap = await self._shadow(where)
        counts = unpack_counts(bitmap.data)
        in_use = int(np.count_nonzero(counts))
        old = counts[entries].astype(np.int64)
        new = old + deltas
        for place in np.flatnonzero((old == MANY) | (new >= MANY)).tolist():
            block, had = number * ENTRIES + int(entries[place]), int(old[place])
            if had == MANY:
                had = await self._many(block)
            new[place] = had + int(deltas[place])
            await self._change_many(block, had, int(new[place]))
        if (new < 0).any():
            place = int(np.argmin(new))
            raise CorruptMetadata(
                f"data block {number * ENTRIES + int(entries[place])}: {-int(deltas[place])} references are taken from its"
                f" {int(new[place] - deltas[place])}"
            )
        counts[entries] = np.minimum(new, MANY)
        self.tx.store.touch(bitmap)
        entry = Entry(bitmap.number, *pack_counts(bitmap.data, counts))
        self._nr_allocated += ENTRIES - entry.free - in_use
        if not 0 <= self._nr_allocated <= self.nr_blocks:
            raise CorruptMetadata(f"the data space map has {self._nr_allocated} blocks in use of {self.nr_blocks}")
        self._entries[number] = entry
        await self._index.insert_part(number, entry)

    async def _shadow(self, where: int) -> Block:
        if not where:
            return self.tx.allocate(BITMAP)
        bitmap, _ = await self.tx.shadow(where, BITMAP)
        return bitmap

    async def _change_many(self, block: int, old: int, new: int) -> None:
        """Changes a count in the tree."""
        if new >= MANY:
            await self._ref_counts.insert_part(block, new)
        elif old >= MANY:
            await self._ref_counts.remove_part(block, block + 1)

    def committed(self) -> None:
        """As WrittenMap.committed: what was freed is free from now on."""
        self._committed_free = self.nr_blocks - self._nr_allocated
        self._allocated = 0
        self._given.clear()
        self._before.clear()
        self._open = -1, bytearray()

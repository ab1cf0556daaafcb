"""The space map of the metadata device itself (dm-space-map-metadata).

It lives in the blocks that it counts. So that changing it needs no recursion, all counts are in memory, and the
disk is brought up to date by `write`, once a transaction: the counts above 2 go into their tree; then each bitmap that has
changed moves to a new block, which may change other bitmaps, until none is left that has changed and not moved; the
index moves too; at last the bitmaps are filled in.

Invariants: a block is given out only if it is free now and was free in the last commit (`_busy`); `write` moves each bitmap
at most once a transaction, so it ends.
"""

from array import array
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from nbdmap.errors import CorruptMetadata, OutOfSpace
from nbdmap.persist.blocks import BLOCK, MAX_BLOCKS, BlockStore, BlockType
from nbdmap.persist.insert import insert, new_leaf
from nbdmap.persist.lookup import Tree
from nbdmap.persist.remove import remove_from_leaf
from nbdmap.persist.space_map import (
    BITMAP,
    ENTRIES,
    INDEX_ENTRY,
    MANY,
    REF_COUNTS,
    Entry,
    Root,
    bitmaps_for,
    pack_counts,
    unpack_counts,
)
from nbdmap.persist.transaction import Transaction

INDEX: Final = BlockType("metadata space-map index", 160478)
MAX_BITMAPS: Final = 255
_INDEX_START: Final = 16


async def read_index(store: BlockStore, root: Root) -> npt.NDArray[np.void]:
    """The index entries of the map with this root."""
    if root.nr_blocks > MAX_BLOCKS:
        raise CorruptMetadata(f"the metadata space map has {root.nr_blocks} blocks, the most there can be is {MAX_BLOCKS}")
    index = await store.read(root.index_block, INDEX)
    return np.frombuffer(index.data, INDEX_ENTRY, bitmaps_for(root.nr_blocks), _INDEX_START).copy()


class MetadataMap:
    """The owners of each metadata block. Changing it never waits; only `open` and `write` do."""

    def __init__(self, nr_blocks: int) -> None:
        if nr_blocks > MAX_BLOCKS:
            raise OutOfSpace(f"{nr_blocks} metadata blocks are more than a space map can have, {MAX_BLOCKS}")
        self.nr_blocks = nr_blocks
        self._counts = array("I", bytes(4 * nr_blocks))
        self._busy = bytearray(nr_blocks)
        """1 for a block that has owners now, or had some in the last commit."""
        self._entries: list[Entry] = []
        self._index = 0
        self._ref_counts = 0
        self._cursor = 0
        self._changed: set[int] = set()
        """Bitmaps of which a count has changed since the last commit."""
        self._spilled: set[int] = set()
        """Blocks whose count was or is above 2 and has changed since it was last put into the tree."""
        self._freed: list[int] = []
        self._committed_free = nr_blocks
        self._in_use = 0
        self._allocated = 0

    @classmethod
    def create(cls, nr_blocks: int) -> Self:
        """The map of a new metadata device: block 0, the superblock, is in use."""
        one = cls(0)
        one.extend(nr_blocks)
        one._cursor = 1
        one.inc(0)
        return one

    @classmethod
    async def open(cls, store: BlockStore, root: bytes) -> Self:
        """Reads the whole map. Raises CorruptMetadata. The blocks in use are counted: thin_restore's root has one too many."""
        found = Root.unpack(root)
        entries = await read_index(store, found)
        one = cls(found.nr_blocks)
        one._index, one._ref_counts = found.index_block, found.ref_counts
        one._entries = [Entry(*entry) for entry in entries.tolist()]
        await one._read(store)
        return one

    async def _read(self, store: BlockStore) -> None:
        await store.read_ahead([entry.block for entry in self._entries], BITMAP)
        counts = np.zeros(len(self._entries) * ENTRIES, np.uint32)
        for number, entry in enumerate(self._entries):
            bitmap = await store.read(entry.block, BITMAP)
            counts[number * ENTRIES : (number + 1) * ENTRIES] = unpack_counts(bitmap.data)
        counts = counts[: self.nr_blocks]
        many = counts == MANY
        async for blocks, values in Tree(store, REF_COUNTS, self._ref_counts).arrays():
            places = blocks[blocks < self.nr_blocks].astype(np.intp)
            found = np.frombuffer(values, np.uint32)[: len(places)]
            counts[places] = np.where(many[places], found, counts[places])
            many[places] = False
        if many.any():
            raise CorruptMetadata(f"the reference count of metadata block {int(np.argmax(many))} is not in its tree")
        self._counts = array("I", counts.tobytes())
        self._busy = bytearray((counts != 0).tobytes())
        self._in_use = int(np.count_nonzero(counts))
        self._committed_free = self.nr_blocks - self._in_use

    @property
    def nr_free(self) -> int:
        """Blocks that were free in the last commit, less those allocated since."""
        return self._committed_free - self._allocated

    @property
    def root(self) -> bytes:
        """The 32 bytes for the superblock; right after `write`."""
        return Root(self.nr_blocks, self._in_use, self._index, self._ref_counts).pack()

    def count(self, block: int) -> int:
        """The owners of a block now."""
        if block >= self.nr_blocks:
            raise CorruptMetadata(f"metadata block {block}: the space map ends with {self.nr_blocks - 1}")
        return self._counts[block]

    def new_block(self) -> int:
        """Gives a free block one owner: the first, at or after a rotating cursor, that was free in the last commit too."""
        block = self._busy.find(0, self._cursor)
        if block < 0:
            block = self._busy.find(0)
            if block < 0:
                raise OutOfSpace(f"all {self.nr_blocks} metadata blocks are in use")
        self._cursor = block + 1
        self._allocated += 1
        self.inc(block)
        return block

    def inc(self, block: int) -> None:
        """One owner more. Raises CorruptMetadata beyond the end."""
        owners = self.count(block) + 1
        self._counts[block] = owners
        if owners == 1:
            self._busy[block] = 1
            self._in_use += 1
        self._changed.add(block // ENTRIES)
        if owners >= MANY:
            self._spilled.add(block)

    def dec(self, block: int) -> None:
        """One owner less. Raises CorruptMetadata for a block without owners."""
        owners = self.count(block)
        if not owners:
            raise CorruptMetadata(f"metadata block {block}: an owner is taken from it, but it has none")
        self._counts[block] = owners - 1
        self._changed.add(block // ENTRIES)
        if owners >= MANY:
            self._spilled.add(block)
        elif owners == 1:
            self._in_use -= 1
            self._freed.append(block)

    def extend(self, nr_blocks: int) -> None:
        """Makes it a map of `nr_blocks`, not less than now; the new ones are free. Raises OutOfSpace for too many."""
        more = nr_blocks - self.nr_blocks
        if nr_blocks > MAX_BLOCKS:
            raise OutOfSpace(f"{nr_blocks} metadata blocks are more than a space map can have, {MAX_BLOCKS}")
        self._counts.extend(array("I", bytes(4 * more)))
        self._busy += bytes(more)
        self._committed_free += more
        self.nr_blocks = nr_blocks
        first = len(self._entries)
        self._entries += [Entry(0, ENTRIES, 0)] * (bitmaps_for(nr_blocks) - first)
        self._changed.update(range(max(first - 1, 0), len(self._entries)))  # thin_restore counts the last one's free to the end

    async def write(self, tx: Transaction) -> None:
        """As CountedSpace.write. Raises OutOfSpace when there is no room for the changed bitmaps."""
        if not self._changed:
            return
        if not self._ref_counts:
            self._ref_counts = new_leaf(tx, REF_COUNTS.size).number
        while self._spilled:
            block = self._spilled.pop()
            owners = self._counts[block]
            if owners >= MANY:
                self._ref_counts, _ = await insert(tx, REF_COUNTS, self._ref_counts, block, owners)
            elif await Tree(tx.store, REF_COUNTS, self._ref_counts).lookup(block) is not None:
                self._ref_counts, _ = await remove_from_leaf(tx, REF_COUNTS, self._ref_counts, block, block + 1)
        self._index = self._moved(tx, self._index)
        moved: set[int] = set()
        while self._changed - moved:
            for number in sorted(self._changed - moved):
                self._entries[number] = self._entries[number]._replace(block=self._moved(tx, self._entries[number].block))
                moved.add(number)
        for number in moved:
            self._fill(tx, number)
        index = tx.store.new(self._index, INDEX)
        for number, entry in enumerate(self._entries):
            index.data[_INDEX_START + 16 * number : _INDEX_START + 16 * (number + 1)] = entry.pack()

    def _moved(self, tx: Transaction, block: int) -> int:
        """A new place for a block of the map."""
        new = self.new_block()
        if block:
            tx.dec(block)
        return new

    def _fill(self, tx: Transaction, number: int) -> None:
        """Fills in bitmap `number` at its new place."""
        block = self._entries[number].block
        first = number * ENTRIES
        counts = np.frombuffer(self._counts, np.uint32)[first : first + ENTRIES]
        self._entries[number] = Entry(block, *pack_counts(tx.store.new(block, BITMAP).data, counts))

    def committed(self) -> None:
        """As CountedSpace.committed: what was freed is free from now on."""
        for block in self._freed:
            if not self._counts[block]:
                self._busy[block] = 0
        self._freed.clear()
        self._changed.clear()
        self._committed_free = self.nr_blocks - self._in_use
        self._allocated = 0


assert BLOCK == _INDEX_START + 16 * MAX_BITMAPS

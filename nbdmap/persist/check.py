"""The offline checker: walks trees, counts owners, and compares with what the space maps say.

Who has metadata of his own calls `own` for each block that his superblock points to by itself, `tree` for each tree, then
`data_map` and `metadata_map`, and at the end `compare` for each map. It finds what thin_check finds, and more: a reference
count of the data that is not the number of leaf entries that point to it, the counters of the indexes and roots, and entries
of a node that belong to its neighbour.

Nothing is raised for what is wrong on the disk: `errors` has what makes the metadata unfit for use, `leaks` what only wastes
space, `notes` counters that are not exact; thin_restore's are not, and the next commit that changes their bitmap sets them
right. Memory: 20 bytes for each metadata block, and 8 for each mapping.
"""

from array import array
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from nbdmap.errors import CorruptMetadata, NbdmapError
from nbdmap.persist.blocks import Block, BlockStore
from nbdmap.persist.lookup import AHEAD, MAX_DEPTH, MAX_KEY
from nbdmap.persist.metadata_map import read_index
from nbdmap.persist.node import FIRST, NODE, U64Array, children, count, is_leaf, keys, room, value_size, values
from nbdmap.persist.space_map import BITMAP, ENTRIES, INDEX_ENTRY, MANY, REF_COUNTS, Root, bitmaps_for, unpack_counts

MAX_FINDINGS: Final = 100
"""Of each sort; more are only counted."""

LeafVisitor = Callable[[Block], None]


class Findings:
    """What is wrong, in words; `total` also counts what is not kept."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.total = 0

    def add(self, words: str) -> None:
        """One more."""
        self.total += 1
        if self.total <= MAX_FINDINGS:
            self.words.append(words)

    def __bool__(self) -> bool:
        return self.total > 0


class Found(NamedTuple):
    """A space map as it was found: its root, its index, and the counts above 2."""

    what: str
    root: Root
    entries: npt.NDArray[np.void]
    many: dict[int, int]


class Way(NamedTuple):
    """A pointer to a node: its keys must be from `low` up to `end`."""

    number: int
    low: int
    end: int
    depth: int


class Check:
    """One check of the metadata in `store`."""

    def __init__(self, store: BlockStore) -> None:
        self.store = store
        self.errors = Findings()
        self.leaks = Findings()
        self.notes = Findings()
        self.owners = array("I", bytes(4 * store.nr_blocks))
        """Of each metadata block, as they are met."""
        self._lowest = array("Q", b"\xff" * 8 * store.nr_blocks)
        self._highest = array("Q", bytes(8 * store.nr_blocks))
        """The keys of each node that was met and has any."""

    def own(self, number: int) -> bool:
        """One pointer to a metadata block; True for the first one."""
        if number >= len(self.owners):
            self.errors.add(f"a pointer to metadata block {number}, the last is {len(self.owners) - 1}")
            return False
        self.owners[number] += 1
        return self.owners[number] == 1

    async def tree(self, what: str, root: int, size: int, leaf: LeafVisitor = lambda leaf: None) -> None:
        """Walks a tree with values of `size` bytes, to which its caller has one pointer; `leaf` is told of each sound leaf.

        Of what is reached a second time only the keys are checked, and nothing is told.
        """
        ways = [Way(root, 0, MAX_KEY + 1, 0)]
        while ways:
            way = ways.pop()
            try:
                if not self.own(way.number):
                    self._check_keys(way)
                    continue
                node = await self.store.read(way.number, NODE)
                self._check_node(node, size, way)
            except NbdmapError as error:
                self.errors.add(f"{what}: {error}")
                continue
            if is_leaf(node):
                leaf(node)
                continue
            lows = keys(node).tolist()
            ends = [*lows[1:], way.end]
            below = [Way(*one, way.depth + 1) for one in zip(children(node), lows, ends, strict=True)]
            ways += reversed(below)
            for start in range(0, len(below), AHEAD):
                if not all(self.store.get(one.number) for one in below[start : start + 2]):
                    await self.store.read_ahead([one.number for one in below[start : start + AHEAD]], NODE)

    def _check_node(self, node: Block, size: int, way: Way) -> None:
        entries, most = count(node), room(node)
        wrong = ""
        if way.depth >= MAX_DEPTH:
            wrong = f"it is {way.depth} nodes below the root"
        elif is_leaf(node) and value_size(node) != size:
            wrong = f"a leaf has values of {value_size(node)} bytes, not {size}"
        elif most % 3:
            wrong = f"room for {most} entries, which is no multiple of 3"
        elif way.depth and entries < most // 3:
            wrong = f"{entries} entries are less than a third of {most}"
        if wrong:
            raise CorruptMetadata(f"metadata block {node.number}: {wrong}")
        if entries:
            self._lowest[node.number], self._highest[node.number] = node.words[FIRST], node.words[FIRST + entries - 1]
            self._check_keys(way)

    def _check_keys(self, way: Way) -> None:
        """Raises CorruptMetadata when a node that was seen does not have the keys that its parent says."""
        if way.number < len(self.owners):
            lowest, highest = self._lowest[way.number], self._highest[way.number]
            if lowest < way.low:
                raise CorruptMetadata(f"metadata block {way.number}: its lowest key is {lowest}, its parent says {way.low}")
            if highest >= way.end:
                raise CorruptMetadata(
                    f"metadata block {way.number}: its highest key is {highest}, the next in its parent {way.end}"
                )

    async def data_map(self, packed: bytes) -> Found | None:
        """Reads the data's space map and counts its blocks. None when it cannot be read."""
        what = "data space map"
        before = self.errors.total
        root = Root.unpack(packed)
        if bitmaps_for(root.nr_blocks) > len(self.owners):
            self.errors.add(f"{what}: it has no place for the counts of {root.nr_blocks} blocks")
            return None
        entries = np.zeros(bitmaps_for(root.nr_blocks), INDEX_ENTRY)
        seen: list[int] = []

        def index(leaf: Block) -> None:
            inside = keys(leaf) < len(entries)
            places = keys(leaf)[inside].astype(np.intp)
            entries[places] = np.frombuffer(values(leaf), INDEX_ENTRY)[inside]
            seen.extend(keys(leaf).tolist())

        await self.tree(f"{what}: index", root.index_block, 16, index)
        if self.errors.total == before and seen != list(range(len(entries))):
            self.errors.add(f"{what}: index: {len(seen)} entries, not those of {len(entries)} bitmaps")
        return await self._found(what, root, entries, before)

    async def metadata_map(self, packed: bytes) -> Found | None:
        """Reads the metadata's space map and counts its blocks. None when it cannot be read."""
        what = "metadata space map"
        before = self.errors.total
        try:
            root = Root.unpack(packed)
            entries = await read_index(self.store, root)
        except NbdmapError as error:
            self.errors.add(f"{what}: {error}")
            return None
        self.own(root.index_block)
        return await self._found(what, root, entries, before)

    async def _found(self, what: str, root: Root, entries: npt.NDArray[np.void], before: int) -> Found | None:
        for number in entries["block"].tolist():
            self.own(number)
        many: dict[int, int] = {}

        def counts(leaf: Block) -> None:
            many.update(zip(keys(leaf).tolist(), np.frombuffer(values(leaf), np.uint32).tolist(), strict=True))

        await self.tree(f"{what}: reference counts", root.ref_counts, REF_COUNTS.size, counts)
        return Found(what, root, entries, many) if self.errors.total == before else None

    async def compare(self, found: Found, blocks: U64Array, owners: npt.NDArray[np.int64]) -> None:
        """Compares a map with the owners that were counted: those of `blocks`, which ascend; all others have none."""
        what, root = found.what, found.root
        if len(blocks) and int(blocks[-1]) >= root.nr_blocks:
            self.errors.add(f"{what}: a pointer to block {int(blocks[-1])}, the last is {root.nr_blocks - 1}")
        await self.store.read_ahead(found.entries["block"].tolist(), BITMAP)
        in_use = 0
        for number in range(len(found.entries)):
            first = number * ENTRIES
            begin, end = np.searchsorted(blocks, [first, min(first + ENTRIES, root.nr_blocks)])
            expected = np.zeros(ENTRIES, np.int64)
            expected[blocks[begin:end].astype(np.int64) - first] = owners[begin:end]
            try:
                in_use += await self._compare_bitmap(found, number, expected)
            except NbdmapError as error:
                self.errors.add(f"{what}: {error}")
                return
        if in_use != root.nr_allocated:
            self.notes.add(f"{what}: {in_use} blocks are in use, its root says {root.nr_allocated}")

    async def _compare_bitmap(self, found: Found, number: int, expected: npt.NDArray[np.int64]) -> int:
        block, free, none_before = found.entries[number].tolist()
        what, first = found.what, number * ENTRIES
        raw = unpack_counts((await self.store.read(block, BITMAP)).data)
        counts = raw.astype(np.int64)
        for entry in np.flatnonzero(raw == MANY).tolist():
            if first + entry not in found.many:
                self.errors.add(f"{what}: the reference count of block {first + entry} is not in its tree")
            counts[entry] = found.many.get(first + entry, MANY)
        for entry in np.flatnonzero(counts != expected).tolist():
            has, should = int(counts[entry]), int(expected[entry])
            findings = self.leaks if has > should else self.errors
            findings.add(f"{what}: block {first + entry} has count {has}, but {should} owners")
        zeroes = ENTRIES - int(np.count_nonzero(raw))
        beyond = max(first + ENTRIES - found.root.nr_blocks, 0)  # the kernel counts them as free, thin_restore does not
        if free not in (zeroes, zeroes - beyond):
            self.notes.add(f"{what}: bitmap {number} has {zeroes} free entries, its index says {free}")
        if not raw[:none_before].all():
            self.notes.add(f"{what}: bitmap {number} has a free entry before {none_before}, its index says none")
        return ENTRIES - zeroes

    async def compare_metadata(self, found: Found) -> None:
        """Compares the metadata's map with the owners that were met on the way."""
        owners = np.frombuffer(self.owners, np.uint32)
        blocks = np.flatnonzero(owners)
        await self.compare(found, blocks.astype(np.uint64), owners[blocks].astype(np.int64))


def count_references(parts: list[U64Array]) -> tuple[U64Array, npt.NDArray[np.int64]]:
    """The blocks that are named in `parts`, ascending, and how often each is."""
    together = np.concatenate(parts) if parts else np.zeros(0, np.uint64)
    blocks, counts = np.unique(together, return_counts=True)
    return blocks, counts.astype(np.int64)

"""B-trees, read: look-ups, neighbours and ranges. Nothing here changes a block.

A reader may wait for a block while the tree is changed. It looks at `BlockStore.changes` after each wait, and when something
has changed it starts at the root again; what it has read by then is in the cache, so it comes further each time.
"""

from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final, Generic, TypeVar, cast

from nbdmap.errors import CorruptMetadata
from nbdmap.persist.blocks import Block, BlockStore
from nbdmap.persist.node import FIRST, LEAF, NODE, U64Array, children, count, is_leaf, keys, room, value_size, values

V = TypeVar("V")
MAX_KEY: Final = (1 << 64) - 1
MAX_DEPTH: Final = 12
"""With 84 children a node, 12 levels have more entries than there are metadata blocks."""
AHEAD: Final = 64
"""Leaves that are read at once when a range is read."""
_LOW: Final = 0xFFFFFFFF


class Stale(Exception):
    """The tree was changed while a reader waited: start again."""


def _nothing(values: Sequence[object]) -> None:
    """Plain data has no owners to count."""


class Values(Generic[V]):
    """What a tree's values are: `size` bytes each, how they are packed, and what is told of those that refer to something.

    `inc(values)` and `dec(values)` say that these values have one owner more or less. Both are plain and quick.
    """

    def __init__(
        self,
        size: int,
        pack: Callable[[V], bytes],
        unpack: Callable[[memoryview], V],
        inc: Callable[[Sequence[V]], None] = _nothing,
        dec: Callable[[Sequence[V]], None] = _nothing,
    ) -> None:
        self.size = size
        self.pack = pack
        self.unpack = unpack
        self.inc = inc
        self.dec = dec

    def of(self, node: Block, first: int, end: int) -> list[V]:
        """Values `first` to `end` of a leaf."""
        found, size, unpack = values(node), self.size, self.unpack
        if size == 8 and unpack is unpack_int:
            return cast("list[V]", found[8 * first : 8 * end].cast("Q").tolist())
        return [unpack(found[at : at + size]) for at in range(first * size, end * size, size)]

    def check(self, leaf: Block) -> None:
        """Raises CorruptMetadata for a leaf of another kind of tree."""
        if value_size(leaf) != self.size:
            raise CorruptMetadata(
                f"metadata block {leaf.number}: a leaf has values of {value_size(leaf)} bytes, its tree of {self.size}"
            )

    def find(self, leaf: Block, key: int) -> V | None:
        """The value of `key` in the leaf that has its place. Raises CorruptMetadata for a leaf of another kind of tree."""
        words = leaf.words
        size = self.size
        if words[3] & _LOW != size:
            self.check(leaf)
        entries = words[2]
        place = bisect_right(words, key, FIRST, FIRST + (entries & _LOW)) - 1
        if place < FIRST or words[place] != key:
            return None
        at = (FIRST + (entries >> 32)) * 8 + (place - FIRST) * size
        return self.unpack(leaf.data[at : at + size])


def pack_u64(value: int) -> bytes:
    """A u64, little-endian."""
    return value.to_bytes(8, "little")


def unpack_int(data: memoryview) -> int:
    """An unsigned number of any size, little-endian."""
    return int.from_bytes(data, "little")


def cached_leaf(store: BlockStore, root: int, key: int) -> Block | None:
    """The leaf that has the place of `key`, if the whole way to it is in the cache."""
    get = store.get
    number = root
    for _ in range(MAX_DEPTH):
        node = get(number)
        if node is None or node.type is not NODE:
            return None
        node.used = True
        words = node.words
        if words[0] >> 32 == LEAF:
            return node
        entries = words[2]
        place = bisect_right(words, key, FIRST, FIRST + (entries & _LOW)) - 1
        number = words[(place if place >= FIRST else FIRST) + (entries >> 32)]
    return None


async def child_at(store: BlockStore, number: int, depth: int) -> Block:
    """The node, read if need be. Raises Stale when something changed while it was read."""
    if depth >= MAX_DEPTH:
        raise CorruptMetadata(f"metadata block {number}: a b-tree is deeper than {MAX_DEPTH} nodes: it has a loop")
    node = store.get(number)
    if node is not None and node.type is NODE:
        return node
    before = store.changes
    try:
        node = await store.read(number, NODE)
    except CorruptMetadata:
        if store.changes != before:
            raise Stale from None
        raise
    if store.changes != before:
        raise Stale
    return node


async def find_leaf(store: BlockStore, root: int, key: int) -> tuple[Block, int]:
    """The leaf that has the place of `key`, and the lowest key that is surely beyond it (MAX_KEY + 1 at the end)."""
    number, beyond = root, MAX_KEY + 1
    for depth in range(MAX_DEPTH + 1):
        node = await child_at(store, number, depth)
        if is_leaf(node):
            break
        words, entries, most = node.words, count(node), room(node)
        place = max(bisect_right(words, key, FIRST, FIRST + entries) - 1, FIRST)
        if place + 1 < FIRST + entries:
            beyond = words[place + 1]
        number = words[place + most]
    return node, beyond


class Tree(Generic[V]):
    """A b-tree with 64-bit keys, to be read. It is found again at each call by `root`, which its owner may change."""

    def __init__(self, store: BlockStore, kind: Values[V], root: int) -> None:
        self.store = store
        self.values = kind
        self.root = root

    async def lookup(self, key: int) -> V | None:
        """The value of `key`; None if it has none."""
        while True:
            try:
                return await self.try_lookup(key)
            except Stale:
                continue

    async def try_lookup(self, key: int) -> V | None:
        """As `lookup`, but raises Stale."""
        leaf = cached_leaf(self.store, self.root, key)
        if leaf is None:
            leaf, _ = await find_leaf(self.store, self.root, key)
        return self.values.find(leaf, key)

    async def next(self, key: int) -> tuple[int, V] | None:
        """The entry with the lowest key that is not below `key`; None if there is none."""
        while key <= MAX_KEY:
            try:
                leaf, beyond = await find_leaf(self.store, self.root, key)
            except Stale:
                continue
            self.values.check(leaf)
            place = bisect_right(leaf.words, key - 1, FIRST, FIRST + count(leaf)) - FIRST if key else 0
            if place < count(leaf):
                return leaf.words[FIRST + place], self.values.of(leaf, place, place + 1)[0]
            key = beyond
        return None

    async def lowest(self) -> tuple[int, V] | None:
        """The entry with the lowest key."""
        return await self.next(0)

    async def highest(self) -> tuple[int, V] | None:
        """The entry with the highest key."""
        while True:
            try:
                leaf, _ = await find_leaf(self.store, self.root, MAX_KEY)
            except Stale:
                continue
            self.values.check(leaf)
            last = count(leaf) - 1
            return None if last < 0 else (leaf.words[FIRST + last], self.values.of(leaf, last, last + 1)[0])

    async def items(self, first: int = 0, end: int = MAX_KEY + 1) -> AsyncIterator[tuple[int, V]]:
        """The entries with keys from `first` up to, not with, `end`, in order."""
        async for leaf, begin, stop in self.leaves(first, end):
            for key, value in zip(keys(leaf)[begin:stop].tolist(), self.values.of(leaf, begin, stop), strict=True):
                yield key, value

    async def arrays(self, first: int = 0, end: int = MAX_KEY + 1) -> AsyncIterator[tuple[U64Array, memoryview]]:
        """As `items`, many at a time: keys, and the bytes of as many values; copies."""
        size = self.values.size
        async for leaf, begin, stop in self.leaves(first, end):
            yield keys(leaf)[begin:stop].copy(), memoryview(bytes(values(leaf)[begin * size : stop * size]))

    async def leaves(self, first: int = 0, end: int = MAX_KEY + 1) -> AsyncIterator[tuple[Block, int, int]]:
        """The leaves with keys from `first` up to `end`: leaf, first entry, entry behind the last. Valid until the next wait."""
        ahead = 0
        while first < end:
            try:
                if first >= ahead:
                    ahead = await self._read_ahead(first, end)
                leaf, beyond = await find_leaf(self.store, self.root, first)
            except Stale:
                continue
            self.values.check(leaf)
            stop = FIRST + count(leaf)
            begin = bisect_right(leaf.words, first - 1, FIRST, stop) if first else FIRST
            if end <= MAX_KEY:
                stop = bisect_right(leaf.words, end - 1, begin, stop)
            if begin < stop:
                yield leaf, begin - FIRST, stop - FIRST
            first = beyond

    async def _read_ahead(self, first: int, end: int) -> int:
        """Reads the leaves from `first` on into the cache, as many as AHEAD; the key up to which there is nothing more to do."""
        number, beyond = self.root, MAX_KEY + 1
        for depth in range(MAX_DEPTH + 1):
            node = await child_at(self.store, number, depth)
            if is_leaf(node):
                break
            words, entries, below = node.words, count(node), children(node)
            place = max(bisect_right(words, first, FIRST, FIRST + entries) - 1 - FIRST, 0)
            stop = min(place + AHEAD, entries)
            if end <= MAX_KEY:
                stop = min(stop, max(bisect_right(words, end - 1, FIRST, FIRST + entries) - FIRST, place + 1))
            lowest = self.store.get(below[place])
            if lowest is None and stop - place > 1:
                await self.store.read_ahead(below[place:stop], NODE)
                lowest = await child_at(self.store, below[place], depth + 1)
            if lowest is not None and lowest.type is NODE and is_leaf(lowest):
                return words[FIRST + stop] if stop < entries else beyond
            if place + 1 < entries:
                beyond = words[FIRST + place + 1]
            number = below[place]
        return beyond

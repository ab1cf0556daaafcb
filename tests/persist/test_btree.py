"""B-trees against a dictionary: what is in them, their shape, the owners of their values, and readers beside changes."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest

from nbdmap.block.io import READ, Io
from nbdmap.errors import CorruptMetadata, IoFailed, OutOfSpace
from nbdmap.persist.blocks import BLOCK, BlockStore
from nbdmap.persist.btree import Btree
from nbdmap.persist.check import Check
from nbdmap.persist.lookup import MAX_KEY, Tree, Values, unpack_int
from nbdmap.persist.metadata_map import MetadataMap
from nbdmap.persist.node import NODE, capacity, children, count, is_leaf, keys, room
from nbdmap.persist.transaction import Transaction
from tests.support.disks import FakeDisk, eio

BLOCKS = 4000


class Planted:
    """A tree with values of `size` bytes that counts the owners of its values, over a disk."""

    def __init__(self, size: int = 8, cache: int = 4096) -> None:
        self.device = FakeDisk("7:0", BLOCKS * 8)
        self.store = BlockStore(self.device, cache)
        self.space = MetadataMap.create(BLOCKS)
        self.tx = Transaction(self.store, self.space)
        self.owners: Counter[int] = Counter()
        self.kind = Values(
            size, lambda value: value.to_bytes(size, "little"), unpack_int, self.owners.update, self.owners.subtract
        )
        self.tree = Btree.create(self.tx, self.kind)
        self.model: dict[int, int] = {}
        self.next = 0
        self.others = 1
        """Blocks in use that are not the tree's: the superblock, and from the first commit on those of the space map."""

    async def insert(self, key: int) -> None:
        """Gives `key` a value that no other has."""
        self.next += 1
        value = self.next
        self.owners[value] += 1
        assert await self.tree.insert(key, value) == (key not in self.model)
        self.model[key] = value

    async def remove(self, key: int) -> None:
        assert await self.tree.remove(key) == (key in self.model)
        self.model.pop(key, None)

    async def remove_range(self, first: int, end: int) -> None:
        gone = [key for key in self.model if first <= key < end]
        assert await self.tree.remove_range(first, end) == len(gone)
        for key in gone:
            del self.model[key]

    async def commit(self) -> None:
        await self.tx.commit(lambda: bytes(BLOCK))
        self.others = 4

    async def check(self) -> None:
        """What is in the tree is what the model has, and the tree's shape is as it must be."""
        assert [item async for item in self.tree.items()] == sorted(self.model.items())
        assert +self.owners == Counter(self.model.values())
        found = Check(self.store)
        await found.tree("tree", self.tree.root, self.kind.size)
        assert not found.errors, found.errors.words
        assert sum(owners > 0 for owners in found.owners) == BLOCKS - self.free() - self.others

    def free(self) -> int:
        return sum(self.space.count(block) == 0 for block in range(BLOCKS))


ORDERS: dict[str, Callable[[int, random.Random], list[int]]] = {
    "up": lambda n, rng: list(range(n)),
    "down": lambda n, rng: list(range(n, 0, -1)),
    "random": lambda n, rng: rng.sample(range(n * 10), n),
    "ends first": lambda n, rng: [key for pair in zip(range(n // 2), range(n, n // 2, -1), strict=True) for key in pair],
    "far apart": lambda n, rng: [rng.randrange(1 << 64) for _ in range(n)],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [8, 24, 4, 16])
async def test_what_is_inserted_is_found(order: str, size: int) -> None:
    one = Planted(size)
    rng = random.Random(size)
    wanted = ORDERS[order](2000, rng)
    for key in wanted:
        await one.insert(key)
    await one.check()
    for key in wanted[:200]:
        assert await one.tree.lookup(key) == one.model[key]
        assert await one.tree.lookup(key ^ 1 << 40) == one.model.get(key ^ 1 << 40)
    rng.shuffle(wanted)
    for key in wanted:
        await one.remove(key)
        if not rng.randrange(100):
            await one.check()
    assert one.free() == BLOCKS - 2  # the superblock's, and an empty leaf
    assert await one.tree.lowest() is None
    assert await one.tree.highest() is None


async def test_a_tree_that_is_filled_in_order_has_full_leaves() -> None:
    for order in ("up", "down"):
        one = Planted()
        for key in ORDERS[order](20000, random.Random(0)):
            await one.insert(key)
        await one.check()
        used = BLOCKS - one.free() - 2
        assert used <= 20000 / capacity(8) * 1.03 + 2


@pytest.mark.parametrize("cache", [48, 4096])
@pytest.mark.parametrize("seed", range(3))
async def test_random_changes_over_commits(seed: int, cache: int) -> None:
    one = Planted(24, cache)
    rng = random.Random(seed)
    for _ in range(12):
        for _ in range(150):
            kind = rng.random()
            key = rng.randrange(3000)
            if kind < 0.6:
                await one.insert(key)
            elif kind < 0.9:
                await one.remove(key)
            else:
                await one.remove_range(key, key + rng.randrange(300))
        await one.check()
        await one.commit()
        assert one.store.resident <= cache


async def test_a_value_that_stays_the_same_keeps_its_owner() -> None:
    one = Planted()
    await one.insert(5)
    assert not await one.tree.insert(5, one.model[5])
    assert one.owners[one.model[5]] == 1


@pytest.mark.parametrize("size", [8, 24])
async def test_many_at_once(size: int) -> None:
    one, other = Planted(size), Planted(size)
    rng = random.Random(size)
    for step in range(60):
        first = rng.randrange(20000)
        spread = rng.choice((1, 1, 2, 50))
        keys = sorted({first + rng.randrange(600) * spread for _ in range(rng.choice((1, 10, 300)))})
        for key in keys:
            await other.insert(key)
        values = [other.model[key] for key in keys]
        new = sum(key not in one.model for key in keys)
        one.owners.update(values)
        assert await one.tx.change(one.tree.insert_all_part(list(zip(keys, values, strict=True)))) == new
        one.model.update(zip(keys, values, strict=True))
        if step % 10 == 9:
            await one.check()
            await one.remove_range(first, first + 3000)
            await other.remove_range(first, first + 3000)
    assert await one.tx.change(one.tree.insert_all_part([])) == 0


async def test_ranges() -> None:
    one = Planted()
    for key in range(0, 3000, 3):
        await one.insert(key)
    for first, end in ((0, 1), (1, 3), (0, 3000), (300, 301), (299, 1501), (2998, 1 << 64), (5, 5), (9, 3)):
        assert [key async for key, _ in one.tree.items(first, end)] == [key for key in one.model if first <= key < end]
        arrays = [(found.tolist(), len(values)) async for found, values in one.tree.arrays(first, end)]
        assert [key for found, _ in arrays for key in found] == [key for key in one.model if first <= key < end]
        assert all(len(found) * 8 == size for found, size in arrays)
    for key in (0, 1, 2, 3, 2997, 2998, MAX_KEY):
        found = await one.tree.next(key)
        assert (found[0] if found else None) == next((one for one in sorted(one.model) if one >= key), None)
    assert await one.tree.lowest() == (0, one.model[0])
    assert await one.tree.highest() == (2997, one.model[2997])


async def test_the_largest_key() -> None:
    one = Planted()
    for key in (MAX_KEY, 0, MAX_KEY - 1):
        await one.insert(key)
    assert [key async for key, _ in one.tree.items()] == [0, MAX_KEY - 1, MAX_KEY]
    assert await one.tree.next(MAX_KEY) == (MAX_KEY, one.model[MAX_KEY])
    await one.remove_range(1, MAX_KEY + 1)
    await one.check()


async def test_a_shared_tree_is_copied_where_it_is_changed() -> None:
    one = Planted()
    for key in range(5000):
        await one.insert(key)
    await one.commit()
    before = dict(one.model)
    one.space.inc(one.tree.root)
    old = Tree(one.store, one.kind, one.tree.root)
    free = one.free()
    await one.insert(2500)
    assert free - one.free() == 2  # a root and a leaf
    assert await old.lookup(2500) == before[2500]
    assert one.owners[before[2499]] == 2  # the leaf's other values have two owners now
    assert one.owners[before[2500]] == 1
    assert one.owners[before[1]] == 1  # and those of leaves that are still shared one
    await one.remove_range(1000, 4000)
    await one.insert(100000)
    assert dict([item async for item in old.items()]) == before
    await Btree(one.tx, one.kind, old.root).destroy()
    await one.check()
    await one.tree.destroy()
    assert one.free() == BLOCKS - one.others
    assert not +one.owners


async def test_a_tree_is_read_ahead() -> None:
    one = Planted()
    for key in range(60000):
        await one.insert(key)
    await one.commit()
    store = BlockStore(one.device)
    one.device.log.clear()
    assert sum([1 async for _ in Tree(store, one.kind, one.tree.root).items()]) == 60000
    assert len(one.device.log) < 60000 / capacity(8) / 10
    one.device.log.clear()
    store = BlockStore(one.device)
    assert sum([1 async for _ in Tree(store, one.kind, one.tree.root).items(30000, 30001)]) == 1
    assert len(one.device.log) == 2


async def test_a_full_disk_breaks_the_transaction() -> None:
    one = Planted()
    one.space = one.tx.space = MetadataMap.create(40)
    one.tx = Transaction(one.store, one.space)
    one.tree = Btree.create(one.tx, one.kind)

    async def fill() -> None:
        for key in range(20000):
            await one.insert(key)

    with pytest.raises(OutOfSpace, match="all 40 metadata blocks are in use"):
        await fill()
    with pytest.raises(IoFailed, match="must be aborted: all 40 metadata blocks"):
        await one.tree.insert(1, 1)
    with pytest.raises(IoFailed, match="must be aborted"):
        await one.commit()


async def test_a_leaf_of_another_tree_is_refused() -> None:
    one, other = Planted(8), Planted(24)
    await one.insert(1)
    await other.insert(1)
    tree = Btree(one.tx, other.kind, one.tree.root)
    for read in (tree.lookup(1), tree.next(1), tree.highest(), tree.insert(1, 2)):
        with pytest.raises(CorruptMetadata, match="a leaf has values of 8 bytes, its tree of 24"):
            await read


async def test_a_loop_is_found() -> None:
    one = Planted()
    for key in range(600):
        await one.insert(key)
    root = await one.store.read(one.tree.root, NODE)
    assert not is_leaf(root)
    root.words[4 + room(root)] = root.number
    with pytest.raises(CorruptMetadata, match="deeper than 12 nodes"):
        await one.tree.lookup(0)
    with pytest.raises(CorruptMetadata, match="deeper than 12 nodes"):
        await one.tree.insert(0, 7)


class SlowDisk(FakeDisk):
    """Reads take a turn of the loop each."""

    async def submit(self, io: Io, offset: int) -> None:
        if io.op is READ:
            await asyncio.sleep(0)
        await super().submit(io, offset)


@pytest.mark.parametrize("seed", range(4))
async def test_readers_beside_changes_see_each_key_as_it_was_or_will_be(seed: int) -> None:
    one = Planted(cache=48)
    one.device.__class__ = SlowDisk
    rng = random.Random(seed)
    steady = set(range(0, 12000, 7))
    for key in range(6000):
        await one.insert(key * 2 + 1 if key * 2 in steady else key * 2)
    for key in steady:
        await one.insert(key)
    await one.commit()
    values = {key: one.model[key] for key in steady}
    done = False
    looked = 0

    async def reader(number: int) -> None:
        nonlocal looked
        own = random.Random(seed * 100 + number)
        some = sorted(steady)
        while not done:
            key = own.choice(some)
            assert await one.tree.lookup(key) == values[key]
            found = await one.tree.next(key)
            assert found == (key, values[key])
            met = [item async for item in one.tree.items(key, key + 100) if item[0] in steady]
            assert met == [(one, values[one]) for one in range(key, min(key + 100, 12000), 7)]
            looked += 1
            await asyncio.sleep(0)

    readers = [asyncio.ensure_future(reader(number)) for number in range(4)]
    for step in range(250):
        first = rng.randrange(12000)
        for key in range(first, first + rng.randrange(120)):
            if key not in steady and rng.random() < 0.7:
                await (one.remove(key) if rng.random() < 0.6 else one.insert(key))
        if step % 20 == 19:
            await one.commit()
    done = True
    await asyncio.gather(*readers)
    assert looked > 20
    await one.check()


async def test_reads_that_fail_are_told_and_break_only_changes() -> None:
    one = Planted()
    for key in range(3000):
        await one.insert(key)
    await one.commit()
    tree = Btree(Transaction(BlockStore(one.device), one.space), one.kind, one.tree.root)
    one.device.failure = eio
    for read in (tree.lookup(1), tree.next(5), tree.lowest()):
        with pytest.raises(IoFailed, match="broken on purpose"):
            await read
    one.device.failure = lambda io, offset: None
    assert await tree.lookup(1) == one.model[1]
    one.device.failure = lambda io, offset: eio(io, offset) if io.op is READ else None
    with pytest.raises(IoFailed, match="broken on purpose"):
        await tree.insert(2999, 1)
    one.device.failure = lambda io, offset: None
    with pytest.raises(IoFailed, match="must be aborted: broken on purpose"):
        await tree.insert(2999, 1)


async def test_internal_nodes_name_the_lowest_keys_of_their_children() -> None:
    one = Planted()
    rng = random.Random(3)
    for key in rng.sample(range(100000), 5000):
        await one.insert(key)
    root = await one.store.read(one.tree.root, NODE)
    lows = keys(root).tolist()
    assert all(low < high for low, high in pairwise(lows))
    for low, number in zip(lows, children(root), strict=True):
        child = await one.store.read(number, NODE)
        assert low <= int(keys(child)[0])
        assert count(child) >= room(child) // 3

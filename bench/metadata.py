"""`python -m bench.metadata`: what the persistent-data library costs, in CPU time of one process, on a metadata disk in memory.

    python -m bench.metadata --mappings 1000000 --snapshots 1000

A volume is filled in order, another at random; snapshots are made; all is committed, opened again, checked, and taken away.
"""

import argparse
import asyncio
import random
import resource
import struct
import time
from collections.abc import Awaitable, Callable

from nbdmap.block.memory import MemoryDisk
from nbdmap.persist.blocks import BLOCK, BlockStore
from nbdmap.persist.btree import Btree
from nbdmap.persist.check import Check
from nbdmap.persist.data_map import DataMap
from nbdmap.persist.forest import Forest, Trees
from nbdmap.persist.lookup import Values, pack_u64, unpack_int
from nbdmap.persist.metadata_map import MetadataMap
from nbdmap.persist.space_map import ENTRIES
from nbdmap.persist.transaction import Transaction
from nbdmap.units import MIB

_ROOTS = struct.Struct("<Q32s32s")
PART = 1024
"""Mappings that one change inserts, as thin's commits do."""


def mapping_values(data: DataMap) -> Values[int]:
    """Plain numbers of data blocks."""
    return Values(8, pack_u64, unpack_int, inc=data.inc_all, dec=data.dec_all)


class Bench:
    """The metadata, and a clock."""

    def __init__(self, mappings: int) -> None:
        self.mappings = mappings
        self.disk = MemoryDisk("memory", "7:0", (mappings // 20 + 20000) * BLOCK)
        self.store = BlockStore(self.disk)
        self.space = MetadataMap.create(self.store.nr_blocks)
        self.tx = Transaction(self.store, self.space)
        self.data = DataMap.create(self.tx, 4 * mappings + ENTRIES)
        self.forest: Forest[int] = Forest.create(self.tx, mapping_values(self.data))

    async def timed(self, what: str, work: Awaitable[object], times: int = 0) -> None:
        """Prints how long `work` takes, and what each of so many operations does."""
        begun = time.process_time()
        await work
        seconds = time.process_time() - begun
        each = f"{times / seconds:14,.0f} a second {seconds / times * 1e6:8.2f} us each" if times else ""
        print(f"{what:44} {seconds * 1e3:10.1f} ms{each}")

    def superblock(self) -> bytes:
        """Roots only."""
        return _ROOTS.pack(self.forest.root, self.data.root, self.space.root).ljust(BLOCK, b"\0")

    async def commit(self) -> None:
        """Commits."""
        await self.tx.commit(self.superblock)

    async def fill(self, identity: int, keys: list[int]) -> None:
        """Maps keys to new blocks, many in one change."""

        async def step(tree: Btree[int]) -> None:
            await tree.insert_all_part([(key, await self.data.new_block()) for key in part])

        for start in range(0, len(keys), PART):
            part = keys[start : start + PART]
            await self.forest.change(identity, step)

    async def one_by_one(self, identity: int, keys: list[int]) -> None:
        """Maps keys to new blocks, each in a change of its own."""
        for key in keys:
            await self.forest.insert(identity, key, await self.data.new_block())

    async def look_up(self, identity: int, keys: list[int]) -> None:
        """Looks keys up through both levels."""
        for key in keys:
            await self.forest.lookup(identity, key)

    async def opened(self) -> "tuple[BlockStore, Trees[int]]":
        """What a pool does when it is opened."""
        store = BlockStore(self.disk)
        root, data, space = _ROOTS.unpack_from(await store.read_raw(0))
        tx = Transaction(store, await MetadataMap.open(store, space))
        await DataMap.open(tx, data)
        return store, Trees(store, mapping_values(self.data), root)

    async def scan(self, identity: int) -> None:
        """Reads a whole volume's mappings from the disk."""
        _, trees = await self.opened()
        tree = await trees.tree(identity)
        assert tree is not None
        async for _ in tree.arrays():
            pass

    async def check(self) -> None:
        """The walk of the offline checker over all mappings."""
        store, trees = await self.opened()
        found = Check(store)
        for root in [root async for _, root in trees.roots()]:
            await found.tree("mappings", root, 8)
        assert not found.errors, found.errors.words


async def repeat(times: int, work: Callable[[int], Awaitable[object]]) -> None:
    """The same again and again."""
    for number in range(times):
        await work(number)


async def run(mappings: int, snapshots: int) -> None:
    """All of it."""
    one = Bench(mappings)
    rng = random.Random(1)
    await one.timed("1000 volumes made, each with its commit", repeat(1000, lambda n: _make(one, n)), 1000)
    await one.timed("mappings in order, 1024 a change", one.fill(0, list(range(mappings))), mappings)
    await one.timed("commit of them", one.commit())
    keys = [rng.randrange(1 << 32) for _ in range(mappings // 10)]
    await one.timed("mappings at random places, one a change", one.one_by_one(1, keys), len(keys))
    await one.timed("commit of them", one.commit())
    await one.timed("look-ups, nodes in the cache", one.look_up(1, keys), len(keys))
    await one.timed("one mapping and its commit, 100 times", repeat(100, lambda n: _touch(one, n)), 100)
    await one.timed(f"{snapshots} snapshots, each with its commit", repeat(snapshots, lambda n: _snapshot(one, n)), snapshots)
    await one.timed("1000 first writes after a snapshot", one.one_by_one(0, rng.sample(range(mappings), 1000)), 1000)
    await one.timed("commit of them", one.commit())
    print(f"{one.store.resident} blocks in the cache, {one.space.nr_blocks - one.space.nr_free} of the metadata in use")
    await one.timed("opening", one.opened())
    await one.timed(f"reading {mappings} mappings from the disk", one.scan(0), mappings)
    await one.timed("walk of the checker over every mapping", one.check())
    await one.timed("half of a volume's mappings removed", one.forest.remove_range(0, 0, mappings // 2), mappings // 2)
    await one.timed("commit of them", one.commit())
    await one.timed(f"{snapshots} snapshots deleted", repeat(snapshots, lambda n: one.forest.remove(2000 + n)), snapshots)
    await one.timed("commit of them", one.commit())
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"largest resident size {rss // MIB} MiB, of which the disk in memory {one.disk.resident // MIB} MiB")


async def _make(one: Bench, number: int) -> None:
    await one.forest.add(number)
    await one.commit()


async def _touch(one: Bench, number: int) -> None:
    await one.one_by_one(2, [number * 1000])
    await one.commit()


async def _snapshot(one: Bench, number: int) -> None:
    await one.forest.share(2000 + number, 0)
    await one.commit()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.metadata", description="what the persistent-data library costs")
    parser.add_argument("--mappings", type=int, default=200000)
    parser.add_argument("--snapshots", type=int, default=100)
    chosen = parser.parse_args()
    asyncio.run(run(chosen.mappings, chosen.snapshots))


if __name__ == "__main__":
    main()

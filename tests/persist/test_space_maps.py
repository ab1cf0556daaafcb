"""Space maps: the contract of all of them, and what each has of its own."""

import random
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from nbdmap.errors import CorruptMetadata, OutOfSpace
from nbdmap.persist import data_map
from nbdmap.persist.blocks import BLOCK, MAX_BLOCKS, BlockStore
from nbdmap.persist.data_map import DataMap
from nbdmap.persist.metadata_map import MetadataMap
from nbdmap.persist.space_map import ENTRIES, Root, bitmaps_for, get_count, pack_counts, unpack_counts
from nbdmap.persist.transaction import Transaction
from tests.contract.space_map import CONTRACT, Kept
from tests.persist.pool import set_count
from tests.support.disks import FakeDisk


class Both:
    """A transaction with both maps on a disk of 4000 blocks; the superblock has their roots."""

    spare = 0

    def __init__(self) -> None:
        self.device = FakeDisk("7:0", 4000 * 8)
        self.device.bytes[:] = random.Random(3).randbytes(len(self.device.bytes))
        self.store = BlockStore(self.device)
        self.space = MetadataMap.create(3000)
        self.tx = Transaction(self.store, self.space)

    async def commit(self) -> None:
        await self.tx.commit(lambda: self.data.root + self.space.root + bytes(BLOCK - 64))

    async def reopen(self) -> None:
        block = bytes(self.device.bytes[:BLOCK])
        self.store = BlockStore(self.device)
        self.space = await MetadataMap.open(self.store, block[32:64])
        self.tx = Transaction(self.store, self.space)
        self.data = await DataMap.open(self.tx, block[:32])

    data: DataMap


class KeptData(Both):
    """The data's map; 40000 blocks, so that it has three bitmaps."""

    def __init__(self) -> None:
        super().__init__()
        self.data = DataMap.create(self.tx, 40000)

    @property
    def nr_blocks(self) -> int:
        return self.data.nr_blocks

    @property
    def nr_free(self) -> int:
        return self.data.nr_free

    async def new_block(self) -> int:
        return await self.data.new_block()

    async def count(self, block: int) -> int:
        return await self.data.count(block)

    async def inc(self, block: int) -> None:
        self.data.inc(block)

    async def dec(self, block: int) -> None:
        self.data.dec(block)

    async def extend(self, nr_blocks: int) -> None:
        self.data.extend(nr_blocks)


class KeptMetadata(Both):
    """The metadata's own."""

    spare = 24

    def __init__(self) -> None:
        super().__init__()
        self.data = DataMap.create(self.tx, 0)

    @property
    def nr_blocks(self) -> int:
        return self.space.nr_blocks

    @property
    def nr_free(self) -> int:
        return self.space.nr_free

    async def new_block(self) -> int:
        return self.space.new_block()

    async def count(self, block: int) -> int:
        return self.space.count(block)

    async def inc(self, block: int) -> None:
        self.space.inc(block)

    async def dec(self, block: int) -> None:
        self.space.dec(block)

    async def extend(self, nr_blocks: int) -> None:
        self.space.extend(nr_blocks)


@pytest.mark.parametrize("kind", [KeptData, KeptMetadata])
@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
async def test_contract(check: Callable[[Kept], Awaitable[None]], kind: Callable[[], KeptData | KeptMetadata]) -> None:
    kept = kind()
    await kept.commit()
    await check(kept)


async def test_the_data_map_keeps_the_contract_when_it_writes_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_map, "REMEMBERED", 5)
    for check in CONTRACT:
        kept = KeptData()
        await kept.commit()

        async def often(block: int, kept: KeptData = kept) -> None:
            kept.data.inc(block)
            await kept.tx.make_room()

        async def seldom(block: int, kept: KeptData = kept) -> None:
            kept.data.dec(block)
            await kept.tx.make_room()

        kept.inc, kept.dec = often, seldom  # type: ignore[method-assign]
        await check(kept)


def test_the_bits_of_a_count_are_swapped() -> None:
    data = memoryview(bytearray(BLOCK))
    for entry, count in enumerate((1, 1, 1, 1, 0, 1, 2, 3)):
        set_count(data, entry, count)
    assert data[16] == 0xAA  # four counts of one, as the kernel writes them
    assert data[17] == 0b11_01_10_00
    assert [get_count(data, entry) for entry in range(9)] == [1, 1, 1, 1, 0, 1, 2, 3, 0]


def test_whole_bitmaps_are_packed_as_single_counts_are() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 6, ENTRIES - 100, np.uint32)
    data, other = memoryview(bytearray(BLOCK)), memoryview(bytearray(BLOCK))
    free, first = pack_counts(data, counts)
    for entry, count in enumerate(counts.tolist()):
        set_count(other, entry, count)
    assert data == other
    assert unpack_counts(data)[: len(counts)].tolist() == np.minimum(counts, 3).tolist()
    assert free == int((counts == 0).sum()) + 100
    assert first == counts.tolist().index(0)
    assert pack_counts(data, np.ones(ENTRIES, np.uint32)) == (0, ENTRIES)


async def test_all_bitmaps_of_the_largest_metadata_fit() -> None:
    assert bitmaps_for(MAX_BLOCKS) == 255
    with pytest.raises(OutOfSpace):
        MetadataMap(MAX_BLOCKS + 1)
    with pytest.raises(OutOfSpace):
        MetadataMap.create(100).extend(MAX_BLOCKS + 1)


async def test_extending_over_many_bitmaps() -> None:
    kept = KeptMetadata()
    kept.space.extend(60000)  # the disk has 4000 blocks: the map does not know
    kept.data.extend(400000)
    await kept.commit()
    await kept.reopen()
    assert (kept.space.nr_blocks, kept.data.nr_blocks) == (60000, 400000)
    assert kept.data.nr_free == 400000
    assert kept.space.nr_free == 60000 - (1 + 1 + 4 + 1 + 1 + 25 + 1)  # superblock, index, bitmaps, tree; index, bitmaps, tree


async def test_a_map_is_extended_whose_last_bitmap_was_counted_to_the_end_of_the_device() -> None:
    """As thin_restore does; the kernel counts the whole bitmap."""
    kept = KeptData()
    for _ in range(40000):
        await kept.new_block()
    await kept.commit()
    kept.data._entries[-1]["free"] = 0
    kept.data.extend(41000)
    await kept.commit()
    assert [await kept.new_block() for _ in range(1000)] == list(range(40000, 41000))
    assert int(kept.data._entries[-1]["free"]) == 3 * ENTRIES - 40000


async def test_a_commit_without_changes_moves_nothing() -> None:
    kept = KeptData()
    await kept.commit()
    kept.device.log.clear()
    await kept.commit()
    assert [(name, offset) for name, offset, _, _ in kept.device.log] == [("flush", 0), ("write", 0)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nr_blocks": MAX_BLOCKS + 1}, "the most there can be"),
        ({"index_block": 0}, "the device has blocks 1 to 3999"),
        ({"nr_blocks": 60000}, "space-map bitmap in block 0"),
    ],
)
async def test_a_metadata_map_that_cannot_be(change: dict[str, int], words: str) -> None:
    kept = KeptMetadata()
    await kept.commit()
    root = Root(**{**vars(Root.unpack(kept.space.root)), **change})
    with pytest.raises(CorruptMetadata, match=words):
        await MetadataMap.open(BlockStore(kept.device), root.pack())


async def test_a_data_map_that_cannot_be() -> None:
    kept = KeptData()
    await kept.commit()
    good = vars(Root.unpack(kept.data.root))
    for change, words in (({"nr_blocks": 1 << 50}, "index has 3 entries"), ({"nr_allocated": 40001}, "40001 blocks in use")):
        with pytest.raises(CorruptMetadata, match=words):
            await DataMap.open(kept.tx, Root(**{**good, **change}).pack())


async def test_a_count_above_two_that_is_not_in_its_tree() -> None:
    kept = KeptData()
    block = await kept.new_block()
    for _ in range(4):
        await kept.inc(block)
    await kept.commit()
    await kept.reopen()
    assert await kept.count(block) == 5
    await kept.data._ref_counts.remove(block)
    with pytest.raises(CorruptMetadata, match=f"data block {block} is not in its tree"):
        await kept.count(block)


async def test_bitmaps_of_the_data_are_read_when_they_are_needed() -> None:
    kept = KeptData()
    await kept.commit()
    await kept.reopen()
    before = kept.store.resident
    assert await kept.count(39999) == 0
    assert kept.store.resident == before + 1
    assert await kept.new_block() == 0
    assert kept.store.resident == before + 2

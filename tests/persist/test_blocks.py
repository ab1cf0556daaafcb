"""Blocks: sealed and checked, cached within a bound, written together."""

import asyncio
import errno

import pytest

from nbdmap.block.io import FUA
from nbdmap.errors import CorruptMetadata, IoFailed
from nbdmap.persist.blocks import BLOCK, MAX_BLOCKS, MAX_RUN, Block, BlockStore, BlockType, checksum, seal, verify
from tests.support.disks import FakeDisk, eio

KIND = BlockType("thing", 1234)
PICKY = BlockType("picky thing", 99, lambda data: "" if data[16] == 7 else f"byte 16 is {data[16]}")


def disk(blocks: int = 256) -> FakeDisk:
    return FakeDisk("7:0", blocks * BLOCK // 512)


def fill(device: FakeDisk, *numbers: int, kind: BlockType = KIND, first: int = 7) -> None:
    for number in numbers:
        data = bytearray(BLOCK)
        data[16] = first
        data[17] = number & 255
        seal(data, number, kind.salt)
        device.bytes[number * BLOCK : (number + 1) * BLOCK] = data


def reads(device: FakeDisk) -> list[tuple[int, int]]:
    return [(offset // BLOCK, length // BLOCK) for name, offset, length, _ in device.log if name == "read"]


def test_the_checksum_is_crc32c_without_the_last_inversion() -> None:
    data = bytearray(BLOCK)  # as the kernel writes it: see tests/vm for blocks of its own
    data[4:13] = b"123456789"
    assert checksum(data, 0) != checksum(data, 1)
    assert checksum(data, 5) == checksum(data, 0) ^ 5
    data[0] = 255
    assert checksum(data, 5) == checksum(data, 0) ^ 5  # the checksum's own bytes do not count


def test_a_wrong_number_and_a_wrong_checksum_have_errnos_of_their_own() -> None:
    data = bytearray(BLOCK)
    seal(data, 9, 77)
    verify(data, 9, 77, "thing")
    with pytest.raises(CorruptMetadata, match="block 8: thing says that it is block 9") as told:
        verify(data, 8, 77, "thing")
    assert told.value.errno == errno.ENOTBLK
    with pytest.raises(CorruptMetadata, match="block 9: thing: checksum") as told:
        verify(data, 9, 78, "thing")
    assert told.value.errno == errno.EILSEQ


async def test_a_block_is_read_once() -> None:
    device = disk()
    fill(device, 5)
    store = BlockStore(device)
    assert store.get(5) is None
    block = await store.read(5, KIND)
    assert await store.read(5, KIND) is block
    assert store.get(5) is block
    assert reads(device) == [(5, 1)]


async def test_what_is_wrong_is_named_and_not_kept() -> None:
    device = disk()
    fill(device, 5, kind=PICKY, first=8)
    store = BlockStore(device)
    with pytest.raises(CorruptMetadata, match="block 5: picky thing: byte 16 is 8"):
        await store.read(5, PICKY)
    fill(device, 5, kind=PICKY)
    assert (await store.read(5, PICKY)).data[16] == 7
    with pytest.raises(CorruptMetadata, match="used as a picky thing and as a thing"):
        await store.read(5, KIND)
    for number in (0, 256, 1 << 50):
        with pytest.raises(CorruptMetadata, match="the device has blocks 1 to 255"):
            await store.read(number, KIND)


async def test_a_failed_read_can_be_asked_again() -> None:
    device = disk()
    fill(device, 5)
    store = BlockStore(device)
    device.failure = eio
    with pytest.raises(IoFailed):
        await store.read(5, KIND)
    device.failure = lambda io, offset: None
    assert (await store.read(5, KIND)).number == 5


async def test_the_cache_keeps_what_is_used_and_never_grows_beyond_its_limit() -> None:
    device = disk()
    fill(device, *range(1, 200))
    store = BlockStore(device, cache=16)
    for number in range(1, 200):
        await store.read(number, KIND)
        await store.read(1, KIND)
        assert store.resident <= 16
    assert store.get(1) is not None
    assert reads(device).count((1, 1)) == 1


async def test_dirty_blocks_stay_until_they_are_written() -> None:
    device = disk()
    fill(device, *range(100, 200))
    store = BlockStore(device, cache=16)
    made = [store.new(number, KIND) for number in (3, 4, 5, 9)]
    made[3].data[16:19] = b"abc"
    for number in range(100, 200):
        await store.read(number, KIND)
    assert all(store.get(block.number) is block for block in made)
    await store.write()
    assert [entry[:3] for entry in device.log if entry[0] == "write"] == [
        ("write", 3 * BLOCK, 3 * BLOCK),
        ("write", 9 * BLOCK, BLOCK),
    ]
    assert store.dirty == 0
    verify(device.bytes[9 * BLOCK : 10 * BLOCK], 9, KIND.salt, "thing")
    assert device.bytes[9 * BLOCK + 16 : 9 * BLOCK + 19] == b"abc"
    store.touch(made[3])
    assert store.dirty == 1


async def test_room_is_made_when_half_of_the_cache_is_dirty() -> None:
    device = disk()
    store = BlockStore(device, cache=16)
    for number in range(1, 9):
        store.new(number, KIND)
    await store.make_room()
    assert store.dirty == 8
    store.new(9, KIND)
    await store.make_room()
    assert store.dirty == 0


async def test_a_forgotten_block_is_not_written() -> None:
    device = disk()
    store = BlockStore(device)
    store.new(3, KIND)
    store.forget(3)
    await store.write()
    assert device.log == []


async def test_a_copy_is_a_block_of_its_own() -> None:
    device = disk()
    fill(device, 5)
    store = BlockStore(device)
    old = await store.read(5, KIND)
    new = store.copy(old, 6)
    new.data[17] = 99
    assert (old.data[17], new.number, new.type) == (5, 6, KIND)
    assert store.get(6) is new


async def test_blocks_are_read_ahead_in_runs() -> None:
    device = disk()
    fill(device, *range(1, 200))
    device.bytes[11 * BLOCK] ^= 1
    store = BlockStore(device, cache=400)
    await store.read(12, KIND)
    device.log.clear()
    await store.read_ahead([13, 10, 11, 12, 40, 13, *range(100, 170), 0, 999], KIND)
    assert reads(device) == [(10, 2), (13, 1), (40, 1), (100, MAX_RUN), (164, 6)]
    device.log.clear()
    assert (await store.read(100, KIND)).data[17] == 100
    assert device.log == []
    with pytest.raises(CorruptMetadata):
        await store.read(11, KIND)


async def test_a_block_made_while_it_is_read_is_the_new_one() -> None:
    device = disk()
    fill(device, 5, 6)
    device.gate = asyncio.Event()
    store = BlockStore(device)
    reader = asyncio.ensure_future(store.read(5, KIND))
    ahead = asyncio.ensure_future(store.read_ahead([5, 6], KIND))
    await asyncio.sleep(0)
    made: Block = store.new(5, KIND)
    device.gate.set()
    assert await reader is made
    await ahead
    assert store.get(5) is made
    assert store.get(6) is not None


async def test_the_superblock_is_written_past_the_cache_with_fua() -> None:
    device = disk()
    store = BlockStore(device)
    await store.write_raw(0, bytes([7]) * BLOCK)
    assert device.log == [("write", 0, BLOCK, FUA)]
    assert await store.read_raw(0) == bytes([7]) * BLOCK


def test_a_large_device_is_used_up_to_a_limit() -> None:
    device = disk(1)
    device.size = 1 << 40
    assert BlockStore(device).nr_blocks == MAX_BLOCKS
    device.size = 3 * BLOCK + 512
    assert BlockStore(device).nr_blocks == 3

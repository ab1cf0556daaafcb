import errno
from collections.abc import Awaitable, Callable

import pytest

from nbdmap.block.device import HOLE, ZERO, Device
from nbdmap.block.io import CACHE, DISCARD, FLUSH, NO_HOLE, READ, WRITE_ZEROES, Io, Op
from nbdmap.block.memory import CHUNK, MAX_EXTENTS, MemoryDisk
from nbdmap.errors import IoFailed
from nbdmap.units import MAX_SIZE, SECTOR
from tests.contract import disk as contract
from tests.contract.disk import act, all_extents, read, refusal, write

ABSENT = HOLE | ZERO


def memory(size: int = 4 * CHUNK + 3 * SECTOR, limit: int | None = None) -> MemoryDisk:
    return MemoryDisk("ram0", "1:0", size, limit=limit)


@pytest.mark.parametrize("check", contract.CONTRACT)
@pytest.mark.parametrize("size", [4 * CHUNK, 5 * CHUNK + 3 * SECTOR])
async def test_contract(check: Callable[[Device], Awaitable[None]], size: int) -> None:
    disk = memory(size)
    await check(disk)
    await disk.close()
    assert disk.resident == 0


@pytest.mark.parametrize("seed", range(2, 8))
async def test_random_operations_keep_the_account(seed: int) -> None:
    disk = memory()
    await contract.random_operations(disk, seed, 150)
    assert disk.resident == sum(size for size, flags in await all_extents(disk, 0, disk.size) if not flags)


def test_what_it_is() -> None:
    disk = MemoryDisk("ram0", "1:0", 1024, read_only=True)
    assert (disk.name, disk.number, disk.size, disk.limit, disk.read_only) == ("ram0", "1:0", 1024, 1024, True)
    assert disk.limits.discard
    assert disk.limits.zero
    assert disk.limits.fast_zero
    assert disk.limits.cache
    assert disk.limits.sparse


@pytest.mark.parametrize("op", [READ, FLUSH, CACHE, DISCARD, WRITE_ZEROES])
def test_every_request_ends_at_once(op: Op) -> None:
    length = 2 * CHUNK
    with pytest.raises(StopIteration):
        memory().submit(Io(op, length, memoryview(bytearray(length))), SECTOR).send(None)


async def test_a_write_within_one_chunk_beyond_the_limit_changes_nothing() -> None:
    disk = memory(limit=CHUNK)
    await write(disk, 0, b"a" * SECTOR)
    error = await refusal(write(disk, CHUNK, b"b" * SECTOR))
    assert isinstance(error, IoFailed)
    assert error.errno == errno.ENOSPC
    assert error.message == (
        "write to ram0 at byte 65536: 65536 more bytes of memory exceed the limit of 65536 bytes,"
        " of which 65536 are in use"
    )
    await write(disk, SECTOR, b"c" * SECTOR)  # what is resident can still be written
    assert await read(disk, 0, disk.size) == b"a" * SECTOR + b"c" * SECTOR + bytes(disk.size - 2 * SECTOR)


async def test_a_write_across_chunks_beyond_the_limit_changes_nothing() -> None:
    disk = memory(limit=2 * CHUNK)
    await write(disk, CHUNK, b"a" * SECTOR)
    assert (await refusal(write(disk, 0, b"b" * (2 * CHUNK + SECTOR)))).errno == errno.ENOSPC
    assert (await refusal(act(disk, WRITE_ZEROES, 0, 2 * CHUNK + SECTOR, NO_HOLE))).errno == errno.ENOSPC
    assert disk.resident == CHUNK
    assert await read(disk, CHUNK, 2 * SECTOR) == b"a" * SECTOR + bytes(SECTOR)
    await write(disk, 0, b"b" * 2 * CHUNK)
    assert disk.resident == disk.limit


async def test_discarding_makes_room() -> None:
    disk = memory(limit=CHUNK)
    await write(disk, 0, b"a" * SECTOR)
    await act(disk, DISCARD, 0, CHUNK)
    await write(disk, 3 * CHUNK, b"b" * SECTOR)
    assert disk.resident == CHUNK


async def test_the_short_last_chunk_counts_its_own_length_and_is_freed_as_a_whole() -> None:
    disk = memory(limit=3 * SECTOR)
    await write(disk, 4 * CHUNK, b"a" * 3 * SECTOR)
    assert disk.resident == 3 * SECTOR
    await act(disk, DISCARD, 4 * CHUNK + SECTOR, 2 * SECTOR)  # not all of it: zeroed, kept
    assert disk.resident == 3 * SECTOR
    assert await read(disk, 4 * CHUNK, 3 * SECTOR) == b"a" * SECTOR + bytes(2 * SECTOR)
    await act(disk, DISCARD, 3 * CHUNK + SECTOR, CHUNK + 2 * SECTOR)
    assert disk.resident == 0


@pytest.mark.parametrize("op", [DISCARD, WRITE_ZEROES])
async def test_whole_chunks_are_freed_and_partial_ones_zeroed(op: Op) -> None:
    disk = memory()
    await write(disk, 0, b"a" * 4 * CHUNK)
    await act(disk, op, SECTOR, 3 * CHUNK)
    assert disk.resident == 2 * CHUNK
    assert await read(disk, 0, 4 * CHUNK) == b"a" * SECTOR + bytes(3 * CHUNK) + b"a" * (CHUNK - SECTOR)


async def test_no_hole_provisions_and_zeroes() -> None:
    disk = memory()
    await write(disk, 0, b"a" * CHUNK)
    await act(disk, WRITE_ZEROES, SECTOR, 2 * CHUNK, NO_HOLE)
    assert disk.resident == 3 * CHUNK
    assert await read(disk, 0, 3 * CHUNK) == b"a" * SECTOR + bytes(3 * CHUNK - SECTOR)


async def test_a_disk_of_8_eib_costs_what_is_resident() -> None:
    disk = memory(MAX_SIZE, limit=4 * CHUNK)
    await write(disk, MAX_SIZE - SECTOR, b"z" * SECTOR)
    await write(disk, 1 << 60, b"m" * SECTOR)
    assert await disk.extents(0, MAX_SIZE) == [
        (1 << 60, ABSENT),
        (CHUNK, 0),
        (MAX_SIZE - (CHUNK - SECTOR) - (1 << 60) - CHUNK, ABSENT),
        (CHUNK - SECTOR, 0),
    ]
    error = await refusal(act(disk, WRITE_ZEROES, 0, MAX_SIZE, NO_HOLE))
    assert error.errno == errno.ENOSPC
    await act(disk, DISCARD, 0, MAX_SIZE)
    assert disk.resident == 0
    assert await disk.extents(SECTOR, MAX_SIZE - SECTOR) == [(MAX_SIZE - SECTOR, ABSENT)]


async def test_extents_are_cut_to_the_range_and_merged() -> None:
    disk = memory()
    await write(disk, CHUNK, b"a" * 2 * CHUNK)
    assert await disk.extents(0, disk.size) == [(CHUNK, ABSENT), (2 * CHUNK, 0), (CHUNK + 3 * SECTOR, ABSENT)]
    assert await disk.extents(CHUNK + SECTOR, CHUNK) == [(CHUNK, 0)]
    assert await disk.extents(SECTOR, SECTOR) == [(SECTOR, ABSENT)]
    assert await disk.extents(CHUNK + SECTOR, SECTOR) == [(SECTOR, 0)]
    assert await disk.extents(CHUNK - SECTOR, 2 * SECTOR) == [(SECTOR, ABSENT), (SECTOR, 0)]
    assert await disk.extents(3 * CHUNK - SECTOR, 2 * SECTOR) == [(SECTOR, 0), (SECTOR, ABSENT)]


@pytest.mark.parametrize("first", [0, 1])
async def test_one_answer_has_a_bounded_number_of_extents(first: int) -> None:
    disk = memory(2 * MAX_EXTENTS * CHUNK)
    for index in range(first, MAX_EXTENTS + 2, 2):
        await write(disk, index * CHUNK, b"a" * SECTOR)
    disk_extents = await disk.extents(0, disk.size)
    assert MAX_EXTENTS - 2 <= len(disk_extents) <= MAX_EXTENTS
    every = await all_extents(disk, 0, disk.size)
    assert sum(size for size, _ in every) == disk.size
    assert sum(size for size, flags in every if not flags) == disk.resident

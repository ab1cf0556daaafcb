"""What every writable disk must do, whatever it is made of: CONTRACT is a list of checks to run on a fresh disk.

A check is `async def check(disk)`; the disk reads as zeroes, has at least 256 KiB and supports what its limits claim.
"""

import random
from collections.abc import Awaitable, Callable, Coroutine
from itertools import pairwise
from typing import Any, Final

from nbdmap.block.device import HOLE, ZERO, Device, Extent
from nbdmap.block.io import (
    CACHE,
    DISCARD,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    WRITE,
    WRITE_ZEROES,
    Io,
    Op,
    run_all,
)
from nbdmap.errors import NbdmapError, Unsupported

GUARD: Final = b"\xa5" * 64


async def read(disk: Device, offset: int, length: int) -> bytes:
    """Reads into the middle of a larger buffer and checks that nothing around it was touched."""
    buffer = bytearray(GUARD + b"\xee" * length + GUARD)
    await disk.submit(Io(READ, length, memoryview(buffer)[len(GUARD) : len(GUARD) + length]), offset)
    assert buffer[: len(GUARD)] == GUARD
    assert buffer[len(GUARD) + length :] == GUARD
    return bytes(buffer[len(GUARD) : len(GUARD) + length])


async def write(disk: Device, offset: int, data: bytes, flags: int = 0) -> None:
    await disk.submit(Io(WRITE, len(data), memoryview(data), flags), offset)


async def act(disk: Device, op: Op, offset: int = 0, length: int = 0, flags: int = 0) -> None:
    """An operation without a payload."""
    await disk.submit(Io(op, length, flags=flags), offset)


async def all_extents(disk: Device, offset: int, length: int) -> list[Extent]:
    """The extents of the whole range, asked for until it is covered, each answer checked for its form."""
    found: list[Extent] = []
    end = offset + length
    while offset < end:
        answer = await disk.extents(offset, end - offset)
        assert answer, "at least one extent"
        assert all(size > 0 and flags & ~(HOLE | ZERO) == 0 for size, flags in answer)
        assert all(left[1] != right[1] for left, right in pairwise(answer)), "neighbours are merged"
        assert sum(size for size, _ in answer) <= end - offset
        found += answer
        offset += sum(size for size, _ in answer)
    return found


async def reads_as_zeroes(disk: Device) -> None:
    assert await read(disk, 0, disk.size) == bytes(disk.size)


async def random_operations(disk: Device, seed: int = 1, count: int = 300) -> None:
    """Every operation at random places, against a bytearray; the extents may claim zeroes only where there are some."""
    rng = random.Random(seed)
    block = disk.limits.logical_block
    model = bytearray(disk.size)
    ops = [READ, WRITE, WRITE, FLUSH]
    ops += [DISCARD] * disk.limits.discard + [WRITE_ZEROES] * disk.limits.zero + [CACHE] * disk.limits.cache
    for step in range(count):
        op = rng.choice(ops)
        longest = rng.choice([1, 8, 64, 300])
        length = block * rng.randint(1, min(longest, disk.size // block))
        offset = block * rng.randint(0, (disk.size - length) // block)
        if op == READ:
            assert await read(disk, offset, length) == model[offset : offset + length], step
        elif op == WRITE:
            data = rng.randbytes(length)
            await write(disk, offset, data, rng.choice([0, 0, FUA]))
            model[offset : offset + length] = data
        elif op == FLUSH:
            await act(disk, FLUSH)
        else:
            await act(disk, op, offset, length, rng.choice([0, 0, FUA]) | rng.choice([0, NO_HOLE]))
            if op == WRITE_ZEROES:
                model[offset : offset + length] = bytes(length)
            elif op == DISCARD:  # what is read afterwards is the disk's choice
                model[offset : offset + length] = await read(disk, offset, length)
        if step % 10 == 0:
            await _extents_agree(disk, model, offset, length)
    assert await read(disk, 0, disk.size) == model
    await _extents_agree(disk, model, 0, disk.size)


async def _extents_agree(disk: Device, model: bytearray, offset: int, length: int) -> None:
    for size, flags in await all_extents(disk, offset, length):
        if flags & ZERO:
            assert not any(model[offset : offset + size])
        offset += size


async def first_and_last_block(disk: Device) -> None:
    block = disk.limits.logical_block
    last = disk.size // block * block - block
    await write(disk, 0, b"a" * block)
    await write(disk, last, b"z" * block)
    assert await read(disk, 0, block) == b"a" * block
    assert await read(disk, last, block) == b"z" * block
    assert await read(disk, block, last - block) == bytes(last - block)


async def whole_disk(disk: Device) -> None:
    """One request of each kind that covers everything."""
    data = random.Random(2).randbytes(disk.size)
    await write(disk, 0, data)
    assert await read(disk, 0, disk.size) == data
    if disk.limits.zero:
        await act(disk, WRITE_ZEROES, 0, disk.size)
        assert await read(disk, 0, disk.size) == bytes(disk.size)
    await write(disk, 0, data)
    if disk.limits.discard:
        await act(disk, DISCARD, 0, disk.size)
    if disk.limits.cache:
        await act(disk, CACHE, 0, disk.size)


async def fast_zero_or_nothing(disk: Device) -> None:
    """FAST_ZERO zeroes, or is refused and changes nothing; it is never refused when the limits promise it."""
    await write(disk, 0, b"x" * 131072)
    try:
        await act(disk, WRITE_ZEROES, 4096, 65536, FAST_ZERO)
    except Unsupported:
        assert not disk.limits.fast_zero
        assert await read(disk, 0, 131072) == b"x" * 131072
    else:
        assert await read(disk, 0, 131072) == b"x" * 4096 + bytes(65536) + b"x" * (131072 - 69632)


async def no_hole_zeroes(disk: Device) -> None:
    if disk.limits.zero:
        await write(disk, 0, b"x" * 131072)
        await act(disk, WRITE_ZEROES, 4096, 65536, NO_HOLE)
        assert await read(disk, 0, 131072) == b"x" * 4096 + bytes(65536) + b"x" * (131072 - 69632)


async def side_by_side(disk: Device) -> None:
    """Many requests under way at once do not mix up their buffers."""
    block = max(4096, disk.limits.logical_block)
    parts = [bytes([index]) * block for index in range(48)]
    await run_all(
        disk.submit(Io(WRITE, block, memoryview(part), FUA * (index % 2)), index * block)
        for index, part in enumerate(parts)
    )
    await run_all([disk.submit(Io(FLUSH, 0), 0) for _ in range(3)])
    buffers = [bytearray(block) for _ in parts]
    await run_all(
        disk.submit(Io(READ, block, memoryview(buffer)), index * block) for index, buffer in enumerate(buffers)
    )
    assert buffers == parts


CONTRACT: Final[list[Callable[[Device], Awaitable[None]]]] = [
    reads_as_zeroes,
    random_operations,
    first_and_last_block,
    whole_disk,
    fast_zero_or_nothing,
    no_hole_zeroes,
    side_by_side,
]


def at_once(request: Coroutine[Any, Any, object]) -> bool:
    """Whether the request ends without waiting; if it would wait it is dropped."""
    try:
        request.send(None)
    except StopIteration:
        return True
    request.close()
    return False


async def refusal(request: Awaitable[object]) -> NbdmapError:
    """The error the request fails with."""
    try:
        await request
    except NbdmapError as error:
        return error
    raise AssertionError("the request succeeded")

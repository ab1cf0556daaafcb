"""nbdmap.targets.ebs: against a model, and that no write undoes another."""

import asyncio
import random

import pytest

from nbdmap.block.device import HOLE, ZERO, Limits
from nbdmap.block.io import CACHE, DISCARD, FLUSH, FUA, READ, WRITE, Io
from nbdmap.dm.table import Table
from nbdmap.errors import InvalidArgument, IoFailed
from tests.crash.clock import run
from tests.support.disks import FakeDisk, build, eio, read, write

BLOCK = 4096
LIMITS = Limits(logical_block=BLOCK, discard=True, zero=True, cache=True, sparse=True)


class Strict(FakeDisk):
    """A disk that insists on its blocks."""

    async def submit(self, io: Io, offset: int) -> None:
        assert not (offset | io.length) % BLOCK, f"{io} at {offset}"
        await super().submit(io, offset)


async def emulated(length: int = 512, begin: int = 0) -> tuple[Table, Strict]:
    disk = Strict("7:0", limits=LIMITS)
    disk.bytes[:] = random.Random(1).randbytes(disk.size)
    lead = f"0 {begin} error\n" if begin else ""
    return await build(f"{lead}{begin} {length} ebs 7:0 16 1", disk), disk


async def test_against_a_model() -> None:
    table, disk = await emulated(begin=5)
    rng = random.Random(2)
    model = disk.bytes[:]
    for _ in range(300):
        first, last = sorted(rng.sample(range(513), 2)) if rng.random() < 0.7 else (64, rng.choice((65, 71, 72, 73, 80)))
        start, end = (16 + first) * 512, (16 + last) * 512
        if rng.random() < 0.6:
            model[start:end] = rng.randbytes(end - start)
            await write(table, (5 + first) * 512, bytes(model[start:end]))
        elif rng.random() < 0.1:
            low, high = -(-start // BLOCK) * BLOCK, end // BLOCK * BLOCK
            if low < high:
                model[low:high] = bytes(high - low)
            await table.submit(Io(DISCARD, end - start), (5 + first) * 512)
        assert await read(table, (5 + first) * 512, end - start) == model[start:end]
        assert disk.bytes == model


@pytest.mark.parametrize(
    ("first", "sectors", "reads"),
    [
        (0, 8, []),
        (8, 16, []),
        (0, 1, [(0, BLOCK)]),
        (3, 2, [(0, BLOCK)]),
        (7, 1, [(0, BLOCK)]),
        (7, 2, [(0, BLOCK), (BLOCK, BLOCK)]),
        (4, 12, [(0, BLOCK)]),
        (0, 12, [(BLOCK, BLOCK)]),
        (4, 24, [(0, BLOCK), (3 * BLOCK, BLOCK)]),
    ],
)
async def test_only_torn_blocks_are_read(first: int, sectors: int, reads: list[tuple[int, int]]) -> None:
    table, disk = await emulated()
    await write(table, first * 512, b"x" * sectors * 512, FUA)
    assert [entry[1:3] for entry in disk.log[:-1]] == [(16 * 512 + at, length) for at, length in reads]
    start = first * 512 // BLOCK * BLOCK
    end = -(-(first + sectors) * 512 // BLOCK) * BLOCK
    assert disk.log[-1] == ("write", 16 * 512 + start, end - start, FUA)


async def test_what_is_only_hinted() -> None:
    table, disk = await emulated()
    for op in (DISCARD, CACHE):
        await table.submit(Io(op, 7 * 512), 512)
        assert disk.log == []
        await table.submit(Io(op, 16 * 512, flags=FUA if op is DISCARD else 0), 512)
        assert disk.log == [(op.name.lower(), 16 * 512 + BLOCK, BLOCK, FUA if op is DISCARD else 0)]
        disk.log.clear()
    await table.submit(Io(FLUSH, 0), 0)
    assert disk.log == [("flush", 0, 0, 0)]


async def test_the_last_block_ends_with_the_device() -> None:
    disk = FakeDisk("7:0", 12)
    table = await build("0 12 ebs 7:0 0 1 8", disk)
    await write(table, 9 * 512, b"x" * 3 * 512)
    assert disk.log == [("read", 4096, 2048, 0), ("write", 4096, 2048, 0)]
    assert await read(table, 10 * 512, 1024) == b"x" * 1024
    assert disk.bytes == bytes(9 * 512) + b"x" * 3 * 512


def test_no_write_undoes_another() -> None:
    """Writes of single sectors and of whole blocks, all at once, on a disk that takes its time in random order."""

    class Slow(Strict):
        async def submit(self, io: Io, offset: int) -> None:
            await asyncio.sleep(rng.random())
            if io.op is WRITE:
                await asyncio.sleep(rng.random())
            await super().submit(io, offset)

    rng = random.Random(3)

    async def main() -> None:
        for _ in range(20):
            disk = Slow("7:0", limits=LIMITS)
            table = await build("0 512 ebs 7:0 0 1", disk)
            sectors = list(range(64))
            rng.shuffle(sectors)
            whole = {0, 3, 6}
            writes = [write(table, at * 512, bytes([at + 1]) * 512) for at in sectors if at // 8 not in whole]
            writes += [write(table, block * BLOCK, bytes([block + 100]) * BLOCK) for block in whole]
            rng.shuffle(writes)
            await asyncio.gather(*writes)
            for at in range(64):
                wanted = at // 8 + 100 if at // 8 in whole else at + 1
                assert disk.bytes[at * 512 : at * 512 + 512] == bytes([wanted]) * 512

    run(main())


@pytest.mark.parametrize("first_is_whole", [True, False])
def test_a_whole_block_and_a_part_of_it_wait_for_one_another(first_is_whole: bool) -> None:
    async def main() -> None:
        table, disk = await emulated()
        disk.gate = asyncio.Event()
        sizes = (BLOCK, 512) if first_is_whole else (512, BLOCK)
        tasks = [asyncio.create_task(write(table, 0, bytes([number + 1]) * size)) for number, size in enumerate(sizes)]
        other = asyncio.create_task(write(table, 16 * 512, b"o" * 512))
        await asyncio.sleep(1)
        assert len(disk.log) == 2, "the second write was not held back, or a third one was"
        disk.gate.set()
        await asyncio.gather(*tasks, other)
        last = bytes([2]) * sizes[1]
        assert disk.bytes[16 * 512 :][:BLOCK] == last + bytes([1]) * (BLOCK - len(last))

    run(main())


async def test_a_failure_lets_others_go_on() -> None:
    table, disk = await emulated()
    disk.failure = eio
    with pytest.raises(IoFailed):
        await write(table, 0, b"x" * 512)
    with pytest.raises(IoFailed):
        await write(table, 0, b"x" * BLOCK)
    disk.failure = lambda io, offset: None
    await write(table, 512, b"y" * 512)
    assert await read(table, 512, 512) == b"y" * 512


async def test_extents() -> None:
    table, disk = await emulated()
    disk.runs = [(16 * 512 + BLOCK, HOLE | ZERO), (900 * 512, 0)]
    assert await table.extents(0, 2 * BLOCK) == [(BLOCK, HOLE | ZERO), (BLOCK, 0)]
    assert await table.extents(7 * 512, 1024) == [(512, HOLE | ZERO), (512, 0)]
    assert await table.extents(9 * 512, 512) == [(512, 0)]


async def test_limits_and_table() -> None:
    table, _ = await emulated()
    assert table.limits == Limits(discard=True, cache=True, sparse=True, io_min=BLOCK)
    assert (table.table_lines()[0].params, table.status_lines()[0].params) == ("7:0 16 1", "")
    given = await build("0 8 ebs disk7:0 16 2 16", FakeDisk("7:0"))
    assert (given.table_lines()[0].params, given.limits.logical_block) == ("7:0 16 2 16", 1024)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("7:0 0", "emulated block is missing"),
        ("7:0 0 1 8 8", "unexpected word '8'"),
        ("7:0 0 3", "emulated block: 3 is not a power of 2"),
        ("7:0 0 16", "emulated block: 16 is not in the range 1 to 8"),
        ("7:0 0 1 0", "underlying block: 0 is not in the range 1 to 32768"),
        ("7:0 0 1 12", "underlying block: 12 is not a power of 2"),
        ("7:0 0 1 4", "underlying block: 4 sectors are less than the logical block of disk7:0, 8"),
        ("7:0 4 1", "start sector: 4 is not a multiple of the underlying block, 8 sectors"),
    ],
)
async def test_bad_words(words: str, complaint: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await build(f"0 64 ebs {words}", FakeDisk("7:0", limits=LIMITS))
    assert caught.value.message == f"line 1: ebs: {complaint}"


async def test_whole_blocks_are_no_detour() -> None:
    table, disk = await emulated()
    data = bytearray(BLOCK)
    await table.submit(Io(READ, BLOCK, memoryview(data)), 0)
    assert (data, disk.log) == (disk.bytes[16 * 512 :][:BLOCK], [("read", 16 * 512, BLOCK, 0)])

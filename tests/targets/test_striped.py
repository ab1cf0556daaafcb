"""nbdmap.targets.striped: geometry against a model, errors, status."""

import random

import pytest

from nbdmap.block.device import HOLE, ZERO, Limits
from nbdmap.block.io import DISCARD, WRITE_ZEROES, Io
from nbdmap.dm.table import Table
from nbdmap.errors import InvalidArgument, IoFailed, Unsupported
from nbdmap.targets import striped
from tests.support.disks import FakeDisk, build, eio, read, write


async def stripes(count: int, chunk: int, rows: int, begin: int = 0) -> tuple[Table, list[FakeDisk]]:
    """A striped target of `rows` rows; stripe i starts at sector 8 * i of its disk."""
    disks = [FakeDisk(f"7:{number}", 8 * number + chunk * rows) for number in range(count)]
    legs = " ".join(f"7:{number} {8 * number}" for number in range(count))
    lead = f"0 {begin} error\n" if begin else ""
    return await build(f"{lead}{begin} {count * chunk * rows} striped {count} {chunk} {legs}", *disks), disks


def place(sector: int, count: int, chunk: int) -> tuple[int, int]:
    """Where the document says sector `sector` is: stripe, sector on it."""
    number, inside = divmod(sector, chunk)
    return number % count, number // count * chunk + inside


@pytest.mark.parametrize(("count", "chunk"), [(1, 8), (2, 8), (3, 24), (5, 1), (3, 7)])
async def test_geometry(count: int, chunk: int) -> None:
    table, disks = await stripes(count, chunk, 4, begin=16)
    total = count * chunk * 4
    data = b"".join(number.to_bytes(2, "big") * 256 for number in range(total))
    await write(table, 16 * 512, data)
    for sector in range(total):
        stripe, at = place(sector, count, chunk)
        begin = (8 * stripe + at) * 512
        assert disks[stripe].bytes[begin : begin + 512] == data[sector * 512 : sector * 512 + 512]
    rng = random.Random(7)
    for _ in range(50):
        first, last = sorted(rng.sample(range(total + 1), 2))
        assert await read(table, (16 + first) * 512, (last - first) * 512) == data[first * 512 : last * 512]


@pytest.mark.parametrize(("count", "chunk"), [(1, 8), (2, 8), (3, 24), (5, 1), (3, 7)])
async def test_discards_go_once_to_each_stripe(count: int, chunk: int) -> None:
    table, disks = await stripes(count, chunk, 4, begin=16)
    total, rng = count * chunk * 4, random.Random(count)
    for op in (DISCARD, WRITE_ZEROES):
        for _ in range(60):
            for disk in disks:
                disk.bytes[:] = b"\xff" * disk.size
                disk.log.clear()
            first, last = sorted(rng.sample(range(total + 1), 2))
            await table.submit(Io(op, (last - first) * 512), (16 + first) * 512)
            assert all(len(disk.log) <= 1 for disk in disks)
            for sector in range(total):
                stripe, at = place(sector, count, chunk)
                begin = (8 * stripe + at) * 512
                assert (disks[stripe].bytes[begin] == 0) is (first <= sector < last)


async def test_the_kernels_example_of_a_discard() -> None:
    """dm-reference a.2: chunks 1 to 3 of 2 stripes are chunk 1 of the first and chunks 0 and 1 of the second."""
    disks = FakeDisk("7:0"), FakeDisk("7:1")
    table = await build("0 64 striped 2 8 7:0 0 7:1 0", *disks)
    await table.submit(Io(DISCARD, 3 * 4096), 4096)
    assert disks[0].log == [("discard", 4096, 4096, 0)]
    assert disks[1].log == [("discard", 0, 8192, 0)]


async def test_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    table, disks = await stripes(2, 8, 4)
    everything = 64 * 512
    assert await table.extents(0, everything) == [(everything, 0)]
    disks[0].runs = [(4096, 0), (8192, HOLE | ZERO), (4096, 0)]
    disks[1].runs = [(4096 + 8192, 0), (4096, HOLE | ZERO), (4096, 0)]
    # rows of (first, second): data data, hole data, hole hole, data data
    whole = [(8192, 0), (4096, HOLE | ZERO), (4096, 0), (8192, HOLE | ZERO), (8192, 0)]
    assert await table.extents(0, everything) == whole
    assert await table.extents(8192 + 512, 512) == [(512, HOLE | ZERO)]
    assert await table.extents(4096 - 512, 1024) == [(1024, 0)]
    monkeypatch.setattr(striped, "MAX_CHUNKS", 3)
    assert await table.extents(0, everything) == [(8192, 0), (4096, HOLE | ZERO), (4096, 0), (8192, HOLE | ZERO), (8192, 0)]
    assert await table.targets[0].extents(0, everything) == [(8192, 0), (4096, HOLE | ZERO)]


async def test_extents_where_a_stripe_answers_short() -> None:
    table, disks = await stripes(2, 8, 4)
    full = disks[1].extents

    async def short(offset: int, length: int) -> list[tuple[int, int]]:
        return [(min(512, length), 0)]

    disks[1].extents = short  # type: ignore[method-assign]
    assert await table.targets[0].extents(0, 64 * 512) == [(4096 + 512, 0)]
    disks[1].extents = full  # type: ignore[method-assign]


async def test_status_counts_errors_and_raises_events() -> None:
    events: list[int] = []
    disks = FakeDisk("7:0"), FakeDisk("7:1")
    table = await build("0 64 striped 3 8 7:0 0 7:1 0 7:0 32".replace("64", "72"), *disks, event=lambda: events.append(1))
    assert [line.params for line in table.status_lines()] == ["3 7:0 7:1 7:0 1 AAA"]
    disks[1].failure = lambda io, offset: Unsupported("no") if io.op is DISCARD else None
    with pytest.raises(Unsupported):
        await table.submit(Io(DISCARD, 72 * 512), 0)
    assert events == []
    disks[0].failure = eio
    for _ in range(20):
        with pytest.raises(IoFailed):
            await read(table, 0, 512)
    assert [line.params for line in table.status_lines()] == ["3 7:0 7:1 7:0 1 DAD"]
    assert len(events) == 28
    with pytest.raises(IoFailed):
        await table.submit(Io(WRITE_ZEROES, 512), 0)


async def test_limits() -> None:
    disks = FakeDisk("7:0"), FakeDisk("7:1", limits=Limits(logical_block=4096))
    table = await build("0 64 striped 2 16 7:0 0 7:1 0", *disks)
    assert table.limits == Limits(logical_block=4096, io_min=8192, io_opt=16384, sparse=True)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("0 64 striped", "number of stripes is missing"),
        ("0 64 striped 0 8", "number of stripes: 0 is not in the range 1 to"),
        ("0 64 striped 2", "chunk size is missing"),
        ("0 64 striped 2 0 7:0 0 7:1 0", "chunk size: 0 is not in the range 1 to"),
        ("0 64 striped 2 0x8 7:0 0 7:1 0", "chunk size: '0x8' is not a decimal number"),
        ("0 65 striped 2 8 7:0 0 7:1 0", "length 65 is not a multiple of the 2 stripes"),
        ("0 72 striped 2 8 7:0 0 7:1 0", "a stripe's share, 36 sectors, is not a multiple of the chunk, 8"),
        ("0 64 striped 2 8 7:0 0 7:1", "2 stripes need 4 words of devices and starts, 3 given"),
        ("0 64 striped 2 8 7:0 0 7:1 0 0", "2 stripes need 4 words of devices and starts, 5 given"),
        ("0 64 striped 2 8 7:0 0 7:1 zero", "start of stripe 1: 'zero' is not a decimal number"),
        ("0 64 striped 2 8 7:0 0 7:1 1000", "sectors 1000 to 1032 are beyond the end of disk7:1"),
    ],
)
async def test_bad_words(line: str, complaint: str) -> None:
    disks = FakeDisk("7:0"), FakeDisk("7:1")
    with pytest.raises(InvalidArgument) as caught:
        await build(line, *disks)
    assert f"line 1: striped: {complaint}" in caught.value.message
    assert [disk.openers for disk in disks] == [0, 0]

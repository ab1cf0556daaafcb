"""nbdmap.targets.unstriped: each stripe of a striped device, seen alone."""

import random

import pytest

from nbdmap.block.device import HOLE, ZERO, Limits
from nbdmap.block.io import DISCARD, Io
from nbdmap.errors import InvalidArgument, IoFailed, Unsupported
from nbdmap.targets import unstriped
from tests.support.disks import FakeDisk, build, mapped, read, write


@pytest.mark.parametrize(("stripes", "chunk"), [(1, 8), (2, 8), (3, 24), (5, 1)])
async def test_undoes_striped(stripes: int, chunk: int) -> None:
    rng = random.Random(stripes)
    share = chunk * 6
    disks = [FakeDisk(f"7:{number}", share) for number in range(stripes)]
    legs = " ".join(f"7:{number} 0" for number in range(stripes))
    striped = await mapped("striped", f"0 {share * stripes} striped {stripes} {chunk} {legs}", *disks)
    for number, disk in enumerate(disks):
        table = await build(f"0 5 error\n5 {share} unstriped {stripes} {chunk} {number} striped 0", striped)
        data = rng.randbytes(share * 512)
        await write(table, 5 * 512, data)
        assert disk.bytes == data
        for _ in range(20):
            first, last = sorted(rng.sample(range(share + 1), 2))
            assert await read(table, (5 + first) * 512, (last - first) * 512) == data[first * 512 : last * 512]
    await striped.close()


async def test_beyond_the_end_of_the_device() -> None:
    disk = FakeDisk("7:0", 64)
    table = await build("0 64 unstriped 2 16 1 7:0 0", disk)
    await write(table, 0, b"x" * 32 * 512)
    with pytest.raises(IoFailed, match="bytes 40960 to 41472 are beyond the end of disk7:0"):
        await read(table, 32 * 512, 512)
    assert disk.bytes == bytes(16 * 512) + b"x" * 16 * 512 + bytes(16 * 512) + b"x" * 16 * 512
    assert await table.extents(0, 64 * 512) == [(64 * 512, 0)]


async def test_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FakeDisk("7:0", 1024)
    table = await build("0 64 unstriped 2 16 1 7:0 8", disk)
    # chunks of the stripe begin at sectors 24, 56, 88 and 120 of the disk
    disk.runs = [(32 * 512, 0), (48 * 512, HOLE | ZERO), (944 * 512, 0)]
    assert await table.extents(0, 64 * 512) == [(8 * 512, 0), (24 * 512, HOLE | ZERO), (32 * 512, 0)]
    assert await table.extents(12 * 512, 512) == [(512, HOLE | ZERO)]
    monkeypatch.setattr(unstriped, "MAX_CHUNKS", 2)
    assert await table.targets[0].extents(0, 64 * 512) == [(8 * 512, 0), (8 * 512, HOLE | ZERO)]


async def test_an_answer_that_ends_early() -> None:
    disk = FakeDisk("7:0", 1024)
    table = await build("0 64 unstriped 2 16 0 7:0 0", disk)
    disk.runs = [(4 * 512, HOLE)]
    assert await table.targets[0].extents(0, 64 * 512) == [(4 * 512, HOLE)]


async def test_limits() -> None:
    table = await build("0 64 unstriped 2 16 0 7:0 0", FakeDisk("7:0"))
    assert table.limits == Limits(cache=True, sparse=True)
    with pytest.raises(Unsupported):
        await table.submit(Io(DISCARD, 512), 0)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("", "number of stripes is missing"),
        ("2 16 0 7:0", "start sector is missing"),
        ("2 16 0 7:0 0 0", "unexpected word '0'"),
        ("0 16 0 7:0 0", "number of stripes: 0 is not in the range 1 to 4294967295"),
        ("2 0 0 7:0 0", "chunk size: 0 is not in the range 1 to 4294967295"),
        ("2 24 0 7:0 0", "length 64 is not a multiple of the chunk, 24"),
        ("2 16 3 7:0 0", "stripe: 3 is not in the range 0 to 2"),
        ("2 16 0 9:9 0", "9:9: no such device"),
    ],
)
async def test_bad_words(words: str, complaint: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await build(f"0 64 unstriped {words}", FakeDisk("7:0"))
    assert caught.value.message == f"line 1: unstriped: {complaint}"


async def test_table() -> None:
    table = await build("0 64 unstriped 2 16 1 disk7:0 8", FakeDisk("7:0"))
    assert (table.table_lines()[0].params, table.status_lines()[0].params) == ("2 16 1 7:0 8", "")

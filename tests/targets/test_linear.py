"""nbdmap.targets.linear"""

import pytest

from nbdmap.block.device import HOLE, ZERO
from nbdmap.block.io import CACHE, DISCARD, FUA, NO_HOLE, WRITE_ZEROES, Io
from nbdmap.errors import InvalidArgument
from tests.support.disks import FakeDisk, build, eio, read, write


async def test_shifts() -> None:
    disk = FakeDisk("7:0")
    table = await build("0 8 error\n8 16 linear 7:0 100", disk)
    await write(table, 5 * 4096 // 4, b"y" * 512, FUA)
    assert disk.log == [("write", 100 * 512 + 1024, 512, FUA)]
    assert await read(table, 5120, 512) == b"y" * 512
    for op, flags in ((DISCARD, FUA), (WRITE_ZEROES, NO_HOLE), (CACHE, 0)):
        await table.submit(Io(op, 1024, flags=flags), 4096)
        assert disk.log[-1] == (op.name.lower(), 100 * 512, 1024, flags)


async def test_extents_are_those_below() -> None:
    disk = FakeDisk("7:0")
    disk.runs = [(104 * 512, HOLE | ZERO), (920 * 512, 0)]
    table = await build("0 16 linear 7:0 100", disk)
    assert await table.extents(0, 16 * 512) == [(4 * 512, HOLE | ZERO), (12 * 512, 0)]


async def test_failures_pass_through() -> None:
    disk = FakeDisk("7:0")
    table = await build("0 16 linear 7:0 100", disk)
    disk.failure = eio
    with pytest.raises(Exception, match="broken on purpose"):
        await read(table, 0, 512)


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        ("", "device is missing"),
        ("7:0", "start sector is missing"),
        ("7:0 0x8", "start sector: '0x8' is not a decimal number"),
        ("7:0 -1", "start sector: '-1' is not a decimal number"),
        ("7:0 36028797018963968", "start sector: 36028797018963968 is not in the range"),
        ("7:0 0 0", "unexpected word '0'"),
        ("7:0 1017", "sectors 1017 to 1025 are beyond the end of disk7:0"),
    ],
)
async def test_bad_words(params: str, complaint: str) -> None:
    disk = FakeDisk("7:0")
    with pytest.raises(InvalidArgument, match=complaint.replace("(", r"\(")):
        await build(f"0 8 linear {params}", disk)
    assert disk.openers == 0


async def test_status_and_table() -> None:
    (line,) = (await build("0 8 linear 7:0 8", FakeDisk("7:0"))).table_lines()
    assert line == (0, 8, "linear", "7:0 8")
    (line,) = (await build("0 8 linear disk7:0 8", FakeDisk("7:0"))).status_lines()
    assert line == (0, 8, "linear", "")

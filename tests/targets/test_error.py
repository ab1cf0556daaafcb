"""nbdmap.targets.error"""

import errno

import pytest

from nbdmap.block.device import Limits
from nbdmap.block.io import CACHE, DISCARD, FLUSH, READ, WRITE, WRITE_ZEROES, Io
from nbdmap.errors import IoFailed, NotFound
from tests.support.disks import FakeDisk, build


@pytest.mark.parametrize("op", [READ, WRITE, DISCARD, WRITE_ZEROES, CACHE])
async def test_everything_fails_but_flush(op: int) -> None:
    disk = FakeDisk("7:0")
    for text in ("0 8 error", "0 8 error some words that mean nothing", "0 8 error 7:0 0"):
        table = await build(text, disk)
        with pytest.raises(IoFailed) as caught:
            await table.submit(Io(op, 512, memoryview(bytearray(512))), 0)  # type: ignore[arg-type]
        assert caught.value.errno == errno.EIO
        await table.submit(Io(FLUSH, 0), 0)
        assert table.table_lines() == [(0, 8, "error", "")]
    assert disk.log == []


async def test_a_device_lends_its_limits_only() -> None:
    disk = FakeDisk("7:0", limits=Limits(logical_block=4096))
    table = await build("0 8 error 7:0 8", disk)
    assert table.limits.logical_block == 4096
    assert table.devices == [disk]
    with pytest.raises(NotFound, match="line 1: error: 9:9: no such device"):
        await build("0 8 error 9:9 0")

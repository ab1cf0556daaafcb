"""nbdmap.targets.zero"""

import pytest

from nbdmap.block.device import ZERO
from nbdmap.block.io import CACHE, DISCARD, FLUSH, WRITE_ZEROES, Io
from nbdmap.errors import InvalidArgument, Unsupported
from tests.support.disks import build, read, write


async def test_reads_zeroes_and_swallows_writes() -> None:
    table = await build("0 2048 zero")
    await write(table, 0, b"x" * 200_192)
    data = bytearray(b"y" * 200_192)
    assert await read(table, 512, len(data)) == bytes(len(data))
    for op in (DISCARD, FLUSH, CACHE):
        await table.submit(Io(op, 0 if op is FLUSH else 512), 0)
    with pytest.raises(Unsupported):
        await table.submit(Io(WRITE_ZEROES, 512), 0)


async def test_is_zeroes_but_no_hole() -> None:
    table = await build("0 2048 zero")
    assert await table.extents(0, 1 << 20) == [(1 << 20, ZERO)]
    assert table.limits.sparse


async def test_takes_no_words() -> None:
    with pytest.raises(InvalidArgument, match="line 1: zero: unexpected word 'x'"):
        await build("0 8 zero x")
    assert (await build("0 8 zero")).table_lines() == [(0, 8, "zero", "")]

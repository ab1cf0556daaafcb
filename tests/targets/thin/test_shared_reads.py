"""Blocks that snapshots share: once known they are read without a look at the metadata, and never after they have changed."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdmap.block.io import DISCARD, Io
from tests.support.disks import read, write
from tests.support.thin import BLOCK, ThinSite


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[ThinSite]:
    one = await ThinSite(tmp_path).open()
    await one.new("v0", 0)
    for block in range(8):
        await write(one.devices["v0"], block * BLOCK, bytes([block + 1]) * BLOCK)
    await one.snap("v1", 1, "v0", 0)
    yield one
    await one.close()


async def test_they_are_looked_up_once(site: ThinSite, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("v0", "v1"):
        assert await read(site.devices[name], 3 * BLOCK, BLOCK) == b"\4" * BLOCK
        assert await read(site.devices[name], 4 * BLOCK, BLOCK) == b"\5" * BLOCK

    async def refused(number: int, block: int) -> int | None:
        raise AssertionError(f"block {block} of volume {number} is looked up again")

    monkeypatch.setattr(site.pool.metadata, "lookup", refused)
    for name in ("v0", "v1"):
        assert await read(site.devices[name], 3 * BLOCK + 512, 4096) == b"\4" * 4096
        assert await read(site.devices[name], 4 * BLOCK - 512, 1024) == b"\4" * 512 + b"\5" * 512
    monkeypatch.undo()


async def test_a_write_to_either_side_is_seen_there_only(site: ThinSite) -> None:
    for name in ("v0", "v1"):
        await read(site.devices[name], 0, 8 * BLOCK)
    await write(site.devices["v1"], 3 * BLOCK + 4096, b"x" * 4096)
    await write(site.devices["v0"], 5 * BLOCK, b"y" * BLOCK)
    assert (await read(site.devices["v1"], 3 * BLOCK, 3 * 4096)) == b"\4" * 4096 + b"x" * 4096 + b"\4" * 4096
    assert (await read(site.devices["v0"], 3 * BLOCK, 3 * 4096)) == b"\4" * 12288
    assert (await read(site.devices["v0"], 5 * BLOCK, 4096)) == b"y" * 4096
    assert (await read(site.devices["v1"], 5 * BLOCK, 4096)) == b"\6" * 4096


async def test_what_is_discarded_is_gone_there_only(site: ThinSite) -> None:
    for name in ("v0", "v1"):
        await read(site.devices[name], 0, 8 * BLOCK)
    await site.devices["v1"].submit(Io(DISCARD, 2 * BLOCK), 2 * BLOCK)
    assert await read(site.devices["v1"], BLOCK, 4 * BLOCK) == b"\2" * BLOCK + bytes(2 * BLOCK) + b"\5" * BLOCK
    assert await read(site.devices["v0"], BLOCK, 4 * BLOCK) == b"".join(bytes([one]) * BLOCK for one in (2, 3, 4, 5))


async def test_a_snapshot_of_a_snapshot(site: ThinSite) -> None:
    assert await read(site.devices["v1"], 3 * BLOCK, 512) == b"\4" * 512
    await site.snap("v2", 2, "v1", 1)
    await write(site.devices["v1"], 3 * BLOCK, b"z" * BLOCK)
    assert await read(site.devices["v1"], 3 * BLOCK, 512) == b"z" * 512
    assert await read(site.devices["v2"], 3 * BLOCK, 512) == b"\4" * 512

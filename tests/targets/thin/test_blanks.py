"""Blocks of the data device that are holes are not zeroed once more, and never taken for holes when they are none."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from nbdmap.block.io import WRITE, Io
from nbdmap.errors import IoFailed
from nbdmap.targets.thin import blanks
from nbdmap.targets.thin.blanks import WORTH
from nbdmap.targets.thin.pool import BLOCKS_FOR_A_MAPPING
from tests.support.thin import BLOCK, ThinSite, contents, flush, read, settle, write

A = b"a" * 4096
SECRET = b"secret!!" * (BLOCK // 8)


@pytest_asyncio.fixture
async def made(tmp_path: Path) -> AsyncIterator[ThinSite]:
    """A pool of 64 blocks; block 0 of the data device and every other one have data, those between are holes."""
    site = ThinSite(tmp_path, data_blocks=64, holes=True)
    await site.open("no_discard_passdown")
    yield site
    await site.close()


def requests(made: ThinSite) -> list[tuple[str, int, int]]:
    """Those of the data device since the last time."""
    log, made.data.log = made.data.log, []
    return [entry[:3] for entry in log]


async def test_only_what_is_no_hole_is_zeroed(made: ThinSite) -> None:
    thin = await made.new("t", 0)
    requests(made)
    for block in range(4):
        await write(thin, block * BLOCK + 4096, A)
    assert requests(made) == [
        ("extents", 0, 64 * BLOCK),
        ("write", 0, BLOCK),
        ("write", BLOCK + 4096, 4096),
        ("write", 2 * BLOCK, BLOCK),
        ("write", 3 * BLOCK + 4096, 4096),
    ]
    for block in range(4):
        assert await read(thin, block * BLOCK, BLOCK) == bytes(4096) + A + bytes(BLOCK - 8192)


async def test_a_block_that_comes_back_is_looked_at_again(made: ThinSite) -> None:
    thin = await made.new("t", 0, blocks=64)
    for block in range(60):
        await write(thin, block * BLOCK, SECRET)
    await made.remove("t")
    await made.message("delete 0")
    other = await made.new("u", 1, blocks=64)
    for block in range(64):
        await write(other, block * BLOCK + 4096, A)
    assert await contents(other) == (bytes(4096) + A + bytes(BLOCK - 8192)) * 64


async def test_what_is_written_through_the_pool_is_no_hole(made: ThinSite) -> None:
    thin = await made.new("t", 0)
    await write(thin, 0, A)
    await write(made.devices["pool"], BLOCK, SECRET)
    await write(thin, BLOCK, A)
    assert await read(thin, BLOCK, BLOCK) == A + bytes(BLOCK - 4096)


async def test_what_is_written_while_the_pool_is_suspended_is_no_hole(made: ThinSite) -> None:
    thin = await made.new("t", 0)
    await write(thin, 0, A)
    await made.devices["pool"].suspend()
    await write(made.data, BLOCK, SECRET)
    await made.devices["pool"].resume()
    await write(thin, BLOCK, A)
    assert await read(thin, BLOCK, BLOCK) == A + bytes(BLOCK - 4096)


async def test_a_device_that_cannot_say_is_zeroed(made: ThinSite) -> None:
    async def broken(offset: int, length: int) -> list[tuple[int, int]]:
        raise IoFailed("it does not know")

    made.data.extents = broken  # type: ignore[method-assign]
    thin = await made.new("t", 0)
    requests(made)
    await write(thin, 0, A)
    await write(thin, BLOCK, A)
    assert requests(made) == [("write", 0, BLOCK), ("write", BLOCK, BLOCK)]


async def test_a_device_that_may_have_lost_a_discard_is_not_asked(made: ThinSite) -> None:
    made.data.restarts = lambda: True  # type: ignore[method-assign]
    thin = await made.new("t", 0)
    requests(made)
    await write(thin, 0, A)
    assert requests(made) == [("write", 0, BLOCK)]


async def test_few_free_blocks_are_not_worth_a_question(tmp_path: Path) -> None:
    site = ThinSite(tmp_path, data_blocks=WORTH - 1, holes=True)
    await site.open()
    thin = await site.new("t", 0)
    requests(site)
    await write(thin, 0, A)
    assert requests(site) == [("write", 0, BLOCK)]
    await site.close()


async def test_the_device_is_asked_of_so_many_blocks_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blanks, "AHEAD", 24)
    site = ThinSite(tmp_path, data_blocks=24 + WORTH, holes=True)
    await site.open()
    thin = await site.new("t", 0)
    for block in range(25):
        await write(thin, block * BLOCK, A)
    asked = [entry[1:3] for entry in site.data.log if entry[0] == "extents"]
    assert asked == [(0, 24 * BLOCK), (24 * BLOCK, WORTH * BLOCK)]
    await site.close()


# --- at once -----------------------------------------------------------------------------------------------------------


async def test_reads_and_writes_wait_for_a_first_write_that_waits(made: ThinSite) -> None:
    thin = await made.new("t", 0)
    await write(thin, 0, A)
    made.data.gate = asyncio.Event()
    first = asyncio.ensure_future(write(thin, BLOCK, A))
    await settle()
    second = asyncio.ensure_future(write(thin, BLOCK + 4096, A))
    reading = asyncio.ensure_future(read(thin, BLOCK, 4096))
    await settle()
    assert not reading.done()
    made.data.gate.set()
    await asyncio.gather(first, second)
    assert await reading == A
    assert await read(thin, BLOCK, BLOCK) == A + A + bytes(BLOCK - 8192)
    assert await made.used() == 2


async def test_a_first_write_that_fails_uses_nothing(made: ThinSite) -> None:
    thin = await made.new("t", 0)
    await write(thin, 0, A)
    made.data.failure = lambda io, offset: IoFailed("on purpose") if io.op is WRITE else None
    for _ in range(2):
        try:
            await thin.submit(Io(WRITE, 4096, memoryview(A)), BLOCK)
        except IoFailed:
            continue
        raise AssertionError("it did not fail")
    made.data.failure = lambda io, offset: None
    await write(thin, 2 * BLOCK, A)
    await flush(thin)
    assert await made.used() == 2
    assert await read(thin, BLOCK, BLOCK) == bytes(BLOCK)


async def test_a_commit_begins_before_writes_have_to_wait_for_one(tmp_path: Path) -> None:
    site = ThinSite(tmp_path, metadata_blocks=64)
    await site.open()
    thin = await site.new("t", 0)
    most = (site.pool.metadata.metadata_free - 16) // BLOCKS_FOR_A_MAPPING
    assert 4 < most < 32
    before = site.commits()
    for block in range(most // 2 + 1):
        await write(thin, block * BLOCK, A)
    await settle()
    assert site.commits() == before
    await write(thin, 31 * BLOCK, A)
    await settle()
    assert site.commits() == before + 1
    await site.close()

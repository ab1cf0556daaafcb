"""RemoteDisk as one of several ways to its storage, before its server is there, and with a server that is silent."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdmap.block.io import FLUSH, FUA
from nbdmap.block.reconnect import Reconnect
from nbdmap.block.remote import WAY_PAUSE_S, RemoteDisk
from nbdmap.errors import InvalidArgument, IoFailed, NbdmapError
from nbdmap.nbd.constants import Cmd
from nbdmap.nbd.uri import Uri
from tests.contract.disk import act, read, write
from tests.support.fake_nbd import FakeServer
from tests.support.remote import Time, begin, commands, connected, read_one


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[FakeServer]:
    async with FakeServer(tmp_path / "nbd") as running:
        yield running


async def until_back(disk: RemoteDisk) -> None:
    while disk.refusal:  # noqa: ASYNC110
        await asyncio.sleep(0)


# --- one of several ways ---------------------------------------------------------------------------------------------------


async def test_requests_of_a_way_fail_as_soon_as_the_connection_is_lost(server: FakeServer) -> None:
    async with connected(server) as disk:
        disk.add_ways(1)
        server.open.clear()
        request = begin(read_one(disk))
        await server.until(lambda: len(server.log) == 1)
        await server.stop()
        with pytest.raises(IoFailed, match="is lost"):
            await request
        with pytest.raises(IoFailed, match="is lost"):
            await read_one(disk)
        server.open.set()
        await server.start()
        await until_back(disk)
        await read_one(disk)


async def test_a_way_repeats_nothing_and_reports_no_loss(server: FakeServer) -> None:
    """Both would be wrong: the storage has got newer data by another way."""
    async with connected(server) as disk:
        await write(disk, 0, b"1" * 512)
        disk.add_ways(1)
        await write(disk, 512, b"2" * 512)
        await write(disk, 1024, b"2" * 512, FUA)
        server.log.clear()
        await server.crash()
        while disk._link is not None:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await until_back(disk)
        await act(disk, FLUSH)
        assert commands(server) == [Cmd.FLUSH]


async def test_it_repeats_again_when_it_is_a_way_no_more(server: FakeServer) -> None:
    async with connected(server) as disk:
        disk.add_ways(2)
        await write(disk, 0, b"1" * 512)
        disk.add_ways(-1)
        disk.add_ways(-1)
        await write(disk, 512, b"2" * 512)
        await server.crash()
        await read_one(disk)
        with pytest.raises(IoFailed, match="forgot writes"):  # the first of the two was not kept
            await act(disk, FLUSH)
        await write(disk, 512, b"3" * 512)
        await act(disk, FLUSH)
        await write(disk, 512, b"4" * 512)
        await server.crash()
        assert await read(disk, 512, 512) == b"4" * 512
        await act(disk, FLUSH)


async def test_a_way_tries_to_connect_every_second(server: FakeServer) -> None:
    time = Time()
    async with connected(server, time) as disk:
        disk.add_ways(1)
        await server.stop()
        await time.ninth.wait()
        assert max(time.pauses) == WAY_PAUSE_S
        assert disk.refusal


# --- not there yet ---------------------------------------------------------------------------------------------------------


async def test_a_server_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    server = FakeServer(tmp_path / "nbd")
    time = Time()
    with pytest.raises(NbdmapError):
        await RemoteDisk.connect(server.uri, name="far", number="7:0")
    disk = await RemoteDisk.connect(server.uri, name="far", number="7:0", reconnect=time.policy(), may_be_absent=True)
    try:
        assert (disk.absent, disk.size, disk.limits.discard) == (True, 0, False)
        for request in (read_one(disk), write(disk, 0, bytes(512), FUA), act(disk, FLUSH)):
            with pytest.raises(IoFailed, match="far: not there yet: nbd"):
                await request
        assert await disk.extents(0, 512) == [(512, 0)]
        await time.ninth.wait()
        async with server:
            await until_back(disk)
            assert (disk.absent, disk.size, disk.limits.discard) == (False, server.size, True)
            await write(disk, 0, b"x" * 512)
            assert await read(disk, 0, 512) == b"x" * 512
            await server.crash()
            assert await read(disk, 0, 512) == b"x" * 512  # from here on as any other
    finally:
        await disk.close()


async def test_a_disk_that_never_came_is_closed(tmp_path: Path) -> None:
    disk = await RemoteDisk.connect(Uri(socket=str(tmp_path / "no")), name="far", number="7:0", may_be_absent=True)
    await disk.close()
    assert disk._reconnecting is not None
    assert disk._reconnecting.done()


async def test_what_can_never_be_is_refused_at_once() -> None:
    with pytest.raises(InvalidArgument):
        await RemoteDisk.connect(Uri("a" * 70, 1), name="far", number="7:0", may_be_absent=True)


# --- a silent server -------------------------------------------------------------------------------------------------------


async def test_a_server_that_does_not_answer_is_given_up_in_time(server: FakeServer) -> None:
    disk = await RemoteDisk.connect(server.uri, name="far", number="7:0", reconnect=Reconnect(deadline_s=0.2, silence_s=0.2))
    try:
        await read_one(disk)
        disk.add_ways(1)
        server.open.clear()
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(IoFailed, match=r"no answer for 0\.2 s"):
            await read_one(disk)
        assert 0.2 <= loop.time() - began < 2
        server.open.set()
        await until_back(disk)
        await read_one(disk)
    finally:
        await disk.close()


async def test_a_server_that_is_busy_is_not_silent(server: FakeServer) -> None:
    """Each request is answered in time, and there is always one that waits."""
    disk = await RemoteDisk.connect(server.uri, name="far", number="7:0", reconnect=Reconnect(deadline_s=0.2, silence_s=0.2))
    try:
        connections = server.connections
        loop = asyncio.get_running_loop()
        end = loop.time() + 0.5
        server.open.clear()
        requests = [begin(read_one(disk))]
        while loop.time() < end:
            requests.append(begin(read_one(disk)))
            await asyncio.sleep(0.05)
            server.open.set()
            await requests.pop(0)
            server.open.clear()
        server.open.set()
        await asyncio.gather(*requests)
        assert server.connections == connections
    finally:
        await disk.close()

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from nbdmap.block import remote
from nbdmap.block.device import HOLE, ZERO, Device, Limits
from nbdmap.block.io import CACHE, DISCARD, FAST_ZERO, FLUSH, FUA, NO_HOLE, READ, WRITE, WRITE_ZEROES, Io
from nbdmap.block.remote import RemoteDisk
from nbdmap.errors import AccessRefused, IoFailed, NbdmapError, NotFound, ProtocolError, Unsupported
from nbdmap.nbd import constants as nbd
from nbdmap.nbd.constants import Cmd
from nbdmap.nbd.uri import Uri
from tests.contract import disk as contract
from tests.contract.disk import act, all_extents, read, refusal, write
from tests.support.fake_nbd import Asked, FakeServer
from tests.support.remote import MAKES, ONLY_SIMPLE, begin, commands, connected, read_one


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[FakeServer]:
    async with FakeServer(tmp_path / "nbd") as running:
        yield running


# --- a disk ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("check", contract.CONTRACT)
@pytest.mark.parametrize("make", MAKES)
async def test_contract(server: FakeServer, make: str, check: Callable[[Device], Awaitable[None]]) -> None:
    server.refused = MAKES[make]
    async with connected(server) as disk:
        await check(disk)


async def test_description(server: FakeServer) -> None:
    server.size += 700
    server.data.extend(bytes(700))
    server.flags |= nbd.ROTATIONAL
    server.blocks = (1024, 8192, 65536 + 512)
    async with connected(server) as disk:
        assert (disk.name, disk.number, disk.size, disk.read_only) == ("far", "7:0", 1 << 20, False)
        assert disk.limits == Limits(1024, True, True, True, True, True, io_min=8192, rotational=True)
        await act(disk, CACHE, 0, 1 << 17)
    assert server.log == [Asked(Cmd.CACHE, 0, 65536), Asked(Cmd.CACHE, 65536, 65536)]
    assert server.discs == 1


async def test_description_of_a_poor_server(server: FakeServer) -> None:
    server.flags, server.refused = nbd.HAS_FLAGS | nbd.SEND_FAST_ZERO, ONLY_SIMPLE
    async with connected(server) as disk:
        assert disk.limits == Limits(io_min=4096)
        await write(disk, 0, b"x" * 512, FUA)
        await act(disk, FLUSH)
        assert await disk.extents(512, 1024) == [(1024, 0)]
        for op, flags in [(DISCARD, 0), (CACHE, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, FAST_ZERO)]:
            assert isinstance(await refusal(disk.submit(Io(op, 512, flags=flags), 0)), Unsupported)
    assert server.log == [Asked(Cmd.WRITE, 0, 512)]


async def test_requests_are_split(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.blocks = (1, 4096, 8192)
    monkeypatch.setattr(remote, "MAX_EFFECT", 65536)
    async with connected(server) as disk:
        await write(disk, 512, bytes(range(256)) * 80)
        assert await read(disk, 512, 20480) == bytes(range(256)) * 80
        await act(disk, WRITE_ZEROES, 0, 65536 * 2 + 512, NO_HOLE)
    pieces = [(512, 8192), (8704, 8192), (16896, 4096)]
    zeroes = [(0, 65536), (65536, 65536), (131072, 512)]
    assert server.log == [
        *(Asked(Cmd.WRITE, offset, length) for offset, length in pieces),
        *(Asked(Cmd.READ, offset, length) for offset, length in pieces),
        *(Asked(Cmd.WRITE_ZEROES, offset, length, nbd.CMD_FLAG_NO_HOLE) for offset, length in zeroes),
    ]


async def test_nothing_is_sent_for_no_bytes(server: FakeServer) -> None:
    async with connected(server) as disk:
        for op in (READ, WRITE, DISCARD, WRITE_ZEROES, CACHE):
            await act(disk, op)
    assert server.log == []


@pytest.mark.parametrize("asked", [True, False])
async def test_read_only(server: FakeServer, asked: bool) -> None:
    server.flags |= 0 if asked else nbd.READ_ONLY
    async with connected(server, read_only=asked) as disk:
        assert disk.read_only
        for op in (WRITE, DISCARD, WRITE_ZEROES):
            assert isinstance(await refusal(disk.submit(Io(op, 512, memoryview(bytes(512))), 0)), AccessRefused)
        assert await read(disk, 0, 512) == bytes(512)
    assert commands(server) == [Cmd.READ]


async def test_fua_without_fua(server: FakeServer) -> None:
    server.flags &= ~nbd.SEND_FUA
    async with connected(server) as disk:
        await write(disk, 0, b"x" * 512, FUA)
    assert server.log == [Asked(Cmd.WRITE, 0, 512), Asked(Cmd.FLUSH)]
    assert server.durable.startswith(b"x" * 512)


@pytest.mark.parametrize("make", MAKES)
async def test_errors(server: FakeServer, make: str) -> None:
    server.refused = MAKES[make]
    text = "No space left on device" if make == "simple" else "said so: no"
    async with connected(server) as disk:
        server.failure = lambda asked: errno.ENOSPC if asked.command != Cmd.READ else errno.EIO
        error = await refusal(write(disk, 1024, b"x" * 512))
        assert (error.message, error.errno) == (f"write of far at byte 1024: {text}", errno.ENOSPC)
        assert isinstance(error, IoFailed)
        assert (await refusal(act(disk, FLUSH))).errno == errno.ENOSPC
        assert (await refusal(read_one(disk))).errno == errno.EIO
        server.failure = lambda asked: errno.EOPNOTSUPP
        assert isinstance(await refusal(disk.submit(Io(WRITE_ZEROES, 512, flags=FAST_ZERO), 0)), Unsupported)
        if make != "simple":
            with pytest.raises(IoFailed, match="block status of far at byte 0: said so"):
                await disk.extents(0, 512)
        server.failure = lambda asked: 0
        assert await read(disk, 0, 512) == bytes(512)


@pytest.mark.parametrize("make", ["structured", "extended"])
async def test_extents(server: FakeServer, make: str) -> None:
    server.refused = MAKES[make]
    server.extents = [(1000, 0), (3000, 3), (96, 2), (4096, 3), (1 << 20, 0)]
    async with connected(server) as disk:
        assert await disk.extents(0, 1 << 20) == [(1024, 0), (2560, HOLE | ZERO), (512, ZERO), (4096, 3), ((1 << 20) - 8192, 0)]
        server.extents = [(100, 3)]
        assert await disk.extents(0, 4096) == [(512, 0)]
        server.extents = []
        assert await all_extents(disk, 4096, 8192) == [(8192, 0)]


async def test_cancelled_requests_leave_the_memory_alone(server: FakeServer) -> None:
    async with connected(server) as disk:
        await write(disk, 0, b"x" * 65536)
        server.open.clear()
        memory = bytearray(65536)
        reading = begin(disk.submit(Io(READ, 65536, memoryview(memory)), 0))
        await server.until(lambda: len(server.log) == 2)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        server.open.set()
        await act(disk, FLUSH)
        assert memory == bytes(65536)


# --- connecting --------------------------------------------------------------------------------------------------------
async def connect_error(uri: Uri) -> NbdmapError:
    try:
        await RemoteDisk.connect(uri, name="far", number="7:0")
    except NbdmapError as error:
        return error
    raise AssertionError("it connected")


async def test_connect_refusals(server: FakeServer, tmp_path: Path) -> None:
    error = await connect_error(Uri(socket=str(server.path), export="other"))
    assert isinstance(error, NotFound)
    assert error.message.startswith("nbd+unix:///other?socket=")
    assert "there is no export 'other'" in error.message
    error = await connect_error(Uri(socket=str(tmp_path / "nothing")))
    assert error.errno == errno.ENOENT
    assert "No such file or directory" in error.message
    server.greeting = b"SSH-2.0-OpenSSH_9.2p1\r\n"
    assert "not an NBD server" in (await connect_error(server.uri)).message
    server.greeting = b""
    server.size = 1 << 63
    assert isinstance(await connect_error(server.uri), ProtocolError)


async def test_largest_request_below_a_sector(server: FakeServer) -> None:
    server.blocks = (65536, 65536, 65537)
    async with connected(server) as disk:
        assert disk.limits.logical_block == 65536
        await write(disk, 0, bytes(131072))
    assert server.log[0].length == 65536


# --- the end -----------------------------------------------------------------------------------------------------------
async def test_close_while_connecting_again(server: FakeServer) -> None:
    async with connected(server) as disk:
        await server.stop()
        reading = begin(read_one(disk))
        await asyncio.sleep(0)
        await disk.close()
        assert (await refusal(reading)).message == "far is closed"
        assert (await refusal(read_one(disk))).message == "far is closed"
    assert len(asyncio.all_tasks()) == 1


async def test_close_while_restoring(server: FakeServer) -> None:
    async with connected(server) as disk:
        await write(disk, 0, b"1" * 512)
        server.open.clear()
        await server.crash()
        await server.until(lambda: commands(server) == [Cmd.WRITE] * 2)
    assert len(asyncio.all_tasks()) <= 3, "those of the server"


async def test_close_says_goodbye(server: FakeServer) -> None:
    async with connected(server) as disk:
        pass
    assert server.discs == 1
    assert (await refusal(read_one(disk))).message == "far is closed"


async def test_close_does_not_wait_for_a_dead_server(tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdmap.block.link.CLOSE_TIMEOUT_S", 0.01)
    async with connected(server) as disk:
        server.open.clear()
        reading = begin(read_one(disk))
        await server.until(lambda: len(server.log) == 1)
        await disk.close()
        assert (await refusal(reading)).message == "far is closed"


def test_flags_have_the_protocols_numbers() -> None:
    assert (FUA, NO_HOLE, FAST_ZERO) == (nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO)

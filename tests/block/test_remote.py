import asyncio
import errno
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdmap.block import remote
from nbdmap.block.device import HOLE, ZERO, Device, Limits
from nbdmap.block.io import CACHE, DISCARD, FAST_ZERO, FLUSH, FUA, NO_HOLE, READ, WRITE, WRITE_ZEROES, Io
from nbdmap.block.remote import Reconnect, RemoteDisk
from nbdmap.errors import AccessRefused, IoFailed, NbdmapError, NotFound, ProtocolError, Unsupported
from nbdmap.nbd import constants as nbd
from nbdmap.nbd.constants import Cmd, Opt
from nbdmap.nbd.uri import Uri
from tests.contract import disk as contract
from tests.contract.disk import act, all_extents, read, refusal, write
from tests.support.fake_nbd import ALL, Asked, FakeServer

ONLY_SIMPLE = frozenset({Opt.EXTENDED_HEADERS, Opt.STRUCTURED_REPLY})
MAKES = {"extended": frozenset[int](), "structured": frozenset({Opt.EXTENDED_HEADERS}), "simple": ONLY_SIMPLE}
DEADLINE = 10.0


class Time:
    """A clock that tests move. Pauses between attempts take no time; the deadline passes when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        self.late = asyncio.Event()
        self.ninth = asyncio.Event()  # pause

    async def sleep(self, duration: float) -> None:
        if duration == DEADLINE:
            await self.late.wait()
            return
        self.pauses.append(duration)
        if len(self.pauses) == 9:
            self.ninth.set()
        await asyncio.sleep(0)

    def policy(self) -> Reconnect:
        return Reconnect(0.1, 5.0, DEADLINE, random=lambda: 1.0, sleep=self.sleep, clock=lambda: self.now)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[FakeServer]:
    async with FakeServer(tmp_path / "nbd") as running:
        yield running


@asynccontextmanager
async def connected(
    server: FakeServer, time: Time | None = None, *, read_only: bool = False, replay: bool = True
) -> AsyncIterator[RemoteDisk]:
    policy = (time or Time()).policy()
    disk = await RemoteDisk.connect(
        server.uri, name="far", number="7:0", read_only=read_only, reconnect=policy, replay=replay
    )
    try:
        yield disk
    finally:
        await disk.close()


def begin(request: Awaitable[None]) -> "asyncio.Future[None]":
    return asyncio.ensure_future(request)


def commands(server: FakeServer) -> list[Cmd]:
    return [asked.command for asked in server.log]


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


async def read_one(disk: Device) -> None:
    await disk.submit(Io(READ, 512, memoryview(bytearray(512))), 0)


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


# --- connecting again --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", MAKES)
async def test_requests_wait_and_are_sent_again(server: FakeServer, make: str) -> None:
    server.refused = MAKES[make]
    async with connected(server) as disk:
        await write(disk, 0, b"a" * 4096)
        server.open.clear()
        writing, memory = begin(write(disk, 4096, b"b" * 4096)), bytearray(8192)
        reading = begin(disk.submit(Io(READ, 8192, memoryview(memory)), 0))
        await server.until(lambda: len(server.log) == 3)
        await server.stop()
        server.log.clear()
        flushing = begin(act(disk, FLUSH))
        server.open.set()
        await server.start()
        await asyncio.gather(writing, reading, flushing)
        assert memory == b"a" * 4096 + b"b" * 4096
        assert server.log == [
            Asked(Cmd.WRITE, 0, 4096),
            Asked(Cmd.WRITE, 4096, 4096),
            Asked(Cmd.READ, 0, 8192),
            Asked(Cmd.FLUSH),
        ]


async def test_nothing_acknowledged_is_lost(server: FakeServer) -> None:
    async with connected(server) as disk:
        await write(disk, 0, b"1" * 4096)
        await act(disk, FLUSH)
        await write(disk, 0, b"2" * 4096)
        await write(disk, 2048, b"3" * 4096, FUA)
        await write(disk, 1024, b"4" * 512)
        await act(disk, WRITE_ZEROES, 8192, 512)
        await act(disk, DISCARD, 512, 512)
        seen = bytes(server.data)
        server.log.clear()
        await server.crash()
        assert await read(disk, 0, 512) == b"2" * 512
        assert server.data == seen
        assert server.log == [
            Asked(Cmd.WRITE, 0, 4096),
            Asked(Cmd.WRITE, 2048, 4096, FUA),
            Asked(Cmd.WRITE, 1024, 512),
            Asked(Cmd.WRITE_ZEROES, 8192, 512),
            Asked(Cmd.TRIM, 512, 512),
            Asked(Cmd.READ, 0, 512),
        ]
        await act(disk, FLUSH)
        server.log.clear()
        await server.crash()
        assert await read(disk, 0, 8704) == seen[:8704]
        assert commands(server) == [Cmd.READ]


@pytest.mark.parametrize("seed", range(10))
async def test_random_crashes_lose_nothing(server: FakeServer, seed: int) -> None:
    """Requests of many kinds on their own sixteenths of the disk, and a server that crashes at any of them."""
    rng = random.Random(seed)
    server.refused = rng.choice(list(MAKES.values()))
    model = bytearray(server.size)
    share = server.size // 16

    def crash(asked: Asked) -> int:
        if rng.random() < 0.05:
            asyncio.ensure_future(server.crash())  # noqa: RUF006  # it ends the task that runs this
        return 0

    async def client(disk: Device, start: int) -> None:
        for _ in range(20):
            length = 512 * rng.randint(1, 8)
            offset = start + 512 * rng.randint(0, (share - length) // 512)
            kind = rng.choice(["write", "write", "write", "fua", "zero", "flush", "read"])
            if kind == "flush":
                await act(disk, FLUSH)
            elif kind == "read":
                assert await read(disk, offset, length) == model[offset : offset + length]
            else:
                data = bytes(length) if kind == "zero" else rng.randbytes(length)
                if kind == "zero":
                    await act(disk, WRITE_ZEROES, offset, length)
                else:
                    await write(disk, offset, data, FUA * (kind == "fua"))
                model[offset : offset + length] = data

    async with connected(server) as disk:
        server.failure = crash
        await asyncio.gather(*(client(disk, start) for start in range(0, server.size, share)))
        server.failure = lambda asked: 0
        await act(disk, FLUSH)
        await server.crash()
        assert await read(disk, 0, server.size) == model
    assert server.connections > 2


async def test_a_flush_covers_only_what_was_acknowledged_before_it(server: FakeServer) -> None:
    server.held = lambda asked: asked.command == Cmd.FLUSH
    async with connected(server) as disk:
        await write(disk, 0, b"1" * 512)
        server.open.clear()
        flushing = begin(act(disk, FLUSH))
        await server.until(lambda: len(server.log) == 2)
        await write(disk, 512, b"2" * 512)
        server.open.set()
        await flushing
        server.durable[512:1024] = bytes(512)
        await server.crash()
        assert await read(disk, 0, 1024) == b"1" * 512 + b"2" * 512
        assert commands(server)[-2:] == [Cmd.WRITE, Cmd.READ]


async def test_crash_while_restoring(server: FakeServer) -> None:
    async with connected(server) as disk:
        await write(disk, 0, b"1" * 4096)
        server.open.clear()
        server.log.clear()
        await server.crash()
        reading = begin(read_one(disk))
        await server.until(lambda: commands(server) == [Cmd.WRITE])
        await server.crash()
        await server.until(lambda: commands(server) == [Cmd.WRITE] * 2)
        server.open.set()
        await reading
        assert server.data.startswith(b"1" * 4096)


async def test_server_that_shuts_down_in_good_order(server: FakeServer) -> None:
    async with connected(server) as disk:
        server.failure = lambda asked: errno.ESHUTDOWN if server.connections < 3 else 0
        await write(disk, 0, b"1" * 4096)
        assert server.discs == 2
        server.failure = lambda asked: errno.ESHUTDOWN if server.connections < 6 else 0
        await server.crash()
        assert await read(disk, 0, 512) == b"1" * 512
        assert server.connections == 6


async def test_replayed_write_that_fails(server: FakeServer) -> None:
    async with connected(server) as disk:
        await write(disk, 0, b"1" * 4096)
        server.failure = lambda asked: errno.EIO if asked.command == Cmd.WRITE else 0
        await server.crash()
        await read_one(disk)
        server.failure = lambda asked: 0
        assert "forgot writes that it had acknowledged" in (await refusal(act(disk, FLUSH))).message
        await act(disk, FLUSH)


async def test_without_replay_a_flush_fails_once(server: FakeServer) -> None:
    async with connected(server, replay=False) as disk:
        await write(disk, 0, b"1" * 512)
        await act(disk, FLUSH)
        await server.crash()
        await read_one(disk)
        await act(disk, FLUSH)
        await write(disk, 0, b"2" * 512)
        await server.crash()
        assert await read(disk, 0, 512) == b"1" * 512
        assert (await refusal(act(disk, FLUSH))).errno == errno.EIO
        await act(disk, FLUSH)


async def test_without_replay_every_flush_under_way_fails(server: FakeServer) -> None:
    async with connected(server, replay=False) as disk:
        await write(disk, 0, b"1" * 512)
        server.open.clear()
        flushes = [begin(act(disk, FLUSH)) for _ in range(2)]
        await server.until(lambda: len(server.log) == 3)
        await server.crash()
        server.open.set()
        for flushing in flushes:
            assert (await refusal(flushing)).errno == errno.EIO
        await act(disk, FLUSH)


async def test_the_record_is_bounded(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_UNFLUSHED", 20000)
    async with connected(server) as disk:
        for index in range(10):
            await write(disk, index * 4096, bytes([index + 1]) * 4096)
        assert commands(server).count(Cmd.FLUSH) == 2
        server.log.clear()
        await asyncio.gather(*(write(disk, index * 4096, b"x" * 4096) for index in range(10)))
        assert commands(server).count(Cmd.FLUSH) == 1
        server.failure = lambda asked: errno.EIO if asked.command == Cmd.FLUSH else 0
        await asyncio.gather(*(write(disk, index * 4096, b"y" * 4096) for index in range(5)))
        server.failure = lambda asked: 0
        assert "forgot" in (await refusal(act(disk, FLUSH))).message
        await act(disk, FLUSH)


async def test_relief_without_a_connection(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_UNFLUSHED", 4096)
    time = Time()
    async with connected(server, time) as disk:
        server.open.clear()
        writing = begin(write(disk, 0, b"1" * 4096))
        await server.until(lambda: len(server.log) == 1)
        server.open.set()
        server.failure = lambda asked: server.open.clear() or 0  # type: ignore[func-returns-value]
        await server.until(lambda: len(server.log) == 2)
        await server.stop()
        time.late.set()
        await writing
        server.failure = lambda asked: 0
        server.open.set()
        await server.start()
        await until_up(disk)
        assert server.data.startswith(b"1" * 4096)


async def until_up(disk: Device) -> None:
    """Waits until an attempt in the background has succeeded."""
    while True:
        try:
            return await read_one(disk)
        except IoFailed:
            await asyncio.sleep(0)


# --- giving up ---------------------------------------------------------------------------------------------------------
async def test_deadline(server: FakeServer) -> None:
    time = Time()
    async with connected(server, time) as disk:
        server.open.clear()
        writing = begin(write(disk, 0, b"1" * 512))
        await server.until(lambda: len(server.log) == 1)
        await server.stop()
        await time.ninth.wait()
        assert not writing.done()
        time.late.set()
        error = await refusal(writing)
        assert error.errno == errno.EIO
        assert error.message.startswith("far: no connection to nbd+unix:///disk?socket=")
        assert " for 10 s: " in error.message
        connections = server.connections
        assert (await refusal(read_one(disk))).message == error.message, "at once"
        assert server.connections == connections
        assert time.pauses[:9] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
        server.open.set()
        await server.start()
        await until_up(disk)
        assert server.data == bytes(server.size), "what has failed is not sent again"


async def test_request_that_is_lost_with_every_connection(server: FakeServer) -> None:
    time = Time()

    def poison(asked: Asked) -> int:
        time.now += 4
        for writer in server._writers:
            writer.transport.abort()
        return 0

    async with connected(server, time) as disk:
        server.failure = poison
        assert "given up after more than one connection" in (await refusal(read_one(disk))).message
        assert commands(server) == [Cmd.READ] * 4
        assert time.pauses == [0.1, 0.2, 0.4], "a connection that was no use does not count as one"
        server.failure = lambda asked: 0
        await read_one(disk)


async def test_protocol_errors_drop_the_connection(server: FakeServer) -> None:
    time = Time()
    async with connected(server, time) as disk:
        server.junk = b"junkjunkjunkjunkjunkjunkjunkjunkjunk"
        reading = begin(read_one(disk))
        await server.until(lambda: server.connections == 4)
        server.junk = b""
        await reading


CHANGES: dict[str, tuple[Callable[[FakeServer], None], str]] = {
    "size": (lambda server: setattr(server, "size", 1 << 19), "it had 1048576 bytes and has 524288"),
    "read-only": (lambda server: setattr(server, "flags", ALL | nbd.READ_ONLY), "it has become read-only"),
    "no flush": (lambda server: setattr(server, "flags", ALL & ~nbd.SEND_FLUSH), "its flags were 0xced and are 0xce9"),
    "no trim": (lambda server: setattr(server, "flags", ALL & ~nbd.SEND_TRIM), "its flags were"),
    "larger blocks": (lambda server: setattr(server, "blocks", (4096, 4096, 32 << 20)), "requests of 4096 to"),
    "smaller requests": (lambda server: setattr(server, "blocks", (1, 4096, 1 << 20)), "requests of 1 to 1048576"),
}


@pytest.mark.parametrize("name", CHANGES)
async def test_another_export_is_refused(server: FakeServer, name: str) -> None:
    change, why = CHANGES[name]
    before = (server.size, server.flags, server.blocks)
    time = Time()
    async with connected(server, time) as disk:
        server.open.clear()
        writing = begin(write(disk, 0, b"1" * 512))
        await server.until(lambda: len(server.log) == 1)
        change(server)
        await server.drop()
        server.open.set()
        error = await refusal(writing)
        assert "is not the same any more: " in error.message
        assert why in error.message
        assert (await refusal(read_one(disk))).message == error.message
        server.size, server.flags, server.blocks = before
        await until_up(disk)
        assert commands(server)[0] == Cmd.WRITE
        assert set(commands(server)[1:]) == {Cmd.READ}


async def test_more_than_before_is_welcome(server: FakeServer) -> None:
    server.flags, server.refused = nbd.HAS_FLAGS, ONLY_SIMPLE
    async with connected(server) as disk:
        server.flags, server.refused = ALL, frozenset()
        await server.drop()
        await read_one(disk)
        assert await disk.extents(0, 512) == [(512, 0)]


async def test_without_block_status_after_all(server: FakeServer) -> None:
    async with connected(server) as disk:
        server.open.clear()
        asking = asyncio.ensure_future(disk.extents(0, 4096))
        await server.until(lambda: len(server.log) == 1)
        server.refused = ONLY_SIMPLE
        await server.drop()
        assert await asking == [(4096, 0)]
        assert await disk.extents(512, 1024) == [(1024, 0)]


async def test_refused_again_and_again(server: FakeServer) -> None:
    time = Time()
    async with connected(server, time) as disk:
        server.size = 1 << 19
        await server.drop()
        await server.until(lambda: server.connections == 4)
        assert "is not the same" in (await refusal(read_one(disk))).message
        time.late.set()  # the deadline has nothing to add


async def test_cancelled_without_a_connection(server: FakeServer) -> None:
    async with connected(server) as disk:
        await server.stop()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(read_one(disk), 0.001)
        await server.start()
        await act(disk, FLUSH)
        assert commands(server) == [Cmd.FLUSH]


async def test_junk_behind_what_is_restored(server: FakeServer) -> None:
    async with connected(server) as disk:
        await write(disk, 0, b"1" * 512)
        await write(disk, 0, b"2" * 512)
        server.junk_behind = bytes(32)
        await server.crash()
        await server.until(lambda: server.connections == 4)
        server.junk_behind = b""
        assert await read(disk, 0, 512) == b"2" * 512


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

import asyncio
import errno
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from nbdmap.block import remote
from nbdmap.block.device import Device
from nbdmap.block.io import DISCARD, FLUSH, FUA, READ, WRITE_ZEROES, Io
from nbdmap.errors import IoFailed
from nbdmap.nbd import constants as nbd
from nbdmap.nbd.constants import Cmd
from tests.contract.disk import act, read, refusal, write
from tests.support.fake_nbd import ALL, Asked, FakeServer
from tests.support.remote import MAKES, ONLY_SIMPLE, Time, begin, commands, connected, read_one


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[FakeServer]:
    async with FakeServer(tmp_path / "nbd") as running:
        yield running


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

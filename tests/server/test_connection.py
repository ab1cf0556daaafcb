"""nbdmap.server.connection: one client's life, on a real socket."""

import asyncio
import struct
from collections.abc import Callable

import pytest

from nbdmap.block.device import HOLE, ZERO
from nbdmap.errors import NoSuchDevice
from nbdmap.nbd import constants as nbd
from nbdmap.nbd.constants import Cmd, Opt
from nbdmap.server import connection, listener
from tests.support.disks import FakeDisk, eio
from tests.support.nbd import Client, serving

STRUCTURED = [Opt.STRUCTURED_REPLY]
STATUS = [Opt.STRUCTURED_REPLY, Opt.SET_META_CONTEXT]


class Noting:
    """A transport whose `pause_reading` is noted."""

    def __init__(self, transport: asyncio.Transport, pause: Callable[[], None]) -> None:
        self._transport = transport
        self.pause_reading = pause

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)


async def ready(path: str, options: list[Opt] | None = None, name: str = "") -> Client:
    client = await (await Client.connect(path)).greet()
    await client.go(name, options or [])
    return client


async def turns(count: int = 50) -> None:
    """Lets everything that can run do so."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_simple_replies() -> None:
    async with serving() as stack:
        disk = FakeDisk("7:0")
        device = await stack.add("a", "0 64 linear 7:0 0", disk)
        client = await (await Client.connect(stack.socket)).greet()
        size, flags = await client.go("a")
        assert size == 64 * 512
        assert flags & (nbd.SEND_FLUSH | nbd.SEND_FUA | nbd.SEND_TRIM | nbd.SEND_WRITE_ZEROES | nbd.CAN_MULTI_CONN)
        assert not flags & nbd.SEND_DF
        assert device.openers == 1
        client.ask(Cmd.WRITE, 1, 512, 512, nbd.CMD_FLAG_FUA, b"w" * 512)
        client.ask(Cmd.READ, 2, 0, 1024)
        client.ask(Cmd.FLUSH, 3)
        client.ask(Cmd.TRIM, 4, 512, 512)
        client.ask(Cmd.WRITE_ZEROES, 5, 0, 512, nbd.CMD_FLAG_NO_HOLE)
        client.ask(Cmd.CACHE, 6, 0, 512)
        assert await client.simple() == (0, 1, b"")
        assert await client.simple(1024) == (0, 2, bytes(512) + b"w" * 512)
        for cookie in (3, 4, 5, 6):
            assert await client.simple() == (0, cookie, b"")
        assert [entry[0] for entry in disk.log] == ["write", "read", "flush", "discard", "write_zeroes", "cache"]
        assert disk.log[0][3] == 1
        client.ask(Cmd.DISC, 7)
        assert await client.at_end() == b""
        await turns()
        assert device.openers == 0


async def test_errors_keep_the_stream_in_step() -> None:
    async with serving() as stack:
        disk = FakeDisk("7:0")
        await stack.add("a", "0 64 linear 7:0 0", disk)
        client = await ready(stack.socket, STRUCTURED)
        disk.failure = eio
        client.ask(Cmd.READ, 1, 0, 512)
        client.ask(Cmd.WRITE, 2, 0, 512, payload=bytes(512))
        client.ask(Cmd.WRITE, 3, 64 * 512, 512, payload=bytes(512))
        client.ask(99, 4, 0, 4096)
        client.ask(Cmd.READ, 5, 2**64 - 512, 1024)
        client.ask(Cmd.BLOCK_STATUS, 6, 0, 512)
        client.ask(Cmd.READ, 7, 1, 512)
        seen = []
        for _ in range(7):
            _, kind, cookie, payload = await client.chunk()
            error, length = struct.unpack_from(">IH", payload)
            seen.append((cookie, error, payload[6 : 6 + length].decode()))
            assert kind == nbd.Chunk.ERROR
        assert seen == [
            (1, nbd.Error.EIO, "broken on purpose"),
            (2, nbd.Error.EIO, "broken on purpose"),
            (3, nbd.Error.ENOSPC, "WRITE of 512 bytes at 32768 reaches beyond the end, 32768"),
            (4, nbd.Error.EINVAL, "command 99 is unknown"),
            (5, nbd.Error.EINVAL, "READ of 1024 bytes at 18446744073709551104 reaches beyond the end, 32768"),
            (6, nbd.Error.EINVAL, "BLOCK_STATUS: no metadata context was negotiated"),
            (7, nbd.Error.EINVAL, "READ of 512 bytes at 1 is not aligned to blocks of 512"),
        ]
        client.close()


async def test_an_unexpected_error_is_eio_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as stack:
        disk = FakeDisk("7:0")
        await stack.add("a", "0 64 linear 7:0 0", disk)
        client = await ready(stack.socket)
        disk.failure = lambda io, offset: ZeroDivisionError()
        client.ask(Cmd.READ, 1, 0, 512)
        assert await client.simple() == (nbd.Error.EIO, 1, b"")
        assert "failed unexpectedly" in caplog.text
        client.close()


async def test_requests_that_wait_answer_later_and_others_overtake_them() -> None:
    async with serving() as stack:
        slow, quick = FakeDisk("7:0"), FakeDisk("7:1")
        await stack.add("a", "0 64 linear 7:0 0\n64 64 linear 7:1 0", slow, quick)
        client = await ready(stack.socket)
        slow.gate = asyncio.Event()
        client.ask(Cmd.WRITE, 1, 0, 512, payload=b"s" * 512)
        client.ask(Cmd.WRITE, 2, 64 * 512, 512, payload=b"q" * 512)
        assert await client.simple() == (0, 2, b"")
        client.ask(Cmd.WRITE, 3, 65 * 512, 512, payload=b"x" * 512)  # must not land in the first one's buffer
        assert await client.simple() == (0, 3, b"")
        slow.gate.set()
        assert await client.simple() == (0, 1, b"")
        assert slow.bytes[:512] == b"s" * 512
        slow.failure = eio
        slow.gate.clear()
        client.ask(Cmd.READ, 4, 0, 512)
        await turns()
        slow.gate.set()
        assert await client.simple() == (nbd.Error.EIO, 4, b"")
        client.close()


async def test_requests_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_REQUESTS", 4)
    async with serving() as stack:
        disk = FakeDisk("7:0")
        await stack.add("a", "0 64 linear 7:0 0", disk)
        client = await ready(stack.socket)
        disk.gate = asyncio.Event()
        for cookie in range(10):
            client.ask(Cmd.READ, cookie, 0, 512)
        await turns()
        assert len(disk.log) == 4
        disk.gate.set()
        assert sorted([(await client.simple(512))[1] for _ in range(10)]) == list(range(10))
        client.close()


async def test_bytes_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_BYTES", 1024)
    async with serving() as stack:
        disk = FakeDisk("7:0")
        await stack.add("a", "0 64 linear 7:0 0", disk)
        client = await ready(stack.socket)
        disk.gate = asyncio.Event()
        for cookie in range(6):
            client.ask(Cmd.WRITE, cookie, 0, 512, payload=bytes(512))
        await turns()
        assert len(disk.log) == 2
        disk.gate.set()
        for cookie in range(6):
            assert (await client.simple())[1] == cookie
        client.close()


async def test_a_client_that_does_not_read_is_not_served_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_UNSENT", 64 << 10)
    monkeypatch.setattr(connection, "BATCH_BYTES", 64 << 10)
    async with serving() as stack:
        disk = FakeDisk("7:0", 2048)
        await stack.add("a", "0 2048 linear 7:0 0", disk)
        greedy = await ready(stack.socket)
        greedy.writer.transport.pause_reading()  # type: ignore[attr-defined]
        for cookie in range(200):
            greedy.ask(Cmd.READ, cookie, 0, 1 << 20)
        await turns(200)
        served = len(disk.log)
        assert served < 20
        other = await ready(stack.socket)
        other.ask(Cmd.READ, 1, 0, 512)
        assert (await other.simple(512))[0] == 0
        greedy.writer.transport.resume_reading()  # type: ignore[attr-defined]
        for cookie in range(200):
            assert (await greedy.simple(1 << 20))[:2] == (0, cookie)
        greedy.close()
        other.close()


async def test_many_requests_do_not_keep_others_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_BATCH", 2)
    async with serving() as stack:
        await stack.add("a", "0 64 zero")
        client = await ready(stack.socket)
        for cookie in range(9):
            client.ask(Cmd.FLUSH, cookie)
        assert [(await client.simple())[1] for _ in range(9)] == list(range(9))
        client.close()


async def test_a_client_that_sends_much_gives_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "TURN_BYTES", 4 << 10)
    async with serving() as stack:
        await stack.add("a", "0 8192 zero")
        greedy, other = await ready(stack.socket), await ready(stack.socket)
        paused: list[int] = []
        (one, two) = stack.listener.clients
        for client in (one, two):
            transport = client._transport

            def pause(transport: asyncio.Transport = transport, real: Callable[[], None] = transport.pause_reading) -> None:
                paused.append(id(transport))
                real()

            monkeypatch.setattr(client, "_transport", Noting(transport, pause))
        for cookie in range(4):
            greedy.ask(Cmd.WRITE, cookie, 0, 1 << 20, payload=bytes(1 << 20))
        other.ask(Cmd.READ, 9, 0, 512)
        assert (await other.simple(512))[0] == 0
        assert [(await greedy.simple())[1] for _ in range(4)] == [0, 1, 2, 3]
        assert len(paused) > 4
        assert len(set(paused)) == 1


async def test_half_close_still_answers_everything() -> None:
    async with serving() as stack:
        disk = FakeDisk("7:0")
        device = await stack.add("a", "0 64 linear 7:0 0", disk)
        client = await ready(stack.socket)
        disk.gate = asyncio.Event()
        for cookie in range(8):
            client.ask(Cmd.READ, cookie, 0, 512)
        client.writer.write_eof()
        await turns()
        disk.gate.set()
        for cookie in range(8):
            assert (await client.simple(512))[:2] == (0, cookie)
        assert await client.at_end() == b""
        await turns()
        assert device.openers == 0


async def test_a_client_that_vanishes() -> None:
    async with serving() as stack:
        disk = FakeDisk("7:0")
        device = await stack.add("a", "0 64 linear 7:0 0", disk)
        client = await ready(stack.socket)
        disk.gate = asyncio.Event()
        client.ask(Cmd.WRITE, 1, 0, 512, payload=b"w" * 512)
        client.ask(Cmd.WRITE, 2, 512, 512, payload=b"half")
        await turns()
        client.writer.transport.abort()
        await turns()
        assert device.openers == 1  # its request is still in flight
        disk.gate.set()
        await turns()
        assert device.openers == 0
        assert disk.bytes[:1024] == b"w" * 512 + bytes(512)
        assert not stack.listener.clients


async def test_garbage_closes() -> None:
    async with serving() as stack:
        await stack.add("a", "0 64 zero")
        client = await ready(stack.socket)
        client.writer.write(b"garbage" * 100)
        assert await client.at_end() == b""
        stranger = await Client.connect(stack.socket)
        stranger.writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert (await stranger.at_end())[:8] == b"NBDMAGIC"
        scanner = await Client.connect(stack.socket)
        scanner.close()
        leaving = await (await Client.connect(stack.socket)).greet()
        leaving.writer.write_eof()
        assert await leaving.at_end() == b""
        await turns()
        assert not stack.listener.clients


async def test_silence_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HANDSHAKE_SECONDS", 0.01)
    async with serving() as stack:
        device = await stack.add("a", "0 64 zero")
        silent = await Client.connect(stack.socket)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await silent.reader.readexactly(1000)
        monkeypatch.setattr(connection, "HANDSHAKE_SECONDS", 30.0)
        good = await ready(stack.socket)
        assert device.openers == 1
        good.close()


async def test_holes_and_block_status() -> None:
    async with serving() as stack:
        disk = FakeDisk("7:0", 1024)
        disk.runs = [(128 << 10, 0), (128 << 10, HOLE | ZERO), (256 << 10, 0)]
        await stack.add("a", "0 1024 linear 7:0 0", disk)
        client = await ready(stack.socket, STATUS)
        client.ask(Cmd.READ, 1, 64 << 10, 128 << 10)
        flags, kind, _, payload = await client.chunk()
        assert (flags, kind, len(payload)) == (0, nbd.Chunk.OFFSET_DATA, 8 + (64 << 10))
        assert await client.chunk() == (1, nbd.Chunk.OFFSET_HOLE, 1, struct.pack(">QI", 128 << 10, 64 << 10))
        client.ask(Cmd.READ, 2, 0, 128 << 10)
        assert (await client.chunk())[0:2] == (1, nbd.Chunk.OFFSET_DATA)
        client.ask(Cmd.READ, 3, 64 << 10, 128 << 10, nbd.CMD_FLAG_DF)
        assert (await client.chunk())[0:2] == (1, nbd.Chunk.OFFSET_DATA)
        client.ask(Cmd.BLOCK_STATUS, 4, 0, 512 << 10)
        expected = struct.pack(">7I", 1, 128 << 10, 0, 128 << 10, 3, 256 << 10, 0)
        assert await client.chunk() == (1, nbd.Chunk.BLOCK_STATUS, 4, expected)
        client.ask(Cmd.BLOCK_STATUS, 5, 0, 512 << 10, nbd.CMD_FLAG_REQ_ONE)
        assert (await client.chunk())[3] == struct.pack(">3I", 1, 128 << 10, 0)
        client.ask(Cmd.READ, 6, 0, 0)
        assert await client.chunk() == (1, nbd.Chunk.NONE, 6, b"")
        client.close()


async def test_extended_headers() -> None:
    async with serving() as stack:
        await stack.add("a", f"0 {1 << 34} zero")
        client = await (await Client.connect(stack.socket)).greet()
        size, _ = await client.go("a", [Opt.EXTENDED_HEADERS, Opt.SET_META_CONTEXT])

        def ask(command: int, cookie: int, offset: int, length: int, flags: int = 0, payload: bytes = b"") -> None:
            client.writer.write(
                nbd.EXTENDED_REQUEST.pack(nbd.EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length) + payload
            )

        ask(Cmd.BLOCK_STATUS, 1, 0, size)
        assert await client.extended_chunk() == (1, nbd.Chunk.BLOCK_STATUS_EXT, 1, 0, struct.pack(">IIQQ", 1, 1, size, ZERO))
        ask(Cmd.TRIM, 2, 0, size)
        assert (await client.extended_chunk())[1:3] == (nbd.Chunk.NONE, 2)
        ask(Cmd.WRITE, 3, 512, 512, nbd.CMD_FLAG_PAYLOAD_LEN, bytes(512))
        assert await client.extended_chunk() == (1, nbd.Chunk.NONE, 3, 512, b"")
        client.close()


async def test_lengths_that_32_bits_cannot_say() -> None:
    async with serving() as stack:
        await stack.add("a", f"0 {1 << 34} zero")
        client = await ready(stack.socket, STATUS)
        client.ask(Cmd.BLOCK_STATUS, 1, 0, 2**32 - 512)
        _, _, _, payload = await client.chunk()
        context, length, flags = struct.unpack(">III", payload)
        assert (context, flags) == (1, ZERO)
        assert 0 < length <= 2**32 - 512
        client.close()


async def test_suspended_devices_hold_and_shutdown_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "GRACE_SECONDS", 0.01)
    async with serving() as stack:
        device = await stack.add("a", "0 64 zero")
        client = await ready(stack.socket, STRUCTURED)
        await device.suspend()
        client.ask(Cmd.READ, 1, 0, 512)
        await turns()
        await stack.listener.close()
        _, kind, cookie, payload = await client.chunk()
        assert (kind, cookie) == (nbd.Chunk.ERROR, 1)
        assert struct.unpack_from(">I", payload)[0] == nbd.Error.ESHUTDOWN
        assert device.openers == 0


async def test_shutdown_finishes_what_is_in_flight() -> None:
    async with serving() as stack:
        disk = FakeDisk("7:0")
        device = await stack.add("a", "0 64 linear 7:0 0", disk)
        client, silent = await ready(stack.socket), await Client.connect(stack.socket)
        disk.gate = asyncio.Event()
        client.ask(Cmd.WRITE, 1, 0, 512, payload=b"w" * 512)
        await turns()
        closing = asyncio.ensure_future(stack.listener.close())
        await turns()
        disk.gate.set()
        assert await client.simple() == (0, 1, b"")
        assert await client.at_end() == b""
        await silent.at_end()
        await closing
        assert device.openers == 0


async def test_an_export_that_goes_between_option_and_open() -> None:
    async with serving() as stack:
        await stack.add("a", "0 64 zero")
        client = await (await Client.connect(stack.socket)).greet()

        def vanished(name: str) -> FakeDisk:
            raise NoSuchDevice("gone")

        stack.exports.open = vanished  # type: ignore[method-assign]
        await client.go("a")
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await client.reader.readexactly(1)

"""Targets that speak NBD: the server's handshake, a server's connection, and the client with its replies."""

import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

from nbdmap.block.device import Device
from nbdmap.block.memory import MemoryDisk
from nbdmap.errors import ProtocolError
from nbdmap.nbd import constants as nbd
from nbdmap.nbd.client import Agreement, ClientHandshake
from nbdmap.nbd.constants import Cmd, Info, Opt, Rep
from nbdmap.nbd.handshake import MAX_PIPELINED_OUTPUT, Export, ServerHandshake, State, TlsMode
from nbdmap.nbd.replies import ReplyReader, Request
from nbdmap.server.connection import Connection
from nbdmap.server.shared import Shared
from tests.fuzz.mutate import Pieces
from tests.support import chunks
from tests.support.handshake import BOTH, FIXED, FakeExports, info, option, query, replies

ALL: Final = 0x1FFF
SIZE: Final = 1 << 20
ALLOCATION: Final = b"base:allocation"
MODES: Final = (TlsMode.OFF, TlsMode.OFFERED, TlsMode.REQUIRED)
OPTIONS: Final = [
    option(Opt.LIST), option(Opt.STARTTLS), option(Opt.STRUCTURED_REPLY), option(Opt.EXTENDED_HEADERS), option(Opt.ABORT),
    option(Opt.INFO, info("disk", Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)), option(Opt.GO, info("strict", 3)),
    option(Opt.GO, info("")), option(Opt.SET_META_CONTEXT, query("disk", ALLOCATION)), option(Opt.PEEK_EXPORT, b"x"),
    option(Opt.LIST_META_CONTEXT, query("", b"base:", b"")), option(Opt.EXPORT_NAME, b"disk"), option(99, bytes(40)),
]  # fmt: skip


class Handshake:
    """The server's side of the negotiation, bytes in, bytes out. The first byte says which TLS, and how it is cut."""

    name = "handshake"
    words: Sequence[bytes] = [*OPTIONS, BOTH, FIXED, info("disk"), query("disk", ALLOCATION), bytes(4), b"IHAVEOPT", bytes(70000)]
    seeds: Sequence[Pieces] = [
        [bytes([mode]), flags, *OPTIONS[first : first + 4], OPTIONS[6]]
        for mode in range(3) for flags in (BOTH, FIXED, bytes(4)) for first in range(len(OPTIONS))
    ]  # fmt: skip

    def __init__(self) -> None:
        self._exports = FakeExports()

    def join(self, pieces: Pieces) -> bytes:
        return b"".join(pieces)

    def run(self, data: bytes) -> object:
        first, data = data[0] if data else 0, data[1:]
        handshake = ServerHandshake(self._exports, MODES[first % 3])
        handshake.output.clear()
        step = (len(data) + 1, 1 + first // 3, 17, 4096)[first // 3 % 4]
        said: list[tuple[int, int]] = []
        for start in range(0, len(data), step):
            handshake.feed(data[start : start + step])
            if handshake.state is State.STARTING_TLS:
                said += [one[:2] for one in replies(handshake.output)]
                handshake.output.clear()
                try:
                    handshake.tls_started()
                except ProtocolError:
                    break
            if handshake.state is State.TRANSMISSION:
                assert handshake.session.export.size
                break
            assert len(handshake.output) <= MAX_PIPELINED_OUTPUT + 2 * 4096 + 2 * len(data)
        if handshake.state is State.CLOSED:
            before = len(handshake.output)
            handshake.feed(b"more")
            handshake.eof()
            assert len(handshake.output) == before
        if handshake.state is not State.TRANSMISSION:
            said += [one[:2] for one in replies(handshake.output)]
        return handshake.state.value, handshake.failure[:12], tuple(said[:6])


# --- a server's connection -------------------------------------------------------------------------------------------------


class Wire:
    """A transport that keeps what is written. What it is asked to do is done at once."""

    def __init__(self) -> None:
        self.out: list[bytes | memoryview] = []
        self.closing = False

    def write(self, data: bytes) -> None:
        self.out.append(data)

    def writelines(self, buffers: Sequence[bytes | memoryview]) -> None:
        self.out += buffers

    def close(self) -> None:
        self.closing = True

    abort = close

    def is_closing(self) -> bool:
        return self.closing

    def get_extra_info(self, name: str) -> Any:
        return None

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


class OneDisk:
    """An export of SIZE bytes in memory."""

    def __init__(self) -> None:
        self.disk = MemoryDisk("disk", "1:0", SIZE)

    def list(self) -> Sequence[tuple[str, str]]:
        return [("disk", "")]

    def find(self, name: str) -> Export:
        return Export("disk", "", SIZE, ALL & ~nbd.READ_ONLY, 1, 4096, 32 << 20)

    def open(self, name: str) -> Device:
        self.disk.openers += 1
        return self.disk

    async def release(self, device: Device) -> None:
        device.openers -= 1


def asked(command: int, offset: int = 0, length: int = 512, flags: int = 0, payload: bytes = b"") -> Pieces:
    """The pieces of a request: its fields, so that each is changed by itself."""
    head = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, command, 7, offset, length)
    return [head[:4], head[4:6], head[6:8], head[8:16], head[16:24], head[24:28], payload]


def asked_extended(command: int, offset: int = 0, length: int = 512, flags: int = 0, payload: bytes = b"") -> Pieces:
    head = nbd.EXTENDED_REQUEST.pack(nbd.EXTENDED_REQUEST_MAGIC, flags, command, 7, offset, length)
    return [head[:4], head[4:6], head[6:8], head[8:16], head[16:24], head[24:32], payload]


AGREED: Final = [
    BOTH + option(Opt.GO, info("disk")),
    BOTH + option(Opt.STRUCTURED_REPLY) + option(Opt.SET_META_CONTEXT, query("disk", ALLOCATION)) + option(Opt.GO, info("disk")),
    BOTH + option(Opt.EXTENDED_HEADERS) + option(Opt.SET_META_CONTEXT, query("disk", ALLOCATION)) + option(Opt.GO, info("disk")),
]


def _requests(make: Callable[..., Pieces], mode: int) -> list[Pieces]:
    each = [
        make(Cmd.READ), make(Cmd.READ, SIZE - 512), make(Cmd.WRITE, 4096, 600, 1, b"w" * 600), make(Cmd.FLUSH, 0, 0),
        make(Cmd.TRIM, 0, SIZE), make(Cmd.WRITE_ZEROES, 512, 70000, 2), make(Cmd.CACHE), make(Cmd.BLOCK_STATUS, 0, SIZE, 8),
        make(Cmd.READ, 0, 70000, 4), make(99), make(Cmd.WRITE, 0, 1 << 25, 0, b"x" * 40), make(Cmd.WRITE, 0, 512, 32, b"y" * 512),
        make(Cmd.BLOCK_STATUS, 0, 12, 32, struct.pack(">QI", 4096, 1)), make(Cmd.DISC),
    ]  # fmt: skip
    return [[bytes([mode]), *one, *each[number - 3], *each[number - 7]] for number, one in enumerate(each)]


class Requests:
    """A whole Connection on a transport of its own. The first byte says what was agreed, and how the bytes arrive."""

    name = "requests"
    words: Sequence[bytes] = [
        b"".join(asked(Cmd.READ)), b"".join(asked_extended(Cmd.READ)), struct.pack(">I", nbd.REQUEST_MAGIC), bytes(600), bytes(8),
        struct.pack(">I", nbd.EXTENDED_REQUEST_MAGIC), *(struct.pack(">H", one) for one in (0, 1, 6, 7, 32)),
    ]  # fmt: skip
    seeds: Sequence[Pieces] = [*_requests(asked, 0), *_requests(asked, 1), *_requests(asked_extended, 2), *_requests(asked, 4)]

    def __init__(self) -> None:
        self._exports = OneDisk()
        self._shared = Shared()

    def join(self, pieces: Pieces) -> bytes:
        return b"".join(pieces)

    def run(self, data: bytes) -> object:
        first, data = data[0] if data else 0, data[1:]
        wire = Wire()
        connection = Connection(self._exports, TlsMode.OFF, None, self._shared)
        connection.connection_made(wire)  # type: ignore[arg-type]
        self._feed(connection, wire, AGREED[first % 3], 1 << 20)
        assert connection._device is self._exports.disk
        wire.out.clear()
        self._feed(connection, wire, data, (1 << 20, 1 + len(data) // 3, 97, 28)[first // 3 % 4])
        ending = connection._ending
        if first & 64:
            connection.eof_received()
        assert connection._requests == 0
        assert connection._bytes == 0
        kinds = []
        for buffer in wire.out[:8]:
            if first % 3 == 0 and len(buffer) >= 16:
                kinds.append(bytes(buffer[4:8]))
            elif first % 3:
                kinds.append(bytes(buffer[4:8]) + bytes(buffer[20:24] if buffer[6] & 128 else b""))
        connection.connection_lost(None)
        return first % 3, ending, tuple(kinds)

    def _feed(self, connection: Connection, wire: Wire, data: bytes, step: int) -> None:
        start = 0
        while start < len(data) and not wire.closing and connection._reading:
            buffer = connection.get_buffer(-1)
            assert len(buffer), "room for more"
            count = min(step, len(buffer), len(data) - start)
            buffer[:count] = data[start : start + count]
            connection.buffer_updated(count)
            start += count


# --- the client ------------------------------------------------------------------------------------------------------------

GREETING: Final = nbd.GREETING.pack(nbd.INIT_MAGIC, nbd.OPTION_MAGIC, 3)
GUARD: Final = b"\xa5" * 64
AGREEMENTS: Final = [chunks.SIMPLE, chunks.STRUCTURED, chunks.EXTENDED]


def _reply(number: int, kind: int, data: bytes = b"") -> bytes:
    return nbd.OPTION_REPLY.pack(nbd.REPLY_MAGIC, number, kind, len(data)) + data


EXPORT: Final = _reply(Opt.GO, Rep.INFO, struct.pack(">HQH", 0, SIZE, ALL))
TALK: Final = [
    _reply(Opt.EXTENDED_HEADERS, Rep.ACK), _reply(Opt.EXTENDED_HEADERS, Rep.ERR_UNSUP, b"no"),
    _reply(Opt.STRUCTURED_REPLY, Rep.ACK),
    _reply(Opt.STRUCTURED_REPLY, Rep.ERR_UNSUP), _reply(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, b"\0\0\0\1" + ALLOCATION),
    _reply(Opt.SET_META_CONTEXT, Rep.ACK), EXPORT, _reply(Opt.GO, Rep.INFO, struct.pack(">HIII", 3, 512, 4096, 1 << 25)),
    _reply(Opt.GO, Rep.ACK), _reply(Opt.GO, Rep.ERR_UNSUP), _reply(Opt.GO, Rep.ERR_UNKNOWN, b"what?"),
    struct.pack(">QH", SIZE, 1), _reply(Opt.STARTTLS, Rep.ACK), _reply(Opt.STARTTLS, Rep.ERR_POLICY),
]  # fmt: skip


def _in_flight() -> list[Request]:
    """What is asked: cookies 1 to 6. Reads have guards around their memory."""
    memory = [memoryview(bytearray(GUARD + bytes(4096) + GUARD)) for _ in range(2)]
    return [
        Request(Cmd.READ, 0, 4096, memory[0][64:-64]), Request(Cmd.READ, 8192, 4096, memory[1][64:-64]),
        Request(Cmd.BLOCK_STATUS, 0, 65536), Request(Cmd.WRITE, 0, 512, memoryview(bytes(512))), Request(Cmd.FLUSH, 0, 0),
        Request(Cmd.TRIM, 4096, 512),
    ]  # fmt: skip


def _answers(agreement: Agreement) -> list[bytes]:
    """An honest answer to each, in parts where there may be parts."""
    reader, requests = ReplyReader(agreement), _in_flight()
    for request in requests:
        reader.begin(request)
    first, second, status, *others = requests
    if not (agreement.structured or agreement.extended):
        data = [chunks.simple(one, data=bytes(4096)) for one in (first, second)]
        return [*data, *(chunks.simple(one) for one in others), chunks.simple(status, 22)]
    return [
        chunks.data_chunk(agreement, first, 0, bytes(1000)), chunks.data_chunk(agreement, second, 8192, bytes(4096), 1),
        chunks.hole(agreement, first, 1000, 3096), chunks.done(agreement, first),
        chunks.status(agreement, status, (4096, 0), (61440, 3)), chunks.error_chunk(agreement, others[0], 5, b"text", 1),
        *(chunks.done(agreement, one) for one in others[1:]),
    ]  # fmt: skip


def _replies_seeds() -> list[Pieces]:
    seeds: list[Pieces] = []
    for mode, agreement in enumerate(AGREEMENTS, 1):
        answers = _answers(agreement)
        for first in range(len(answers)):
            turned = answers[first:] + answers[:first]
            head = 32 if agreement.extended else 20 if agreement.structured else 16
            parts = [part for one in turned for part in (one[:4], one[4:8], one[8:head], one[head:])]
            seeds.append([bytes([mode]), *parts])
    return seeds


class Client:
    """The client: its handshake (first byte 0 or 4 modulo 4), or its reading of replies with requests in flight."""

    name = "client"
    words: Sequence[bytes] = [*TALK, GREETING, *(one for agreement in AGREEMENTS for one in _answers(agreement)), bytes(1000)]
    seeds: Sequence[Pieces] = [
        [b"\0", GREETING, TALK[0], TALK[4], TALK[5], EXPORT, TALK[7], TALK[8]],
        [b"\0", GREETING, TALK[1], TALK[2], TALK[4], TALK[5], EXPORT, TALK[8]],
        [b"\0", GREETING, TALK[1], TALK[3], EXPORT, TALK[8]],
        [b"\0", GREETING, TALK[1], TALK[3], TALK[9], TALK[11]],
        [b"\0", GREETING[:-1] + b"\0", TALK[11], bytes(124)],
        [b"\4", GREETING, TALK[12], TALK[1], TALK[3], EXPORT, TALK[8]],
        [b"\0", GREETING, TALK[1], TALK[3], TALK[10]],
        *_replies_seeds(),
    ]  # fmt: skip

    def join(self, pieces: Pieces) -> bytes:
        return b"".join(pieces)

    def run(self, data: bytes) -> object:
        first, data = data[0] if data else 0, data[1:]
        step = (1 << 20, 1 + len(data) // 2, 61, 16)[first // 8 % 4]
        return self._replies(first % 4, data, step) if first % 4 else self._handshake(bool(first & 4), data, step)

    def _handshake(self, tls: bool, data: bytes, step: int) -> object:
        handshake = ClientHandshake("disk", tls=tls)
        for start in range(0, len(data), step):
            handshake.feed(data[start : start + step])
            if handshake.state is State.STARTING_TLS:
                handshake.tls_started()
            if handshake.state is not State.NEGOTIATING:
                break
            assert len(handshake.output) < 4096
        handshake.eof()
        agreement = getattr(handshake, "agreement", None)
        assert agreement is None or 0 <= agreement.size < 1 << 63
        return handshake.state.value, handshake.failure[:20], agreement and (agreement.structured, agreement.extended)

    def _replies(self, mode: int, data: bytes, step: int) -> object:
        reader, requests = ReplyReader(AGREEMENTS[mode - 1]), _in_flight()
        for request in requests:
            reader.begin(request)
        outcome, start, finished = "", 0, []
        try:
            while start < len(data):
                buffer = reader.get_buffer()
                assert len(buffer), "room for more"
                count = min(step, len(buffer), len(data) - start)
                buffer[:count] = data[start : start + count]
                finished += reader.advance(count)
                start += count
        except ProtocolError as error:
            outcome = error.message[:16]
        gone = len(requests) - len(reader.pending)  # with a broken stream the last ones count as not answered
        assert len(finished) == len({id(one) for one in finished}) == gone or (outcome and len(finished) < gone)
        for one in requests[:2]:
            memory = one.data.obj
            assert isinstance(memory, bytearray)
            assert memory.startswith(GUARD)
            assert memory.endswith(GUARD)
        for one in finished:
            if one.command == Cmd.BLOCK_STATUS and not one.error:
                assert 0 < sum(length for length, _ in one.extents) <= one.length
            assert one.message.isprintable()
        return mode, outcome, tuple((one.cookie, one.error) for one in finished)



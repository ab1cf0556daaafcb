"""nbdmap.nbd.transmission: requests whole, byte by byte and with junk behind; every kind of reply."""

import errno
import mmap
import random
import struct

import pytest

from nbdmap.errors import ProtocolError
from nbdmap.nbd import constants as nbd
from nbdmap.nbd.constants import Chunk, Cmd, Error
from nbdmap.nbd.transmission import BUFFER_SIZE, LARGE, ReceiveBuffer, Replies, Request, RequestReader, wire_error


def encode(
    command: int, cookie: int, offset: int, length: int, flags: int = 0, *, extended: bool = False, payload: bytes = b""
) -> bytes:
    """A request's bytes."""
    header = nbd.EXTENDED_REQUEST if extended else nbd.REQUEST
    magic = nbd.EXTENDED_REQUEST_MAGIC if extended else nbd.REQUEST_MAGIC
    return header.pack(magic, flags, command, cookie, offset, length) + payload


def show(request: Request) -> tuple[int, int, int, int, int, bytes | None]:
    """What can be compared."""
    payload = None if request.payload is None else bytes(request.payload)
    return request.flags, request.command, request.cookie, request.offset, request.length, payload


def drain(reader: RequestReader) -> list[tuple[int, int, int, int, int, bytes | None]]:
    """All requests that are there."""
    return [show(request) for request in iter(reader.next, None)]


def receive(reader: RequestReader, data: bytes, step: int) -> list[tuple[int, int, int, int, int, bytes | None]]:
    """Gives `data` in pieces of at most `step` bytes, as a socket would."""
    found = []
    rest = memoryview(data)
    while rest:
        buffer = reader.get_buffer()
        assert len(buffer) > 0
        count = min(step, len(buffer), len(rest))
        buffer[:count] = rest[:count]
        reader.advance(count)
        rest = rest[count:]
        found += drain(reader)
    return found


SESSION = [
    (Cmd.READ, 1, 0, 4096, 0, None),
    (Cmd.WRITE, 2, 512, 512, nbd.CMD_FLAG_FUA, b"a" * 512),
    (Cmd.WRITE, 3, 0, 0, 0, b""),
    (Cmd.FLUSH, 2**64 - 1, 0, 0, 0, None),
    (Cmd.WRITE, 5, 2**63, 3000, 0, bytes(range(250)) * 12),
    (Cmd.DISC, 6, 0, 0, 0, None),
    (77, 7, 1, 4000, 0xFFFF & ~nbd.CMD_FLAG_PAYLOAD_LEN, None),
]


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("step", [1, 7, 28, 100, 1 << 20])
def test_a_session_in_pieces(extended: bool, step: int) -> None:
    stream = b"".join(
        encode(command, cookie, offset, length, flags, extended=extended, payload=payload or b"")
        for command, cookie, offset, length, flags, payload in SESSION
    )
    expected = [(flags, command, cookie, offset, length, data) for command, cookie, offset, length, flags, data in SESSION]
    assert receive(RequestReader(extended), stream, step) == expected
    fed = RequestReader(extended)
    fed.feed(stream)
    assert drain(fed) == expected


@pytest.mark.parametrize("extended", [False, True])
def test_junk_behind_a_request_is_told_from_it(extended: bool) -> None:
    reader = RequestReader(extended)
    reader.feed(encode(Cmd.READ, 1, 0, 512, extended=extended) + b"junk" * 10)
    assert reader.next() is not None
    with pytest.raises(ProtocolError, match="a request starts with 0x6a756e6b"):
        reader.next()


def test_the_other_magic_is_refused() -> None:
    for extended in (False, True):
        reader = RequestReader(extended)
        reader.feed(encode(Cmd.READ, 1, 0, 512, extended=not extended) + bytes(8))
        with pytest.raises(ProtocolError, match="was expected"):
            reader.next()


@pytest.mark.parametrize("step", [1000, 1 << 20])
def test_large_payloads_are_received_in_their_own_buffer(step: int) -> None:
    rng = random.Random(1)
    payloads = [rng.randbytes(size) for size in (LARGE, 3 << 20, LARGE + 1, 10, BUFFER_SIZE)]
    stream = b"".join(encode(Cmd.WRITE, n, 0, len(data), payload=data) for n, data in enumerate(payloads))
    stream += encode(Cmd.READ, 9, 0, 1)
    assert [entry[5] for entry in receive(RequestReader(False), stream, step)] == [*payloads, None]


def test_after_a_large_payload_the_header_comes_alone() -> None:
    reader = RequestReader(False)
    receive(reader, encode(Cmd.WRITE, 1, 0, LARGE, payload=bytes(LARGE)), 1 << 20)
    assert len(reader.get_buffer()) == nbd.REQUEST.size
    receive(reader, encode(Cmd.READ, 1, 0, 512), 1 << 20)
    assert len(reader.get_buffer()) == BUFFER_SIZE


def test_announced_payloads_cost_no_memory_before_they_come() -> None:
    reader = RequestReader(False)
    reader.feed(encode(Cmd.WRITE, 1, 0, nbd.MAX_PAYLOAD))
    assert reader.next() is None
    payload = reader.get_buffer()
    assert len(payload) == nbd.MAX_PAYLOAD
    assert isinstance(payload.obj, mmap.mmap)


@pytest.mark.parametrize("step", [28, 1 << 20])
def test_payloads_that_are_too_large_are_dropped(step: int) -> None:
    length = nbd.MAX_PAYLOAD + 512
    stream = encode(Cmd.WRITE, 1, 0, length, payload=b"x" * length) + encode(Cmd.READ, 2, 0, 512)
    reader = RequestReader(False)
    head = stream[: 28 * 4]
    receive(reader, head, step)
    rest = receive(reader, stream[len(head) :], 1 << 20)
    assert rest == [(0, Cmd.WRITE, 1, 0, length, None), (0, Cmd.READ, 2, 0, 512, None)]
    reader.feed(encode(Cmd.WRITE, 1, 0, 2**32 - 1))
    assert reader.next() is None


def test_oversize_is_marked() -> None:
    length = nbd.MAX_PAYLOAD + 1
    reader = RequestReader(True)
    reader.feed(encode(Cmd.WRITE, 1, 0, length, nbd.CMD_FLAG_PAYLOAD_LEN, extended=True))
    assert reader.next() is None
    dropped = 0
    while dropped < length:
        assert reader.next() is None
        count = min(len(reader.get_buffer()), length - dropped)
        reader.advance(count)
        dropped += count
    request = reader.next()
    assert request is not None
    assert request.oversize
    reader.feed(encode(Cmd.WRITE, 1, 0, 2**32, extended=True))
    with pytest.raises(ProtocolError, match="4294967296 bytes is more than can be skipped"):
        reader.next()


def test_other_commands_carry_payload_only_where_they_say_so() -> None:
    body = struct.pack(">QI", 4096, 1)
    status = encode(Cmd.BLOCK_STATUS, 1, 0, len(body), nbd.CMD_FLAG_PAYLOAD_LEN, extended=True, payload=body)
    assert receive(RequestReader(True), status, 5)[0][5] == body
    reader = RequestReader(False)
    reader.feed(encode(Cmd.BLOCK_STATUS, 1, 0, 4096, nbd.CMD_FLAG_PAYLOAD_LEN))
    assert drain(reader)[0][5] is None


def test_requests_that_borrow_keep_their_bytes() -> None:
    reader = RequestReader(False)
    reader.feed(encode(Cmd.WRITE, 1, 0, 512, payload=b"1" * 512) + encode(Cmd.WRITE, 2, 0, 512, payload=b"2" * 512)[:100])
    first = reader.next()
    assert first is not None
    assert first.borrowed
    assert first.payload is not None
    assert reader.next() is None  # the second is moved into a buffer of its own
    reader.renew()
    receive(reader, b"2" * (512 + 28 - 100) + encode(Cmd.WRITE, 3, 0, 512, payload=b"3" * 512), 1 << 20)
    assert bytes(first.payload) == b"1" * 512


def test_readers_share_a_buffer() -> None:
    shared = ReceiveBuffer()
    first, second = RequestReader(False, shared), RequestReader(False, shared)
    one, other = encode(Cmd.WRITE, 1, 0, 8, payload=b"first123"), encode(Cmd.WRITE, 2, 0, 8, payload=b"second45")
    for step in range(1, len(one)):
        found = receive(first, one[:step], 1 << 20)
        first.settle()
        found += receive(second, other[:step], 1 << 20)
        second.settle()
        found += receive(first, one[step:], 1 << 20)
        first.settle()
        found += receive(second, other[step:], 1 << 20)
        second.settle()
        assert [entry[5] for entry in found] == [b"first123", b"second45"]


def test_a_buffer_is_left_to_who_borrowed_it() -> None:
    shared = ReceiveBuffer()
    first, second = RequestReader(False, shared), RequestReader(False, shared)
    first.feed(encode(Cmd.WRITE, 1, 0, 8, payload=b"borrowed") + b"%\x60")
    request = first.next()
    assert request is not None
    assert request.borrowed
    first.renew()
    receive(second, encode(Cmd.WRITE, 2, 0, 8, payload=b"other678"), 1 << 20)
    assert request.payload == b"borrowed"
    assert first.next() is None
    first.feed(encode(Cmd.READ, 3, 0, 8)[2:])
    assert drain(first)[0][2] == 3
    first.settle()


def test_what_was_put_by_is_not_borrowed() -> None:
    reader = RequestReader(False)
    reader.feed(encode(Cmd.WRITE, 1, 0, 8, payload=b"put away"))
    reader.settle()
    reader.settle()
    request = reader.next()
    assert request is not None
    assert not request.borrowed
    assert request.payload == b"put away"


def test_a_buffer_full_of_requests_grows() -> None:
    reader = RequestReader(False)
    one = encode(Cmd.READ, 1, 0, 512)
    count = 2 * BUFFER_SIZE // len(one)
    reader.feed(one * count)
    assert len(drain(reader)) == count


@pytest.mark.parametrize("step", [1, 3, 1 << 20])
def test_random_streams(step: int) -> None:
    rng = random.Random(step)
    sent = []
    stream = b""
    for cookie in range(40):
        payload = rng.randbytes(rng.choice((0, 1, 100, 5000))) if rng.random() < 0.5 else None
        length = len(payload) if payload is not None else rng.randrange(1 << 32)
        command = Cmd.WRITE if payload is not None else rng.choice((Cmd.READ, Cmd.TRIM, Cmd.FLUSH))
        sent.append((0, command, cookie, 7, length, payload))
        stream += encode(command, cookie, 7, length, payload=payload or b"")
    assert receive(RequestReader(False), stream, step) == sent


# --- replies -------------------------------------------------------------------------------------------------------------

READ = Request(0, Cmd.READ, 77, 4096, 3)
WRITE = Request(0, Cmd.WRITE, 78, 0, 512)
SIMPLE, STRUCTURED, EXTENDED = Replies(False, False), Replies(True, False), Replies(False, True)


def structured(kind: int, payload: bytes, *, cookie: int = 77, flags: int = 1) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(payload)) + payload


def extended(kind: int, payload: bytes, *, cookie: int = 77, offset: int = 4096, flags: int = 1) -> bytes:
    return struct.pack(">IHHQQQ", 0x6E8A278C, flags, kind, cookie, offset, len(payload)) + payload


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        (SIMPLE, struct.pack(">IIQ", 0x67446698, 0, 77) + b"abc"),
        (STRUCTURED, structured(1, struct.pack(">Q", 4096) + b"abc")),
        (EXTENDED, extended(1, struct.pack(">Q", 4096) + b"abc")),
    ],
)
def test_reads(replies: Replies, expected: bytes) -> None:
    buffer, data = replies.read(READ)
    data[:] = b"abc"
    assert bytes(buffer) == expected


def test_data_and_holes() -> None:
    buffer, data = STRUCTURED.data(READ, 5000, 2, done=False)
    data[:] = b"xy"
    assert bytes(buffer) == structured(1, struct.pack(">Q", 5000) + b"xy", flags=0)
    assert STRUCTURED.hole(READ, 4096, 3, done=True) == structured(2, struct.pack(">QI", 4096, 3))
    assert EXTENDED.hole(READ, 4096, 3, done=False) == extended(2, struct.pack(">QI", 4096, 3), flags=0)


def test_done() -> None:
    simple = struct.pack(">IIQ", 0x67446698, 0, 78)
    assert SIMPLE.done(WRITE) == STRUCTURED.done(WRITE) == simple
    assert SIMPLE.done(READ) == struct.pack(">IIQ", 0x67446698, 0, 77)
    assert STRUCTURED.done(READ) == structured(0, b"")
    assert EXTENDED.done(WRITE) == extended(0, b"", cookie=78, offset=0)


def test_errors() -> None:
    assert SIMPLE.error(READ, Error.EIO, "why") == struct.pack(">IIQ", 0x67446698, 5, 77)
    assert STRUCTURED.error(READ, Error.EIO, "why") == structured(2**15 + 1, struct.pack(">IH", 5, 3) + b"why")
    assert EXTENDED.error(READ, Error.EINVAL, "") == extended(2**15 + 1, struct.pack(">IH", 22, 0))
    long = STRUCTURED.error(READ, Error.EIO, "é" * 4096)
    assert len(long) == 20 + 6 + 4096
    assert long[26:].decode() == "é" * 2048
    assert len(STRUCTURED.error(READ, Error.EIO, "x" + "é" * 4096)) == 20 + 6 + 4095
    STRUCTURED.error(READ, Error.EIO, "\udcff")  # from a path that is not UTF-8


def test_block_status() -> None:
    extents = [(4096, 0), (512, 3)]
    body = struct.pack(">5I", 1, 4096, 0, 512, 3)
    assert STRUCTURED.block_status(READ, 1, extents, done=True) == structured(Chunk.BLOCK_STATUS, body)
    body = struct.pack(">II4Q", 1, 2, 4096, 0, 512, 3)
    assert EXTENDED.block_status(READ, 1, extents, done=False) == extended(Chunk.BLOCK_STATUS_EXT, body, flags=0)


@pytest.mark.parametrize(
    ("number", "flags", "error"),
    [
        (errno.EPERM, 0, Error.EPERM),
        (errno.EROFS, 0, Error.EPERM),
        (errno.EDQUOT, 0, Error.ENOSPC),
        (errno.EFBIG, 0, Error.ENOSPC),
        (errno.EOPNOTSUPP, 0, Error.EINVAL),
        (errno.EOPNOTSUPP, nbd.CMD_FLAG_FAST_ZERO, Error.ENOTSUP),
        (errno.EILSEQ, 0, Error.EIO),
        (errno.ETIMEDOUT, 0, Error.EIO),
        (errno.ESHUTDOWN, 0, Error.ESHUTDOWN),
        (99999, 0, Error.EIO),
    ],
)
def test_errors_on_the_wire(number: int, flags: int, error: Error) -> None:
    assert wire_error(number, flags) is error

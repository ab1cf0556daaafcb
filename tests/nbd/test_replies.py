import errno
import itertools
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdmap.errors import ProtocolError
from nbdmap.nbd import replies
from nbdmap.nbd.client import Agreement
from nbdmap.nbd.constants import (
    CMD_FLAG_FUA,
    CMD_FLAG_PAYLOAD_LEN,
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    Chunk,
    Cmd,
)
from nbdmap.nbd.replies import AFTER_LARGE, DIRECT, MAX_EXTENTS, MAX_STATUS, READ_AHEAD, ReplyReader, Request, cover, whole_blocks
from tests.support.chunks import (
    CHUNKED,
    DONE,
    EXTENDED,
    SIMPLE,
    STRUCTURED,
    chunk,
    data_chunk,
    done,
    error_chunk,
    hole,
    read_of,
    simple,
    status,
)


def begun(agreement: Agreement, *requests: Request) -> ReplyReader:
    reader = ReplyReader(agreement)
    for request in requests:
        assert len(reader.begin(request)) == (32 if agreement.extended else 28)
    return reader


def receive(reader: ReplyReader, data: bytes, most: int = 1 << 30) -> list[Request]:
    """Gives the reader what a socket would, at most `most` bytes at a time."""
    finished = []
    while data:
        buffer = reader.get_buffer()
        length = min(len(buffer), len(data), most)
        assert length
        buffer[:length] = data[:length]
        finished += reader.advance(length)
        data = data[length:]
    return finished


def refused(agreement: Agreement, request: Request, data: bytes) -> str:
    reader = begun(agreement, request)
    with pytest.raises(ProtocolError) as caught:
        receive(reader, data)
    return caught.value.message


# --- requests ----------------------------------------------------------------------------------------------------------
def test_headers() -> None:
    write = Request(Cmd.WRITE, 4096, 3, memoryview(b"abc"), CMD_FLAG_FUA)
    trim = Request(Cmd.TRIM, 0, 1 << 20)
    reader = ReplyReader(SIMPLE)
    assert reader.begin(write) == struct.pack(">IHHQQI", REQUEST_MAGIC, 1, 1, 1, 4096, 3)
    assert reader.begin(trim) == struct.pack(">IHHQQI", REQUEST_MAGIC, 0, 4, 2, 0, 1 << 20)
    assert reader.pending == {1: write, 2: trim}
    reader = ReplyReader(EXTENDED)
    flags = CMD_FLAG_FUA | CMD_FLAG_PAYLOAD_LEN
    assert reader.begin(write) == struct.pack(">IHHQQQ", EXTENDED_REQUEST_MAGIC, flags, 1, 1, 4096, 3)
    assert reader.begin(trim) == struct.pack(">IHHQQQ", EXTENDED_REQUEST_MAGIC, 0, 4, 2, 0, 1 << 20)


def test_a_request_can_start_again() -> None:
    request = Request(Cmd.FLUSH, 0, 0)
    request.fail(errno.EIO, "first")
    request.fail(errno.EPERM, "second")
    assert (request.error, request.message) == (errno.EIO, "first")
    request.restart()
    assert (request.error, request.message, request.cookie) == (0, "", 0)


# --- every reply: whole, byte by byte, before another one --------------------------------------------------------------
def answers(agreement: Agreement) -> list[tuple[Request, bytes, int]]:
    """Requests with a good answer each, and the errno of that."""
    flush, read, failed = Request(Cmd.FLUSH, 0, 0), read_of(1000, 100), Request(Cmd.WRITE, 0, 3, memoryview(b"abc"))
    for cookie, request in enumerate([flush, read, failed], 1):
        request.cookie = cookie
    if not agreement.structured and not agreement.extended:
        return [(flush, simple(flush), 0), (read, simple(read, 0, bytes(range(100))), 0), (failed, simple(failed, 28), 28)]
    plain = simple(flush) if agreement.structured else done(agreement, flush)
    pieces = [
        data_chunk(agreement, read, 1060, bytes(range(60, 100))),
        hole(agreement, read, 1000, 0x10),
        data_chunk(agreement, read, 1016, bytes(range(16, 60)), DONE),
    ]
    return [
        (flush, plain, 0),
        (read, b"".join(pieces), 0),
        (failed, error_chunk(agreement, failed, 28, b"no space\n", DONE), 28),
    ]


@pytest.mark.parametrize("agreement", [SIMPLE, STRUCTURED, EXTENDED])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("most", [1, 7, 1 << 20])
def test_answers_in_any_order(agreement: Agreement, order: list[int], most: int) -> None:
    script = answers(agreement)
    reader = begun(agreement, *(request for request, _, _ in script))
    finished = receive(reader, b"".join(script[index][1] for index in order), most)
    assert finished == [script[index][0] for index in order]
    assert [request.error for request in finished] == [script[index][2] for index in order]
    expected = bytes(range(100)) if agreement is SIMPLE else bytes(16) + bytes(range(16, 100))
    assert script[1][0].data == expected
    assert not reader.pending


@pytest.mark.parametrize("agreement", CHUNKED)
def test_interleaved_chunks(agreement: Agreement) -> None:
    reads = [read_of(index * 512, 512) for index in range(8)]
    reader = begun(agreement, *reads)
    places = [(read, at) for read in reads for at in range(0, 512, 64)]
    pieces = [data_chunk(agreement, read, read.offset + at, bytes([at // 64 + 1]) * 64) for read, at in places]
    random.Random(1).shuffle(pieces)
    assert receive(reader, b"".join(pieces), 100) == []
    assert receive(reader, b"".join(done(agreement, read) for read in reads)) == reads
    assert all(read.data == b"".join(bytes([value]) * 64 for value in range(1, 9)) and not read.error for read in reads)


# --- where payload is received -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("agreement", [SIMPLE, STRUCTURED, EXTENDED])
def test_large_payload_is_received_in_place(agreement: Agreement) -> None:
    memory = bytearray(1 << 20)
    request = Request(Cmd.READ, 0, 1 << 20, memoryview(memory))
    reader = begun(agreement, request)
    payload = random.Random(2).randbytes(1 << 20)
    whole = simple(request, 0, payload) if agreement is SIMPLE else data_chunk(agreement, request, 0, payload, DONE)
    buffer = reader.get_buffer()
    assert len(buffer) == READ_AHEAD
    buffer[:] = whole[:READ_AHEAD]
    assert reader.advance(READ_AHEAD) == []
    buffer = reader.get_buffer()
    assert buffer.obj is memory
    assert len(buffer) == len(whole) - READ_AHEAD
    buffer[:1000] = whole[READ_AHEAD : READ_AHEAD + 1000]
    assert reader.advance(1000) == []
    buffer = reader.get_buffer()
    assert buffer.obj is memory
    buffer[:] = whole[READ_AHEAD + 1000 :]
    assert reader.advance(len(buffer)) == [request]
    assert memory == payload
    assert len(reader.get_buffer()) == AFTER_LARGE, "the next large payload should not begin in the wrong place"
    small = read_of(0, 512)
    reader.begin(small)
    assert receive(reader, simple(small, 5) if agreement is SIMPLE else error_chunk(agreement, small, 5, flags=DONE)) == [small]
    assert len(reader.get_buffer()) == READ_AHEAD


@pytest.mark.parametrize("agreement", [SIMPLE, STRUCTURED, EXTENDED])
@pytest.mark.parametrize("arrived", [0, 10, 16, 28, 40, 100, 50_000])
def test_abandoned_read_touches_nothing(agreement: Agreement, arrived: int) -> None:
    memory = bytearray(100_000)
    request, other = Request(Cmd.READ, 0, len(memory), memoryview(memory)), Request(Cmd.FLUSH, 0, 0)
    reader = begun(agreement, request, other)
    payload = b"\xff" * len(memory)
    whole = simple(request, 0, payload) if agreement is SIMPLE else data_chunk(agreement, request, 0, payload, DONE)
    whole += simple(other) if not agreement.extended else done(agreement, other)
    assert receive(reader, whole[:arrived]) == []
    before = bytes(memory)
    reader.abandon(request)
    memory.append(0)  # nobody holds on to it
    assert receive(reader, whole[arrived:]) == [request, other]
    assert memory == before + b"\0"


def test_abandoned_others() -> None:
    write, flush = Request(Cmd.WRITE, 0, 3, memoryview(b"abc")), Request(Cmd.FLUSH, 0, 0)
    reader = begun(SIMPLE, write, flush)
    reader.abandon(write)
    assert receive(reader, simple(write) + simple(flush)) == [write, flush]


# --- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("agreement", CHUNKED)
def test_an_error_on_any_chunk_counts(agreement: Agreement) -> None:
    request = read_of(0, 1024)
    reader = begun(agreement, request)
    pieces = [
        data_chunk(agreement, request, 0, bytes(512)),
        chunk(agreement, request, Chunk.ERROR_OFFSET, struct.pack(">IH3sQ", errno.EIO, 3, b"bad", 600)),
        chunk(agreement, request, Chunk.ERROR_OFFSET, struct.pack(">IHQ", errno.EPERM, 0, 0)),
        error_chunk(agreement, request, errno.EPERM, b"other"),
    ]
    assert receive(reader, b"".join(pieces)) == []
    assert receive(reader, done(agreement, request)) == [request]
    assert (request.error, request.message) == (errno.EIO, "bad")


@pytest.mark.parametrize("agreement", CHUNKED)
def test_unknown_errors(agreement: Agreement) -> None:
    request = read_of(0, 512)
    reader = begun(agreement, request)
    body = struct.pack(">IH", 999, 2) + b"hmtail"
    assert receive(reader, chunk(agreement, request, 2**15 + 77, body, DONE)) == [request]
    assert (request.error, request.message) == (errno.EINVAL, "hm")
    request = read_of(0, 512)
    assert receive(begun(SIMPLE, request), simple(request, 12345)) == [request]
    assert request.error == errno.EINVAL


@pytest.mark.parametrize("agreement", CHUNKED)
def test_what_is_left_out_is_an_error(agreement: Agreement) -> None:
    nothing, half, stat = read_of(0, 512), read_of(0, 512), Request(Cmd.BLOCK_STATUS, 0, 512)
    reader = begun(agreement, nothing, half, stat)
    data = done(agreement, nothing) + data_chunk(agreement, half, 0, bytes(511), DONE) + done(agreement, stat)
    assert receive(reader, data) == [nothing, half, stat]
    assert [request.error for request in (nothing, half, stat)] == [errno.EIO] * 3


# --- block status ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("agreement", CHUNKED)
def test_block_status(agreement: Agreement) -> None:
    request = Request(Cmd.BLOCK_STATUS, 4096, 10000)
    reader = begun(agreement, request)
    other = status(agreement, request, (1, 1), context=9, flags=0)
    assert receive(reader, other + status(agreement, request, (4000, 0), (1000, 7), (2**32 - 1, 2), (5, 5))) == [request]
    assert request.extents == [(4000, 0), (1000, 3), (5000, 2)]


@pytest.mark.parametrize("agreement", CHUNKED)
def test_block_status_of_many_extents(agreement: Agreement) -> None:
    request = Request(Cmd.BLOCK_STATUS, 0, 1 << 30)
    reader = begun(agreement, request)
    many = [(512, index % 2) for index in range(MAX_EXTENTS + 1000)]
    assert receive(reader, status(agreement, request, *many)) == [request]
    assert request.extents == many[:MAX_EXTENTS]


# --- what puts the stream out of step ----------------------------------------------------------------------------------
def asked() -> tuple[Request, Request]:
    """A read and a block status as the first request of a connection."""
    read, stat = read_of(1000, 100), Request(Cmd.BLOCK_STATUS, 1000, 100)
    read.cookie = stat.cookie = 1
    return read, stat


@pytest.mark.parametrize("agreement", [SIMPLE, STRUCTURED, EXTENDED])
def test_magic_and_cookie(agreement: Agreement) -> None:
    read, _ = asked()
    assert "reply magic 0x00000000" in refused(agreement, read, bytes(32))
    read.cookie = 2
    wrong = done(agreement, read) if agreement.extended else simple(read)
    assert "cookie 0x2, which no request has" in refused(agreement, read_of(0, 512), wrong)


def test_replies_of_another_kind() -> None:
    read, stat = asked()
    assert "reply magic" in refused(SIMPLE, read, done(STRUCTURED, read))
    assert "reply magic" in refused(EXTENDED, read, done(STRUCTURED, read) + bytes(12))
    assert "a simple reply to READ" in refused(STRUCTURED, read, simple(read, 5))
    assert receive(begun(STRUCTURED, stat), simple(stat, 22)) == [stat]
    read.offset = 1001
    wrong = done(EXTENDED, read)
    assert "offset 1001, which is not that of its request" in refused(EXTENDED, asked()[0], wrong)


def test_twice_the_same_answer() -> None:
    flush = Request(Cmd.FLUSH, 0, 0)
    reader = begun(SIMPLE, flush)
    answer = simple(flush)
    assert receive(reader, answer) == [flush]
    with pytest.raises(ProtocolError):
        receive(reader, answer)


@pytest.mark.parametrize("agreement", CHUNKED)
@pytest.mark.parametrize(
    ("offset", "size"),
    [(999, 1), (1100, 1), (1099, 2), (0, 100), (2**64 - 1, 1), (1000, 0), (1000, 101), (1000, 2**31)],
)
def test_payload_outside_of_the_request(agreement: Agreement, offset: int, size: int) -> None:
    read, _ = asked()
    assert "which were not asked for" in refused(agreement, read, hole(agreement, read, offset, size))
    if 0 < size < 1000:
        assert "which were not asked for" in refused(agreement, read, data_chunk(agreement, read, offset, bytes(size)))


@pytest.mark.parametrize("agreement", CHUNKED)
@pytest.mark.parametrize(("offset", "size"), [(1000, 1), (1040, 20), (1000, 100), (1049, 1), (1049, 50), (1050, 1)])
def test_overlapping_payload(agreement: Agreement, offset: int, size: int) -> None:
    read, _ = asked()
    middle = hole(agreement, read, 1000, 50) + hole(agreement, read, 1050, 1)
    assert "or came before" in refused(agreement, read, middle + hole(agreement, read, offset, size))


def test_payload_for_others() -> None:
    _, stat = asked()
    assert "which were not asked for" in refused(STRUCTURED, stat, hole(STRUCTURED, stat, 1000, 10))
    assert "which were not asked for" in refused(STRUCTURED, stat, data_chunk(STRUCTURED, stat, 1000, b"x"))
    read, _ = asked()
    assert "a status chunk of 12 bytes to READ" in refused(STRUCTURED, read, status(STRUCTURED, read, (1, 0)))


def test_too_many_fragments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "MAX_FRAGMENTS", 10)
    read, _ = asked()
    data = b"".join(hole(STRUCTURED, read, 1000 + at, 1) for at in range(0, 22, 2))
    assert "more than 10 fragments" in refused(STRUCTURED, read, data)
    assert receive(begun(STRUCTURED, asked()[0]), data[:320]) == []


@pytest.mark.parametrize("agreement", CHUNKED)
def test_chunks_that_cannot_be(agreement: Agreement) -> None:
    read, stat = asked()
    for kind, data, flags in [
        (Chunk.NONE, b"", 0),
        (Chunk.NONE, b"x", DONE),
        (Chunk.OFFSET_DATA, bytes(8), DONE),
        (Chunk.OFFSET_HOLE, bytes(11), DONE),
        (Chunk.OFFSET_HOLE, bytes(13), DONE),
        (3, b"", DONE),
        (99, bytes(4), DONE),
        (Chunk.BLOCK_STATUS if agreement.extended else Chunk.BLOCK_STATUS_EXT, bytes(24), DONE),
    ]:
        assert f"a chunk of type {int(kind)}" in refused(agreement, read, chunk(agreement, read, kind, data, flags))
    kind = Chunk.BLOCK_STATUS_EXT if agreement.extended else Chunk.BLOCK_STATUS
    head, entry = (8, 16) if agreement.extended else (4, 8)
    for length in (0, head, head + entry - 1, head + entry + 1, head + (MAX_STATUS + 1) * entry):
        assert "a status chunk of" in refused(agreement, stat, chunk(agreement, stat, kind, bytes(length)))
    assert "an extent of no bytes" in refused(agreement, stat, status(agreement, stat, (10, 0), (0, 0), (10, 0)))
    twice = status(agreement, stat, (10, 0), flags=0) * 2
    assert "two status chunks" in refused(agreement, stat, twice)


def test_extended_status_counts() -> None:
    _, stat = asked()
    body = struct.pack(">IIQQ", 5, 2, 100, 0)
    assert "of 2 extents has 1" in refused(EXTENDED, stat, chunk(EXTENDED, stat, Chunk.BLOCK_STATUS_EXT, body, DONE))


@pytest.mark.parametrize("agreement", CHUNKED)
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (Chunk.ERROR, bytes(5)),
        (Chunk.ERROR, bytes(6)),
        (Chunk.ERROR, struct.pack(">IH", 5, 1)),
        (Chunk.ERROR, struct.pack(">IH", 5, 0xFFFF) + bytes(4096)),
        (Chunk.ERROR, struct.pack(">IH", 5, 5000) + bytes(5000)),
        (Chunk.ERROR_OFFSET, struct.pack(">IHQ", 5, 0, 1000)[:13]),
        (Chunk.ERROR_OFFSET, struct.pack(">IHQ", 5, 1, 1000)),
        (Chunk.ERROR_OFFSET, struct.pack(">IHQ", 5, 0, 999)),
        (Chunk.ERROR_OFFSET, struct.pack(">IHQ", 5, 0, 1100)),
        (Chunk.ERROR_OFFSET, struct.pack(">IHQ", 0, 0, 1000)),
    ],
)
def test_errors_that_cannot_be(agreement: Agreement, kind: int, body: bytes) -> None:
    read, _ = asked()
    assert "an error" in refused(agreement, read, chunk(agreement, read, kind, body, DONE))


@pytest.mark.parametrize("agreement", CHUNKED)
def test_lengths_are_refused_before_they_arrive(agreement: Agreement) -> None:
    for kind in (Chunk.OFFSET_HOLE, Chunk.NONE, Chunk.ERROR, Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT, 77):
        read, _ = asked()
        header = bytearray(chunk(agreement, read, kind))
        header[-4:] = b"\xff\xff\xff\xff"
        refused(agreement, read, bytes(header))
    read, _ = asked()
    header = bytearray(chunk(agreement, read, Chunk.OFFSET_DATA))
    header[-4:] = b"\xff\xff\xff\xff"
    refused(agreement, read, bytes(header) + struct.pack(">Q", 1000))


# --- small parts -------------------------------------------------------------------------------------------------------
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), max_size=30))
def test_cover(ranges: list[tuple[int, int]]) -> None:
    bounds: list[int] = []
    covered: set[int] = set()
    for start, length in ranges:
        these = set(range(start, start + length))
        assert cover(bounds, start, start + length) == (not these & covered)
        if not these & covered:
            covered |= these
        assert bounds == sorted(set(bounds))
        pairs = zip(bounds[::2], bounds[1::2], strict=True)
        assert {byte for begin, end in pairs for byte in range(begin, end)} == covered


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), max_size=30), st.sampled_from([1, 4, 16]))
def test_whole_blocks(extents: list[tuple[int, int]], block: int) -> None:
    flags = [flag for length, flag in extents for _ in range(length)]
    found = whole_blocks(extents, block)
    assert sum(length for length, _ in found) == len(flags) // block * block
    assert all(left[1] != right[1] for left, right in itertools.pairwise(found))
    at = 0
    for length, flag in found:
        assert length > 0
        for start in range(at, at + length, block):
            shared = 3
            for each in flags[start : start + block]:
                shared &= each
            assert flag == shared
        at += length


@settings(deadline=None)
@given(
    agreement=st.sampled_from([SIMPLE, STRUCTURED, EXTENDED]),
    position=st.integers(0, 200),
    junk=st.binary(max_size=40),
    replace=st.booleans(),
    most=st.integers(1, 99),
)
def test_any_bytes(agreement: Agreement, position: int, junk: bytes, replace: bool, most: int) -> None:
    guard = bytearray(b"\xa5" * 300)
    script = answers(agreement)
    script[1][0].data = memoryview(guard)[100:200]
    data = b"".join(piece for _, piece, _ in script)
    data = data[:position] + junk + data[position + len(junk) * replace :]
    reader = begun(agreement, *(request for request, _, _ in script))
    try:
        receive(reader, data, most)
    except ProtocolError:
        pass
    assert guard[:100] == guard[200:] == b"\xa5" * 100


def test_direct_is_not_larger_than_what_follows() -> None:
    assert AFTER_LARGE < DIRECT < READ_AHEAD

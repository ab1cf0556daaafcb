"""A client's requests and the reading of a server's replies, without I/O: simple, structured and extended.

Follows doc/proto.md and its extension-ext-header. `ReplyReader` has the two calls of asyncio's BufferedProtocol: what is
received goes into the buffer that `get_buffer` names, and `advance` says how much. Replies in chunks come in any order and
interleaved. Payloads of reads are received straight into the memory of who asked; only what is small, or arrived along
with a header, is copied there.

The server is not trusted. What puts the stream out of step or writes where it must not (lengths, cookies, overlapping
chunks, unknown types) raises ProtocolError and the connection must go; an answer that is merely wrong (bytes or status
missing) fails its request with EIO.
"""

import errno
from bisect import bisect_right
from collections.abc import Iterator
from struct import Struct
from typing import Final

from nbdmap.errors import ProtocolError
from nbdmap.nbd.client import Agreement, printable
from nbdmap.nbd.constants import (
    CMD_FLAG_PAYLOAD_LEN,
    EXTENDED_REPLY,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    MAX_STRING,
    REPLY_FLAG_DONE,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STATE_HOLE,
    STATE_ZERO,
    STRUCTURED_REPLY,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Cmd,
    Error,
)

READ_AHEAD: Final = 64 << 10
"""Small replies that are received at once."""
DIRECT: Final = 16 << 10
"""What is still missing of a payload is received in place from this size on."""
AFTER_LARGE: Final = 4 << 10
"""What is received at once after that, so that little of the next large payload has to be copied."""
MAX_EXTENTS: Final = 4096
"""Extents that are looked at in one status chunk; the others are asked for again."""
MAX_STATUS: Final = 1 << 20
"""The most extents a server may send in one chunk."""
MAX_FRAGMENTS: Final = 16384
"""The most gaps that the chunks of one read may leave while it is under way."""

_ERROR_BIT: Final = 1 << 15
_ERRORS: Final = frozenset(Error)
_U64: Final = Struct(">Q")
_HOLE: Final = Struct(">QI")
_STATUS: Final = (Struct(">I"), Struct(">II"))  # context; length, flags
_STATUS_EXT: Final = (Struct(">II"), Struct(">QQ"))  # context, count; length, flags
_ERROR: Final = Struct(">IH")
NOWHERE: Final = memoryview(b"")
"""The data of a request that has none."""


class Request:
    """One request and, when it is finished, its answer. `data`: READ: what is to be filled; WRITE: the payload.

    `error` is 0 or an errno, `message` the server's words; `extents` is what BLOCK_STATUS found: (length, flags).
    """

    __slots__ = ("bounds", "command", "cookie", "data", "error", "extents", "flags", "length", "message", "offset")

    def __init__(self, command: Cmd, offset: int, length: int, data: memoryview = NOWHERE, flags: int = 0) -> None:
        self.command = command
        self.offset = offset
        self.length = length
        self.data = data
        self.flags = flags
        self.restart()

    def restart(self) -> None:
        """Forgets what was answered so far; the request is to be sent again."""
        self.cookie = 0
        self.error = 0
        self.message = ""
        self.extents: list[tuple[int, int]] = []
        self.bounds: list[int] = []

    def fail(self, error: int, message: str) -> None:
        """Notes an error; of several, the first counts."""
        if not self.error:
            self.error = error
            self.message = message


def cover(bounds: list[int], start: int, end: int) -> bool:
    """Adds [start, end) to the ranges whose sorted starts and ends `bounds` holds; False if it overlaps one of them."""
    at = bisect_right(bounds, start)
    if at % 2 or (at < len(bounds) and bounds[at] < end):
        return False
    left = at > 0 and bounds[at - 1] == start
    right = at < len(bounds) and bounds[at] == end
    bounds[at - left : at + right] = ([] if left else [start]) + ([] if right else [end])
    return True


class ReplyReader:
    """The requests in flight on one connection and what has arrived of their replies. `pending`: by cookie."""

    def __init__(self, agreement: Agreement) -> None:
        self.pending: dict[int, Request] = {}
        self._extended = agreement.extended
        self._structured = agreement.structured
        self._allocation = agreement.allocation
        self._cookie = 0
        self._finished: list[Request] = []
        self._ahead = memoryview(bytearray(READ_AHEAD))
        self._in_place = False
        self._target: Request | None = None  # whose memory `_missing` is part of
        self._steps = self._replies()
        self._missing = next(self._steps)

    def begin(self, request: Request) -> bytes:
        """Notes the request as in flight; returns its header, behind which the payload of a WRITE is to be sent."""
        self._cookie += 1
        request.cookie = self._cookie
        self.pending[self._cookie] = request
        if not self._extended:
            return REQUEST.pack(
                REQUEST_MAGIC, request.flags, request.command, self._cookie, request.offset, request.length
            )
        flags = request.flags | (CMD_FLAG_PAYLOAD_LEN if request.command == Cmd.WRITE else 0)
        return EXTENDED_REQUEST.pack(
            EXTENDED_REQUEST_MAGIC, flags, request.command, self._cookie, request.offset, request.length
        )

    def abandon(self, request: Request) -> None:
        """Nobody waits for the request any more: what still arrives for it goes nowhere near its memory."""
        if request.command == Cmd.READ:
            request.data = memoryview(bytearray(request.length))
        if self._target is request:
            self._missing = memoryview(bytearray(len(self._missing)))

    def get_buffer(self) -> memoryview:
        """Where the next bytes are to be received."""
        after_large, self._in_place = self._in_place, len(self._missing) >= DIRECT
        if self._in_place:
            return self._missing
        return self._ahead[:AFTER_LARGE] if after_large else self._ahead

    def advance(self, received: int) -> list[Request]:
        """Takes note of bytes received there; returns the requests that are finished. Raises ProtocolError."""
        self._finished = []
        if self._in_place:
            self._missing = self._missing[received:]
            if not self._missing:
                self._missing = next(self._steps)
            return self._finished
        used = 0
        while used < received:
            length = min(len(self._missing), received - used)
            self._missing[:length] = self._ahead[used : used + length]
            used += length
            self._missing = self._missing[length:] or next(self._steps)
        return self._finished

    # --- replies: each view that is yielded comes back filled ----------------------------------------------------------
    def _replies(self) -> Iterator[memoryview]:
        header = memoryview(bytearray(EXTENDED_REPLY.size))
        simple, structured = header[: SIMPLE_REPLY.size], header[: STRUCTURED_REPLY.size]
        while True:
            if self._extended:
                yield header
                magic, flags, kind, cookie, offset, length = EXTENDED_REPLY.unpack(header)
                if magic != EXTENDED_REPLY_MAGIC:
                    raise ProtocolError(f"reply magic {magic:#010x}")
                if offset != self._request(cookie).offset:
                    raise ProtocolError(f"a reply for offset {offset}, which is not that of its request")
                yield from self._chunk(self._request(cookie), flags, kind, length)
                continue
            yield simple
            magic, error, cookie = SIMPLE_REPLY.unpack(simple)
            if magic == SIMPLE_REPLY_MAGIC:
                yield from self._simple(self._request(cookie), error)
            elif magic == STRUCTURED_REPLY_MAGIC and self._structured:
                yield structured[SIMPLE_REPLY.size :]
                _, flags, kind, cookie, length = STRUCTURED_REPLY.unpack(structured)
                yield from self._chunk(self._request(cookie), flags, kind, length)
            else:
                raise ProtocolError(f"reply magic {magic:#010x}")

    def _request(self, cookie: int) -> Request:
        request = self.pending.get(cookie)
        if request is None:
            raise ProtocolError(f"a reply with cookie {cookie:#x}, which no request has")
        return request

    def _simple(self, request: Request, error: int) -> Iterator[memoryview]:
        if request.command == Cmd.READ and self._structured:
            raise ProtocolError("a simple reply to READ, though structured replies were agreed on")
        if error:
            request.fail(_errno(error), "")
        elif request.command == Cmd.READ:
            yield from self._payload(request, request.offset, request.length)
        self._finish(request)

    def _chunk(self, request: Request, flags: int, kind: int, length: int) -> Iterator[memoryview]:
        if kind == Chunk.OFFSET_DATA and length > _U64.size:
            start = memoryview(bytearray(_U64.size))
            yield start
            yield from self._payload(request, _U64.unpack(start)[0], length - _U64.size)
        elif kind == Chunk.OFFSET_HOLE and length == _HOLE.size:
            hole = memoryview(bytearray(_HOLE.size))
            yield hole
            offset, size = _HOLE.unpack(hole)
            _claim(request, offset, size)[:] = bytes(size)
        elif kind == (Chunk.BLOCK_STATUS_EXT if self._extended else Chunk.BLOCK_STATUS):
            yield from self._status(request, length)
        elif kind & _ERROR_BIT:
            yield from self._error(request, kind, length)
        elif kind != Chunk.NONE or length or not flags & REPLY_FLAG_DONE:
            raise ProtocolError(f"a chunk of type {kind} with {length} bytes and flags {flags:#x}")
        if flags & REPLY_FLAG_DONE:
            self._finish(request)

    def _payload(self, request: Request, offset: int, length: int) -> Iterator[memoryview]:
        self._target = request
        yield _claim(request, offset, length)  # not kept here: `abandon` lets go of it
        self._target = None

    def _status(self, request: Request, length: int) -> Iterator[memoryview]:
        head, entry = _STATUS_EXT if self._extended else _STATUS
        count, rest = divmod(length - head.size, entry.size)
        if request.command != Cmd.BLOCK_STATUS or rest or not 1 <= count <= MAX_STATUS:
            raise ProtocolError(f"a status chunk of {length} bytes to {request.command.name}")
        status = memoryview(bytearray(length))
        yield status
        context, *counted = head.unpack_from(status)
        if counted not in ([], [count]):
            raise ProtocolError(f"a status chunk of {counted[0]} extents has {count}")
        if context != self._allocation:
            return
        if request.extents:
            raise ProtocolError("two status chunks for base:allocation")
        left = request.length
        last = head.size + min(count, MAX_EXTENTS) * entry.size
        for size, flags in entry.iter_unpack(status[head.size : last]):
            if not size:
                raise ProtocolError("an extent of no bytes")
            request.extents.append((min(size, left), flags & (STATE_HOLE | STATE_ZERO)))
            left -= size
            if left <= 0:
                break

    def _error(self, request: Request, kind: int, length: int) -> Iterator[memoryview]:
        tail = _U64.size if kind == Chunk.ERROR_OFFSET else 0
        if not _ERROR.size + tail <= length <= _ERROR.size + MAX_STRING + _U64.size:
            raise ProtocolError(f"an error chunk of {length} bytes")
        body = memoryview(bytearray(length))
        yield body
        error, text_length = _ERROR.unpack_from(body)
        text = body[_ERROR.size : _ERROR.size + text_length]
        if not error or text_length > length - _ERROR.size - tail:
            raise ProtocolError(f"an error chunk of {length} bytes with error {error} and {text_length} bytes of text")
        if tail and not 0 <= _U64.unpack_from(body, length - tail)[0] - request.offset < request.length:
            raise ProtocolError("an error at an offset outside of its request")
        request.fail(_errno(error), printable(bytes(text)))

    def _finish(self, request: Request) -> None:
        del self.pending[request.cookie]
        if not request.error:
            if request.command == Cmd.READ and request.bounds != [0, request.length]:
                request.fail(errno.EIO, "the server left out some of the bytes")
            if request.command == Cmd.BLOCK_STATUS and not request.extents:
                request.fail(errno.EIO, "the server left out the status")
        self._finished.append(request)


def _claim(request: Request, offset: int, length: int) -> memoryview:
    """The memory of `length` bytes at the export's `offset`, once: they must be asked for and not yet have come."""
    start = offset - request.offset
    inside = request.command == Cmd.READ and length and start >= 0 and start + length <= request.length
    if not inside or not cover(request.bounds, start, start + length):
        raise ProtocolError(f"{length} bytes at {offset}, which were not asked for or came before")
    if len(request.bounds) > 2 * MAX_FRAGMENTS:
        raise ProtocolError(f"a read in more than {MAX_FRAGMENTS} fragments")
    return request.data[start : start + length]


def _errno(error: int) -> int:
    """The protocol's errors are Linux's numbers; what it does not know counts as EINVAL."""
    return error if error in _ERRORS else errno.EINVAL


def whole_blocks(extents: list[tuple[int, int]], block: int) -> list[tuple[int, int]]:
    """Extents that end on blocks, neighbours merged. A block that several share is only what all of them are."""
    found: list[tuple[int, int]] = []
    partial, shared = 0, 0  # bytes of a block that has begun, and its flags so far

    def add(length: int, flags: int) -> None:
        if found and found[-1][1] == flags:
            length += found.pop()[0]
        found.append((length, flags))

    for length, flags in extents:
        if partial:
            taken = min(length, block - partial)
            partial, shared, length = partial + taken, shared & flags, length - taken
            if partial < block:
                continue
            add(block, shared)
        if length >= block:
            add(length - length % block, flags)
        partial, shared = length % block, flags
    return found

"""The transmission phase, server side and without I/O: bytes to requests, and results to replies.

A `RequestReader` says where the next bytes should be received (`get_buffer`) and is told how many came (`advance`), in the
manner of asyncio.BufferedProtocol. Requests and small payloads are parsed where they lie in one shared buffer; what is
still missing of a payload is received straight into a buffer of its own. `Replies` encodes for the three header styles:
simple, structured, extended. After proto.md, "Transmission phase".
"""

import errno
import mmap
from collections.abc import Sequence
from struct import Struct
from typing import Final

from nbdmap.errors import ProtocolError
from nbdmap.nbd.constants import (
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_PAYLOAD_LEN,
    EXTENDED_REPLY,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    MAX_PAYLOAD,
    MAX_STRING,
    REPLY_FLAG_DONE,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Cmd,
    Error,
)

BUFFER_SIZE: Final = 256 << 10
LARGE: Final = 64 << 10
"""After a payload of this size the next header is received alone, so that its payload needs no copy."""
MAX_SKIPPED: Final = (1 << 32) - 1
"""A refused payload is read and dropped up to this size; a larger one ends the connection."""

_WRITE: Final = int(Cmd.WRITE)
_OFFSET: Final = Struct(">Q")
_HOLE: Final = Struct(">QI")
_ERROR: Final = Struct(">IH")

_WIRE: Final = {
    errno.EPERM: Error.EPERM,
    errno.EACCES: Error.EPERM,
    errno.EROFS: Error.EPERM,
    errno.ENOMEM: Error.ENOMEM,
    errno.EINVAL: Error.EINVAL,
    errno.ENOSPC: Error.ENOSPC,
    errno.EDQUOT: Error.ENOSPC,
    errno.EFBIG: Error.ENOSPC,
    errno.EOPNOTSUPP: Error.EINVAL,
    errno.EOVERFLOW: Error.EOVERFLOW,
    errno.ESHUTDOWN: Error.ESHUTDOWN,
}


def wire_error(number: int, flags: int = 0) -> Error:
    """The NBD error for Linux's errno `number`; EOPNOTSUPP is ENOTSUP only for a request with FAST_ZERO in `flags`."""
    if number == errno.EOPNOTSUPP and flags & CMD_FLAG_FAST_ZERO:
        return Error.ENOTSUP
    return _WIRE.get(number, Error.EIO)


class Request:
    """One request. `payload` is there for WRITE and whatever else carries one; None otherwise, and where it was dropped
    because it exceeds MAX_PAYLOAD (`oversize`). `borrowed`: the payload lies in the reader's shared buffer."""

    __slots__ = ("borrowed", "command", "cookie", "flags", "length", "offset", "oversize", "payload")

    def __init__(self, flags: int, command: int, cookie: int, offset: int, length: int) -> None:
        self.flags = flags
        self.command = command
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.payload: memoryview | None = None
        self.borrowed = False
        self.oversize = False


class RequestReader:
    """Bytes in, requests out. Raises ProtocolError where the stream cannot be followed any further."""

    def __init__(self, extended: bool) -> None:
        self._header = EXTENDED_REQUEST if extended else REQUEST
        self._magic = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
        self._extended = extended
        self._view = memoryview(bytearray(BUFFER_SIZE))
        self._start = 0  # the first byte that is not parsed yet
        self._end = 0  # behind the last byte that came
        self._waiting: Request | None = None  # whose payload is being received
        self._filled = 0  # of its payload
        self._skip = 0  # bytes of its payload that are still to be dropped
        self._expect_large = False

    def get_buffer(self) -> memoryview:
        """Where to receive the next bytes; never empty."""
        if self._waiting is not None and self._waiting.payload is not None:
            return self._waiting.payload[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
            if self._expect_large and self._waiting is None:
                return self._view[: self._header.size]
        elif self._end == len(self._view):
            self._move(max(BUFFER_SIZE, 2 * (self._end - self._start)))
        return self._view[self._end :]

    def advance(self, count: int) -> None:
        """`count` bytes have been put at the start of the last `get_buffer`."""
        if self._waiting is not None and self._waiting.payload is not None:
            self._filled += count
        else:
            self._end += count

    def feed(self, data: bytes) -> None:
        """Takes bytes that were received elsewhere."""
        rest = memoryview(data)
        while rest:
            buffer = self.get_buffer()
            count = min(len(buffer), len(rest))
            buffer[:count] = rest[:count]
            self.advance(count)
            rest = rest[count:]

    def renew(self) -> None:
        """Leaves the shared buffer to the requests that borrowed from it, and goes on with a new one."""
        self._move(max(BUFFER_SIZE, self._end - self._start))

    def _move(self, size: int) -> None:
        view = memoryview(bytearray(size))
        unread = self._end - self._start
        view[:unread] = self._view[self._start : self._end]
        self._view, self._start, self._end = view, 0, unread

    def next(self) -> Request | None:
        """The next request that has come whole, or None."""
        if self._waiting is not None:
            return self._next_payload(self._waiting)
        start = self._start
        if self._end - start < self._header.size:
            return None
        magic, flags, command, cookie, offset, length = self._header.unpack_from(self._view, start)
        if magic != self._magic:
            raise ProtocolError(f"a request starts with {magic:#010x}, {self._magic:#010x} was expected")
        request = Request(flags, command, cookie, offset, length)
        self._start = start = start + self._header.size
        if command != _WRITE and not (self._extended and flags & CMD_FLAG_PAYLOAD_LEN):
            self._expect_large = False
            return request
        self._expect_large = length >= LARGE
        if self._end - start >= length <= MAX_PAYLOAD:
            request.payload = self._view[start : start + length]
            request.borrowed = True
            self._start = start + length
            return request
        return self._next_payload(self._announce(request))

    def _announce(self, request: Request) -> Request:
        """Makes room for a payload that has not come whole, or prepares to drop it."""
        length = request.length
        self._waiting = request
        if length > MAX_PAYLOAD:
            if length > MAX_SKIPPED:
                raise ProtocolError(f"a payload of {length} bytes is more than can be skipped")
            request.oversize = True
            self._skip = length
            return request
        # a large buffer must not cost memory before its bytes arrive: anonymous pages are made on first touch
        payload = memoryview(mmap.mmap(-1, length)) if length > LARGE else memoryview(bytearray(length))
        self._filled = self._end - self._start
        payload[: self._filled] = self._view[self._start : self._end]
        self._start = self._end = 0
        request.payload = payload
        return request

    def _next_payload(self, request: Request) -> Request | None:
        if request.payload is None:
            dropped = min(self._skip, self._end - self._start)
            self._start += dropped
            self._skip -= dropped
            if self._skip:
                return None
        elif self._filled < len(request.payload):
            return None
        self._waiting = None
        return request


class Replies:
    """Encodes the replies of one connection."""

    def __init__(self, structured: bool, extended: bool) -> None:
        self.structured = structured or extended
        self._extended = extended
        if extended:
            self._data_at = EXTENDED_REPLY.size + _OFFSET.size
        else:
            self._data_at = STRUCTURED_REPLY.size + _OFFSET.size if structured else SIMPLE_REPLY.size

    def read(self, request: Request) -> tuple[bytearray, memoryview]:
        """A successful reply to READ, and the part of it that the data goes to."""
        length = request.length
        reply = bytearray(self._data_at + length)
        if self._extended:
            EXTENDED_REPLY.pack_into(
                reply, 0, EXTENDED_REPLY_MAGIC, REPLY_FLAG_DONE, Chunk.OFFSET_DATA, request.cookie, request.offset, length + 8
            )
            _OFFSET.pack_into(reply, EXTENDED_REPLY.size, request.offset)
        elif self.structured:
            STRUCTURED_REPLY.pack_into(
                reply, 0, STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, Chunk.OFFSET_DATA, request.cookie, length + 8
            )
            _OFFSET.pack_into(reply, STRUCTURED_REPLY.size, request.offset)
        else:
            SIMPLE_REPLY.pack_into(reply, 0, SIMPLE_REPLY_MAGIC, 0, request.cookie)
        return reply, memoryview(reply)[self._data_at :]

    def _chunk(self, request: Request, kind: Chunk, length: int, *, done: bool) -> bytes:
        """The header of a chunk with `length` bytes of payload."""
        flags = REPLY_FLAG_DONE if done else 0
        if self._extended:
            return EXTENDED_REPLY.pack(EXTENDED_REPLY_MAGIC, flags, kind, request.cookie, request.offset, length)
        return STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, length)

    def data(self, request: Request, offset: int, length: int, *, done: bool) -> tuple[bytearray, memoryview]:
        """A chunk with part of the data of a READ, and where in it the data goes."""
        head = self._chunk(request, Chunk.OFFSET_DATA, _OFFSET.size + length, done=done) + _OFFSET.pack(offset)
        reply = bytearray(len(head) + length)
        reply[: len(head)] = head
        return reply, memoryview(reply)[len(head) :]

    def hole(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """A chunk that says that part of a READ is zeroes."""
        return self._chunk(request, Chunk.OFFSET_HOLE, _HOLE.size, done=done) + _HOLE.pack(offset, length)

    def done(self, request: Request) -> bytes:
        """Success of a command without data to return. A READ of nothing must be structured where that was negotiated."""
        if self._extended or (self.structured and request.command == Cmd.READ):
            return self._chunk(request, Chunk.NONE, 0, done=True)
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def error(self, request: Request, error: Error, text: str) -> bytes:
        """Failure, with the reason as text where chunks can carry it."""
        if not self.structured:
            return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, request.cookie)
        message = text.encode(errors="replace")[:MAX_STRING].decode(errors="ignore").encode()
        head = self._chunk(request, Chunk.ERROR, _ERROR.size + len(message), done=True)
        return head + _ERROR.pack(error, len(message)) + message

    def block_status(self, request: Request, context: int, extents: Sequence[tuple[int, int]], *, done: bool) -> bytes:
        """The extents of one context: (length, flags), in order from the request's offset."""
        if self._extended:
            body = Struct(f">II{2 * len(extents)}Q").pack(context, len(extents), *(n for pair in extents for n in pair))
            return self._chunk(request, Chunk.BLOCK_STATUS_EXT, len(body), done=done) + body
        body = Struct(f">I{2 * len(extents)}I").pack(context, *(n for pair in extents for n in pair))
        return self._chunk(request, Chunk.BLOCK_STATUS, len(body), done=done) + body

"""The transmission phase, server side and without I/O: bytes to requests, and results to replies.

A `RequestReader` says where the next bytes should be received (`get_buffer`) and is told how many came (`advance`), in the
manner of asyncio.BufferedProtocol. Requests and small payloads are parsed where they lie in one shared buffer; what is
still missing of a payload is received straight into a buffer of its own. `Replies` encodes for the three header styles:
simple, structured, extended. After proto.md, "Transmission phase".
"""

import errno
import mmap
from collections.abc import Callable, Sequence
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

Buffer = bytes | memoryview

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

    __slots__ = ("command", "cookie", "flags", "length", "offset")
    payload: memoryview | None = None
    borrowed: bool = False
    oversize: bool = False

    def __init__(self, flags: int, command: int, cookie: int, offset: int, length: int) -> None:
        self.flags = flags
        self.command = command
        self.cookie = cookie
        self.offset = offset
        self.length = length


class PayloadRequest(Request):
    """A request with a payload."""

    __slots__ = ("borrowed", "oversize", "payload")

    def __init__(self, flags: int, command: int, cookie: int, offset: int, length: int) -> None:
        super().__init__(flags, command, cookie, offset, length)
        self.payload = None
        self.borrowed = False
        self.oversize = False


Allocate = Callable[[int], memoryview]
"""Gives a buffer of that many bytes, of any content, for a large payload. It must not cost memory before it is written to."""


def allocate(length: int) -> memoryview:
    """The plain way: small ones from the heap, large ones as anonymous pages, which are made when first touched."""
    return memoryview(mmap.mmap(-1, length)) if length > LARGE else memoryview(bytearray(length))


class ReceiveBuffer:
    """Where requests are received: one for all connections of a loop, as what comes in is parsed before the next receives."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(BUFFER_SIZE))

    def renew(self) -> None:
        """Leaves the memory to requests that still use it."""
        self.view = memoryview(bytearray(BUFFER_SIZE))


class RequestReader:
    """Bytes in, requests out. Raises ProtocolError where the stream cannot be followed any further.

    After every `advance`, take what `next` gives and call `settle` before another reader uses the same ReceiveBuffer.
    """

    def __init__(self, extended: bool, shared: ReceiveBuffer | None = None, allocate: Allocate = allocate) -> None:
        header = EXTENDED_REQUEST if extended else REQUEST
        self._header_size = header.size
        self._unpack = header.unpack_from
        self._magic = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
        self._extended = extended
        self._shared = shared or ReceiveBuffer()
        self._allocate = allocate
        self._view = self._target = self._shared.view  # what is parsed, and where get_buffer has put the start of it
        self._start = 0  # the first byte that is not parsed yet
        self._end = 0  # behind the last byte that came
        self._waiting: PayloadRequest | None = None  # whose payload is being received
        self._filled = 0  # of its payload
        self._skip = 0  # bytes of its payload that are still to be dropped
        self._expect_large = False

    def get_buffer(self) -> memoryview:
        """Where to receive the next bytes; never empty."""
        if self._waiting is not None and self._waiting.payload is not None:
            return self._waiting.payload[self._filled :]
        self.settle()
        unread = self._end - self._start
        self._target = target = self._shared.view
        if unread:
            if unread >= len(target):
                self._target = target = memoryview(bytearray(2 * unread))
            target[:unread] = self._view[self._start : self._end]
            return target[unread:]
        if self._expect_large and self._waiting is None:
            return target[: self._header_size]
        return target

    def advance(self, count: int) -> None:
        """`count` bytes have been put at the start of the last `get_buffer`."""
        if self._waiting is not None and self._waiting.payload is not None:
            self._filled += count
        else:
            self._end += count - self._start
            self._start = 0
            self._view = self._target

    def feed(self, data: bytes) -> None:
        """Takes bytes that were received elsewhere."""
        rest = memoryview(data)
        while rest:
            buffer = self.get_buffer()
            count = min(len(buffer), len(rest))
            buffer[:count] = rest[:count]
            self.advance(count)
            rest = rest[count:]

    def settle(self) -> None:
        """Takes what is not parsed yet out of the shared buffer."""
        if self._start < self._end and self._view is self._shared.view:
            self._view = memoryview(bytes(self._view[self._start : self._end]))
            self._end -= self._start
            self._start = 0

    def renew(self) -> None:
        """Leaves the shared buffer to the requests that borrowed from it."""
        self.settle()
        self._shared.renew()

    def next(self) -> Request | None:
        """The next request that has come whole, or None."""
        if self._waiting is not None:
            return self._next_payload(self._waiting)
        start = self._start
        after = start + self._header_size
        if after > self._end:
            return None
        magic, flags, command, cookie, offset, length = self._unpack(self._view, start)
        if magic != self._magic:
            raise ProtocolError(f"a request starts with {magic:#010x}, {self._magic:#010x} was expected")
        self._start = after
        if command != _WRITE and not (self._extended and flags & CMD_FLAG_PAYLOAD_LEN):
            self._expect_large = False
            return Request(flags, command, cookie, offset, length)
        request = PayloadRequest(flags, command, cookie, offset, length)
        self._expect_large = length >= LARGE
        if self._end - after >= length <= MAX_PAYLOAD:
            request.payload = self._view[after : after + length]
            request.borrowed = self._view is self._shared.view
            self._start = after + length
            return request
        return self._next_payload(self._announce(request))

    def _announce(self, request: PayloadRequest) -> PayloadRequest:
        """Makes room for a payload that has not come whole, or prepares to drop it."""
        length = request.length
        self._waiting = request
        if length > MAX_PAYLOAD:
            if length > MAX_SKIPPED:
                raise ProtocolError(f"a payload of {length} bytes is more than can be skipped")
            request.oversize = True
            self._skip = length
            return request
        payload = self._allocate(length)
        self._filled = self._end - self._start
        payload[: self._filled] = self._view[self._start : self._end]
        self._start = self._end = 0
        request.payload = payload
        return request

    def _next_payload(self, request: PayloadRequest) -> Request | None:
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


_READ_SIMPLE: Final = SIMPLE_REPLY
_READ_STRUCTURED: Final = Struct(">IHHQIQ")  # the header of a chunk, and the offset that data begins with
_READ_EXTENDED: Final = Struct(">IHHQQQQ")
_OFFSET_DATA: Final = int(Chunk.OFFSET_DATA)


class Replies:
    """Encodes the replies of one connection."""

    def __init__(self, structured: bool, extended: bool, allocate: Allocate = allocate) -> None:
        self.structured = structured or extended
        self._extended = extended
        self._allocate = allocate
        self._data_at = (_READ_EXTENDED if extended else _READ_STRUCTURED if structured else _READ_SIMPLE).size

    def read(self, request: Request) -> tuple[Buffer, memoryview]:
        """A successful reply to READ, and the part of it that the data goes to."""
        length = request.length
        at = self._data_at
        view = memoryview(bytearray(at + length)) if length < LARGE else self._allocate(at + length)
        if self._extended:
            _READ_EXTENDED.pack_into(
                view, 0, EXTENDED_REPLY_MAGIC, REPLY_FLAG_DONE, _OFFSET_DATA, request.cookie, request.offset, length + 8,
                request.offset,
            )  # fmt: skip
        elif self.structured:
            _READ_STRUCTURED.pack_into(
                view, 0, STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, _OFFSET_DATA, request.cookie, length + 8, request.offset
            )
        else:
            _READ_SIMPLE.pack_into(view, 0, SIMPLE_REPLY_MAGIC, 0, request.cookie)
        return view, view[at:]

    def _chunk(self, request: Request, kind: Chunk, length: int, *, done: bool) -> bytes:
        """The header of a chunk with `length` bytes of payload."""
        flags = REPLY_FLAG_DONE if done else 0
        if self._extended:
            return EXTENDED_REPLY.pack(EXTENDED_REPLY_MAGIC, flags, kind, request.cookie, request.offset, length)
        return STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, length)

    def data(self, request: Request, offset: int, length: int, *, done: bool) -> tuple[Buffer, memoryview]:
        """A chunk with part of the data of a READ, and where in it the data goes."""
        head = self._chunk(request, Chunk.OFFSET_DATA, _OFFSET.size + length, done=done) + _OFFSET.pack(offset)
        view = self._allocate(len(head) + length)
        view[: len(head)] = head
        return view, view[len(head) :]

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

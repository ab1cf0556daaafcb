"""Replies as a server sends them, for tests."""

import struct

from nbdmap.nbd.client import Agreement
from nbdmap.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Cmd,
)
from nbdmap.nbd.replies import Request

SIMPLE = Agreement(1 << 30, 1)
STRUCTURED = Agreement(1 << 30, 1, structured=True, allocation=5)
EXTENDED = Agreement(1 << 30, 1, extended=True, allocation=5)
CHUNKED = [STRUCTURED, EXTENDED]
DONE = 1


def read_of(offset: int, length: int) -> Request:
    return Request(Cmd.READ, offset, length, memoryview(bytearray(b"\xee" * length)))


def simple(request: Request, error: int = 0, data: bytes = b"") -> bytes:
    return struct.pack(">IIQ", SIMPLE_REPLY_MAGIC, error, request.cookie) + data


def chunk(agreement: Agreement, request: Request, kind: int, data: bytes = b"", flags: int = 0) -> bytes:
    if agreement.extended:
        return struct.pack(">IHHQQQ", EXTENDED_REPLY_MAGIC, flags, kind, request.cookie, request.offset, len(data)) + data
    return struct.pack(">IHHQI", STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, len(data)) + data


def data_chunk(agreement: Agreement, request: Request, offset: int, data: bytes, flags: int = 0) -> bytes:
    return chunk(agreement, request, Chunk.OFFSET_DATA, struct.pack(">Q", offset) + data, flags)


def hole(agreement: Agreement, request: Request, offset: int, size: int, flags: int = 0) -> bytes:
    return chunk(agreement, request, Chunk.OFFSET_HOLE, struct.pack(">QI", offset, size), flags)


def error_chunk(agreement: Agreement, request: Request, error: int, text: bytes = b"", flags: int = 0) -> bytes:
    return chunk(agreement, request, Chunk.ERROR, struct.pack(">IH", error, len(text)) + text, flags)


def done(agreement: Agreement, request: Request) -> bytes:
    return chunk(agreement, request, Chunk.NONE, flags=DONE)


def status(agreement: Agreement, request: Request, *extents: tuple[int, int], context: int = 5, flags: int = DONE) -> bytes:
    if agreement.extended:
        head = struct.pack(">II", context, len(extents))
        return chunk(agreement, request, Chunk.BLOCK_STATUS_EXT, head + b"".join(struct.pack(">QQ", *e) for e in extents), flags)
    body = struct.pack(">I", context) + b"".join(struct.pack(">II", *e) for e in extents)
    return chunk(agreement, request, Chunk.BLOCK_STATUS, body, flags)

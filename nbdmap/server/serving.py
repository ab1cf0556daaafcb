"""How one request is served: from the request to the device, and from the result to reply buffers.

Each `serve` ends with the buffers of the reply in `reply`, or fails with NbdmapError.
"""

import asyncio
import logging
from typing import Final

from nbdmap.block.device import HOLE, ZERO, Device, Extent
from nbdmap.block.io import (
    CACHE,
    DISCARD,
    DONE,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    NO_PLUG,
    WRITE_ZEROES,
    Io,
    Op,
    Pending,
    Plug,
    run_all,
)
from nbdmap.block.io import READ as IO_READ
from nbdmap.block.io import WRITE as IO_WRITE
from nbdmap.errors import InvalidArgument, NbdmapError
from nbdmap.nbd.constants import CMD_FLAG_DF, CMD_FLAG_FAST_ZERO, CMD_FLAG_PAYLOAD_LEN, CMD_FLAG_REQ_ONE, Cmd, Error
from nbdmap.nbd.handshake import Session
from nbdmap.nbd.transmission import Allocate, Buffer, Replies, Request, wire_error

SPARSE_READ: Final = 64 << 10
"""Reads of this size and more look for holes first, where the device may have them."""

_IO_FLAGS: Final = FUA | NO_HOLE | FAST_ZERO
_READ: Final = int(Cmd.READ)
_WRITE: Final = int(Cmd.WRITE)
_FLUSH: Final = int(Cmd.FLUSH)
_BLOCK_STATUS: Final = int(Cmd.BLOCK_STATUS)
_PLAIN: Final[dict[int, Op]] = {Cmd.TRIM: DISCARD, Cmd.WRITE_ZEROES: WRITE_ZEROES, Cmd.CACHE: CACHE}

Reply = list[Buffer]

log = logging.getLogger(__name__)


class Serving:
    """What one session's requests are served with. `device` may change its size; the door keeps to what was agreed."""

    def __init__(self, device: Device, session: Session, allocate: Allocate, plug: Plug = NO_PLUG) -> None:
        self.replies = Replies(session.structured, session.extended, allocate)
        self._device = device
        self._plug = plug
        self._holes = self.replies.structured
        self._size = session.export.size
        self._block = session.export.minimum_block
        self._contexts = session.contexts

    def serve(self, request: Request, reply: Reply) -> Pending:
        """Serves a request which has passed the door."""
        command = request.command
        length = request.length
        if command == _READ and length:
            if length >= SPARSE_READ and self._holes and self._device.limits.sparse and not request.flags & CMD_FLAG_DF:
                return self._sparse_read(request, reply)
            buffer, data = self.replies.read(request)
            reply.append(buffer)
            return self._device.submit(Io(IO_READ, length, data, 0, self._plug), request.offset)
        if length == 0 and command != _FLUSH:
            reply.append(self.replies.done(request))
            return DONE
        if command == _BLOCK_STATUS:
            return self._block_status(request, reply)
        reply.append(self.replies.done(request))
        if command == _WRITE:
            assert request.payload is not None
            return self._device.submit(Io(IO_WRITE, length, request.payload, request.flags & FUA, self._plug), request.offset)
        if command == _FLUSH:
            return self._device.submit(Io(FLUSH, 0), 0)
        return self._device.submit(Io(_PLAIN[command], length, flags=request.flags & _IO_FLAGS), request.offset)

    def failure(self, request: Request, error: BaseException, peer: str) -> bytes:
        """The reply to a request that failed; what nobody foresaw is logged."""
        if isinstance(error, asyncio.CancelledError):
            return self.replies.error(request, Error.ESHUTDOWN, "the server is shutting down")
        if not isinstance(error, NbdmapError):
            log.error("%s: command %d failed unexpectedly", peer, request.command, exc_info=error)
            return self.replies.error(request, Error.EIO, f"internal error: {type(error).__name__}")
        flags = request.flags & CMD_FLAG_FAST_ZERO if request.command == Cmd.WRITE_ZEROES else 0
        return self.replies.error(request, wire_error(error.errno, flags), error.message)

    async def _sparse_read(self, request: Request, reply: Reply) -> None:
        """A large read, with its zeroes as holes. A hole is as true as a read of it would have been at the same moment."""
        extents = await self._device.extents(request.offset, request.length)
        covered = sum(length for length, _ in extents)
        if covered < request.length:
            extents.append((request.length - covered, 0))
        pieces = _merge_data(extents)
        if len(pieces) == 1 and not pieces[0][1]:
            buffer, data = self.replies.read(request)
            reply.append(buffer)
            await self._device.submit(Io(IO_READ, request.length, data), request.offset)
            return
        reads: list[Pending] = []
        offset, end = request.offset, request.offset + request.length
        for length, hole in pieces:
            done = offset + length == end
            if hole:
                reply.append(self.replies.hole(request, offset, length, done=done))
            else:
                buffer, data = self.replies.data(request, offset, length, done=done)
                reply.append(buffer)
                reads.append(self._device.submit(Io(IO_READ, length, data), offset))
            offset += length
        await run_all(reads)

    async def _block_status(self, request: Request, reply: Reply) -> None:
        """One chunk for each selected context; there is only base:allocation. An extent is no longer than what was asked
        for, so a client that asks in 32 bits can be told of it in 32 bits."""
        ids, length = self._wanted(request)
        extents = await self._device.extents(request.offset, length)
        extents = [(size, flags & (HOLE | ZERO)) for size, flags in extents]
        if request.flags & CMD_FLAG_REQ_ONE:
            del extents[1:]
        for number in ids:
            reply.append(self.replies.block_status(request, number, extents, done=number == ids[-1]))

    def _wanted(self, request: Request) -> tuple[list[int], int]:
        """The context ids and the length that a BLOCK_STATUS asks for; with a payload these stand in there."""
        if not request.flags & CMD_FLAG_PAYLOAD_LEN:
            return list(self._contexts), request.length
        payload = bytes(request.payload or b"")
        length = int.from_bytes(payload[:8], "big")
        ids = [int.from_bytes(payload[at : at + 4], "big") for at in range(8, len(payload), 4)]
        if len(set(ids)) < len(ids) or not set(ids) <= set(self._contexts):
            raise InvalidArgument(f"BLOCK_STATUS: context ids {ids} are not all different and negotiated")
        if not 0 < length <= self._size - request.offset:
            raise InvalidArgument(f"BLOCK_STATUS of {length} bytes at {request.offset} reaches beyond the end, {self._size}")
        if length % self._block:
            raise InvalidArgument(f"BLOCK_STATUS of {length} bytes is not aligned to blocks of {self._block}")
        return ids, length


def _merge_data(extents: list[Extent]) -> list[tuple[int, bool]]:
    """(length, is zeroes): runs of data are one; whether they are provisioned does not matter to a read."""
    pieces: list[tuple[int, bool]] = []
    for length, flags in extents:
        zero = bool(flags & ZERO)
        if pieces and pieces[-1][1] == zero:
            pieces[-1] = (pieces[-1][0] + length, zero)
        else:
            pieces.append((length, zero))
    return pieces

"""Bugs planted into crypt, one at a time."""

import asyncio
from typing import Any, Final

from nbdmap.block.io import FUA, READ, WRITE, Deferred, Io, Pending
from nbdmap.targets import TARGETS
from nbdmap.targets.crypt.target import Crypt
from nbdmap.units import SECTOR


class LoseFua(Crypt):
    """FUA does not reach the disk."""

    def submit(self, io: Io, offset: int) -> Pending:
        return super().submit(Io(io.op, io.length, io.data, io.flags & ~FUA, io.plug), offset)


class NotFlushed(Crypt):
    """A flush of the mapped device stops here."""

    flushed = False


class MixTwoWrites(Crypt):
    """The first half of a sector keeps the plaintext of the write before."""

    def submit(self, io: Io, offset: int) -> Pending:
        return self._mix(io, offset) if io.op is WRITE and io.length == SECTOR else super().submit(io, offset)

    async def _mix(self, io: Io, offset: int) -> None:
        mixed = bytearray(SECTOR)
        await super().submit(Io(READ, SECTOR, memoryview(mixed)), offset)
        mixed[SECTOR // 2 :] = io.data[SECTOR // 2 :]
        await super().submit(Io(WRITE, SECTOR, memoryview(mixed), io.flags), offset)


class AnswerBeforeTheDisk(Crypt):
    """A write is done when it is encrypted."""

    def submit(self, io: Io, offset: int) -> Pending:
        if io.op is not WRITE:
            return super().submit(io, offset)
        copy = Io(WRITE, io.length, memoryview(bytes(io.data)), io.flags)
        self._late = asyncio.ensure_future(super().submit(copy, offset))
        done = Deferred()
        done.finish()
        return done


CRYPT_PLANTS: Final[dict[str, dict[str, Any]]] = {
    name: {"types": {**TARGETS, "crypt": kind}}
    for name, kind in {
        "crypt-lose-fua": LoseFua,
        "crypt-not-flushed": NotFlushed,
        "crypt-mix-two-writes": MixTwoWrites,
        "crypt-answer-before-the-disk": AnswerBeforeTheDisk,
    }.items()
}

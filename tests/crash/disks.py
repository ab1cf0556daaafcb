"""The disks under a stack in a crash run: they write down all they are asked, and end requests in a seeded random order.

`RecordingDisk` is a disk as the kernel sees one: a volatile cache that a flush empties, and FUA. A write is seen by reads
from the moment it ends. (`simfile.py` has the other leaf: the real FileDisk on a simulated file.)
"""

import asyncio
import math
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from nbdmap.block.device import Device, Limits
from nbdmap.block.io import DISCARD, FLUSH, FUA, READ, WRITE, Io
from nbdmap.errors import IoFailed
from nbdmap.units import SECTOR
from tests.crash.log import WriteLog
from tests.crash.oracle import Violation

LIMITS: Final = Limits(discard=True, zero=True, fast_zero=True, cache=True)
_KINDS: Final = {WRITE: "write", DISCARD: "discard", FLUSH: "flush"}


@dataclass(frozen=True, slots=True)
class Fault:
    """How a request goes wrong: it is held up for `stall` seconds (inf: until `release`), then fails with `errno` after the
    share `done` of it. With errno 0 it succeeds, or is short, which only files do."""

    errno: int = 0
    done: float = 1.0
    stall: float = 0.0

    def bytes_of(self, length: int) -> int:
        """How much is done, in whole sectors, and at least one of a short request."""
        sectors = int(length // SECTOR * self.done)
        return max(sectors, 0 if self.errno else 1) * SECTOR if length else 0

    def strike(self) -> None:
        """Fails as a system call does, if it is to fail."""
        if self.errno:
            raise OSError(self.errno, os.strerror(self.errno))


class Weather:
    """What the disks of one run meet: how long requests take, and which of them fail. With seed None: nothing, at once.

    `faults` maps (kind, n) to what happens to the n-th request of that kind, counted over all disks from 0.
    """

    def __init__(self, seed: int | None, faults: Iterable[tuple[tuple[str, int], Fault]] = ()) -> None:
        self.rng = None if seed is None else random.Random(seed)
        self._faults = dict(faults)
        self._counts: dict[str, int] = {}
        self._released = asyncio.Event()

    async def pause(self) -> None:
        """Lets time pass: usually a moment, now and then much longer, so that the order of requests is well mixed."""
        if self.rng is not None:
            await asyncio.sleep(self.rng.random() * self.rng.choice((1, 1, 1, 8)))

    async def hold_up(self, seconds: float) -> None:
        """Waits so long, and at most until `release`."""
        if seconds < math.inf:
            await asyncio.sleep(seconds)
        else:
            await self._released.wait()

    def release(self) -> None:
        """Whatever is held up for ever goes on."""
        self._released.set()

    def fault(self, kind: str, *, waits: bool) -> Fault | None:
        """What is to happen to the next request of this kind; `waits` says whether it can be held up."""
        number = self._counts.get(kind, 0)
        self._counts[kind] = number + 1
        return self._faults.get((kind, number))


CALM: Final = Weather(None)


class Failing(IoFailed):
    """A disk's failure on purpose."""

    def __init__(self, message: str, fault: Fault) -> None:
        super().__init__(message, fault.errno)
        self.fault = fault


class RecordingDisk(Device):
    """A disk of a bytearray whose requests are in the log."""

    def __init__(self, number: int, image: bytes, log: WriteLog, weather: Weather) -> None:
        self.name = f"disk{number}"
        self.number = f"7:{number}"
        self.size = len(image)
        self.limits = LIMITS
        self.read_only = False
        self.openers = 0
        self._index = number
        self._bytes = bytearray(image)
        self._log = log
        self._weather = weather

    @property
    def contents(self) -> bytes:
        """What reads see now."""
        return bytes(self._bytes)

    async def submit(self, io: Io, offset: int) -> None:
        """Writes it down, waits, does it."""
        if offset + io.length > self.size:
            raise Violation(f"{io} at {offset} is beyond the end of {self.name}")
        if io.op is READ:
            await self._weather.pause()
            await self._meet("read")
            io.data[:] = self._bytes[offset : offset + io.length]
            return
        kind = _KINDS.get(io.op, "zero")
        data = bytes(io.data)
        entry = self._log.submit(self._index, kind, offset, io.length, data, fua=bool(io.flags & FUA))
        await self._weather.pause()
        try:
            await self._meet(kind)
        except Failing as error:
            done = error.fault.bytes_of(io.length)
            self._store(kind, offset, data[:done], done)
            self._log.fail(entry, done)
            raise
        if data != io.data:
            raise Violation(f"the buffer of a write of {self.name} at {offset} was changed while the write was under way")
        self._store(kind, offset, data, io.length)
        self._log.complete(entry)

    async def _meet(self, kind: str) -> None:
        if fault := self._weather.fault(kind, waits=True):
            if fault.stall:
                await self._weather.hold_up(fault.stall)
            if fault.errno:
                raise Failing(f"{kind} of {self.name} fails on purpose", fault)

    def _store(self, kind: str, offset: int, data: bytes, length: int) -> None:
        if kind != "flush":
            self._bytes[offset : offset + length] = data if kind == "write" else bytes(length)

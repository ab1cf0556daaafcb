"""delay: holds requests back for a while, and may send reads, writes and flushes to different devices
(Documentation device-mapper/delay).

    0 8192 delay /dev/sda 0 500
    0 8192 delay /dev/sda 0 0 /dev/sdb 0 500
    0 8192 delay /dev/sda 0 20 /dev/sdb 0 50 /dev/sdb 0 400

The time of a request runs from its arrival. However many wait, each costs one object; there is one timer for the target.
A suspend issues what is held back at once.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Self

from nbdmap.block.device import Device, Extent, Limits
from nbdmap.block.io import CACHE, FLUSH, READ, Deferred, Io, Pending, run_all
from nbdmap.dm.args import Args
from nbdmap.dm.target import Below, Spec, Target, merge_limits
from nbdmap.errors import InvalidArgument
from nbdmap.units import SECTOR

MAX_DELAY_MS: Final = (1 << 32) - 1
MAX_TURN: Final = 256
"""Requests issued in one turn of the loop; then others have theirs, however many are due at the same moment."""
_TICK_S: Final = 0.001
"""What uvloop's timers count in."""


class Held(Deferred):
    """A request that is held back until `due`, in seconds of the target's clock."""

    __slots__ = ("due", "io", "leg", "offset")

    def __init__(self, leg: "Leg", io: Io, offset: int, due: float) -> None:
        super().__init__()
        self.leg = leg
        self.io: Io | None = io
        self.offset = offset
        self.due = due

    def issue(self) -> None:
        """Sends it on; it ends with what that gives."""
        io, self.io = self.io, None
        if io is not None:
            self.leg.held -= 1
            self.follow(self.leg.send(io, self.offset))

    def cancel(self) -> None:
        """Nobody waits for it any more: if it is still held back it ends here, and is skipped when its time has come."""
        if self.io is None:
            super().cancel()
            return
        self.io = None
        self.leg.held -= 1
        self.finish(asyncio.CancelledError())


class Leg:
    """Where one class of requests goes and how long it takes to set out: `start` in bytes on `device`."""

    def __init__(self, device: Device, start: int, begin: int, delay_ms: int) -> None:
        self.device = device
        self.start = start
        self.delay_ms = delay_ms
        self.held = 0
        """How many are held back."""
        self.queue: deque[Held] = deque()
        """Those, and some that were dropped, in the order in which they are due."""
        self._shift = start - begin

    def send(self, io: Io, offset: int) -> Pending:
        """Does the request on the device."""
        return self.device.submit(io, offset + self._shift)

    def table(self) -> str:
        """`<major:minor> <start> <delay ms>`"""
        return f"{self.device.number} {self.start // SECTOR} {self.delay_ms}"


class FlushLeg(Leg):
    """As a Leg, for flushes. They go to the device of the writes as well, where that is another: in the kernel they do not,
    and what was written is not safe."""

    def __init__(self, device: Device, start: int, begin: int, delay_ms: int, writes: Device) -> None:
        super().__init__(device, start, begin, delay_ms)
        self._devices = [device] if device is writes else [device, writes]

    def send(self, io: Io, offset: int) -> Pending:
        """Flushes."""
        if len(self._devices) == 1:
            return self.device.submit(io, 0)
        return run_all([device.submit(io, 0) for device in self._devices])


class Delay(Target):
    """`delay <device> <start> <ms> [<write device> <start> <ms> [<flush device> <start> <ms>]]`

    Who has no words of its own takes those before: flushes those of writes, writes those of reads.
    """

    type_name = "delay"
    version = (1, 4, 0)
    takes_flush = True

    def __init__(self, spec: Spec, words: Sequence[tuple[Device, int, int]]) -> None:
        super().__init__(spec)
        self._loop = asyncio.get_running_loop()
        # uvloop reads its clock once a turn, in whole milliseconds, so that a request would seem to have come before its
        # time: the system is asked. Its timers are rounded: they are set half a tick later, for none to be early. A virtual
        # loop's clock is its own, and exact.
        virtual = abs(self._loop.time() - time.monotonic()) > 1
        self._clock = self._loop.time if virtual else time.monotonic
        self._late_s = 0.0 if virtual else _TICK_S / 2
        self._given = len(words)
        (device, start, delay_ms), writes, flushes = words[0], words[min(1, self._given - 1)], words[-1]
        self._reads = Leg(device, start, spec.begin, delay_ms)
        self._writes = Leg(writes[0], writes[1], spec.begin, writes[2])
        self._flushes = FlushLeg(flushes[0], flushes[1], spec.begin, flushes[2], writes[0])
        self._legs: tuple[Leg, ...] = (self._reads, self._writes, self._flushes)
        self._delaying = True
        self._timer: asyncio.Handle | None = None

    @classmethod
    async def construct(cls, spec: Spec, args: Args) -> Self:
        """A device, its first sector and a delay in milliseconds, once, twice or three times."""
        if len(args) not in (3, 6, 9):
            raise InvalidArgument(f"3, 6 or 9 words are needed, {len(args)} given")
        words: list[tuple[Device, int, int]] = []
        for what in ("", "write ", "flush ")[: len(args) // 3]:
            reference = args.word(f"{what}device")
            start = args.start(f"{what}start sector")
            delay_ms = args.number(f"{what}delay", 0, MAX_DELAY_MS)
            words.append((await spec.open(reference), start, delay_ms))
        return cls(spec, words)

    def submit(self, io: Io, offset: int) -> Pending:
        """Holds the request back for the time of its class, or sends it on at once where that is none."""
        op = io.op
        leg = self._reads if op is READ or op is CACHE else self._flushes if op is FLUSH else self._writes
        if not leg.delay_ms or not self._delaying:
            return leg.send(io, offset)
        held = Held(leg, io, offset, self._clock() + leg.delay_ms / 1000)
        first = not leg.queue
        leg.queue.append(held)
        leg.held += 1
        if first:
            self._set_timer()
        return held

    def _set_timer(self) -> None:
        """Sets the timer to the request that is due next."""
        due = min((leg.queue[0].due for leg in self._legs if leg.queue), default=None)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if due is None else self._loop.call_at(due + self._late_s, self._expire)

    def _expire(self) -> None:
        """Issues what is due, in the order of its time."""
        now = self._clock()
        for _ in range(MAX_TURN):
            leg = min((leg for leg in self._legs if leg.queue), key=_next_due, default=None)
            if leg is None or leg.queue[0].due > now:
                self._timer = None
                self._set_timer()
                return
            leg.queue.popleft().issue()
        self._timer = self._loop.call_soon(self._expire)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Those of the reads' device. Holes are not told where reads are delayed: who knows of one does not read it."""
        if self._reads.delay_ms:
            return [(length, 0)]
        return await self._reads.device.extents(offset - self.begin + self._reads.start, length)

    def devices(self) -> list[Below]:
        """As given."""
        return [Below(leg.device, leg.start, self.length) for leg in self._legs[: self._given]]

    def limits(self) -> Limits:
        """What all devices can. (The kernel offers no write-zeroes, and writes zeroes instead.)"""
        below = merge_limits([leg.device.limits for leg in self._legs])
        return replace(below, sparse=below.sparse and not self._reads.delay_ms)

    def table(self) -> str:
        """`<major:minor> <start> <delay ms>`, as often as given."""
        return " ".join(leg.table() for leg in self._legs[: self._given])

    def status(self) -> str:
        """`<reads> <writes> <flushes>`: how many are held back now."""
        return " ".join(str(leg.held) for leg in self._legs)

    async def presuspend(self, noflush: bool) -> None:
        """Issues everything, and delays nothing until the resume."""
        self._delaying = False
        for leg in self._legs:
            while leg.queue:
                leg.queue.popleft().issue()
        self._set_timer()

    async def resume(self) -> None:
        """Delays again."""
        self._delaying = True

    async def close(self) -> None:
        """Stops the timer; nothing is held back any more by then."""
        if self._timer is not None:
            self._timer.cancel()


def _next_due(leg: Leg) -> float:
    return leg.queue[0].due

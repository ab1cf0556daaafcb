"""Bugs, planted one at a time into a scenario to prove that the harness sees them. None of this is in the product.

`PLANTS[name]` is a `Plant`: the scenario it is planted into and what it changes there; `plant(name)` is that scenario,
broken. Each must be caught.
"""

import asyncio
from typing import Any, Final, NamedTuple

from nbdmap.block.device import Device
from nbdmap.block.file import FileDisk
from nbdmap.block.io import DISCARD, DONE, FLUSH, FUA, READ, WRITE, WRITE_ZEROES, Io, Pending
from nbdmap.dm.device import MappedDevice
from nbdmap.dm.target import Below, Target
from nbdmap.errors import NbdmapError
from nbdmap.targets import TARGETS
from nbdmap.targets.linear import Linear
from nbdmap.targets.striped import Stripe, Striped
from nbdmap.units import SECTOR
from tests.crash.crypt_plants import CRYPT_PLANTS
from tests.crash.fault_plants import FAULT_PLANTS
from tests.crash.multipath_plants import MULTIPATH_PLANTS
from tests.crash.persist_plants import PERSIST_PLANTS
from tests.crash.scenario import Scenario
from tests.crash.stacks import SCENARIOS
from tests.crash.thin_plants import THIN_PLANTS


class Broken(Device):
    """A layer that does what the device below does; subclasses do one thing wrong."""

    def __init__(self, below: Device) -> None:
        self.name, self.number, self.size = below.name, below.number, below.size
        self.limits, self.read_only, self.openers = below.limits, below.read_only, 0
        self.below = below
        self.late: set[asyncio.Task[None]] = set()

    async def submit(self, io: Io, offset: int) -> None:
        await self.below.submit(io, offset)

    def behind_its_back(self, work: Pending) -> None:
        """Goes on with `work` while the request is answered already."""
        task = asyncio.get_running_loop().create_task(_quietly(work))
        self.late.add(task)
        task.add_done_callback(self.late.discard)

    async def close(self) -> None:
        while self.late:
            await asyncio.wait(self.late)
        await self.below.close()


async def _quietly(work: Pending) -> None:
    try:
        await work
    except NbdmapError:
        pass


def _copy(io: Io, flags: int | None = None) -> Io:
    return Io(io.op, io.length, memoryview(bytes(io.data)), io.flags if flags is None else flags)


# --- layers: below the stack, or above it -----------------------------------------------------------------------------


class DropFlush(Broken):
    """A flush is acknowledged and not passed on."""

    async def submit(self, io: Io, offset: int) -> None:
        if io.op is not FLUSH:
            await self.below.submit(io, offset)


class DropEverySecondFlush(Broken):
    """As above, but every second time only."""

    flushes = 0

    async def submit(self, io: Io, offset: int) -> None:
        self.flushes += io.op is FLUSH
        if io.op is not FLUSH or self.flushes % 2:
            await self.below.submit(io, offset)


class AcknowledgeFlushEarly(Broken):
    """A flush is answered when it has been sent."""

    async def submit(self, io: Io, offset: int) -> None:
        if io.op is FLUSH:
            self.behind_its_back(self.below.submit(io, offset))
        else:
            await self.below.submit(io, offset)


class AcknowledgeWriteEarly(Broken):
    """A write is answered when it has been sent; its data is copied."""

    async def submit(self, io: Io, offset: int) -> None:
        if io.op is WRITE:
            self.behind_its_back(self.below.submit(_copy(io), offset))
        else:
            await self.below.submit(io, offset)


class KeepBuffer(Broken):
    """As above, and the data is not even copied."""

    async def submit(self, io: Io, offset: int) -> None:
        if io.op is WRITE:
            self.behind_its_back(self.below.submit(io, offset))
        else:
            await self.below.submit(io, offset)


class SwapWrites(Broken):
    """Every second write is done after the one that follows it; whatever else comes is done after both."""

    held: tuple[Io, int] | None = None
    writes = 0

    async def submit(self, io: Io, offset: int) -> None:
        held, self.held = self.held, None
        if io.op is WRITE and held is None:
            self.writes += 1
            if self.writes % 2 and not io.flags & FUA:
                self.held = _copy(io), offset
                return
        if io.op is WRITE:
            await self.below.submit(io, offset)
            if held:
                await self.below.submit(*held)
            return
        if held:
            await self.below.submit(*held)
        await self.below.submit(io, offset)

    async def close(self) -> None:
        if self.held:
            await self.below.submit(*self.held)
        await super().close()


class LoseFua(Broken):
    """FUA is not passed on."""

    async def submit(self, io: Io, offset: int) -> None:
        await self.below.submit(_copy(io, 0) if io.op is WRITE else io, offset)


class LoseFuaOfZeroes(Broken):
    """FUA of WRITE_ZEROES and DISCARD is not passed on."""

    async def submit(self, io: Io, offset: int) -> None:
        await self.below.submit(_copy(io, io.flags & ~FUA) if io.op in (WRITE_ZEROES, DISCARD) else io, offset)


class FlushBeforeWrite(Broken):
    """FUA by a flush, which comes first."""

    async def submit(self, io: Io, offset: int) -> None:
        if io.flags & FUA and io.op is WRITE:
            await self.below.submit(Io(FLUSH, 0), 0)
            io = _copy(io, 0)
        await self.below.submit(io, offset)


class SkipZeroing(Broken):
    """WRITE_ZEROES is answered and not done."""

    async def submit(self, io: Io, offset: int) -> None:
        if io.op is not WRITE_ZEROES:
            await self.below.submit(io, offset)


class HideWriteErrors(Broken):
    """A write that fails succeeds."""

    async def submit(self, io: Io, offset: int) -> None:
        try:
            await self.below.submit(io, offset)
        except NbdmapError:
            if io.op is not WRITE:
                raise


class HideFlushErrors(Broken):
    """A flush that fails succeeds."""

    async def submit(self, io: Io, offset: int) -> None:
        try:
            await self.below.submit(io, offset)
        except NbdmapError:
            if io.op is not FLUSH:
                raise


class LoseTail(Broken):
    """The last sector of a write of seven or more is lost."""

    async def submit(self, io: Io, offset: int) -> None:
        long = io.op is WRITE and io.length >= 7 * SECTOR
        await self.below.submit(io.part(0, io.length - SECTOR) if long else io, offset)


class WriteTwice(Broken):
    """A write is sent again, once it is answered, as by a retry that comes too late."""

    async def submit(self, io: Io, offset: int) -> None:
        again = _copy(io) if io.op is WRITE and io.length == SECTOR else None
        await self.below.submit(io, offset)
        if again:
            self.behind_its_back(self.below.submit(again, offset))


class ShareRunningFlush(Broken):
    """A flush that comes during another is answered with it."""

    running: asyncio.Event | None = None

    async def submit(self, io: Io, offset: int) -> None:
        if io.op is not FLUSH:
            await self.below.submit(io, offset)
        elif self.running is not None:
            await self.running.wait()
        else:
            ended = self.running = asyncio.Event()
            try:
                await self.below.submit(io, offset)
            finally:
                self.running = None
                ended.set()


# --- targets ----------------------------------------------------------------------------------------------------------


class FlushFirstStripe(Striped):
    """A flush reaches the first stripe only."""

    def devices(self) -> list[Below]:
        return super().devices()[:1]


class FlushFirstTarget(Linear):
    """A flush reaches the first target's device only."""

    @property
    def flushed(self) -> bool:  # type: ignore[override]
        return self.begin == 0


class FuaFirstStripe(Striped):
    """FUA reaches the first stripe only."""

    async def _piece(self, io: Io, place: int, inside: int) -> None:
        first = place % len(self._stripes) == 0
        await super()._piece(io if first or io.op is READ else _copy(io, 0), place, inside)


class WrongStripe(Striped):
    """The pieces after the first of a write go one row too far, where there is one."""

    async def _piece(self, io: Io, place: int, inside: int) -> None:
        row = place // len(self._stripes)
        wrong = io.op is WRITE and io.length == self._chunk and row == 1
        await super()._piece(io, place + len(self._stripes) if wrong else place, inside)


class LosePiece(Striped):
    """The piece of a write that lies on the last stripe is lost, if it is less than a chunk."""

    async def _piece(self, io: Io, place: int, inside: int) -> None:
        if io.op is WRITE and place % len(self._stripes) == len(self._stripes) - 1 and io.length == SECTOR:
            return
        await super()._piece(io, place, inside)


class ForgetStripeOfZeroes(Striped):
    """WRITE_ZEROES leaves the last stripe out."""

    def _send(self, stripe: Stripe, io: Io, at: int) -> Pending:
        if io.op is WRITE_ZEROES and stripe is self._stripes[-1]:
            return DONE
        return super()._send(stripe, io, at)


# --- the mapper, and files --------------------------------------------------------------------------------------------


class SuspendWithoutFlush(MappedDevice):
    """A suspend never flushes."""

    async def suspend(self, *, noflush: bool = False) -> None:
        await super().suspend(noflush=True)


class IgnoreFailedSync(FileDisk):
    """A failed fdatasync counts as a good one."""

    def _sync_now(self, changes: int) -> None:
        try:
            super()._sync_now(changes)
        except OSError:
            self._sync_failure = None
            self._durable = changes


class NoLatch(FileDisk):
    """After a failed fdatasync the next may succeed."""

    def _latch(self, what: str, error: OSError) -> None:
        pass


class FuaWithoutSync(FileDisk):
    """FUA is a plain write."""

    def _write_durably_now(self, data: memoryview, offset: int) -> None:
        self._write_now(data, offset)


class OneWriteIsEnough(FileDisk):
    """A short write is not gone on with."""

    def _write_now(self, data: memoryview, offset: int) -> None:
        self._write_some_now(data, offset)


class CountWhenSyncEnds(FileDisk):
    """What ends during an fdatasync counts as durable."""

    def _sync_now(self, changes: int) -> None:
        super()._sync_now(changes)
        self._durable = self._changes


class JoinRunningSync(FileDisk):
    """A flush that comes during an fdatasync ends with it."""

    async def _flush(self) -> None:
        if self._sync_ended is not None:
            await self._sync_ended.wait()
        else:
            await super()._flush()


class ZeroesAreNoChange(FileDisk):
    """Discards and zeroes do not make the disk dirty."""

    async def _free(self, io: Io, offset: int) -> None:
        await super()._free(io, offset)
        self._changes -= 1


# --- the list -----------------------------------------------------------------------------------------------------------


class Plant(NamedTuple):
    """A scenario and what is changed in it."""

    scenario: str
    changes: dict[str, Any]


def _types(kind: type[Target]) -> dict[str, Any]:
    return {"types": {**TARGETS, kind.type_name: kind}}


PLANTS: Final[dict[str, Plant]] = {
    "drop-flush": Plant("linear", {"below": DropFlush}),
    "drop-every-second-flush": Plant("striped-files", {"below": DropEverySecondFlush}),
    "acknowledge-flush-early": Plant("linear", {"above": AcknowledgeFlushEarly}),
    "acknowledge-flush-early-below": Plant("striped", {"below": AcknowledgeFlushEarly}),
    "acknowledge-write-early": Plant("striped", {"below": AcknowledgeWriteEarly}),
    "keep-buffer": Plant("linear", {"above": KeepBuffer}),
    "swap-writes": Plant("linear", {"below": SwapWrites}),
    "lose-fua": Plant("stacked", {"below": LoseFua}),
    "lose-fua-of-zeroes": Plant("linear", {"below": LoseFuaOfZeroes}),
    "flush-before-write": Plant("linear", {"below": FlushBeforeWrite}),
    "skip-zeroing": Plant("striped", {"below": SkipZeroing}),
    "hide-write-errors": Plant("linear", {"below": HideWriteErrors}),
    "hide-flush-errors": Plant("striped", {"below": HideFlushErrors}),
    "lose-tail": Plant("linear", {"above": LoseTail}),
    "write-twice": Plant("striped", {"below": WriteTwice}),
    "share-running-flush": Plant("linear", {"below": ShareRunningFlush}),
    "flush-first-stripe": Plant("striped", _types(FlushFirstStripe)),
    "flush-first-target": Plant("linear-files", _types(FlushFirstTarget)),
    "fua-first-stripe": Plant("striped", _types(FuaFirstStripe)),
    "wrong-stripe": Plant("striped", _types(WrongStripe)),
    "lose-piece": Plant("striped", _types(LosePiece)),
    "forget-stripe-of-zeroes": Plant("striped-files", _types(ForgetStripeOfZeroes)),
    "suspend-without-flush": Plant("stacked", {"device_type": SuspendWithoutFlush}),
    "ignore-failed-sync": Plant("linear-files", {"file_type": IgnoreFailedSync}),
    "no-latch": Plant("striped-files", {"file_type": NoLatch}),
    "fua-without-sync": Plant("linear-files", {"file_type": FuaWithoutSync}),
    "one-write-is-enough": Plant("linear-files", {"file_type": OneWriteIsEnough}),
    "count-when-sync-ends": Plant("linear-files", {"file_type": CountWhenSyncEnds}),
    "join-running-sync": Plant("linear-files", {"file_type": JoinRunningSync}),
    "zeroes-are-no-change": Plant("linear-files", {"file_type": ZeroesAreNoChange}),
    **{name: Plant(scenario, _types(kind)) for name, (scenario, kind) in FAULT_PLANTS.items()},
    **{name: Plant("crypt", changes) for name, changes in CRYPT_PLANTS.items()},
    **{name: Plant("paths", _types(kind)) for name, kind in MULTIPATH_PLANTS.items()},
    **{name: Plant("persist", changes) for name, changes in PERSIST_PLANTS.items()},
    **{name: Plant("thin", {"planted": planted}) for name, planted in THIN_PLANTS.items()},
}


def plant(name: str) -> Scenario:
    """The scenario with this bug in it."""
    found = PLANTS[name]
    scenario = SCENARIOS[found.scenario]()
    for attribute, value in found.changes.items():
        setattr(scenario, attribute, value)
    return scenario

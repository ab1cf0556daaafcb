"""The client of a stack in a crash run, and what each sector may hold after a power cut, given what the client was told.

For each sector, at moment k: a change is *safe* when it was acknowledged and then covered: by an acknowledged flush that was
asked for later, or by its own FUA, or by a suspend or close that ended. The sector may hold what any change wrote that was
asked for by k, unless that change had ended before a safe one was asked for; and what it held in the beginning unless there
is a safe change. A change that failed may have happened in part, so what it wrote is possible but never promised.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from nbdmap.block.device import Device
from nbdmap.block.io import DISCARD, FLUSH, FUA, READ, WRITE, WRITE_ZEROES, Io, Op
from nbdmap.dm.device import MappedDevice
from nbdmap.errors import NbdmapError
from nbdmap.units import SECTOR
from tests.crash.log import WriteLog

ZEROES: Final = bytes(SECTOR)
_STAMP: Final = struct.Struct("<8sII")


class Violation(AssertionError):
    """A promise was broken."""


class Unanswered(NbdmapError):
    """A request got no answer so far; it may still be done at any time."""


@dataclass(slots=True, eq=False)
class Change:
    """One request that changes sectors from `first` on; `values` None: a discard, anything may be read."""

    number: int
    first: int
    count: int
    values: list[bytes] | None
    asked: int
    ended: int | None = None
    good: bool = False
    safe: int | None = None

    def value(self, sector: int) -> bytes | None:
        """What it writes into `sector`; None is anything."""
        return None if self.values is None else self.values[sector - self.first]


def stamp(name: str, number: int, sector: int) -> bytes:
    """A sector's content that nobody else writes."""
    return _STAMP.pack(name.encode()[:8], number, sector) * (SECTOR // _STAMP.size)


def describe(data: bytes) -> str:
    """A sector's content for a human."""
    if data == ZEROES:
        return "zeroes"
    name, number, sector = _STAMP.unpack_from(data)
    if data == _STAMP.pack(name, number, sector) * (SECTOR // _STAMP.size):
        return f"change {number} of {name.rstrip(bytes(1)).decode(errors='replace')!r}, sector {sector}"
    return f"{data[:16].hex()}... (never written whole)"


class Client:
    """Sends requests to one device of a stack, one after another or several at once, and remembers what it was told.

    A request that fails with NbdmapError returns False; whatever else is raised is a bug. Reads are checked at once.
    """

    def __init__(self, name: str, device: Device, log: WriteLog, initial: bytes, *, discard_zeroes: bool) -> None:
        self.name = name
        self.device = device
        self.log = log
        self.initial = initial
        self.sectors = len(initial) // SECTOR
        self.changes: list[Change] = []
        self.failures = 0
        self._touching: list[list[Change]] = [[] for _ in range(self.sectors)]
        self._discard_zeroes = discard_zeroes
        self._counter = 0

    # --- requests ----------------------------------------------------------------------------------------------------

    async def write(self, sector: int, count: int, *, fua: bool = False) -> bool:
        """Writes `count` sectors that nobody else writes."""
        number = self._next()
        values = [stamp(self.name, number, sector + index) for index in range(count)]
        data = bytearray(b"".join(values))
        io = Io(WRITE, len(data), memoryview(data), FUA * fua)
        good = await self._change(io, number, sector, values, fua)
        data[:] = bytes([0xDB]) * len(data)  # from now on the buffer is the client's again
        return good

    async def zero(self, sector: int, count: int, *, fua: bool = False, flags: int = 0) -> bool:
        """WRITE_ZEROES."""
        io = Io(WRITE_ZEROES, count * SECTOR, flags=FUA * fua | flags)
        return await self._change(io, self._next(), sector, [ZEROES] * count, fua)

    async def discard(self, sector: int, count: int, *, fua: bool = False) -> bool:
        """DISCARD: what is read afterwards is the disk's choice."""
        io = Io(DISCARD, count * SECTOR, flags=FUA * fua)
        return await self._change(io, self._next(), sector, [ZEROES] * count if self._discard_zeroes else None, fua)

    async def flush(self) -> bool:
        """Asks for a flush; once it is acknowledged, whatever had been acknowledged before it was asked for is safe."""
        asked = self.log.mark(f"{self.name} flush asked")
        if not await self._do(Io(FLUSH, 0), 0):
            return False
        self._covered(asked, self.log.mark(f"{self.name} flush acknowledged"))
        return True

    async def suspend(self) -> bool:
        """Suspends a mapped device: when it has ended, whatever was acknowledged is safe."""
        assert isinstance(self.device, MappedDevice)
        try:
            await self.device.suspend()
        except NbdmapError:
            self.failures += 1
            return False
        moment = self.log.mark(f"{self.name} suspended")
        self._covered(moment, moment)
        return True

    def closed(self, moment: int) -> None:
        """The stack was closed, and said so without a failure."""
        self._covered(moment, moment)

    async def read(self, sector: int, count: int) -> bytes | None:
        """Reads and checks against what may be there; None when it fails."""
        data = bytearray(count * SECTOR)
        begun = self.log.tick()
        if not await self._do(Io(READ, len(data), memoryview(data)), sector * SECTOR):
            return None
        ended = self.log.tick()
        for index in range(count):
            value = bytes(data[index * SECTOR : (index + 1) * SECTOR])
            if not any(one is None or one == value for one in self.visible(sector + index, begun, ended)):
                raise Violation(f"{self.name}: a read of sector {sector + index} gave {describe(value)}")
        return bytes(data)

    def _next(self) -> int:
        self._counter += 1
        return self._counter

    async def _change(self, io: Io, number: int, sector: int, values: list[bytes] | None, fua: bool) -> bool:
        count = io.length // SECTOR
        asked = self.log.mark(f"{self.name} change {number} asked")
        change = Change(number, sector, count, values, asked)
        self.changes.append(change)
        for touched in range(sector, sector + count):
            self._touching[touched].append(change)
        try:
            change.good = await self._do(io, sector * SECTOR)
        except Unanswered:
            return False
        change.ended = self.log.mark(f"{self.name} change {number} {'acknowledged' if change.good else 'failed'}")
        if change.good and fua:
            change.safe = change.ended
        return change.good

    async def _do(self, io: Io, offset: int) -> bool:
        try:
            await self.device.submit(io, offset)
        except Unanswered:
            if io.op in (READ, FLUSH):
                return False
            raise
        except NbdmapError:
            self.failures += 1
            return False
        return True

    def _covered(self, asked: int, moment: int) -> None:
        for change in self.changes:
            if change.good and change.safe is None and change.ended is not None and change.ended <= asked:
                change.safe = moment

    # --- what may be there -------------------------------------------------------------------------------------------

    def allowed(self, at: int) -> list[frozenset[bytes] | None]:
        """For each sector what it may hold after a power cut at moment `at`; None: anything."""
        return [self._possible(sector, at, [c for c in self._touching[sector] if c.safe is not None and c.safe <= at])
                for sector in range(self.sectors)]  # fmt: skip

    def visible(self, sector: int, begun: int, ended: int) -> Iterator[bytes | None]:
        """What a read of `sector` may give that was asked for at `begun` and answered at `ended`."""
        seen = [c for c in self._touching[sector] if c.good and c.ended is not None and c.ended < begun]
        values = self._possible(sector, ended, seen)
        return iter(values if values is not None else [None])

    def _possible(self, sector: int, at: int, promised: list[Change]) -> frozenset[bytes] | None:
        """What changes until `at` may have left, when those of `promised` cannot be undone."""
        start = sector * SECTOR
        if not self._touching[sector]:
            return frozenset((self.initial[start : start + SECTOR],))
        horizon = max((change.asked for change in promised), default=0)
        values = set() if promised else {self.initial[start : start + SECTOR]}
        for change in self._touching[sector]:
            if change.asked <= at and not (change.ended is not None and change.ended < horizon):
                value = change.value(sector)
                if value is None:
                    return None
                values.add(value)
        return frozenset(values)


async def read_all(device: Device) -> bytes:
    """Everything on a device, in one request."""
    data = bytearray(device.size)
    await device.submit(Io(Op.READ, device.size, memoryview(data)), 0)
    return bytes(data)

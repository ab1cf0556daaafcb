"""log-writes: every write is done on one device and written down, with its data, on another
(Documentation device-mapper/log-writes), so that a crash at any moment can be played through.

    0 8192 log-writes /dev/sda /dev/sdb

    dmsetup message log1 0 mark mkfs-done

`replay-log` of josefbacik/log-writes and xfstests reads the log. It is little-endian and counts in sectors of the first
device's logical block: a superblock, then for each entry a sector with its head and, of a write, its data. A mark's text
stands in the rest of its own sector; a discard has no data.

The log has the order in which things became durable: a write enters it when a flush that came after its end has ended, or
with the mark `dm-log-writes-end` when the table goes; FUA writes and marks enter it at once, and renew the superblock's
count. Beyond the kernel: a FUA write takes with it what it overlaps of earlier writes, so that a replay to the end gives
the same disk; and when MAX_UNFLUSHED bytes wait for a flush, one is sent. If the log is full or fails, logging ends and
the device works on; the status says so.
"""

import asyncio
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntFlag
from typing import Annotated, Final, Self

from nbdmap.block.device import Device, Extent, Limits
from nbdmap.block.io import CACHE, DISCARD, FLUSH, FUA, READ, WRITE, Continued, Io, Pending, to_the_end
from nbdmap.dm.args import Args
from nbdmap.dm.target import Below, Spec, Target
from nbdmap.errors import InvalidArgument, NbdmapError
from nbdmap.layout import Record
from nbdmap.units import MIB, SECTOR

MAGIC: Final = 0x6A736677736872
VERSION: Final = 1
END: Final = "dm-log-writes-end"
MAX_UNFLUSHED: Final = 64 * MIB
"""The data of writes, each with its sector for the head, that wait in memory for a flush."""
MAX_APPEND: Final = MIB
"""The log is written in pieces of about this size."""

log = logging.getLogger(__name__)


class Flag(IntFlag):
    """What an entry is."""

    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8
    METADATA = 16


@dataclass(frozen=True)
class Superblock(Record, order="<"):
    """The first sector of a log; `entries` may be fewer than there are, `sector_size` is in bytes."""

    magic: Annotated[int, "Q"]
    version: Annotated[int, "Q"]
    entries: Annotated[int, "Q"]
    sector_size: Annotated[int, "I"]


@dataclass(frozen=True)
class Head(Record, order="<"):
    """The beginning of an entry: what it changes, in sectors; `data_length` is in bytes and that of a mark's text only."""

    sector: Annotated[int, "Q"]
    sectors: Annotated[int, "Q"]
    flags: Annotated[int, "Q"]
    data_length: Annotated[int, "Q"]


@dataclass(frozen=True, slots=True)
class Logged:
    """An entry as it stands in the log; `data` is a write's, or a mark's text."""

    sector: int
    sectors: int
    flags: Flag
    data: bytes = b""

    def encode(self, sector_size: int = SECTOR) -> bytes:
        """Its sectors."""
        if not self.flags & Flag.MARK:
            return Head(self.sector, self.sectors, self.flags, 0).pack().ljust(sector_size, b"\0") + self.data
        text = self.data[: sector_size - Head.layout.size - 1]
        return (Head(self.sector, self.sectors, self.flags, len(text)).pack() + text).ljust(sector_size, b"\0")


class LogWrites(Target):
    """`log-writes <device> <log device>`; further words are ignored, as by the kernel."""

    type_name = "log-writes"
    version = (1, 1, 0)
    takes_flush = True

    def __init__(self, spec: Spec, device: Device, log_device: Device) -> None:
        super().__init__(spec)
        self._device = device
        self._log_device = log_device
        self._sector_size = device.limits.logical_block
        self._entries = 0
        self._next = self._sector_size  # where the next entry begins on the log device, in bytes
        self._ended = 0
        self._unflushed: dict[int, Logged] = {}  # by the order in which they ended
        self._unflushed_bytes = 0
        self._queue: list[Logged] = []  # those that are to be appended, in their order
        self._appending = asyncio.Lock()
        self._enabled = not spec.read_only
        self._was_live = False

    @classmethod
    async def construct(cls, spec: Spec, args: Args) -> Self:
        """The device, and the one for the log."""
        reference, log_reference = args.word("device"), args.word("log device")
        device = await spec.open(reference)
        log_device = await spec.open(log_reference)
        if log_device.limits.logical_block > device.limits.logical_block:
            raise InvalidArgument(
                f"log device: {log_device.name} has a logical block of {log_device.limits.logical_block} bytes, "
                f"{device.name} one of {device.limits.logical_block}"
            )
        return cls(spec, device, log_device)

    # --- requests ------------------------------------------------------------------------------------------------------

    def submit(self, io: Io, offset: int) -> Pending:
        """Does the request at the same place of the device; what changes something is logged when it has ended."""
        if io.op is READ or io.op is CACHE:
            return self._device.submit(io, offset)
        if io.op is FLUSH:
            return self._flush(io, Logged(0, 0, Flag.FLUSH))
        return self._change(io, offset)

    async def _flush(self, io: Io, *entries: Logged) -> None:
        """Flushes the device; then what had been written before is logged, and `entries` behind it."""
        last = self._ended
        await self._device.submit(io, 0)
        await self._append(*self._take([number for number in self._unflushed if number <= last]), *entries)

    async def _change(self, io: Io, offset: int) -> None:
        if io.op is not DISCARD or self._device.limits.discard:
            await self._device.submit(io, offset)
        if not self._enabled:
            return
        size = self._sector_size
        flags = (Flag.FUA if io.flags & FUA else Flag(0)) | (Flag.DISCARD if io.op is DISCARD else Flag(0))
        entry = Logged(offset // size, io.length // size, flags, bytes(io.data))
        if io.flags & FUA:
            await self._append(*self._take_overlapped(entry), entry)
            return
        self._ended += 1
        self._unflushed[self._ended] = entry
        self._unflushed_bytes += size + len(entry.data)
        if self._unflushed_bytes > MAX_UNFLUSHED:
            try:
                await self._flush(Io(FLUSH, 0))
            except NbdmapError as error:
                self._disable(f"the device cannot be flushed: {error.message}")

    def _take(self, numbers: Iterable[int]) -> list[Logged]:
        """Takes these out of what waits for a flush."""
        taken = [self._unflushed.pop(number) for number in numbers]
        self._unflushed_bytes -= sum(self._sector_size + len(entry.data) for entry in taken)
        return taken

    def _take_overlapped(self, by: Logged) -> list[Logged]:
        """Takes the writes that must stand before `by`: those that it overlaps, and those that these overlap in turn."""
        ranges = [(by.sector, by.sector + by.sectors)]
        numbers: list[int] = []
        for number, entry in reversed(self._unflushed.items()):
            low, high = entry.sector, entry.sector + entry.sectors
            if any(start < high and low < end for start, end in ranges):
                ranges.append((low, high))
                numbers.append(number)
        return self._take(reversed(numbers))

    # --- the log -------------------------------------------------------------------------------------------------------

    async def _append(self, *entries: Logged) -> None:
        """Writes entries behind those that came before, and ends when they are there, also when it is cancelled: an entry of
        which a part is missing would be the end of the log."""
        self._queue += entries
        async with self._appending:
            batch, self._queue = self._queue, []
            if not self._enabled or not batch:
                return
            work = self._write_batch(batch)
            try:
                yielded = work.send(None)
            except StopIteration:
                return
            await to_the_end(Continued(work, yielded))

    async def _write_batch(self, batch: Sequence[Logged]) -> None:
        try:
            for piece, at in self._encode(batch):
                await self._log_device.submit(Io(WRITE, len(piece), memoryview(piece)), at)
            if any(entry.flags & (Flag.FUA | Flag.MARK) for entry in batch):
                await self._write_superblock()
        except NbdmapError as error:
            self._disable(f"the log cannot be written: {error.message}")

    def _encode(self, batch: Sequence[Logged]) -> Iterator[tuple[bytes, int]]:
        """The batch as pieces for the log device, each with its place. Ends before what does not fit, and all logging."""
        piece = bytearray()
        start = self._next
        for entry in batch:
            data = entry.encode(self._sector_size)
            if self._next + len(data) >= self._log_device.size:
                self._disable(f"{self._log_device.name} is full")
                break
            piece += data
            self._next += len(data)
            self._entries += 1
            if len(piece) >= MAX_APPEND:
                yield bytes(piece), start
                piece.clear()
                start = self._next
        if piece:
            yield bytes(piece), start

    async def _write_superblock(self) -> None:
        superblock = Superblock(MAGIC, VERSION, self._entries, self._sector_size).pack().ljust(self._sector_size, b"\0")
        await self._log_device.submit(Io(WRITE, len(superblock), memoryview(superblock)), 0)

    def _disable(self, reason: str) -> None:
        if self._enabled:
            log.error("log-writes on %s: logging ends: %s", self._device.name, reason)
        self._enabled = False
        self._unflushed.clear()
        self._unflushed_bytes = 0

    async def message(self, args: Args) -> str:
        """`mark <text>`: puts a mark into the log."""
        word = args.word("message")
        if word.lower() != "mark" or len(args) != 1:
            raise InvalidArgument(f"{word!r} with {len(args)} words is not 'mark <text>'")
        await self._append(Logged(0, 0, Flag.MARK, args.word("text").encode()))
        return ""

    async def resume(self) -> None:
        """From now on there is something to log."""
        self._was_live = True

    async def close(self) -> None:
        """Logs what no flush has come for, and the last mark. A table that was never live leaves the log device alone."""
        if self._was_live and self._enabled:
            await self._append(*self._unflushed.values(), Logged(0, 0, Flag.MARK, END.encode()))
            try:
                await self._log_device.submit(Io(FLUSH, 0), 0)
            except NbdmapError as error:
                log.error("log-writes on %s: the log cannot be flushed: %s", self._device.name, error.message)

    # --- what is told --------------------------------------------------------------------------------------------------

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Those of the device."""
        return await self._device.extents(offset, length)

    def devices(self) -> list[Below]:
        """The device, whose sectors are those of the mapped device, and the log, of which nothing is demanded."""
        return [Below(self._device, self.begin, self.length), Below(self._log_device, 0, 0)]

    def limits(self) -> Limits:
        """What the device can; discards always, which are logged at least; no write-zeroes, as in the kernel."""
        return replace(self._device.limits, discard=True, zero=False, fast_zero=False)

    def table(self) -> str:
        """`<major:minor> <major:minor of the log>`"""
        return f"{self._device.number} {self._log_device.number}"

    def status(self) -> str:
        """`<entries> <last sector of the log in use> [logging_disabled]`, in sectors of 512 bytes."""
        return f"{self._entries} {self._next // SECTOR - 1}{'' if self._enabled else ' logging_disabled'}"

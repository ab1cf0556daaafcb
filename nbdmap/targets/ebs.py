"""ebs: smaller logical blocks on a device that has larger ones (Documentation device-mapper/dm-ebs).

    0 8192 ebs /dev/sda 0 1
    0 8192 ebs /dev/sda 0 1 8

Clients may use blocks of 512 bytes (1 sector); the device is only asked for whole blocks of its own, here 8 sectors. What
ends inside of one is read, changed and written. Such a write has its blocks to itself: another write of them waits, so
that none undoes the other.
"""

import asyncio
from dataclasses import replace
from typing import Final, Self

from nbdmap.block.device import Device, Extent, Limits
from nbdmap.block.io import CACHE, DISCARD, DONE, READ, WRITE, Io, Pending
from nbdmap.dm.args import Args
from nbdmap.dm.target import Below, Spec, Target
from nbdmap.errors import InvalidArgument
from nbdmap.units import SECTOR, round_down, round_up

MAX_EMULATED: Final = 4096
"""A page: no larger block can be emulated."""
MAX_UNDERLYING: Final = (1 << 15) * SECTOR


class _Writing:
    """Bytes start..end of the device that are being written; `whole` unless they are being read and changed, too."""

    __slots__ = ("end", "over", "start", "whole")

    def __init__(self, start: int, end: int, whole: bool) -> None:
        self.start = start
        self.end = end
        self.whole = whole
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Ebs(Target):
    """`ebs <device> <start> <emulated sectors> [<underlying sectors>]`"""

    type_name = "ebs"
    version = (1, 0, 1)

    def __init__(self, spec: Spec, device: Device, start: int, emulated: int, underlying: int, given: bool) -> None:
        super().__init__(spec)
        self._device = device
        self._start = start
        self._shift = start - spec.begin
        self._emulated = emulated
        self._block = underlying
        self._given = given
        self._writing: list[_Writing] = []

    @classmethod
    async def construct(cls, spec: Spec, args: Args) -> Self:
        """A device, its first sector, the block to emulate, and the device's block if it is not its logical block."""
        reference = args.word("device")
        start = args.start()
        emulated = _power("emulated block", args, MAX_EMULATED)
        given = _power("underlying block", args, MAX_UNDERLYING) if args else 0
        args.end()
        device = await spec.open(reference)
        underlying = given or device.limits.logical_block
        if underlying % device.limits.logical_block:
            raise InvalidArgument(
                f"underlying block: {underlying // SECTOR} sectors are less than the logical block of {device.name}, "
                f"{device.limits.logical_block // SECTOR}"
            )
        if start % underlying:
            raise InvalidArgument(
                f"start sector: {start // SECTOR} is not a multiple of the underlying block, {underlying // SECTOR} sectors"
            )
        return cls(spec, device, start, emulated, underlying, bool(given))

    def submit(self, io: Io, offset: int) -> Pending:
        """Passes whole blocks down; the rest is done by way of them."""
        below = offset + self._shift
        end = below + io.length
        whole = not (below | end) & (self._block - 1)
        if io.op is DISCARD or io.op is CACHE:
            return self._trim(io, below)
        if io.op is not WRITE:
            return self._device.submit(io, below) if whole else self._read(io, below)
        if not whole:
            return self._change(io, below)
        if self._writing:
            return self._write(io, below)
        pending = self._device.submit(io, below)
        return DONE if pending is DONE else self._track(pending, below, end)

    def _trim(self, io: Io, below: int) -> Pending:
        """A hint for the whole blocks of the range only."""
        start, end = round_up(below, self._block), round_down(below + io.length, self._block)
        return self._device.submit(Io(io.op, end - start, flags=io.flags), start) if start < end else DONE

    def _around(self, below: int, length: int) -> tuple[int, int]:
        """The blocks around a range; the last ends with the device."""
        return round_down(below, self._block), min(round_up(below + length, self._block), self._device.size)

    async def _read(self, io: Io, below: int) -> None:
        start, end = self._around(below, io.length)
        blocks = memoryview(bytearray(end - start))
        await self._device.submit(Io(READ, end - start, blocks), start)
        io.data[:] = blocks[below - start : below - start + io.length]

    async def _change(self, io: Io, below: int) -> None:
        """Reads the blocks at the ends, puts the data between, writes."""
        start, end = self._around(below, io.length)
        writing = await self._begin(start, end, whole=False)
        try:
            blocks = memoryview(bytearray(end - start))
            for low, high in self._torn(below, below + io.length, end):
                await self._device.submit(Io(READ, high - low, blocks[low - start : high - start]), low)
            blocks[below - start : below - start + io.length] = io.data
            await self._device.submit(Io(WRITE, end - start, blocks, io.flags), start)
        finally:
            self._end(writing)

    def _torn(self, below: int, end: int, last: int) -> list[tuple[int, int]]:
        """The blocks of which only a part is written: that at the start, and that at the end, where it is another."""
        head, tail = round_down(below, self._block), round_down(end, self._block)
        torn = [(head, min(head + self._block, last))] if below > head else []
        if end < last and (not torn or tail > head):
            torn.append((tail, last))
        return torn

    async def _write(self, io: Io, below: int) -> None:
        writing = await self._begin(below, below + io.length, whole=True)
        try:
            await self._device.submit(io, below)
        finally:
            self._end(writing)

    async def _begin(self, start: int, end: int, *, whole: bool) -> _Writing:
        """Waits for writes that must not meet this one, and keeps others from it."""
        while meets := [
            other.over for other in self._writing if other.start < end and start < other.end and not (whole and other.whole)
        ]:
            await asyncio.shield(meets[0])
        writing = _Writing(start, end, whole)
        self._writing.append(writing)
        return writing

    def _end(self, writing: _Writing) -> None:
        self._writing.remove(writing)
        writing.over.set_result(None)

    async def _track(self, pending: Pending, start: int, end: int) -> None:
        writing = _Writing(start, end, whole=True)
        self._writing.append(writing)
        try:
            await pending
        finally:
            self._end(writing)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Those of the device's blocks around, cut to the range."""
        below = offset + self._shift
        start, end = self._around(below, length)
        found: list[Extent] = []
        at = start
        for size, flags in await self._device.extents(start, end - start):
            low, high = max(at, below), min(at + size, below + length)
            if low < high:
                found.append((high - low, flags))
            at += size
        return found or [(length, 0)]

    def devices(self) -> list[Below]:
        """The one range."""
        return [Below(self._device, self._start, self.length)]

    def limits(self) -> Limits:
        """What the device can, but no write-zeroes, as in the kernel; the logical block is the emulated one."""
        io_min = max(self._emulated, self._block)
        return replace(self._device.limits, logical_block=self._emulated, zero=False, fast_zero=False, io_min=io_min)

    def table(self) -> str:
        """`<major:minor> <start> <emulated> [<underlying>]`"""
        given = f" {self._block // SECTOR}" if self._given else ""
        return f"{self._device.number} {self._start // SECTOR} {self._emulated // SECTOR}{given}"


def _power(what: str, args: Args, high: int) -> int:
    """A block of the table, in bytes."""
    sectors = args.number(what, 1, high // SECTOR)
    if sectors & sectors - 1:
        raise InvalidArgument(f"{what}: {sectors} is not a power of 2")
    return sectors * SECTOR

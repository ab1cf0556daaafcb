"""Sixteen clients at once on one export: every history is linearizable, whatever the stack; a broken stack is found out."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdmap.block.device import Device
from nbdmap.block.file import FileDisk
from nbdmap.block.io import FLUSH, FUA, READ, WRITE, Io
from nbdmap.block.memory import MemoryDisk
from nbdmap.dm.device import MappedDevice
from nbdmap.dm.table import parse_table
from nbdmap.errors import IoFailed
from nbdmap.units import MIB, SECTOR
from tests.crash.plants import AcknowledgeWriteEarly, Broken, KeepBuffer, SwapWrites, WriteTwice
from tests.linear.history import Party
from tests.support.disks import FakeOpener
from tests.support.nbd import serving

HISTORIES = 300
"""For each stack."""
STRIPED = "0 96 striped 3 2 7:0 1 7:1 0 7:2 5"
LINEAR = "0 40 linear 7:0 8\n40 20 linear 7:1 3\n60 36 linear 7:2 0"


class Jumbled(Broken):
    """A disk that does requests a sector at a time, in no order, with others in between."""

    def __init__(self, below: Device, seed: int) -> None:
        super().__init__(below)
        self._rng = random.Random(seed)

    async def submit(self, io: Io, offset: int) -> None:
        order = list(range(0, io.length, SECTOR))
        self._rng.shuffle(order)
        for start in order if io.op in (READ, WRITE) else ():
            for _ in range(self._rng.choice((0, 0, 1, 3))):
                await asyncio.sleep(0)
            await self.below.submit(io.part(start, SECTOR), offset + start)
        if io.op is FLUSH:
            await self.below.submit(io, offset)


def memory(number: int) -> MemoryDisk:
    return MemoryDisk(f"ram{number}", f"7:{number}", MIB)


def jumbled(number: int) -> Device:
    return Jumbled(memory(number), number)


async def play(table: str, disks: list[Device], count: int, seed: int, *, atomic: bool = True) -> list[str]:
    """The faults of `count` histories."""
    async with serving() as stack:
        await stack.add("dev", table, *disks)
        party = await Party.connect(stack.socket, seed, atomic=atomic)
        return [found for _ in range(count) if (found := (await party.play()).fault())]


@pytest.mark.parametrize("table", [LINEAR, STRIPED], ids=["linear", "striped"])
@pytest.mark.parametrize("disk", [memory, jumbled])
async def test_every_history_is_linearizable(table: str, disk: Callable[[int], Device]) -> None:
    assert await play(table, [disk(number) for number in range(3)], HISTORIES, 1) == []


async def test_over_files(tmp_path: Path) -> None:
    """Threads do the FUA writes; the kernel does not promise that a sector of the page cache is atomic."""
    disks = [
        await FileDisk.open(tmp_path / str(number), name=f"d{number}", number=f"7:{number}", create=True, size=MIB)
        for number in range(3)
    ]
    assert await play(STRIPED, list(disks), HISTORIES, 2, atomic=False) == []
    for disk in disks:
        await disk.close()


async def test_while_tables_are_swapped() -> None:
    """The device is suspended, loaded with another table over the same data, and resumed, again and again."""
    disks: list[Device] = [jumbled(number) for number in range(3)]
    async with serving() as stack:
        device = await stack.add("dev", LINEAR, *disks)
        party = await Party.connect(stack.socket, 3)
        done: list[None] = []
        swaps = asyncio.create_task(swap_for_ever(device, disks, done))
        faults = [found for _ in range(HISTORIES) if (found := (await party.play()).fault())]
        swaps.cancel()
        assert faults == []
        assert len(done) > HISTORIES
        with pytest.raises(asyncio.CancelledError):
            await swaps


async def swap_for_ever(device: MappedDevice, disks: list[Device], done: list[None]) -> None:
    """LINEAR, cut elsewhere: the same sectors by another table. Between two swaps some requests get through."""
    other = "0 7 linear 7:0 8\n7 33 linear 7:0 15\n40 20 linear 7:1 3\n60 35 linear 7:2 0\n95 1 linear 7:2 35"
    while True:
        for table in (other, LINEAR):
            await device.load(parse_table(table), FakeOpener(*disks), read_only=False)
            await device.suspend()
            await asyncio.sleep(0)
            await device.resume()
            done.append(None)
            for _ in range(8):
                await asyncio.sleep(0)


class Shaky(Broken):
    """One of several ways to a disk: one request in ten fails, before anything is done."""

    def __init__(self, below: Device, number: int) -> None:
        super().__init__(below)
        self.name = self.number = f"8:{number}"
        self._rng = random.Random(number)

    async def submit(self, io: Io, offset: int) -> None:
        for _ in range(self._rng.choice((0, 1, 2))):
            await asyncio.sleep(0)
        if self._rng.random() < 0.1:
            raise IoFailed("gone")
        await self.below.submit(io, offset)


@pytest.mark.parametrize("selector", ["round-robin", "queue-length", "service-time", "historical-service-time"])
async def test_over_paths_that_fail(selector: str) -> None:
    """Requests wait and change their way all the time. (A path that fails a write after it was done is not linearizable, as
    the second try may undo what another client wrote in between; so it is in Linux.)"""
    disk = jumbled(0)
    table = f"0 96 multipath 1 queue_if_no_path 0 2 1 {selector} 0 2 0 8:0 8:1 {selector} 0 1 0 8:2"
    async with serving() as stack:
        device = await stack.add("dev", table, *(Shaky(disk, number) for number in range(3)))
        party = await Party.connect(stack.socket, 4)
        repairs = asyncio.create_task(reinstate_for_ever(device))
        faults = [found for _ in range(HISTORIES // 3) if (found := (await party.play()).fault())]
        repairs.cancel()
        assert faults == []
        assert device.event_number > 100
        with pytest.raises(asyncio.CancelledError):
            await repairs
    await disk.close()


async def reinstate_for_ever(device: MappedDevice) -> None:
    """Now and then every path is used again."""
    while True:
        for number in range(3):
            await device.message(0, ["reinstate_path", f"8:{number}"])
        for _ in range(40):
            await asyncio.sleep(0)


class StaleReads(Broken):
    """Every third read of a sector gives what it gave before."""

    def __init__(self, below: Device) -> None:
        super().__init__(below)
        self._last: dict[int, tuple[int, bytes]] = {}

    async def submit(self, io: Io, offset: int) -> None:
        await self.below.submit(io, offset)
        if io.op is READ and io.length == SECTOR:
            reads, before = self._last.get(offset, (0, bytes(io.data)))
            self._last[offset] = reads + 1, bytes(io.data)
            if reads % 3 == 2:
                io.data[:] = before


class FuaWritesTwice(Broken):
    """A FUA write is done, and done again durably; as FileDisk did it."""

    async def submit(self, io: Io, offset: int) -> None:
        await self.below.submit(io, offset)
        if io.flags & FUA:
            await self.below.submit(io, offset)


@pytest.mark.parametrize("layer", [AcknowledgeWriteEarly, KeepBuffer, SwapWrites, WriteTwice, StaleReads, FuaWritesTwice])
async def test_a_broken_stack_is_found_out(layer: type[Broken]) -> None:
    broken = layer(jumbled(0))
    assert await play("0 64 linear 7:0 0", [broken], 60, 5) != []
    await broken.close()

"""What a crash run is about: a stack, what clients do with it, and what must hold when it is opened again.

A target joins in with a subclass of `Scenario`: it says how many disks of which size there are (`disks`), builds the stack
over them with the normal code (`open`, for the first time after `format`), and may bring its own `workload`, `recover` and
`check`. See stacks.py for linear and striped; README.md for an example.
"""

import asyncio
import contextlib
import errno
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

from nbdmap.block.device import Device
from nbdmap.block.file import FileDisk
from nbdmap.block.io import NO_HOLE
from nbdmap.dm.device import MappedDevice
from nbdmap.dm.target import Target
from nbdmap.targets import TARGETS
from nbdmap.units import SECTOR
from tests.crash.disks import Fault, RecordingDisk, Weather
from tests.crash.log import WriteLog
from tests.crash.oracle import Client
from tests.crash.simfile import SimKernel

Layer = Callable[[Device], Device]
"""Puts a device on another: a fault of the stack that is planted to be found."""


@dataclass(slots=True)
class Stack:
    """An open stack: the devices that clients use, by name, and all mapped devices from the bottom up, to be closed."""

    devices: Mapping[str, Device]
    mapped: Sequence[MappedDevice]

    async def close(self) -> None:
        """Suspends, so flushes, and closes from the top down."""
        try:
            for device in reversed(self.mapped):
                if not device.suspended:
                    await device.suspend()
        finally:
            for device in reversed(self.mapped):
                await device.close()


class Scenario:
    """One kind of stack. Its life: `disks` are made of images, `format` once, then `open`, `workload`, `Stack.close`."""

    name: ClassVar[str]
    sectors: ClassVar[tuple[int, ...]]
    """The size of each disk."""
    files: ClassVar[bool] = False
    """The disks are FileDisks on simulated files; else RecordingDisks."""
    discard_zeroes: ClassVar[bool] = False
    """What clients discard reads as zeroes, as it does over files."""

    types: Mapping[str, type[Target]] = TARGETS
    device_type: type[MappedDevice] = MappedDevice
    file_type: type[FileDisk] = FileDisk
    below: Layer | None = None
    """Planted between the stack and each disk."""
    above: Layer | None = None
    """Planted between the stack and its clients."""

    writers: int = 3
    operations: int = 7
    """What each writer does."""

    # --- the hooks of a target -----------------------------------------------------------------------------------------

    async def format(self, disks: Sequence[Device]) -> None:
        """Writes what must be on the disks before the stack is opened for the first time. It is durable."""

    async def open(self, disks: Sequence[Device]) -> Stack:
        """Opens the stack with the normal code."""
        raise NotImplementedError

    async def workload(self, clients: Mapping[str, Client], stack: Stack, rng: random.Random) -> None:
        """What the clients do: several writers on each device, at random."""
        async with asyncio.TaskGroup() as group:
            for name, client in clients.items():
                for number in range(self.writers):
                    seed = rng.getrandbits(64)
                    group.create_task(self.write_at_random(client, random.Random(seed)), name=f"{name} {number}")

    async def recover(self, stack: Stack) -> None:
        """What is done after the stack is opened on a crashed state, before it is checked."""

    async def check(self, stack: Stack, clients: Mapping[str, Client], at: int) -> None:
        """More that must hold of an opened stack after a cut at `at`. Raises Violation."""

    def allowed(self, clients: Mapping[str, Client], at: int) -> dict[str, list[frozenset[bytes] | None]]:
        """For each device and sector what it may hold after a cut at `at`."""
        return {name: client.allowed(at) for name, client in clients.items()}

    def faults(self, rng: random.Random) -> list[tuple[tuple[str, int], Fault]]:
        """What fails in a run: in one of three something does."""
        if rng.random() < 0.67:
            return []
        kind = rng.choice(("flush", "flush", "write", "zero", *(("range",) if self.files else ())))
        number = errno.EIO if kind in ("flush", "range") else rng.choice((errno.EIO, errno.ENOSPC))
        faults = [((kind, rng.randrange(6)), Fault(number, rng.choice((0.0, 0.5, 1.0))))]
        if self.files:
            faults.append((("write", rng.randrange(6)), Fault(0, 0.5)))
        return faults

    # --- the parts -------------------------------------------------------------------------------------------------------

    async def write_at_random(self, client: Client, rng: random.Random) -> None:
        """One writer: mostly writes, in a part of the device that is small enough for them to meet."""
        for _ in range(self.operations):
            count = min(rng.choice((1, 1, 2, 4, 7, 12)), client.sectors)
            sector = rng.randrange(client.sectors - count + 1)
            fua = rng.random() < 0.25
            kind = rng.random()
            if kind < 0.55:
                await client.write(sector, count, fua=fua)
            elif kind < 0.65:
                await client.zero(sector, count, fua=fua, flags=rng.choice((0, NO_HOLE)))
            elif kind < 0.72:
                await client.discard(sector, count, fua=fua)
            elif kind < 0.90:
                await client.flush()
            elif kind < 0.96:
                await client.read(sector, count)
            elif isinstance(client.device, MappedDevice) and not client.device.suspended:
                await self._suspend_and_resume(client)

    async def _suspend_and_resume(self, client: Client) -> None:
        await client.suspend()
        if isinstance(client.device, MappedDevice):
            await client.device.resume()

    def disks(self, log: WriteLog, images: Sequence[bytes], weather: Weather) -> AbstractContextManager[list[Device]]:
        """The disks under the stack, for as long as the context lasts."""
        return self._disks(log, images, weather)

    @contextlib.contextmanager
    def _disks(self, log: WriteLog, images: Sequence[bytes], weather: Weather) -> Iterator[list[Device]]:
        if self.files:
            kernel = SimKernel(log, weather, images)
            with kernel.installed():
                yield [self._under(kernel.disk(index, self.file_type)) for index in range(len(images))]
        else:
            yield [self._under(RecordingDisk(index, image, log, weather)) for index, image in enumerate(images)]

    def _under(self, disk: Device) -> Device:
        return self.below(disk) if self.below is not None else disk

    def seen(self, device: Device) -> Device:
        """A device of the stack as clients see it."""
        return self.above(device) if self.above is not None else device

    def first_images(self, rng: random.Random) -> list[bytes]:
        """Disks full of garbage."""
        return [rng.randbytes(sectors * SECTOR) for sectors in self.sectors]

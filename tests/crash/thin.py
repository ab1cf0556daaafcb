"""A pool with a volume and a snapshot of it, crashed.

Beside the clients' writes and discards of whole blocks the pool gets messages: snapshots of the volume, which share its
blocks, and transaction ids. After a crash the metadata must be without a finding, leaks included, so no block is mapped twice
or lost; each sector of both volumes what the oracle says: zeroes or what their own clients wrote, never what the disks, full
of garbage, had before; the transaction id not older than one that was acknowledged; and a snapshot that was acknowledged as it
was made, when nothing was written meanwhile.
"""

import asyncio
import contextlib
import errno
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Final
from unittest.mock import patch
from weakref import WeakKeyDictionary

from nbdmap.block.device import Device
from nbdmap.block.io import READ, WRITE, WRITE_ZEROES, Io
from nbdmap.dm.device import MappedDevice
from nbdmap.dm.table import parse_table
from nbdmap.errors import NbdmapError
from nbdmap.targets.thin.check import check
from nbdmap.targets.thin.thin_pool import ThinPool
from tests.crash.disks import Fault, Weather
from tests.crash.log import WriteLog
from tests.crash.oracle import Client, Violation
from tests.crash.scenario import Scenario, Stack
from tests.support.disks import FakeOpener, Uevents
from tests.support.thin import thin_check_bytes

BLOCK: Final = 128
"""Sectors."""
BLOCKS: Final = 2
"""Of each volume, and a half."""
ASK_THIN_CHECK: Final = 500
SIZE: Final = BLOCKS * BLOCK + BLOCK // 2


class Thin(Scenario):
    """Metadata of 64 blocks, 12 blocks of data, volumes 0 and 1, the second a snapshot of the first."""

    name = "thin"
    sectors = (64 * 8, 12 * BLOCK)
    tables: ClassVar[dict[str, str]] = {
        "pool": f"0 {12 * BLOCK} thin-pool 7:0 7:1 {BLOCK} 0 1 error_if_no_space",
        "thin": f"0 {SIZE} thin pool 0",
        "snap": f"0 {SIZE} thin pool 1",
    }
    discard_zeroes = True
    operations = 8
    writers = 2
    states = 0
    planted: tuple[Any, str, Any] | None = None
    """An object, its attribute, and what stands in for that."""

    def __init__(self) -> None:
        self._acknowledged: WeakKeyDictionary[Client, list[tuple[int, int]]] = WeakKeyDictionary()
        """For each run: (moment, transaction id)."""

    async def format(self, disks: Sequence[Device]) -> None:
        await disks[0].submit(Io(WRITE, 4096, memoryview(bytes(4096))), 0)
        opener = FakeOpener(*disks)
        pool = await self._device("pool", opener)
        await pool.message(0, ["create_thin", "0"])
        thin = await self._device("thin", opener)
        await thin.submit(Io(WRITE, 512, memoryview(b"\x01" * 512)), 512)
        await thin.submit(Io(WRITE, 512, memoryview(b"\x02" * 512)), BLOCK * 512)
        await pool.message(0, ["create_snap", "1", "0"])
        await thin.submit(Io(WRITE, 512, memoryview(b"\x03" * 512)), 1024)
        for device in (thin, pool):
            await device.suspend()
            await device.close()

    async def _device(self, name: str, opener: FakeOpener) -> MappedDevice:
        device = self.device_type(name, "", f"254:{list(self.tables).index(name)}", self.types, Uevents())
        await device.load(parse_table(self.tables[name]), opener, read_only=False)
        await device.resume()
        opener.devices[name] = device
        return device

    async def open(self, disks: Sequence[Device]) -> Stack:
        opener = FakeOpener(*disks)
        mapped: list[MappedDevice] = []
        try:
            for name in self.tables:
                device = await self._device(name, opener)
                mapped.append(device)
        except BaseException:
            for device in reversed(mapped):
                await device.close()
            raise
        return Stack({device.name: self.seen(device) for device in mapped[1:]}, mapped)

    async def workload(self, clients: Mapping[str, Client], stack: Stack, rng: random.Random) -> None:
        async with asyncio.TaskGroup() as group:
            for client in clients.values():
                for _ in range(self.writers):
                    group.create_task(self.write_at_random(client, random.Random(rng.getrandbits(64))))
            group.create_task(self._send_messages(clients["thin"], stack.mapped[0], random.Random(rng.getrandbits(64))))

    async def write_at_random(self, client: Client, rng: random.Random) -> None:
        for _ in range(self.operations):
            kind = rng.random()
            if kind < 0.15:
                await client.discard(rng.randrange(BLOCKS) * BLOCK, BLOCK, fua=rng.random() < 0.25)
            elif kind < 0.2:
                await client.zero(0, 1)  # is not supported
            elif kind < 0.25:
                await client.write(rng.randrange(BLOCKS) * BLOCK, BLOCK)
            elif kind < 0.3:
                await client.write(BLOCK - 4, 8, fua=rng.random() < 0.5)
            elif kind < 0.7:
                count = rng.choice((1, 1, 2, 4, 7))
                await client.write(rng.randrange(client.sectors - count + 1), count, fua=rng.random() < 0.2)
            elif kind < 0.9:
                await client.flush()
            elif kind < 0.95:
                await client.read(rng.randrange(client.sectors - 8), 8)
            elif isinstance(client.device, MappedDevice) and not client.device.suspended:
                await client.suspend()
                await client.device.resume()

    async def _send_messages(self, client: Client, pool: MappedDevice, rng: random.Random) -> None:
        acknowledged = self._acknowledged.setdefault(client, [])
        target = pool.targets[0]
        assert isinstance(target, ThinPool)
        for _ in range(3):
            await asyncio.sleep(rng.random() / 100)
            now = target.pool.metadata.superblock.transaction_id
            await self._message(pool, f"set_transaction_id {now} {now + 1}")
            acknowledged.append((client.log.mark(f"transaction id {now + 1}"), now + 1))
            number = 2 + now
            if rng.random() < 0.4:
                await self._message(pool, f"create_snap {number} {rng.randrange(2)}")
            elif rng.random() < 0.5:
                await self._message(pool, f"delete {number - 1}")
            elif rng.random() < 0.5:
                held = target.pool.metadata.superblock.held_root
                await self._message(pool, "release_metadata_snap" if held else "reserve_metadata_snap")
            elif not pool.suspended:
                await pool.suspend()
                await pool.resume()

    async def _message(self, pool: MappedDevice, text: str) -> None:
        try:
            await pool.message(0, text.split())
        except NbdmapError as error:
            if error.errno not in (errno.EEXIST, errno.ENODATA, errno.EBUSY):
                raise

    async def check(self, stack: Stack, clients: Mapping[str, Client], at: int) -> None:
        target = stack.mapped[0].targets[0]
        assert isinstance(target, ThinPool)
        found = await check(target.pool.metadata_device)
        if found.errors or found.leaks:
            raise Violation(f"the check finds {(found.errors.words + found.leaks.words)[:3]}")
        numbers = [number for moment, number in self._acknowledged.get(clients["thin"], ()) if moment <= at]
        if numbers and target.pool.metadata.superblock.transaction_id < numbers[-1]:
            raise Violation(f"the transaction id is older than {numbers[-1]}, which was acknowledged")
        self.states += 1
        if self.states % ASK_THIN_CHECK == 0 and shutil.which("thin_check"):
            await self._ask(target.pool.metadata_device)

    async def _ask(self, device: Device) -> None:
        image = bytearray(device.size)
        await device.submit(Io(READ, device.size, memoryview(image)), 0)
        with tempfile.TemporaryDirectory() as directory:
            thin_check_bytes(image, Path(directory))

    def disks(self, log: WriteLog, images: Sequence[bytes], weather: Weather) -> AbstractContextManager[list[Device]]:
        """With the planted bug, if there is one."""
        stack = contextlib.ExitStack()
        if self.planted is not None:
            stack.enter_context(patch.object(*self.planted))
        inner = super().disks(log, images, weather)

        @contextlib.contextmanager
        def both() -> Iterator[list[Device]]:
            with stack, inner as disks:
                yield disks

        return both()

    def faults(self, rng: random.Random) -> list[tuple[tuple[str, int], Fault]]:
        """None: a pool that goes back to its last commit loses what was acknowledged and not flushed. See tests/faults."""
        return []



class ThinFiles(Thin):
    """The same over files; every other block of the data is a hole, which is not zeroed once more."""

    name = "thin-files"
    files = True

    async def format(self, disks: Sequence[Device]) -> None:
        for sector in range(BLOCK, 12 * BLOCK, 2 * BLOCK):
            await disks[1].submit(Io(WRITE_ZEROES, BLOCK * 512), sector * 512)
        await super().format(disks)

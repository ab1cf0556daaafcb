"""The persistent-data library alone, crashed: a device whose sectors are entries of a b-tree in thin metadata.

`Ledger` keeps of each sector only the number in its stamp, as the value of a mapping (reference g.3), so a commit is the one
thing that makes its writes durable. Now and then it makes a snapshot, with the checksum of what is in it as its transaction
id, or deletes one: so blocks are shared at every level, and counts come and go. After a crash the metadata must be without a
finding, leaks included, and each snapshot as it was made.
"""

import asyncio
import errno
import random
import shutil
import struct
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from nbdmap.block.device import Device
from nbdmap.block.io import DISCARD, FLUSH, FUA, READ, WRITE, Io
from nbdmap.errors import IoFailed, NbdmapError
from nbdmap.units import SECTOR
from tests.crash.disks import LIMITS, Fault
from tests.crash.oracle import Client, Violation, stamp
from tests.crash.scenario import Scenario, Stack
from tests.persist.pool import TIME_BITS, Metadata, check, thin_check

NAME: Final = "ledger"
SECTORS: Final = 700
SNAPSHOTS: Final = 4
SHORT: Final = 16
ASK_THIN_CHECK: Final = 500
"""Every so many states thin_check is asked, too."""
_NUMBER: Final = struct.Struct("<8xI")


class Ledger(Device):
    """A device of SECTORS sectors on a metadata disk. When a change fails, nothing goes any more until it is opened again."""

    def __init__(self, pool: Metadata) -> None:
        self.name, self.number, self.size = NAME, "254:0", SECTORS * SECTOR
        self.limits, self.read_only = LIMITS, False
        self.pool = pool
        self.failed = False
        self._lock = asyncio.Lock()
        self._commits = 0

    async def submit(self, io: Io, offset: int) -> None:
        first, count = offset // SECTOR, io.length // SECTOR
        try:
            self._check()
            if io.op is READ:
                await self._read(io, first, count)
                self._check()
                return
            async with self._lock:
                self._check()
                await self._change(io, first, count)
        except NbdmapError:
            self.failed = True
            raise

    async def _read(self, io: Io, first: int, count: int) -> None:
        """A short read looks up sector by sector, beside the changes; a long one reads the tree, and waits for them."""
        if count <= SHORT:
            found = {sector: await self.pool.forest.lookup(0, sector) for sector in range(first, first + count)}
        else:
            async with self._lock:
                tree = await self.pool.forest.tree(0)
                assert tree is not None
                found = dict([item async for item in tree.items(first, first + count)])
        for sector in range(first, first + count):
            value = found.get(sector)
            data = bytes(SECTOR) if value is None else stamp(NAME, value & (1 << TIME_BITS) - 1, sector)
            io.data[(sector - first) * SECTOR : (sector - first + 1) * SECTOR] = data

    def _check(self) -> None:
        if self.failed:
            raise IoFailed("the ledger has failed")

    async def _change(self, io: Io, first: int, count: int) -> None:
        if io.op is WRITE:
            for sector in range(count):
                self.pool.time = _NUMBER.unpack_from(io.data, sector * SECTOR)[0]
                await self.pool.provision(0, first + sector)
        elif io.op is not FLUSH:
            assert io.op is DISCARD or io.op.name == "WRITE_ZEROES"
            await self.pool.discard(0, first, first + count)
        if io.op is FLUSH or io.flags & FUA:
            await self._snapshots()
            await self.pool.commit()

    async def _snapshots(self) -> None:
        self._commits += 1
        pool = self.pool
        old = [identity async for identity, _ in pool.forest.roots() if identity]
        if self._commits % 2 == 0:
            new = max(old, default=0) + 1
            pool.transaction = await contents(pool, 0)
            await pool.create_snap(new, 0)
        if len(old) >= SNAPSHOTS:
            await pool.delete(old[0])


async def contents(pool: Metadata, identity: int) -> int:
    """A checksum of what is in a volume."""
    tree = await pool.forest.tree(identity)
    assert tree is not None
    found = 0
    async for keys, values in tree.arrays():
        found = zlib.crc32(values, zlib.crc32(keys.tobytes(), found))
    return found


class LedgerStack(Stack):
    """Closing it commits."""

    async def close(self) -> None:
        await self.devices[NAME].submit(Io(FLUSH, 0), 0)


class Persist(Scenario):
    """One ledger on a metadata disk of 100 blocks, with room for some transactions before blocks are used again."""

    name = "persist"
    sectors = (100 * 8,)
    metadata_type: type[Metadata] = Metadata
    states = 0

    async def format(self, disks: Sequence[Device]) -> None:
        pool = await Metadata.create(disks[0], 3000)
        await pool.create_thin(0)
        for key in range(0, SECTORS, 2):
            await pool.provision(0, key)
        pool.transaction = await contents(pool, 0)
        for identity in range(1, SNAPSHOTS + 1):
            await pool.create_snap(identity, 0)
        pool.time = 0
        await pool.commit()

    async def open(self, disks: Sequence[Device]) -> Stack:
        pool = await self.metadata_type.open(disks[0])
        return LedgerStack({NAME: self.seen(Ledger(pool))}, [])

    async def check(self, stack: Stack, clients: Mapping[str, Client], at: int) -> None:
        ledger = stack.devices[NAME]
        assert isinstance(ledger, Ledger)
        pool = ledger.pool
        device = pool.store.device
        found = await check(device)
        if found.errors or found.leaks or found.notes:
            raise Violation(f"the check finds {(found.errors.words + found.leaks.words + found.notes.words)[:3]}")
        async for identity, details in pool.details.items():
            if identity and details[1] != await contents(pool, identity):
                raise Violation(f"snapshot {identity} is not what it was")
        self.states += 1
        if self.states % ASK_THIN_CHECK == 0 and shutil.which("thin_check"):
            await self._ask(device)
        await ledger.submit(Io(FLUSH, 0), 0)
        found = await check(device)
        if found.errors or found.leaks or found.notes:
            raise Violation(f"after a commit the check finds {(found.errors.words + found.leaks.words + found.notes.words)[:3]}")

    async def _ask(self, device: Device) -> None:
        image = bytearray(device.size)
        await device.submit(Io(READ, device.size, memoryview(image)), 0)
        with tempfile.TemporaryDirectory() as directory:
            status, words = thin_check(bytes(image), Path(directory))
        if status:
            raise Violation(f"thin_check says: {words}")

    def faults(self, rng: random.Random) -> list[tuple[tuple[str, int], Fault]]:
        """In one run of two something fails."""
        if rng.random() < 0.5:
            return []
        kind, first, end = rng.choice((("flush", 0, 8), ("write", 0, 24), ("read", 12, 40)))  # opening reads, and must succeed
        return [((kind, rng.randrange(first, end)), Fault(errno.EIO, rng.choice((0.0, 0.5, 1.0))))]

"""A pool and volumes for tests, over disks that can fail, and thin_check over what is left of them."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from nbdmap.block.io import DISCARD, FLUSH, Io
from nbdmap.dm.device import MappedDevice
from nbdmap.dm.table import parse_table
from nbdmap.targets import TARGETS
from nbdmap.targets.thin.pool import Pool
from nbdmap.targets.thin.thin_pool import ThinPool
from tests.support.disks import FakeDisk, FakeOpener, HoleyDisk, Uevents, read, write

BLOCK: Final = 64 << 10


def thin_check(path: Path) -> None:
    """Raises AssertionError, with what thin_check says, unless it finds nothing wrong."""
    done = subprocess.run(["thin_check", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"thin_check: {done.stdout}{done.stderr}"


def thin_check_bytes(metadata: bytes | bytearray, directory: Path) -> None:
    """As thin_check, for metadata in memory."""
    path = directory / "metadata"
    path.write_bytes(metadata)
    thin_check(path)


class ThinSite:
    """The disks "meta" (7:0) and "data" (7:1), the pool "pool" and its volumes."""

    def __init__(
        self, directory: Path, data_blocks: int = 64, metadata_blocks: int = 256, block: int = BLOCK, *, holes: bool = False
    ) -> None:
        """With `holes` every other block of the data disk is one; else none is, and all are garbage."""
        self.block = block
        self.data_blocks = data_blocks
        self.meta = FakeDisk("7:0", metadata_blocks * 8)
        self.data = HoleyDisk("7:1", data_blocks * block // 512) if holes else FakeDisk("7:1", data_blocks * block // 512)
        for at in range(0, self.data.size, 2 * block if holes else block):
            self.data.bytes[at : at + block] = b"\xee" * block
        self.opener = FakeOpener(self.meta, self.data)
        self.devices: dict[str, MappedDevice] = {}
        self._directory = directory

    async def open(self, features: str = "", low_water: int = 0) -> "ThinSite":
        """Makes the pool live."""
        await self.create("pool", self.pool_table(features, low_water))
        return self

    def pool_table(self, features: str = "", low_water: int = 0, blocks: int = 0) -> str:
        words = f" {len(features.split())} {features}" if features else ""
        sectors = (blocks or self.data_blocks) * self.block // 512
        return f"0 {sectors} thin-pool 7:0 7:1 {self.block // 512} {low_water}{words}"

    async def create(self, name: str, table: str, read_only: bool = False) -> MappedDevice:
        """A mapped device with a live table."""
        device = MappedDevice(name, "", f"254:{len(self.devices)}", TARGETS, Uevents())
        try:
            await device.load(parse_table(table), self.opener, read_only)
            await device.resume()
        except BaseException:
            await device.close()
            raise
        self.devices[name] = self.opener.devices[name] = self.opener.devices[device.number] = device
        return device

    async def thin(self, name: str, number: int, blocks: int = 32, origin: str = "") -> MappedDevice:
        """A device for volume `number`."""
        return await self.create(name, f"0 {blocks * self.block // 512} thin pool {number} {origin}")

    async def new(self, name: str, number: int, blocks: int = 32, origin: str = "") -> MappedDevice:
        """A new volume and its device."""
        await self.message(f"create_thin {number}")
        return await self.thin(name, number, blocks, origin)

    async def snap(self, name: str, number: int, of: str, origin: int, blocks: int = 32) -> MappedDevice:
        """A snapshot of a volume that is active, as the document says how."""
        await self.devices[of].suspend()
        await self.message(f"create_snap {number} {origin}")
        await self.devices[of].resume()
        return await self.thin(name, number, blocks)

    async def message(self, text: str) -> str:
        return await self.devices["pool"].message(0, text.split())

    async def reload(self, name: str, table: str) -> None:
        await self.devices[name].load(parse_table(table), self.opener, False)
        await self.devices[name].resume()

    async def status(self, name: str = "pool") -> str:
        device = self.devices[name]
        for target in device.targets:
            await target.refresh_status()
        return "; ".join(line.params.strip() for line in (device.live.status_lines() if device.live else []))

    async def mode(self) -> str:
        return (await self.status()).split()[4]

    async def used(self) -> int:
        return int((await self.status()).split()[2].split("/")[0])

    @property
    def pool(self) -> Pool:
        target = self.devices["pool"].targets[0]
        assert isinstance(target, ThinPool)
        return target.pool

    async def remove(self, *names: str) -> None:
        for name in names:
            device = self.devices.pop(name)
            for key in [key for key, one in self.opener.devices.items() if one is device]:
                del self.opener.devices[key]
            await device.close()

    async def close(self) -> None:
        """Removes everything, the pool last, and checks the metadata."""
        for name in reversed(list(self.devices)):
            await self.remove(name)
        self.check()

    def check(self) -> None:
        """thin_check over the metadata as it is on the disk."""
        thin_check_bytes(self.meta.bytes, self._directory)

    def save(self) -> Path:
        """The metadata as a file."""
        path = self._directory / "metadata"
        path.write_bytes(self.meta.bytes)
        return path

    def commits(self) -> int:
        """How often the superblock was written."""
        return sum(entry[:2] == ("write", 0) for entry in self.meta.log)


Make = Callable[..., ThinSite]


@asynccontextmanager
async def site(directory: Path, features: str = "", *, holes: bool = False, **sizes: int) -> AsyncIterator[ThinSite]:
    """An open site that is closed, and checked, at the end."""
    made = ThinSite(directory, **sizes, holes=holes)
    await made.open(features)
    yield made
    await made.close()


async def discard(device: MappedDevice, offset: int, length: int, flags: int = 0) -> None:
    await device.submit(Io(DISCARD, length, flags=flags), offset)


async def flush(device: MappedDevice) -> None:
    await device.submit(Io(FLUSH, 0), 0)


async def contents(device: MappedDevice) -> bytes:
    return await read(device, 0, device.size)


async def settle() -> None:
    """Lets everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


__all__ = ["Mapping", "contents", "discard", "flush", "read", "settle", "site", "thin_check", "write"]

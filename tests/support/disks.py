"""Disks and openers for tests: no mocks, but devices that can be told to wait or to fail."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from nbdmap.block.device import HOLE, ZERO, Device, Extent, Limits
from nbdmap.block.io import FLUSH, READ, WRITE, Io
from nbdmap.dm.device import MappedDevice
from nbdmap.dm.table import Table, parse_table
from nbdmap.errors import IoFailed, NotFound
from nbdmap.targets import TARGETS
from nbdmap.units import SECTOR

if TYPE_CHECKING:
    import asyncio

ALL = Limits(discard=True, zero=True, fast_zero=True, cache=True, sparse=True)


class FakeDisk(Device):
    """A disk in a bytearray that writes down every request, and waits or fails when told to."""

    def __init__(self, number: str, sectors: int = 1024, limits: Limits = ALL, read_only: bool = False) -> None:
        self.name = f"disk{number}"
        self.number = number
        self.size = sectors * SECTOR
        self.limits = limits
        self.read_only = read_only
        self.bytes = bytearray(self.size)
        self.log: list[tuple[str, int, int, int]] = []
        """(operation, offset, length, flags) of each request, in the order they came."""
        self.gate: asyncio.Event | None = None
        """Requests wait for it, when it is set."""
        self.failure: Callable[[Io, int], Exception | None] = lambda io, offset: None
        self.runs: list[Extent] = []
        self.closed = False

    async def submit(self, io: Io, offset: int) -> None:
        self.log.append((io.op.name.lower(), offset, io.length, io.flags))
        if self.gate is not None:
            await self.gate.wait()
        if error := self.failure(io, offset):
            raise error
        assert io.op is FLUSH or offset + io.length <= self.size, "the table must not let this through"
        if io.op is READ:
            io.data[:] = self.bytes[offset : offset + io.length]
        elif io.op is WRITE:
            assert len(io.data) == io.length
            self.bytes[offset : offset + io.length] = io.data
        elif io.op is not FLUSH:
            self.bytes[offset : offset + io.length] = bytes(io.length)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        if not self.runs:
            return [(length, 0)]
        found: list[Extent] = []
        begin = 0
        for size, flags in self.runs:
            low, high = max(begin, offset), min(begin + size, offset + length)
            if low < high:
                found.append((high - low, flags))
            begin += size
        return found

    async def close(self) -> None:
        self.closed = True


class HoleyDisk(FakeDisk):
    """Of it 4 KiB of zeroes are a hole, as of a file that is kept sparse with zeal."""

    async def extents(self, offset: int, length: int) -> list[Extent]:
        self.log.append(("extents", offset, length, 0))
        return holes(self.bytes, offset, length)


def holes(content: bytes | bytearray, offset: int, length: int) -> list[Extent]:
    """The extents of a range of a disk with this content, zeroes being holes."""
    found: list[Extent] = []
    for at in range(offset, offset + length, 4096):
        size = min(4096, offset + length - at)
        flags = 0 if any(content[at : at + size]) else HOLE | ZERO
        if found and found[-1][1] == flags:
            found[-1] = (found[-1][0] + size, flags)
        else:
            found.append((size, flags))
    return found


class FakeOpener:
    """Opens disks by number or name and counts."""

    def __init__(self, *devices: Device) -> None:
        self.devices: dict[str, Device] = {}
        for device in devices:
            self.devices[device.number] = self.devices[device.name] = device

    async def open(self, reference: str, read_only: bool, *, may_be_absent: bool = False) -> Device:
        if reference not in self.devices:
            raise NotFound(f"{reference}: no such device")
        device = self.devices[reference]
        device.openers += 1
        return device

    async def release(self, device: Device) -> None:
        device.openers -= 1


async def build(text: str, *devices: Device, read_only: bool = False, event: Callable[[], None] = lambda: None) -> Table:
    """The table that `text` spells over `devices`."""
    return await Table.build(parse_table(text), TARGETS, FakeOpener(*devices), read_only, lambda *keys: event())


class Uevents:
    """Keeps the uevents of mapped devices."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, dict[str, str]]] = []

    def __call__(self, device: MappedDevice, action: str, keys: Mapping[str, str]) -> None:
        self.seen.append((device.name, action, dict(keys)))


async def mapped(name: str, table: str = "", *devices: Device, minor: int = 0, sink: Uevents | None = None) -> MappedDevice:
    """A mapped device; live, if there is a table."""
    device = MappedDevice(name, "", f"254:{minor}", TARGETS, sink or Uevents())
    if table:
        await device.load(parse_table(table), FakeOpener(*devices), read_only=False)
        await device.resume()
    return device


async def read(device: Device | Table, offset: int, length: int) -> bytes:
    """What a read gives."""
    data = bytearray(length)
    await device.submit(Io(READ, length, memoryview(data)), offset)
    return bytes(data)


async def write(device: Device | Table, offset: int, data: bytes, flags: int = 0) -> None:
    """Writes `data`."""
    await device.submit(Io(WRITE, len(data), memoryview(data), flags), offset)


def eio(io: Io, offset: int) -> Exception:
    """A failure for FakeDisk."""
    return IoFailed("broken on purpose")

"""Which mapped devices are exported, and how they look to an NBD client.

A device is seen by clients while it is exported and has a live table. The default export "" is the only one, or the first.
Flags advertise only what the device does; the block sizes are its own.
"""

from dataclasses import dataclass
from typing import Final

from nbdmap.block.device import Device, Limits
from nbdmap.control.mapper import Mapper
from nbdmap.dm.device import MappedDevice
from nbdmap.errors import Busy, InvalidArgument, NotFound
from nbdmap.nbd import constants as nbd
from nbdmap.nbd.handshake import Export

PREFERRED_BLOCK: Final = 4096


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """How a device is exported. `name` "" is the device's own name; `max_connections` 0 is no limit."""

    name: str = ""
    description: str = ""
    read_only: bool = False
    max_connections: int = 0


class Exports:
    """The exported devices; what the server serves."""

    def __init__(self, mapper: Mapper) -> None:
        self._mapper = mapper
        self._settings: dict[MappedDevice, ExportSettings] = {}
        self._connections: dict[Device, int] = {}

    def add(self, device: MappedDevice, settings: ExportSettings) -> None:
        """Exports a device, or changes how. Raises Busy when another export has the name."""
        name = settings.name or device.name
        if len(name.encode()) > nbd.MAX_STRING or "\0" in name:
            raise InvalidArgument(f"an export name has at most {nbd.MAX_STRING} bytes and no NUL")
        if len(settings.description.encode()) > nbd.MAX_STRING:
            raise InvalidArgument(f"an export description has at most {nbd.MAX_STRING} bytes")
        self._check_free(device, name)
        self._settings[device] = settings

    def check_rename(self, device: MappedDevice, name: str) -> None:
        """Raises Busy when an export that follows its device's name would get the name of another."""
        settings = self._settings.get(device)
        if settings is not None and not settings.name:
            self._check_free(device, name)

    def _check_free(self, device: MappedDevice, name: str) -> None:
        for other in self._existing():
            if other is not device and self.name_of(other) == name:
                raise Busy(f"the export name {name!r} is in use by {other.name}")

    def discard(self, device: MappedDevice) -> None:
        """Ends the export of a device; clients that use it stay."""
        self._settings.pop(device, None)

    def settings(self, device: MappedDevice) -> ExportSettings | None:
        """How a device is exported, or None."""
        return self._settings.get(device)

    def connections(self, device: MappedDevice) -> int:
        """Clients that use the device now."""
        return self._connections.get(device, 0)

    def name_of(self, device: MappedDevice) -> str:
        """The name of an exported device's export."""
        return self._settings[device].name or device.name

    def _existing(self) -> list[MappedDevice]:
        for device in [one for one in self._settings if self._mapper.devices.get(one.name) is not one]:
            del self._settings[device]  # removed since
        return list(self._settings)

    def _visible(self) -> list[MappedDevice]:
        return [device for device in self._existing() if device.live is not None]

    # --- what the handshake asks ---------------------------------------------------------------------------------------

    def list(self) -> list[tuple[str, str]]:
        """(name, description) of every export."""
        return [(self.name_of(device), self._settings[device].description) for device in self._visible()]

    def _find(self, name: str) -> MappedDevice:
        for device in self._visible():
            if name in ("", self.name_of(device)):
                return device
        raise NotFound(f"no export {name[:256]!r}" if name else "nothing is exported")

    def find(self, name: str) -> Export:
        """The export called `name`. Raises NotFound, or Busy when it has as many clients as it may."""
        device = self._find(name)
        settings = self._settings[device]
        self._check_room(device)
        limits = device.limits
        read_only = settings.read_only or device.read_only
        preferred = max(PREFERRED_BLOCK, limits.logical_block)
        return Export(
            name=self.name_of(device),
            description=settings.description,
            size=device.size,
            flags=_flags(limits, read_only),
            minimum_block=limits.logical_block,
            preferred_block=preferred,
            maximum_block=nbd.MAX_PAYLOAD,
        )

    def _check_room(self, device: MappedDevice) -> None:
        most = self._settings[device].max_connections
        if most and self.connections(device) >= most:
            raise Busy(f"export {self.name_of(device)!r} already has {most} clients, as many as it may")

    def open(self, name: str) -> Device:
        """The device behind an export, one opener more. Raises NotFound or Busy."""
        device = self._find(name)
        self._check_room(device)
        device.openers += 1
        self._connections[device] = self.connections(device) + 1
        return device

    async def release(self, device: Device) -> None:
        """Takes back one `open`."""
        self._connections[device] -= 1
        if not self._connections[device]:
            del self._connections[device]
        await self._mapper.release(device)


def _flags(limits: Limits, read_only: bool) -> int:
    """The transmission flags of a device; the handshake leaves out what a client has not negotiated the means for."""
    flags = nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.SEND_FUA | nbd.CAN_MULTI_CONN | nbd.BLOCK_STATUS_PAYLOAD
    if limits.rotational:
        flags |= nbd.ROTATIONAL
    if limits.cache:
        flags |= nbd.SEND_CACHE
    if read_only:
        return flags | nbd.READ_ONLY
    if limits.discard:
        flags |= nbd.SEND_TRIM
    if limits.zero:
        flags |= nbd.SEND_WRITE_ZEROES
        if limits.fast_zero:
            flags |= nbd.SEND_FAST_ZERO
    return flags

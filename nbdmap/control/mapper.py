"""The mapper: every disk and mapped device of this process, by name, uuid and number.

A reference in a table is looked up in this order: a mapped device (NAME, /dev/mapper/NAME or its major:minor), a disk of
the configuration (name or number), an NBD URI, a path of a file or block device. What is opened by URI or path is
shared by everyone who names it in the same mode, and closed after its last user.
"""

import asyncio
import errno
import itertools
import logging
import os
import re
import stat
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

from nbdmap.block.device import Device
from nbdmap.block.file import FileDisk
from nbdmap.block.io import to_the_end
from nbdmap.block.memory import MemoryDisk
from nbdmap.block.remote import RemoteDisk
from nbdmap.control.events import Events
from nbdmap.dm.device import MappedDevice
from nbdmap.dm.table import parse_table
from nbdmap.dm.target import Opener, Target
from nbdmap.errors import AccessRefused, Busy, InvalidArgument, IoFailed, NbdmapError, NoSuchDevice, NotFound, from_os_error
from nbdmap.nbd.uri import parse_uri

MAJOR: Final = 254
"""Of mapped devices, as Debian's kernel gives it."""
FILE_MAJOR: Final = 240
"""Of plain files: the range of numbers that Linux keeps for local use."""
MEMORY_MAJOR: Final = 1
REMOTE_MAJOR: Final = 43
MINORS: Final = 1 << 20
MAX_NAME: Final = 127
MAX_UUID: Final = 128

log = logging.getLogger(__name__)

_NUMBER: Final = re.compile(r"(\d{1,10}):(\d{1,10})")


def check_name(name: str) -> str:
    """`name`, if a device may be called so; raises InvalidArgument otherwise."""
    if not name or len(name.encode()) > MAX_NAME:
        raise InvalidArgument(f"a device name has 1 to {MAX_NAME} bytes, {name!r} has {len(name.encode())}")
    if "/" in name or "\0" in name or name in (".", "..", "control"):
        raise InvalidArgument(f"{name!r} cannot be the name of a device")
    return name


def strip_directory(name: str) -> str:
    """`NAME` of `/dev/mapper/NAME`."""
    return name.removeprefix("/dev/mapper/")


class Mapper:
    """Devices by name. One of it in a process; everything it needs is handed to it."""

    def __init__(self, types: Mapping[str, type[Target]], events: Events) -> None:
        self.types = types
        self.events = events
        self.devices: dict[str, MappedDevice] = {}
        self._made: dict[str, MappedDevice] = {}  # being created: their names, uuids and numbers are taken
        self._early: dict[MappedDevice, list[tuple[str, Mapping[str, str]]]] = {}  # events of those: told after their "add"
        self.disks: dict[str, Device] = {}
        """The configuration's disks, by name."""
        self.reserved: frozenset[str] = frozenset()
        """Numbers that the configuration gives away: nobody gets them by chance."""
        self.luks: dict[MappedDevice, Mapping[str, object]] = {}
        """Of devices that are LUKS disks: the keys of the configuration that open them, but for the disk."""
        self.unlocking = asyncio.Lock()
        """Held while a passphrase of a LUKS disk is tried."""
        self._opened: dict[tuple[str, bool], Device] = {}  # by path or URI and mode, for those that no name stands for
        self._numbers: dict[str, str] = {}  # of each path or URI that was ever to be opened: it keeps its number

    # --- mapped devices --------------------------------------------------------------------------------------------

    def find(self, reference: str) -> MappedDevice:
        """The device called `reference`: NAME, /dev/mapper/NAME or major:minor. Raises NoSuchDevice."""
        device = self._mapped(reference)
        if device is None:
            raise NoSuchDevice(f"no device {reference!r}")
        return device

    def _mapped(self, reference: str) -> MappedDevice | None:
        device = self.devices.get(strip_directory(reference))
        if device is None and _NUMBER.fullmatch(reference):
            return next((one for one in self.devices.values() if one.number == reference), None)
        return device

    def find_uuid(self, uuid: str) -> MappedDevice:
        """The device with this uuid. Raises NoSuchDevice."""
        for device in self.devices.values():
            if device.uuid == uuid:
                return device
        raise NoSuchDevice(f"no device with uuid {uuid!r}")

    async def create(
        self,
        name: str,
        uuid: str = "",
        minor: int | None = None,
        table: str | None = None,
        read_only: bool = False,
        directory: str = ".",
        opener: Opener | None = None,
    ) -> MappedDevice:
        """A new device, with `table` live if one is given. It is seen by nobody before it is complete.

        The table's devices are opened by `opener`, or looked up here, relative paths from `directory` on.
        Raises Busy when name, uuid or minor number is in use, and what the table raises.
        """
        check_name(name)
        self._check_uuid(uuid)
        if name in self.devices or name in self._made:
            raise Busy(f"the name {name!r} is in use")
        device = MappedDevice(name, uuid, self._mapped_number(minor), self.types, self._publish)
        self._made[name] = device
        self._early[device] = []
        try:
            if table is not None:
                await device.load(parse_table(table), opener or self.opener(directory), read_only)
                await device.resume()
        except BaseException as error:
            if isinstance(error, NbdmapError):
                error.stage = "resume" if device.inactive or device.live else "reload"
                error.number = device.number if error.stage == "reload" else ""
            try:
                await device.close()
            except Exception:
                log.exception("%s: was not closed in good order", name)
            raise
        finally:
            del self._made[name]
            early = self._early.pop(device)
        self.devices[name] = device
        for action, keys in [("add", {}), *early]:
            self._publish(device, action, keys)
        return device

    def _publish(self, device: MappedDevice, action: str, keys: Mapping[str, str]) -> None:
        if device in self._early:
            self._early[device].append((action, keys))
        else:
            self.events.publish(device, action, keys)

    def _mapped_number(self, minor: int | None) -> str:
        used = {device.number for device in self._all()}
        if minor is None:
            used |= self.reserved
            minor = next(minor for minor in range(MINORS) if f"{MAJOR}:{minor}" not in used)
        elif not 0 <= minor < MINORS:
            raise InvalidArgument(f"minor number {minor} is not in the range 0 to {MINORS - 1}")
        elif f"{MAJOR}:{minor}" in used:
            raise Busy(f"the minor number {minor} is in use")
        return f"{MAJOR}:{minor}"

    def _all(self) -> list[MappedDevice]:
        return [*self.devices.values(), *self._made.values()]

    def _check_uuid(self, uuid: str) -> None:
        if len(uuid.encode()) > MAX_UUID:
            raise InvalidArgument(f"a uuid has at most {MAX_UUID} bytes, {uuid!r} has {len(uuid.encode())}")
        if uuid and any(device.uuid == uuid for device in self._all()):
            raise Busy(f"the uuid {uuid!r} is in use")

    async def remove(self, device: MappedDevice, *, deferred: bool = False) -> bool:
        """Removes a device and says whether it is gone: with `deferred` an open one goes at its last close instead.

        Raises Busy when it is open, and NoSuchDevice when somebody else has removed it meanwhile.
        """
        if self.devices.get(device.name) is not device:
            raise NoSuchDevice(f"no device {device.name!r}")
        if device.openers:
            if not deferred:
                raise Busy(f"{device.name} is open ({device.openers} times)")
            device.deferred_remove = True
            return False
        del self.devices[device.name]
        try:
            await device.close()
        finally:
            self.luks.pop(device, None)
            self._publish(device, "remove", {})
        return True

    def rename(self, device: MappedDevice, name: str) -> None:
        """Gives a device another name. Raises Busy when it is in use."""
        check_name(name)
        if name in self.devices or name in self._made:
            raise Busy(f"the name {name!r} is in use")
        del self.devices[device.name]
        device.name = name
        self.devices[name] = device
        device.event()

    def set_uuid(self, device: MappedDevice, uuid: str) -> None:
        """Gives a device that has none a uuid. Raises InvalidArgument when it has one, Busy when another has this one."""
        if not uuid:
            raise InvalidArgument("the uuid is empty")
        self._check_uuid(uuid)
        if device.uuid:
            raise InvalidArgument(f"{device.name} already has the uuid {device.uuid!r}")
        device.uuid = uuid
        device.event()

    # --- opening ---------------------------------------------------------------------------------------------------

    def opener(self, directory: str = ".") -> "MapperOpener":
        """What tables open their devices with; relative paths start at `directory`."""
        return MapperOpener(self, directory)

    async def open(self, reference: str, read_only: bool, directory: str, *, may_be_absent: bool = False) -> Device:
        """One opener more for what `reference` names; as Opener.open."""
        device = self._mapped(reference) or self._disk(reference, read_only)
        if device is None:
            if _NUMBER.fullmatch(reference):
                raise NoSuchDevice(f"no device has the number {reference}")
            device = await self._open_outside(reference, read_only, directory, may_be_absent)
        if isinstance(device, RemoteDisk) and device.absent and not may_be_absent:
            raise IoFailed(device.refusal)
        if isinstance(device, MappedDevice) and not device.loaded:
            raise NoSuchDevice(f"{reference} never had a table: there is no disk to stand on yet")
        device.openers += 1
        if device.read_only and not read_only:
            await self.release(device)
            raise AccessRefused(f"{reference} is read-only; load the table read-only")
        return device

    def _disk(self, reference: str, read_only: bool) -> Device | None:
        disk = self.disks.get(reference)
        if disk is None and _NUMBER.fullmatch(reference):
            opened = sorted(self._opened.items(), key=lambda item: item[0][1] is not read_only)  # those of this mode first
            known = [*self.disks.values(), *(one for _, one in opened)]
            return next((one for one in known if one.number == reference), None)
        return disk

    async def _open_outside(self, reference: str, read_only: bool, directory: str, may_be_absent: bool) -> Device:
        """What is opened by URI or path, shared with those who have it open in this mode."""
        if re.match(r"nbds?(\+unix)?:", reference):
            uri = parse_uri(reference)
            return await self._share(
                str(uri), read_only, REMOTE_MAJOR,
                lambda number: RemoteDisk.connect(
                    uri, name=reference, number=number, read_only=read_only, may_be_absent=may_be_absent
                ),
            )  # fmt: skip
        path = Path(directory, reference)
        try:
            found = os.stat(path)
        except (OSError, ValueError) as error:
            if not isinstance(error, OSError) or error.errno == errno.ENOENT:  # a NUL is in no path
                raise NotFound(f"{reference}: no mapped device, disk or file has this name") from None
            raise from_os_error(error, reference) from error
        if stat.S_ISBLK(found.st_mode):
            number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
            key = f"block {number}"
            self._numbers[key] = number
        else:
            key = f"file {found.st_dev}:{found.st_ino}"
        return await self._share(
            key, read_only, FILE_MAJOR,
            lambda number: FileDisk.open(str(path), name=reference, number=number, read_only=read_only),
        )  # fmt: skip

    async def _share(
        self, key: str, read_only: bool, major: int, make: Callable[[str], Awaitable[Device]]
    ) -> Device:
        """What is open as `key` in this mode, or what `make` makes, with the number that it keeps."""
        while (known := self._opened.get((key, read_only))) is None:
            if key not in self._numbers:
                self._numbers[key] = self.free_number(major)  # now: others look for a free one while this is being opened
            device = await make(self._numbers[key])
            if (key, read_only) not in self._opened:
                self._opened[key, read_only] = known = device
                break
            await to_the_end(device.close())  # somebody else was quicker, and may have closed it meanwhile
        return known

    def free_number(self, major: int) -> str:
        """The lowest major:minor that nothing here, and no real block device, has."""
        used = {disk.number for disk in self.disks.values()} | set(self._numbers.values()) | self.reserved
        numbers = (f"{major}:{minor}" for minor in range(MINORS))
        return next(number for number in numbers if number not in used and not os.path.exists(f"/sys/dev/block/{number}"))

    def knows_number(self, number: str) -> bool:
        """Whether a disk here has this number, or had it under a name that keeps it."""
        return number in self._numbers.values() or any(disk.number == number for disk in self.disks.values())

    async def release(self, device: Device) -> None:
        """Takes back one opener; the last closes what no name stands for and ends a deferred remove."""
        device.openers -= 1
        if device.openers:
            return
        if isinstance(device, MappedDevice):
            if device.deferred_remove and self.devices.get(device.name) is device:
                await self.remove(device)
            return
        for key, opened in list(self._opened.items()):
            if opened is device:
                del self._opened[key]
                await to_the_end(device.close())

    def describe_disks(self) -> dict[str, dict[str, object]]:
        """Every open disk as the entry of a configuration. One that was opened by path or URI gets a name here; what is
        open in both modes is one disk, the one that can be written."""
        named: dict[str, Device] = dict(self.disks)
        numbers = {disk.number for disk in named.values()}
        free = (name for name in map("disk{}".format, itertools.count()) if name not in self.disks and name not in self.devices)
        for disk in sorted(self._opened.values(), key=lambda disk: disk.read_only):
            if disk.number not in numbers:
                numbers.add(disk.number)
                named[next(free)] = disk
        return {name: _describe(disk) for name, disk in named.items()}

    # --- the whole -------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Suspends (so flushes) and drops every device, uppermost first, and closes the disks.

        What cannot be flushed is dropped like the rest; then the first failure is raised.
        """
        failures: list[NbdmapError] = []

        async def attempt(name: str, work: Awaitable[None]) -> None:
            try:
                await work
            except Exception as error:
                number = error.errno if isinstance(error, NbdmapError) else errno.EIO
                failures.append(IoFailed(f"{name}: {error}", number))

        for device in self.top_down():
            if not (device.suspended or device.held):
                await attempt(device.name, device.suspend())
            device.openers = 0
            device.deferred_remove = False
        for device in self.top_down():
            self.devices.pop(device.name, None)
            await attempt(device.name, device.close())
        for name, disk in self.disks.items():
            await attempt(name, disk.close())
        self.disks.clear()
        if failures:
            raise failures[0]

    def top_down(self) -> list[MappedDevice]:
        """All mapped devices, each before those it stands on."""
        order: list[MappedDevice] = []
        seen: set[int] = set()

        def visit(device: Device) -> None:
            if id(device) in seen or not isinstance(device, MappedDevice):
                return
            seen.add(id(device))
            for table in (device.live, device.inactive):
                for below in table.devices if table else []:
                    visit(below)
            order.append(device)

        for device in self.devices.values():
            visit(device)
        return order[::-1]


def _describe(disk: Device) -> dict[str, object]:
    """A disk's entry in a configuration."""
    entry: dict[str, object] = {}
    if isinstance(disk, FileDisk):
        entry["file"] = disk.path
        if disk.direct:
            entry["direct"] = True
    elif isinstance(disk, MemoryDisk):
        entry["memory"] = disk.size
        if disk.limit != disk.size:
            entry["limit"] = disk.limit
    elif isinstance(disk, RemoteDisk):
        entry["nbd"] = str(disk.uri)
        if disk.silence_s is not None:
            entry["timeout"] = f"{disk.silence_s * 1000:g}ms"
    entry["number"] = disk.number
    if disk.read_only:
        entry["read_only"] = True
    return entry


class MapperOpener:
    """A Mapper's `open` with the directory that relative paths start at."""

    def __init__(self, mapper: Mapper, directory: str) -> None:
        self._mapper = mapper
        self._directory = directory

    async def open(self, reference: str, read_only: bool, *, may_be_absent: bool = False) -> Device:
        """As Opener.open."""
        return await self._mapper.open(reference, read_only, self._directory, may_be_absent=may_be_absent)

    async def release(self, device: Device) -> None:
        """As Opener.release."""
        await self._mapper.release(device)

"""Brings a Mapper and its exports to a configuration: at the start all or nothing, at a reload as far as it goes.

    c.yaml:12:7: devices.joined.table: linear: sda: no mapped device, disk or file has this name

Order: exports and devices that go, disks, devices from the bottom up, exports. A device is made or changed when its turn
comes or when a table opens it, whichever is first, so what stands on what need not be known beforehand.

Invariants of a reload: a device is touched only where its entry differs from the one that was applied last, so what was
done to it at run time stays; a new table goes live without dropping a client; devices that were made at run time are
left alone; what fails is as it was before, is told in one line, and is tried again the next time.
"""

import errno
import logging
import os
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from nbdmap.block.device import Device
from nbdmap.block.file import FileDisk
from nbdmap.block.memory import MemoryDisk
from nbdmap.block.remote import RemoteDisk
from nbdmap.control.config import BadConfig, Config, KeyPath, by_line
from nbdmap.control.exports import Exports, ExportSettings
from nbdmap.control.luks import unlocked
from nbdmap.control.mapper import FILE_MAJOR, MAJOR, MEMORY_MAJOR, REMOTE_MAJOR, Mapper, strip_directory
from nbdmap.control.schema import DeviceEntry, DiskEntry, FileEntry, LuksEntry, MemoryEntry, TableText
from nbdmap.dm.args import split_words
from nbdmap.dm.device import MappedDevice
from nbdmap.dm.table import parse_table
from nbdmap.errors import Busy, InvalidArgument, NbdmapError, NotFound
from nbdmap.targets.crypt.keys import KEYRING

log = logging.getLogger(__name__)


@dataclass
class _Placed:
    """A device of the configuration that is there, and what of its entry was applied."""

    device: MappedDevice
    table: TableText | None = None
    luks: LuksEntry | None = None
    read_only: bool = False
    sent: tuple[str, ...] = ()
    settings: ExportSettings | None = None


class Applied:
    """What of a configuration is in place."""

    def __init__(self, mapper: Mapper, exports: Exports) -> None:
        self.mapper = mapper
        self.exports = exports
        self.disks: dict[str, DiskEntry] = {}
        self.devices: dict[str, _Placed] = {}

    async def start(self, config: Config) -> None:
        """Makes everything in `config`. Raises BadConfig with all that failed; then everything is closed again."""
        try:
            if problems := await self.reload(config):
                raise BadConfig(problems)
        except BaseException:
            self.disks.clear()
            self.devices.clear()
            try:
                await self.mapper.close()
            except NbdmapError as error:
                log.error("%s", error.message)
            raise

    async def reload(self, config: Config) -> list[str]:
        """Changes what differs from the configuration before, and returns what failed, one line each."""
        return await _Change(self, config).run()


class _Change:
    """One way from what is applied to `config`."""

    def __init__(self, applied: Applied, config: Config) -> None:
        self._applied = applied
        self._mapper = applied.mapper
        self._exports = applied.exports
        self._config = config
        self._problems: list[str] = []
        self._missing_disks: set[str] = set()
        self._finished: set[str] = set()
        self._under_way: list[str] = []  # each is opened by the table of the one before
        self._numbers = {f"{MAJOR}:{entry.minor}": name for name, entry in config.devices.items() if entry.minor is not None}

    async def run(self) -> list[str]:
        """Does everything in order; the problems."""
        devices, disks = self._config.devices, self._config.disks
        self._mapper.reserved = frozenset(self._numbers) | {disk.number for disk in disks.values() if disk.number}
        KEYRING.replace(self._config.keyring)
        self._forget_strangers()
        self._end_exports()
        await self._remove(deferred=False)
        for name in sorted(disks, key=lambda name: disks[name].number is None):  # those that choose a number come first
            await self._bring_disk(name, disks[name])
        for name in self._config.bottom_up:
            await self.bring(name)
        await self._remove(deferred=True)
        await self._remove_disks()
        for name in devices:  # in the order of the file: the first is the default export
            self._export(name)
        return by_line(self._problems)

    def _report(self, path: KeyPath, error: NbdmapError, *, key: bool = True) -> None:
        self._problems.append(self._config.origin.explain(path, error.message, key=key))

    # --- what goes -----------------------------------------------------------------------------------------------------

    def _forget_strangers(self) -> None:
        """Devices that were removed or renamed at run time are not ours any more."""
        for name, placed in list(self._applied.devices.items()):
            if self._mapper.devices.get(name) is not placed.device:
                del self._applied.devices[name]

    def _end_exports(self) -> None:
        """Ends the exports that go, or get another name: somebody else may take the old one."""
        for name, placed in self._applied.devices.items():
            entry = self._config.devices.get(name)
            wanted, present = entry.settings() if entry else None, placed.settings
            if present is not None and (wanted is None or wanted.name != present.name):
                self._exports.discard(placed.device)
                placed.settings = None

    async def _remove(self, *, deferred: bool) -> None:
        """Removes the devices that go and are not open; with `deferred` the others, too, at their last close."""
        for device in self._mapper.top_down():
            placed = self._applied.devices.get(device.name)
            if placed is None or placed.device is not device or device.name in self._config.devices:
                continue
            if device.openers and not deferred:
                continue
            try:
                gone = await self._mapper.remove(device, deferred=deferred)
            except NbdmapError as error:
                self._report(("devices", device.name), error)
                continue
            if gone:
                del self._applied.devices[device.name]
            log.info("%s: %s", device.name, "removed" if gone else "is open, goes at its last close")

    async def _remove_disks(self) -> None:
        for name in [name for name in self._applied.disks if name not in self._config.disks]:
            disk = self._mapper.disks.get(name)
            if disk is not None and disk.openers:
                self._report(("disks", name), Busy(f"{name} is gone from here, but in use by {self._users(disk)}: it stays open"))
                continue
            del self._applied.disks[name]
            if disk is not None:
                del self._mapper.disks[name]
                await disk.close()
                log.info("disk %s: closed", name)

    def _users(self, disk: Device) -> str:
        devices = self._mapper.devices.values()
        tables = [(device, table) for device in devices for table in (device.live, device.inactive) if table]
        return ", ".join(dict.fromkeys(device.name for device, table in tables if disk in table.devices))

    # --- disks ---------------------------------------------------------------------------------------------------------

    async def _bring_disk(self, name: str, entry: DiskEntry) -> None:
        if self._applied.disks.get(name) == entry:
            return
        present = self._mapper.disks.get(name)
        try:
            self._check_unused(name, present)
            number = await self._number(entry, present)
            disk = await open_disk(name, number, entry)
            try:
                self._check_unused(name, present)  # again: opening took a while
            except Busy:
                await disk.close()
                raise
        except NbdmapError as error:
            self._report(("disks", name), error)
            if present is None:
                self._missing_disks.add(name)
            return
        self._mapper.disks[name] = disk
        self._applied.disks[name] = entry
        if present is not None:
            await present.close()
            log.info("disk %s: changed", name)

    def _check_unused(self, name: str, present: Device | None) -> None:
        if present is not None and present.openers:
            raise Busy(f"{name} has changed here, but is in use by {self._users(present)}: it stays as it was")

    async def _number(self, entry: DiskEntry, present: Device | None) -> str:
        """The number that is asked for, that of a real block device, the one it has, or a free one."""
        if entry.number:
            if (present is None or present.number != entry.number) and self._mapper.knows_number(entry.number):
                raise Busy(f"the device number {entry.number} is in use")
            return entry.number
        if isinstance(entry, FileEntry):
            return _real_number(entry.file) or (present.number if present else self._mapper.free_number(FILE_MAJOR))
        major = MEMORY_MAJOR if isinstance(entry, MemoryEntry) else REMOTE_MAJOR
        return present.number if present else self._mapper.free_number(major)

    # --- devices -------------------------------------------------------------------------------------------------------

    async def bring(self, name: str) -> None:
        """Makes or changes one device, once; a failure is reported. Raises InvalidArgument when it would stand on itself."""
        if name in self._finished:
            return
        if name in self._under_way:
            chain = self._under_way[self._under_way.index(name) :]
            raise InvalidArgument(f"the table would make {name} stand on itself: {' on '.join([*chain, name])}")
        self._under_way.append(name)
        entry = self._config.devices[name]
        try:
            placed = self._applied.devices.get(name)
            if placed is None:
                placed = await self._make(name, entry)
            else:
                await self._change(name, placed, entry)
            await self._send(name, placed, entry.messages)
        except NbdmapError as error:
            in_table = entry.luks is None and error.message.startswith("line ")
            key = ("table",) if in_table else ("luks",) if entry.luks else ()
            self._report(("devices", name, *key), error, key=not in_table)
        finally:
            self._under_way.pop()
            self._finished.add(name)

    async def _make(self, name: str, entry: DeviceEntry) -> _Placed:
        opener = _Opener(self)
        async with self._table(name, entry) as (table, uuid):
            device = await self._mapper.create(name, uuid, entry.minor, table, entry.read_only, opener=opener)
        placed = self._applied.devices[name] = _Placed(device, entry.table, entry.luks, entry.read_only)
        self._note(device, entry)
        return placed

    def _note(self, device: MappedDevice, entry: DeviceEntry) -> None:
        if entry.luks is not None:
            self._mapper.luks[device] = entry.luks.model_dump(exclude_unset=True, exclude={"disk"})

    @asynccontextmanager
    async def _table(self, name: str, entry: DeviceEntry) -> AsyncIterator[tuple[str | None, str]]:
        """The text of a device's table and its uuid. That of a LUKS disk can be loaded only inside the block."""
        if entry.luks is None:
            yield entry.table.text if entry.table else None, entry.uuid
            return
        wanted, secret = entry.luks.wanted(), entry.luks.secret()
        async with unlocked(self._mapper.unlocking, _Opener(self), wanted, secret) as (table, uuid):
            yield table, entry.uuid or f"{uuid}{name}"

    async def _change(self, name: str, placed: _Placed, entry: DeviceEntry) -> None:
        device = placed.device
        device.deferred_remove = False
        if entry.uuid and entry.uuid != device.uuid:
            self._mapper.set_uuid(device, entry.uuid)
        if entry.minor is not None and device.number != f"{MAJOR}:{entry.minor}":
            raise InvalidArgument(f"the number of a device that is there cannot be changed, it is {device.number}")
        if entry.table is None and entry.luks is None:
            if placed.table is not None or placed.luks is not None:
                raise InvalidArgument("a table cannot be taken away from a device that is there; the present one stays")
            return
        same = entry.luks == placed.luks and (entry.table is None or entry.table.same_as(placed.table))
        if same and entry.read_only == placed.read_only:
            return
        async with self._table(name, entry) as (table, _):
            await device.load(parse_table(table or ""), _Opener(self), entry.read_only)
        if device.suspended:
            log.warning("%s: is suspended; its new table goes live when it is resumed", device.name)
        else:
            try:
                await device.resume()
            except BaseException:
                await device.clear()
                raise
            log.info("%s: new table", device.name)
        placed.table, placed.luks, placed.read_only = entry.table, entry.luks, entry.read_only
        self._note(device, entry)

    async def _send(self, name: str, placed: _Placed, messages: Sequence[str]) -> None:
        """Sends the messages that were not sent before, up to the first that is refused."""
        for index, message in enumerate(messages):
            if message in placed.sent:
                continue
            try:
                await placed.device.message(0, split_words(message))
            except NbdmapError as error:
                if error.errno != errno.EEXIST:
                    self._report(("devices", name, "messages", index), error)
                    return
            placed.sent += (message,)

    async def prepare(self, reference: str) -> None:
        """Called before a table opens `reference`: sees to it that it is there, if it is one of the configuration."""
        name = self._numbers.get(reference) or strip_directory(reference)
        if name in self._config.devices:
            await self.bring(name)
            if name not in self._mapper.devices:
                raise NotFound(f"{reference}: could not be made")
        elif reference in self._missing_disks:
            raise NotFound(f"{reference}: could not be opened")

    # --- exports -------------------------------------------------------------------------------------------------------

    def _export(self, name: str) -> None:
        placed = self._applied.devices.get(name)
        wanted = self._config.devices[name].settings()
        if placed is None or wanted is None or wanted == placed.settings:
            return
        try:
            self._exports.add(placed.device, wanted)
        except NbdmapError as error:
            self._report(("devices", name, "export"), error)
        else:
            placed.settings = wanted


class _Opener:
    """What the tables of a configuration open their devices with."""

    def __init__(self, change: _Change) -> None:
        self._change = change
        self._mapper = change._mapper
        self._directory = change._config.directory

    async def open(self, reference: str, read_only: bool, *, may_be_absent: bool = False) -> Device:
        """As Opener.open, after seeing to it that it is there."""
        await self._change.prepare(reference)
        return await self._mapper.open(reference, read_only, self._directory, may_be_absent=may_be_absent)

    async def release(self, device: Device) -> None:
        """As Opener.release."""
        await self._mapper.release(device)


async def open_disk(name: str, number: str, entry: DiskEntry) -> Device:
    """Opens one disk of a configuration."""
    if isinstance(entry, FileEntry):
        return await FileDisk.open(
            entry.file, name=name, number=number, read_only=entry.read_only, direct=entry.direct,
            create=entry.create, size=entry.size,
        )  # fmt: skip
    if isinstance(entry, MemoryEntry):
        return MemoryDisk(name, number, entry.memory, limit=entry.limit, read_only=entry.read_only)
    return await RemoteDisk.connect(
        entry.nbd, name=name, number=number, read_only=entry.read_only, reconnect=entry.reconnect(), may_be_absent=True
    )


def _real_number(path: str) -> str:
    """The number of a block device, "" for anything else."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" if stat.S_ISBLK(status.st_mode) else ""

"""Every admin verb, once: a typed method that the RPC offers, the command line calls and the configuration replays.

Results are plain data (dicts, lists, strings, numbers) that go into JSON as they are. A verb that fails raises NbdmapError
with the kernel's errno and changes nothing. Devices are named by NAME, /dev/mapper/NAME or major:minor; where a `uuid`
is given, it names the device instead. Sizes and starts that verbs report are in sectors, as dmsetup's.
"""

import base64
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

from nbdmap import __version__
from nbdmap.block.io import Op
from nbdmap.control.exports import Exports, ExportSettings
from nbdmap.control.luks import LuksDisk, Secret, is_luks_line, unlocked
from nbdmap.control.mapper import Mapper, check_name
from nbdmap.dm.args import split_words
from nbdmap.dm.device import MappedDevice
from nbdmap.dm.table import Table, TargetLine, parse_table
from nbdmap.errors import Busy, InvalidArgument
from nbdmap.luks.secret import wiping
from nbdmap.units import SECTOR

Data = dict[str, Any]

DRIVER_VERSION: Final = "4.48.0"
"""The device-mapper interface whose behaviour is followed (Linux 6.12)."""


class Verbs:
    """The verbs of one server."""

    def __init__(self, mapper: Mapper, exports: Exports) -> None:
        self._mapper = mapper
        self._exports = exports

    def _device(self, name: str, uuid: str = "") -> MappedDevice:
        return self._mapper.find_uuid(uuid) if uuid else self._mapper.find(name)

    def _devices(self, name: str, uuid: str) -> list[MappedDevice]:
        """The one that is named, or all in the order of their names."""
        if name or uuid:
            return [self._device(name, uuid)]
        return sorted(self._mapper.devices.values(), key=lambda device: device.name.encode())

    # --- devices -------------------------------------------------------------------------------------------------------

    async def create(
        self,
        name: str,
        table: str | None = None,
        uuid: str = "",
        minor: int | None = None,
        read_only: bool = False,
        directory: str = "/",
        export: bool = True,
    ) -> Data:
        """Makes a device, with a live table unless `table` is null, and exports it under its name."""
        device = await self._mapper.create(name, uuid, minor, table, read_only, directory)
        if export:
            try:
                self._exports.add(device, ExportSettings())
            except Busy:
                await self._mapper.remove(device)
                raise
        return self._describe(device)

    async def luks_open(
        self,
        name: str,
        disk: str,
        passphrase: str,
        header: str = "",
        key_slot: int | None = None,
        allow_discards: bool = False,
        uuid: str = "",
        read_only: bool = False,
        directory: str = "/",
        export: bool = True,
    ) -> Data:
        """Makes a device of what is decrypted of a LUKS disk; `passphrase` is in base64, as it need not be text."""
        try:
            secret = bytearray(base64.b64decode(passphrase, validate=True))
        except ValueError:
            raise InvalidArgument("the passphrase is not in base64") from None
        check_name(name)
        wanted = LuksDisk(disk, header, key_slot, ("allow_discards",) if allow_discards else ())
        opener = self._mapper.opener(directory)
        with wiping(secret):
            async with unlocked(self._mapper.unlocking, opener, wanted, Secret(secret)) as (table, prefix):
                made = await self.create(name, table, uuid or f"{prefix}{name}", None, read_only, directory, export)
        keys = {"header": header or None, "key_slot": key_slot, "allow_discards": allow_discards or None}
        self._mapper.luks[self._device(name)] = {key: value for key, value in keys.items() if value is not None}
        return made

    async def remove(self, name: str = "", uuid: str = "", force: bool = False, deferred: bool = False) -> Data:
        """Removes a device. `force` first replaces its table by one that fails every request; `deferred` removes an open
        device at its last close."""
        device = self._device(name, uuid)
        if force and not deferred:
            await self._wipe(device)
        return {"removed": await self._mapper.remove(device, deferred=deferred)}

    async def remove_all(self, force: bool = False, deferred: bool = False) -> Data:
        """Removes every device that is not open, uppermost first."""
        removed = []
        for device in self._mapper.top_down():
            if force and not deferred and self._is_there(device):
                await self._wipe(device)
            if self._is_there(device) and (deferred or not device.openers):  # others may have been quicker
                await self._mapper.remove(device, deferred=deferred)
                removed.append(device.name)
        return {"removed": removed}

    def _is_there(self, device: MappedDevice) -> bool:
        return self._mapper.devices.get(device.name) is device

    async def rename(self, name: str = "", new_name: str = "", uuid: str = "") -> Data:
        """Gives a device another name; its export follows unless it has a name of its own."""
        device = self._device(name, uuid)
        self._exports.check_rename(device, check_name(new_name))
        self._mapper.rename(device, new_name)
        return self._describe(device)

    async def set_uuid(self, name: str, new_uuid: str) -> Data:
        """Gives a uuid to a device that has none."""
        device = self._device(name)
        self._mapper.set_uuid(device, new_uuid)
        return self._describe(device)

    # --- tables --------------------------------------------------------------------------------------------------------

    async def load(self, name: str = "", table: str = "", uuid: str = "", read_only: bool = False, directory: str = "/") -> Data:
        """Loads a table into the inactive slot."""
        device = self._device(name, uuid)
        await device.load(parse_table(table), self._mapper.opener(directory), read_only)
        return self._describe(device)

    async def clear(self, name: str = "", uuid: str = "") -> Data:
        """Drops the inactive table."""
        device = self._device(name, uuid)
        await device.clear()
        return self._describe(device)

    async def wipe_table(self, name: str = "", uuid: str = "", noflush: bool = False) -> Data:
        """Replaces the live table by one that fails every request."""
        device = self._device(name, uuid)
        if not device.size:
            raise InvalidArgument(f"{device.name} has no table")
        await self._wipe(device, noflush=noflush)
        return self._describe(device)

    async def _wipe(self, device: MappedDevice, *, noflush: bool = True) -> None:
        if device.size:
            lines = parse_table(f"0 {device.size // SECTOR} error")
            await device.load(lines, self._mapper.opener(), device.read_only)
            await device.resume(noflush=noflush)

    async def suspend(self, name: str = "", uuid: str = "", noflush: bool = False) -> Data:
        """Holds new requests, waits for those in flight and flushes."""
        device = self._device(name, uuid)
        await device.suspend(noflush=noflush)
        return self._describe(device)

    async def resume(self, name: str = "", uuid: str = "", noflush: bool = False) -> Data:
        """Makes the inactive table live and lets requests in."""
        device = self._device(name, uuid)
        await device.resume(noflush=noflush)
        return self._describe(device)

    async def message(self, name: str = "", sector: int = 0, message: str = "", uuid: str = "") -> str:
        """Sends a message to the target at `sector` and returns its answer; words that start with @ are the core's."""
        device = self._device(name, uuid)
        words = split_words(message)
        if words and words[0].startswith("@"):
            if words != ["@cancel_deferred_remove"]:
                raise InvalidArgument(f"unknown message {words[0]!r}")
            device.deferred_remove = False
            return ""
        return await device.message(sector, words)

    # --- reading -------------------------------------------------------------------------------------------------------

    async def info(self, name: str = "", uuid: str = "", inactive: bool = False) -> list[Data]:
        """The state of one device, or of all; with `inactive` read-only, targets and dependencies are of that table."""
        return [self._describe(device, inactive) for device in self._devices(name, uuid)]

    def _describe(self, device: MappedDevice, inactive: bool = False) -> Data:
        table = device.inactive if inactive else device.live
        major, minor = device.number.split(":")
        settings = self._exports.settings(device)
        return {
            "name": device.name,
            "uuid": device.uuid,
            "major": int(major),
            "minor": int(minor),
            "suspended": device.suspended,
            "read_only": table is not None and table.read_only if inactive else device.read_only,
            "deferred_remove": device.deferred_remove,
            "loaded": device.loaded,
            "live": device.live is not None,
            "inactive": device.inactive is not None,
            "open": device.openers,
            "event": device.event_number,
            "targets": len(table.targets) if table else 0,
            "target_types": list(dict.fromkeys(target.type_name for target in table.targets)) if table else [],
            "sectors": device.size // SECTOR,
            "dependencies": _dependencies(table),
            "export": self._exports.name_of(device) if settings else None,
            "connections": self._exports.connections(device),
        }

    async def table(self, name: str = "", uuid: str = "", inactive: bool = False) -> list[Data]:
        """The table of one device, or of all."""
        return [self._lines(device, inactive, Table.table_lines) for device in self._devices(name, uuid)]

    async def status(self, name: str = "", uuid: str = "", inactive: bool = False, noflush: bool = False) -> list[Data]:
        """What the targets of one device, or of all, say of themselves; unless `noflush`, they write what they have not."""
        for device in self._devices(name, uuid):
            if not (noflush or inactive or device.suspended):
                for target in device.targets:
                    await target.refresh_status()
        return [self._lines(device, inactive, Table.status_lines) for device in self._devices(name, uuid)]

    def _lines(self, device: MappedDevice, inactive: bool, read: Callable[[Table], list[TargetLine]]) -> Data:
        table = device.inactive if inactive else device.live
        lines = [
            {"start": line.start_sectors, "length": line.length_sectors, "target": line.type_name, "params": line.params}
            for line in (read(table) if table else [])
        ]
        return {**self._describe(device, inactive), "lines": lines}

    async def deps(self, name: str = "", uuid: str = "", inactive: bool = False) -> list[Data]:
        """What one device, or all, stand on; the last opened first."""
        return [self._describe(device, inactive) for device in self._devices(name, uuid)]

    async def wait(self, name: str = "", event: int | None = None, uuid: str = "") -> Data:
        """Waits until the event number of a device differs from `event` (default: the present one); then its state."""
        device = self._device(name, uuid)
        number = await device.wait(event)
        return {**self._describe(device), "event": number}

    async def targets(self) -> list[Data]:
        """The target types, the newest registered first."""
        kinds = reversed(list(self._mapper.types.values()))
        return [{"name": kind.type_name, "version": ".".join(map(str, kind.version))} for kind in kinds]

    async def version(self) -> Data:
        """nbdmap's version, and that of the kernel interface it follows."""
        return {"version": __version__, "driver": DRIVER_VERSION}

    # --- exports, events, numbers --------------------------------------------------------------------------------------

    async def export(
        self, name: str = "", export_name: str = "", description: str = "", read_only: bool = False,
        max_connections: int = 0, uuid: str = "",
    ) -> Data:  # fmt: skip
        """Exports a device, or changes how it is exported for clients that come from now on."""
        device = self._device(name, uuid)
        self._exports.add(device, ExportSettings(export_name, description, read_only, max_connections))
        return self._describe(device)

    async def unexport(self, name: str = "", uuid: str = "") -> Data:
        """Ends a device's export; clients that use it stay."""
        device = self._device(name, uuid)
        self._exports.discard(device)
        return self._describe(device)

    async def stats(self, name: str = "", uuid: str = "") -> list[Data]:
        """Requests, bytes, errors and requests in flight of one device, or of all, since it was made; and what its targets
        count of themselves, if they do."""
        return [
            {
                "name": device.name,
                "operations": {
                    op.name.lower(): {"requests": device.requests[op], "bytes": device.bytes_done[op]} for op in Op
                },
                "errors": device.errors,
                "in_flight": device.live.in_flight if device.live else 0,
                "connections": self._exports.connections(device),
                **({"counters": counters} if (counters := _counters(device)) else {}),
            }
            for device in self._devices(name, uuid)
        ]  # fmt: skip

    def events(self) -> AsyncIterator[Mapping[str, str]]:
        """Uevents from now on, as they happen."""
        return self._mapper.events.listen()

    async def dump_config(self) -> Data:
        """A configuration that makes the present disks and devices again."""
        devices: Data = {}
        for device in reversed(self._mapper.top_down()):
            entry: Data = {"uuid": device.uuid} if device.uuid else {}
            entry["minor"] = int(device.number.split(":")[1])  # by which the tables above name it
            if device.read_only:
                entry["read_only"] = True
            if device.live is not None:
                lines = device.live.table_lines()
                luks = self._mapper.luks.get(device)
                if luks is not None and is_luks_line(lines[0]):
                    entry["luks"] = {"disk": lines[0].params.split()[3], **luks}
                else:
                    entry["table"] = "".join(f"{line_text(line)}\n" for line in lines)
            settings = self._exports.settings(device)
            entry["export"] = _export_entry(settings) if settings else False
            devices[device.name] = entry
        return {"disks": self._mapper.describe_disks(), "devices": devices}


def line_text(line: TargetLine) -> str:
    """A table or status line as dmsetup prints it."""
    return f"{line.start_sectors} {line.length_sectors} {line.type_name} {line.params}"


def _export_entry(settings: ExportSettings) -> bool | Data:
    named = {
        "name": settings.name, "description": settings.description,
        "read_only": settings.read_only, "max_connections": settings.max_connections,
    }  # fmt: skip
    return {key: value for key, value in named.items() if value} or True


def _counters(device: MappedDevice) -> dict[str, int]:
    counters: Counter[str] = Counter()
    for target in device.targets:
        counters.update(target.counters())
    return dict(counters)


def _dependencies(table: Table | None) -> list[Data]:
    devices = reversed(table.devices) if table else ()
    return [
        {"major": int(device.number.split(":")[0]), "minor": int(device.number.split(":")[1]), "name": device.name}
        for device in devices
    ]


"""The configuration file: read, checked, and every mistake told with file, line, column and key.

    c.yaml:8:18: devices.joined.tabel: unknown key (did you mean 'table'?)

The keys are those of docs/configuration.md. Relative paths of a file start at its directory, in tables as well. A Config is
right in itself: names, numbers, uuids and export names are unique, tables are laid out without a gap and no device stands
on itself as far as tables can tell that by their words (`apply` finds the rest). What is outside it is not looked at.
"""

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from nbdmap.control.located import Node, Place, Problem, Unreadable, read_yaml
from nbdmap.control.mapper import MAJOR, strip_directory
from nbdmap.control.schema import (
    DISK_KINDS,
    BaseDisk,
    DeviceEntry,
    DiskEntry,
    ExportEntry,
    File,
    FileEntry,
    Keys,
    LuksEntry,
    MultipathEntry,
    Surroundings,
    TlsEntry,
    meant,
)
from nbdmap.dm.args import split_words
from nbdmap.errors import InvalidArgument, NotFound, from_os_error
from nbdmap.nbd.uri import Uri, parse_uri

DEFAULT_LISTEN: Final = "nbd://127.0.0.1:10809"

_PLAIN_TARGETS: Final = ("linear", "striped", "delay")
"""Targets all of whose words are devices and numbers: there a word that is a device's name is that device."""

KeyPath = tuple[int | str, ...]


class BadConfig(InvalidArgument):
    """A configuration that cannot be used; `problems` has one line for each mistake."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class Config:
    """A configuration that is right in itself."""

    listen: tuple[Uri, ...]
    admin: str | None
    tls: TlsEntry | None
    keyring: Mapping[str, str]
    """The files of keys, by "type:description"."""
    multipath: MultipathEntry
    busy_poll_s: float
    on_event: tuple[str, ...] | None
    """A program and its arguments, run for every event."""
    disks: Mapping[str, DiskEntry]
    devices: Mapping[str, DeviceEntry]
    bottom_up: tuple[str, ...]
    """The devices, each after those that its table names, as far as its words tell."""
    directory: str
    origin: "Origin"

    def read_only(self) -> "Config":
        """The same with nothing that can be written or created."""
        without = {"read_only": True}
        disks = {
            name: disk.model_copy(update=without | ({"create": False} if isinstance(disk, FileEntry) else {}))
            for name, disk in self.disks.items()
        }
        devices = {name: device.model_copy(update=without) for name, device in self.devices.items()}
        return replace(self, disks=disks, devices=devices)


@dataclass(frozen=True)
class Origin:
    """Where a configuration comes from: a file's name and content, and the tables of the command line."""

    file: str
    root: Node
    lines: list[str]
    added: frozenset[str] = frozenset()

    def explain(self, path: KeyPath, text: str, *, key: bool = False) -> str:
        """`FILE:LINE:COL: key.path: reason`; a table's "line N" is turned into the line of the file."""
        if path[:1] == ("devices",) and len(path) > 1 and path[1] in self.added:
            return f"--device {path[1]}: {text}"
        node = self.root.at(path)
        while node is None and path and isinstance(path[-1], int):  # one value where a list may stand
            path = path[:-1]
            node = self.root.at(path)
        place = self.root.place_of(path, key=key)
        match = re.match(r"line (\d+): ", text)
        if match and node is not None and node.is_block and isinstance(node.content, str):
            text = text[match.end() :]
            number = int(match[1])
            line = self.lines[node.place.line + number - 1]
            place = Place(node.place.line + number, len(line) - len(line.lstrip()) + 1)
        where = ".".join(step if (step := str(one)).isprintable() else repr(step) for one in path)
        return f"{self.file}:{place.line}:{place.column}: " + (f"{where}: {text}" if where else text)


def load(file: str, types: Collection[str], tables: Mapping[str, str] | None = None) -> Config:
    """The configuration in `file` and, beside it, the devices of `tables`. Raises BadConfig with all that is wrong, or
    NotFound or IoFailed when it cannot be read."""
    try:
        raw = Path(file).read_bytes()
    except FileNotFoundError:
        raise NotFound(f"{file}: no such file") from None
    except OSError as error:
        raise from_os_error(error, file) from None
    return parse(raw, file, types, tables)


def parse(raw: bytes, file: str, types: Collection[str], tables: Mapping[str, str] | None = None) -> Config:
    """As `load`, of a file's content."""
    try:
        root = read_yaml(raw)
    except Unreadable as error:
        raise BadConfig([_line(file, problem) for problem in error.problems]) from None
    origin = Origin(file, root, raw.decode("utf-8-sig").splitlines(), frozenset(tables or ()))
    content = root.plain()
    if not isinstance(content, dict):
        raise BadConfig([origin.explain((), "should be a mapping: listen, disks, devices, ...")])
    if tables:
        devices = content.get("devices") or {}
        if isinstance(devices, dict):
            if twice := [name for name in tables if name in devices]:
                raise BadConfig([f"--device {name}: {file} has a device of this name" for name in twice])
            content["devices"] = devices | {name: {"table": table} for name, table in tables.items()}
    directory = os.path.dirname(os.path.abspath(file))
    try:
        checked = File.model_validate(content, context=Surroundings(directory, types))
    except ValidationError as error:
        found = [_explain(origin, one) for one in error.errors(include_url=False)]
        raise BadConfig(by_line(found)) from None
    _check_unique(checked, origin)
    listen = (parse_uri(DEFAULT_LISTEN),) if checked.listen is None else tuple(checked.listen)
    if checked.tls is None and (secure := [uri for uri in listen if uri.tls]):
        index = listen.index(secure[0])
        raise BadConfig([origin.explain(("listen", index), f"{str(secure[0])!r} needs the key tls with its certificates")])
    order = _bottom_up(checked.devices, origin)
    return Config(
        listen, checked.admin, checked.tls, checked.keyring, checked.multipath, checked.busy_poll,
        checked.on_event, checked.disks, checked.devices, order, directory, origin,
    )  # fmt: skip


def from_command_line(tables: Mapping[str, str], types: Collection[str]) -> Config:
    """The configuration that is nothing but these devices. Raises BadConfig."""
    return parse(b"", os.path.join(os.getcwd(), "(command line)"), types, tables)


# --- what is wrong, in words -----------------------------------------------------------------------------------------------


def _line(file: str, problem: Problem) -> str:
    return f"{file}:{problem.place.line}:{problem.place.column}: {problem.text}"


def by_line(problems: list[str]) -> list[str]:
    """Problems of one file in the order of its lines."""

    def line_number(text: str) -> int:
        match = re.match(r".*?:(\d+):\d+: ", text)
        return int(match[1]) if match else 0

    return sorted(problems, key=line_number)


_REASONS: Final = {
    "string_type": "should be text (put it in quotes)",
    "bool_type": "should be true or false",
    "int_type": "should be a whole number",
    "list_type": "should be a list",
    "tuple_type": "should be a list",
    "dict_type": "should be a mapping",
    "model_type": "should be a mapping",
}


def _explain(origin: Origin, error: ErrorDetails) -> str:
    path, kind = list(error["loc"]), error["type"]
    if len(path) == 3 and path[2] == "[key]":
        return origin.explain(tuple(path[:2]), error["msg"], key=True)
    model = _model_at(path)
    if path[0] == "disks" and len(path) > 2:
        del path[2]  # the kind of disk, which is no key of the file
    if kind == "extra_forbidden":
        return origin.explain(tuple(path), _unknown(str(path[-1]), model, path), key=True)
    if kind == "missing":
        return origin.explain(tuple(path[:-1]), f"the key {path[-1]} is missing", key=True)
    reason = _REASONS.get(kind, error["msg"].removeprefix("Input "))
    return origin.explain(tuple(path), reason)


def _model_at(path: list[int | str]) -> type[Keys]:
    """The model whose key the last step of `path` is."""
    if path[0] == "disks":
        return DISK_KINDS.get(str(path[2]), BaseDisk) if len(path) > 2 else BaseDisk
    if path[0] == "devices":
        if path[2:3] == ["luks"] and len(path) > 3:
            return LuksEntry
        return ExportEntry if path[2:3] == ["export"] and len(path) > 3 else DeviceEntry
    models: Mapping[object, type[Keys]] = {"tls": TlsEntry, "multipath": MultipathEntry}
    return models.get(path[0], File) if len(path) > 1 else File


def _unknown(key: str, model: type[Keys], path: list[int | str]) -> str:
    if path[0] == "disks":
        others = [kind for kind, other in DISK_KINDS.items() if key in other.model_fields]
        if others:
            mine = next(kind for kind, other in DISK_KINDS.items() if other is model)
            return f"does not go together with {mine}" if key in DISK_KINDS else f"belongs to {others[0]} disks, not to {mine}"
    return "unknown key" + meant(key, model.model_fields)


# --- what must be unique, and what stands on what --------------------------------------------------------------------------


def _check_unique(file: File, origin: Origin) -> None:
    disks, devices = file.disks.items(), file.devices.items()
    problems = [
        *_twice(origin, "the device number", [(("disks", name, "number"), disk.number) for name, disk in disks]),
        *_twice(origin, "the uuid", [(("devices", name, "uuid"), device.uuid or None) for name, device in devices]),
        *_twice(origin, "the minor number", [(("devices", name, "minor"), device.minor) for name, device in devices]),
        *_twice(
            origin, "the export name",
            [(("devices", name, "export"), device.export and (device.export.name or name)) for name, device in devices],
        ),
        *(
            origin.explain(("disks", name), "a device has this name, too", key=True)
            for name in file.disks if name in file.devices
        ),
    ]  # fmt: skip
    if problems:
        raise BadConfig(problems)


def _twice(origin: Origin, what: str, values: Iterable[tuple[KeyPath, object]]) -> list[str]:
    first: dict[object, str] = {}
    problems = []
    for path, value in values:
        if value is None:
            continue
        if value in first:
            problems.append(origin.explain(path, f"{what} {value!r} is that of {first[value]}, too"))
        else:
            first[value] = str(path[1])
    return problems


def _bottom_up(devices: Mapping[str, DeviceEntry], origin: Origin) -> tuple[str, ...]:
    numbers = {f"{MAJOR}:{device.minor}": name for name, device in devices.items() if device.minor is not None}
    below = {name: list(_named(device, devices, numbers)) for name, device in devices.items()}
    try:
        return tuple(TopologicalSorter(below).static_order())
    except CycleError as error:
        chain = error.args[1][::-1]  # graphlib's goes from what is below to what is above
        chain = _from_first(chain[:-1], list(devices))
        names = " on ".join([*chain, chain[0]])
        text = f"the table would make {chain[0]} stand on itself: {names}"
        raise BadConfig([origin.explain(("devices", chain[0], "table"), text)]) from None


def _from_first(loop: list[str], order: list[str]) -> list[str]:
    """A loop of names, begun with the one that comes first in the file."""
    start = min(range(len(loop)), key=lambda index: order.index(loop[index]))
    return loop[start:] + loop[:start]


def _named(device: DeviceEntry, devices: Mapping[str, DeviceEntry], numbers: Mapping[str, str]) -> Iterable[str]:
    """The devices that a table surely names."""
    if device.luks is not None:
        for reference in (device.luks.disk, device.luks.header):
            name = numbers.get(reference) or strip_directory(reference)
            if name in devices:
                yield name
    for line in device.table.lines if device.table else ():
        for word in split_words(line.params):
            name = numbers.get(word) or strip_directory(word)
            sure = name != word or (line.type_name in _PLAIN_TARGETS and not word.isdigit())
            if sure and name in devices:
                yield name

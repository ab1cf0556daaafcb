"""The keys of the configuration, as pydantic models: what each is, and how it is checked by itself.

    sda: {file: /srv/a.img, size: 1GiB, create: true}

Strict: nothing is guessed from a value of another type, and no key is ignored. Paths come out absolute.
"""

import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Annotated, Final, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    InstanceOf,
    Tag,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from nbdmap.block.reconnect import Reconnect
from nbdmap.control.exports import ExportSettings
from nbdmap.control.luks import LuksDisk, Secret
from nbdmap.control.mapper import MAJOR, MINORS, check_name
from nbdmap.dm.args import split_words
from nbdmap.dm.table import TableLine, check_layout, parse_table
from nbdmap.errors import InvalidArgument, NbdmapError
from nbdmap.luks.keyfile import MAX_KEY_FILE, KeyFile
from nbdmap.luks.metadata import MAX_SLOTS
from nbdmap.nbd.uri import Uri, parse_uri
from nbdmap.targets.crypt.keys import check_key_name
from nbdmap.units import SECTOR, parse_duration, parse_size

_NUMBER: Final = re.compile(r"(0|[1-9][0-9]{0,9}):(0|[1-9][0-9]{0,9})")

_Value = TypeVar("_Value")


class TableText(NamedTuple):
    """A table as it is written, and its lines."""

    text: str
    lines: tuple[TableLine, ...]

    def same_as(self, other: "TableText | None") -> bool:
        """Whether the targets are the same, whatever blank lines and comments stand between."""
        return other is not None and [line[1:] for line in self.lines] == [line[1:] for line in other.lines]


class Surroundings(NamedTuple):
    """What the values are checked against: the directory of relative paths, and the target types there are."""

    directory: str
    types: Collection[str]


# --- values ----------------------------------------------------------------------------------------------------------------


def _surroundings(info: ValidationInfo) -> Surroundings:
    assert isinstance(info.context, Surroundings)
    return info.context


def _wrong(reason: str) -> PydanticCustomError:
    return PydanticCustomError("nbdmap", "{reason}", {"reason": reason})


def _checked(check: Callable[..., _Value], *arguments: object) -> _Value:
    """What `check` returns; what it complains about becomes an error of this key."""
    try:
        return check(*arguments)
    except NbdmapError as error:
        raise _wrong(error.message) from None


def _text(value: object) -> object:
    return str(value) if type(value) is int else value  # a number is text as it was written


def _size(value: object) -> object:
    if type(value) not in (int, str):
        raise _wrong("should be a size, such as 64MiB")
    size = _checked(parse_size, str(value))
    if not size or size % SECTOR:
        raise _wrong(f"a size of {size} bytes is not a multiple of {SECTOR}, or 0")
    return size


def _duration(value: object) -> object:
    if type(value) not in (int, str):
        raise _wrong("should be a duration, such as 5s")
    return _checked(parse_duration, str(value))


def _number(value: object) -> object:
    match = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise _wrong(f'{value!r} is not a device number, such as "8:0"')
    if int(match[1]) == MAJOR:
        raise _wrong(f"the major number {MAJOR} is that of mapped devices")
    return value


def _path(value: str, info: ValidationInfo) -> str:
    if not value or "\0" in value:
        raise _wrong("should be the path of a file")
    return os.path.join(_surroundings(info).directory, value)


def _uri(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, str):
        raise _wrong("should be an NBD URI, such as nbd://127.0.0.1:10809")
    uri = _checked(parse_uri, value)
    directory = _surroundings(info).directory
    socket, certificates = (path and os.path.join(directory, path) for path in (uri.socket, uri.tls_certificates))
    return replace(uri, socket=socket, tls_certificates=certificates)


def check_listen(uri: Uri) -> Uri:
    """`uri`, if a server can listen there. Raises InvalidArgument."""
    if uri.export:
        raise InvalidArgument(f"{str(uri)!r}: an export ({uri.export!r}) has no place in a URI to listen on")
    if uri.tls_certificates or uri.tls_hostname or not uri.tls_verify_peer:
        raise InvalidArgument(f"{str(uri)!r}: the server's own TLS is described by the key tls")
    return uri


def _table(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, str):
        raise _wrong("should be the text of a table; after 'table: |' each line stands as it is")
    lines = _checked(parse_table, value)
    _checked(check_layout, lines)
    types = _surroundings(info).types
    for line in lines:
        if line.type_name not in types:
            raise _wrong(f"line {line.number}: unknown target type {line.type_name!r}{meant(line.type_name, types)}")
    return TableText(value, tuple(lines))


def meant(word: str, known: Collection[str]) -> str:
    """A hint at what may have been meant."""
    close = get_close_matches(word, known, 1, 0.6)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"


def _disk_name(name: str) -> str:
    if _NUMBER.fullmatch(name):
        raise _wrong(f"{name!r} would be a device number; say 'number: {name}' of a disk with another name")
    return _checked(check_name, name)


def _message(value: str) -> str:
    if not split_words(value):
        raise _wrong("an empty message")
    return value


def _export(value: object) -> object:
    if value is True:
        return {}
    if value is False:
        return None
    if not isinstance(value, dict):
        raise _wrong("should be true, false or a mapping")
    return value


def _one_or_more(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _maybe_empty(value: object) -> object:
    return {} if value is None else value


def _command(value: object) -> object:
    """The program and its arguments; of text, the shell's."""
    if isinstance(value, str) and value.strip():
        return ("/bin/sh", "-c", value)
    if isinstance(value, list) and value and all(type(word) in (int, str) for word in value):
        return tuple(str(word) for word in value)
    raise _wrong("should be a program with its arguments as a list, or a command for the shell as text")


Text = Annotated[str, BeforeValidator(_text)]
FilePath = Annotated[Text, AfterValidator(_path)]
Duration = Annotated[float, BeforeValidator(_duration)]
Command = Annotated[tuple[str, ...], BeforeValidator(_command)]
Size = Annotated[int, BeforeValidator(_size)]
DeviceNumber = Annotated[str, BeforeValidator(_number)]
DiskName = Annotated[str, AfterValidator(_disk_name)]
DeviceName = Annotated[str, AfterValidator(lambda name: _checked(check_name, name))]
KeyName = Annotated[str, AfterValidator(lambda name: _checked(check_key_name, name))]
CheckedTable = Annotated[InstanceOf[TableText], BeforeValidator(_table)]


# --- the keys --------------------------------------------------------------------------------------------------------------


class Keys(BaseModel):
    """The base of all."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


class TlsEntry(Keys):
    """`tls`: certificates is a directory with ca-cert.pem, server-cert.pem and server-key.pem."""

    certificates: FilePath
    require: bool = False
    verify_peer: bool = False


class BaseDisk(Keys):
    """What all disks have."""

    number: DeviceNumber | None = None
    read_only: bool = False


class FileEntry(BaseDisk):
    """A disk that is a file or a block device."""

    file: FilePath
    size: Size | None = None
    create: bool = False
    direct: bool = False

    @model_validator(mode="after")
    def _can_create(self) -> "FileEntry":
        if self.create and self.size is None:
            raise _wrong("create needs a size")
        if self.create and self.read_only:
            raise _wrong("create and read_only do not go together")
        return self


class MemoryEntry(BaseDisk):
    """A disk in memory; `limit` bytes of it may be in use."""

    memory: Size
    limit: Size | None = None


class NbdEntry(BaseDisk):
    """A disk that is another server's export."""

    nbd: Annotated[Uri, BeforeValidator(_uri)]
    timeout: Duration | None = None

    def reconnect(self) -> Reconnect:
        """How long requests wait for a server that is away or silent."""
        return Reconnect(deadline_s=self.timeout, silence_s=self.timeout) if self.timeout else Reconnect()


DISK_KINDS: Final[Mapping[str, type[BaseDisk]]] = {"file": FileEntry, "memory": MemoryEntry, "nbd": NbdEntry}


def _kind(value: object) -> str | None:
    return next((kind for kind in DISK_KINDS if isinstance(value, dict) and kind in value), None)


DiskEntry = FileEntry | MemoryEntry | NbdEntry
_Disk = Annotated[
    Annotated[FileEntry, Tag("file")] | Annotated[MemoryEntry, Tag("memory")] | Annotated[NbdEntry, Tag("nbd")],
    Discriminator(
        _kind, custom_error_type="nbdmap", custom_error_message="should be a mapping with one of the keys file, memory, nbd"
    ),
]


class ExportEntry(Keys):
    """`export`; an empty name is the device's own, 0 connections are no limit."""

    name: Text = ""
    description: Text = ""
    read_only: bool = False
    max_connections: Annotated[int, Field(ge=0, le=1 << 20)] = 0


class LuksEntry(Keys):
    """`luks`: the device is what is decrypted of `disk`; what is a file here is read when the device is made."""

    disk: Text
    header: Text = ""
    key_file: FilePath | None = None
    key_file_size: Annotated[int, Field(ge=1, le=MAX_KEY_FILE)] | None = None
    key_file_offset: Annotated[int, Field(ge=0)] = 0
    volume_key_file: FilePath | None = None
    key_slot: Annotated[int, Field(ge=0, lt=MAX_SLOTS)] | None = None
    allow_discards: bool = False

    @model_validator(mode="after")
    def _one_secret(self) -> "LuksEntry":
        if (self.key_file is None) == (self.volume_key_file is None):
            raise _wrong("should have one of the keys key_file, volume_key_file")
        return self

    def wanted(self) -> LuksDisk:
        """What to open."""
        options = ("allow_discards",) if self.allow_discards else ()
        return LuksDisk(self.disk, self.header, self.key_slot, options)

    def secret(self) -> Secret:
        """What opens it."""
        if self.volume_key_file is not None:
            return Secret(volume_key_file=self.volume_key_file)
        assert self.key_file is not None
        return Secret(key_file=KeyFile(self.key_file, self.key_file_size, self.key_file_offset))


class DeviceEntry(Keys):
    """A mapped device. Without a table it is made, and waits for one."""

    uuid: Text = ""
    table: CheckedTable | None = None
    luks: LuksEntry | None = None
    read_only: bool = False
    minor: Annotated[int, Field(ge=0, lt=MINORS)] | None = None
    messages: tuple[Annotated[Text, AfterValidator(_message)], ...] = Field(default=(), strict=False)
    export: Annotated[ExportEntry | None, BeforeValidator(_export)] = ExportEntry()

    @model_validator(mode="after")
    def _one_source(self) -> "DeviceEntry":
        if self.table is not None and self.luks is not None:
            raise _wrong("table and luks do not go together")
        return self

    def settings(self) -> ExportSettings | None:
        """How it is exported, or None."""
        return ExportSettings(**self.export.model_dump()) if self.export else None


class MultipathEntry(Keys):
    """`multipath`: how often paths are checked; 0 is never."""

    polling_interval: Duration = 5.0


class File(Keys):
    """The whole file."""

    listen: Annotated[list[Annotated[Uri, AfterValidator(lambda uri: _checked(check_listen, uri)), BeforeValidator(_uri)]],
                      BeforeValidator(_one_or_more)] | None = None  # fmt: skip
    admin: FilePath | None = None
    tls: TlsEntry | None = None
    keyring: Annotated[dict[KeyName, FilePath], BeforeValidator(_maybe_empty)] = {}
    disks: Annotated[dict[DiskName, _Disk], BeforeValidator(_maybe_empty)] = {}
    devices: Annotated[dict[DeviceName, DeviceEntry], BeforeValidator(_maybe_empty)] = {}
    multipath: MultipathEntry = MultipathEntry()
    busy_poll: Duration = 100e-6
    on_event: Command | None = None

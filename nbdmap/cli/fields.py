"""The columns of `info -c`, of splitname and of stats."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from nbdmap.cli.names import LvmName, kernel_name, mangle, split_lvm, subsystem_of, unmangle
from nbdmap.cli.report import SELECTED, Field, Value
from nbdmap.cli.tree import Forest, Info, Node, blkdevname

READ_AHEAD: Final = 256
"""Sectors; Linux's default for every device without a preferred size."""

INFO_DEFAULT: Final = "name,major,minor,attr,open,segments,events,uuid"
SPLIT_DEFAULT: Final = "vg_name,lv_name,lv_layer"
STATS_DEFAULT: Final = "name,reads,read_bytes,writes,write_bytes,flushes,discards,zeroes,errors,in_flight,connections"


class InfoRow(NamedTuple):
    """A device and, where a column asks for it, its place among all of them."""

    info: Info
    forest: Callable[[], Forest]

    @property
    def node(self) -> Node:
        """The device in the tree."""
        return self.forest().nodes[f"{self.info['major']}:{self.info['minor']}"]

    @property
    def lvm(self) -> LvmName:
        """The parts of its name."""
        return split_lvm(self.info["name"], subsystem_of(self.info["uuid"]))


def attr(info: Info) -> str:
    """`L--w`: live, inactive, suspended, read-only or writable."""
    flags = ("L", info["live"]), ("I", info["inactive"]), ("s", info["suspended"])
    return "".join(letter if on else "-" for letter, on in flags) + ("r" if info["read_only"] else "w")


def tables_loaded(info: Info) -> str:
    """Both, Live, Inactive or None."""
    if info["live"]:
        return "Both" if info["inactive"] else "Live"
    return "Inactive" if info["inactive"] else "None"


def read_ahead(info: Info) -> int:
    """Linux's, for a device that it has a node for."""
    return READ_AHEAD if info["loaded"] else 0


def _numbers(devices: Iterable[Mapping[str, Any]]) -> str:
    return ",".join(f"{one['major']}:{one['minor']}" for one in devices)


def _names(nodes: Iterable[Node]) -> str:
    return ",".join(node.name for node in nodes if node.name)


def block_name(device: Mapping[str, Any], forest: Forest) -> str:
    """The kernel's name of one that a device stands on."""
    node = forest.nodes.get(f"{device['major']}:{device['minor']}")
    return node.blkdevname if node else kernel_name(device["name"])


def _info(
    section: str, name: str, heading: str, width: int, kind: str, description: str, value: Callable[[Info], Value]
) -> Field:
    return Field(name, heading, width, kind == "number", section, description, lambda row: value(row.info))


def _row(name: str, heading: str, width: int, kind: str, description: str, value: Callable[[InfoRow], Value]) -> Field:
    return Field(name, heading, width, kind == "number", "deps", description, value)


def _part(name: str, heading: str, width: int, description: str, value: Callable[[LvmName], Value]) -> Field:
    return Field(name, heading, width, False, "splitname", description, lambda row: value(row.lvm))


INFO_FIELDS: Final[Sequence[Field]] = (
    _info("name", "name", "Name", 16, "string", "Name of mapped device.", lambda i: i["name"]),
    _info("name", "mangled_name", "MangledName", 16, "string", "Mangled name of mapped device.", lambda i: mangle(i["name"])),
    _info(
        "name", "unmangled_name", "UnmangledName", 16, "string", "Unmangled name of mapped device.",
        lambda i: unmangle(i["name"]),
    ),
    _info("name", "uuid", "UUID", 32, "string", "Unique (optional) identifier for mapped device.", lambda i: i["uuid"]),
    _info("name", "mangled_uuid", "MangledUUID", 32, "string", "Mangled unique (optional) identifier for mapped device.",
          lambda i: mangle(i["uuid"])),
    _info("name", "unmangled_uuid", "UnmangledUUID", 32, "string", "Unmangled unique (optional) identifier for mapped device.",
          lambda i: unmangle(i["uuid"])),
    _info("name", "read_ahead", "RAhead", 6, "number", "Read ahead value.", read_ahead),
    _info("info", "blkdevname", "BlkDevName", 16, "string", "Name of block device.", blkdevname),
    _info("info", "attr", "Stat", 4, "string", "(L)ive, (I)nactive, (s)uspended, (r)ead-only, read-(w)rite.", attr),
    _info("info", "tables_loaded", "Tables", 6, "string", "Which of the live and inactive table slots are filled.",
          tables_loaded),
    _info("info", "suspended", "Suspended", 9, "string", "Whether the device is suspended.",
          lambda i: "Suspended" if i["suspended"] else "Active"),
    _info("info", "readonly", "Read-only", 9, "string", "Whether the device is read-only or writeable.",
          lambda i: "Read-only" if i["read_only"] else "Writeable"),
    _info("info", "devno", "DevNo", 5, "string", "Device major and minor numbers", lambda i: f"{i['major']}:{i['minor']}"),
    _info("info", "major", "Maj", 3, "number", "Block device major number.", lambda i: i["major"]),
    _info("info", "minor", "Min", 3, "number", "Block device minor number.", lambda i: i["minor"]),
    _info("info", "open", "Open", 4, "number", "Number of references to open device, if requested.", lambda i: i["open"]),
    _info("info", "segments", "Targ", 4, "number", "Number of segments in live table, if present.", lambda i: i["targets"]),
    _info("info", "events", "Event", 6, "number", "Number of most recent event.", lambda i: i["event"]),
    _row("device_count", "#Devs", 5, "number", "Number of devices used by this one.", lambda r: len(r.info["dependencies"])),
    _row("devs_used", "DevNamesUsed", 16, "string", "List of names of mapped devices used by this one.",
         lambda r: _names(r.node.uses)),
    _row("devnos_used", "DevNosUsed", 16, "string", "List of device numbers of devices used by this one.",
         lambda r: _numbers(r.info["dependencies"])),
    _row("blkdevs_used", "BlkDevNamesUsed", 16, "string", "List of names of block devices used by this one.",
         lambda r: ",".join(block_name(one, r.forest()) for one in r.info["dependencies"])),
    _row("device_ref_count", "#Refs", 5, "number", "Number of mapped devices referencing this one.",
         lambda r: len(r.node.used_by)),
    _row("names_using_dev", "RefNames", 8, "string", "List of names of mapped devices using this one.",
         lambda r: _names(r.node.used_by)),
    _row("devnos_using_dev", "RefDevNos", 9, "string", "List of device numbers of mapped devices using this one.",
         lambda r: ",".join(node.number for node in r.node.used_by)),
    _part("subsystem", "Subsys", 6, "Userspace subsystem responsible for this device.", lambda p: p.subsystem),
    _part("vg_name", "VG", 4, "LVM Volume Group name.", lambda p: p.vg),
    _part("lv_name", "LV", 4, "LVM Logical Volume name.", lambda p: p.lv),
    _part("lv_layer", "LVLayer", 7, "LVM device layer.", lambda p: p.layer),
)  # fmt: skip


class SplitRow(NamedTuple):
    """The row of splitname."""

    lvm: LvmName


SPLIT_FIELDS: Final[Sequence[Field]] = tuple(one for one in INFO_FIELDS if one.section == "splitname")


def _count(name: str, heading: str, operation: str, what: str, description: str) -> Field:
    return Field(name, heading, max(6, len(heading)), True, "stats", description, lambda row: row["operations"][operation][what])


def _plain(name: str, heading: str, description: str) -> Field:
    return Field(name, heading, max(6, len(heading)), True, "stats", description, lambda row: row[name])


STATS_FIELDS: Final[Sequence[Field]] = (
    Field("name", "Name", 16, False, "stats", "Name of mapped device.", lambda row: row["name"]),
    _count("reads", "Reads", "read", "requests", "Read requests."),
    _count("read_bytes", "RdBytes", "read", "bytes", "Bytes read."),
    _count("writes", "Writes", "write", "requests", "Write requests."),
    _count("write_bytes", "WrBytes", "write", "bytes", "Bytes written."),
    _count("flushes", "Flushes", "flush", "requests", "Flush requests."),
    _count("discards", "Discards", "discard", "requests", "Discard requests."),
    _count("discard_bytes", "DiscBytes", "discard", "bytes", "Bytes discarded."),
    _count("zeroes", "Zeroes", "write_zeroes", "requests", "Requests to write zeroes."),
    _count("zero_bytes", "ZeroBytes", "write_zeroes", "bytes", "Bytes zeroed."),
    _plain("errors", "Errors", "Requests that failed."),
    _plain("in_flight", "InFlight", "Requests in flight."),
    _plain("connections", "Clients", "NBD clients connected."),
)

_SECTIONS: Final = {
    "name": "Mapped Device Name", "info": "Mapped Device Information", "deps": "Mapped Device Relationship Information",
    "splitname": "Mapped Device Name Components", "stats": "Mapped Device Request Counts", "special": "Special",
}  # fmt: skip


def list_fields(fields: Sequence[Field], *, types: bool = False) -> str:
    """The text of `-o help`, and with types that of `-S help`."""
    shown = [*fields, SELECTED]
    width = max(len(one.id) for one in shown)
    lines: list[str] = []
    for section, title in _SECTIONS.items():
        members = [one for one in shown if one.section == section]
        if not members:
            continue
        lines += [*([" "] if lines else []), f"{title} Fields", "-" * (len(title) + 7)]
        if section != "special" and not types:
            lines.append(f"  {section + '_all':{width}} - All fields in this section.")
        for one in members:
            kind = f" [{'number' if one.number else 'string'}]" if types else ""
            lines.append(f"  {one.id:{width}} - {one.description}{kind}")
    return "".join(f"{line}\n" for line in [*lines, " "])

r"""Names as dmsetup takes and shows them: mangling, LVM's parts, paths.

Linux keeps a name like `with space` as `with\x20space` because of udev; nbdmap keeps it as it is. So a name that comes
mangled is unmangled (--manglename auto, the default), and is shown mangled where --manglename none asks for what Linux
keeps. Characters outside of 0-9A-Za-z#+-.:=@_ are mangled, byte by byte.
"""

import re
from typing import Final, NamedTuple

from nbdmap.cli.errors import CommandFailed

MODES: Final = ("auto", "hex", "none")
_PLAIN: Final = frozenset(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz#+-.:=@_")
_MANGLED: Final = re.compile(rb"\\x([0-9a-fA-F]{2})")


def mangle(name: str) -> str:
    r"""`name` as Linux keeps it; what is mangled already stays.

    >>> mangle("with space")
    'with\\x20space'
    """
    raw = _encode(name)
    if _MANGLED.search(raw):
        return name
    return "".join(chr(byte) if byte in _PLAIN else f"\\x{byte:02x}" for byte in raw)


def unmangle(name: str) -> str:
    """`name` as people write it."""
    return _MANGLED.sub(lambda match: bytes([int(match[1], 16)]), _encode(name)).decode(errors="surrogateescape")


def _encode(name: str) -> bytes:
    return name.encode(errors="surrogateescape")


def given(name: str, mode: str, what: str = "name") -> str:
    """The name that the server knows for one that was given on the command line. Raises CommandFailed as dmsetup does."""
    if mode == "hex":
        return name
    raw = _encode(name)
    if mode == "auto":
        if rb"\x5cx" in raw:
            raise CommandFailed(
                f'The {what} "{name}" seems to be mangled more than once. This is not allowed in auto mode.'
            )
        rest = _MANGLED.sub(b"", raw)
        if rest != raw and not _PLAIN.issuperset(rest):
            raise CommandFailed(
                f'The {what} "{name}" contains mixed mangled and unmangled characters or it\'s already mangled improperly.'
            )
    return unmangle(name)


def without_directory(name: str) -> str:
    """`NAME` of `/dev/mapper/NAME` or `mapper/NAME`. Raises CommandFailed for another path."""
    for directory in ("/dev/mapper/", "mapper/"):
        if name.startswith(directory) and "/" not in name.removeprefix(directory):
            return name.removeprefix(directory)
    if "/" in name:
        raise CommandFailed(f"Device {name} not found")
    return name


def kernel_name(name: str) -> str:
    """What Linux would call the disk `name` in /sys/block: `loop0` of `/dev/loop0`; anything else as it is."""
    return name.removeprefix("/dev/")


class LvmName(NamedTuple):
    """The parts of a name that LVM made; all but `subsystem` are empty for other subsystems."""

    subsystem: str
    vg: str
    lv: str
    layer: str


def split_lvm(name: str, subsystem: str) -> LvmName:
    """The parts of `name` if `subsystem` is LVM: they are joined by "-", and a "-" in them is doubled.

    >>> split_lvm("vg0-lv--a-layer", "LVM")
    LvmName(subsystem='LVM', vg='vg0', lv='lv-a', layer='layer')
    """
    if subsystem != "LVM":
        return LvmName(subsystem, "", "", "")
    parts = [""]
    position = 0
    while position < len(name) and len(parts) < 4:
        if name[position] != "-" or position + 1 == len(name):
            parts[-1] += name[position]
        elif name[position + 1] == "-":
            parts[-1] += "-"
            position += 1
        else:
            parts.append("")
        position += 1
    vg, lv, layer = [*parts, "", ""][:3]
    return LvmName(subsystem, vg, lv, layer)


def subsystem_of(uuid: str) -> str:
    """`LVM` of `LVM-0123`."""
    return uuid.partition("-")[0] if "-" in uuid else ""

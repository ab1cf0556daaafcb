"""Sizes and alignment. Inside nbdmap every offset and length is in bytes; tables speak in sectors of 512 bytes."""

import re
from typing import Final

from nbdmap.errors import InvalidArgument

SECTOR: Final = 512
SECTOR_SHIFT: Final = 9
KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
MAX_SIZE: Final = (1 << 63) - SECTOR
"""The largest device: signed 64-bit offsets, whole sectors."""

_UNITS: Final = {"": 1, "B": 1, "S": SECTOR} | {
    prefix + suffix: 1 << shift
    for prefix, shift in (("K", 10), ("M", 20), ("G", 30), ("T", 40), ("P", 50), ("E", 60))
    for suffix in ("", "IB")
}
_SIZE: Final = re.compile(r"(\d+)\s*([A-Za-z]*)")


def parse_size(text: str) -> int:
    """Bytes of "64MiB", "1G", "2048s" (sectors) or "4096". Raises InvalidArgument for anything else.

    >>> parse_size("64MiB")
    67108864
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise InvalidArgument(f"{text!r} is not a size (examples: 4096, 2048s, 64MiB, 1GiB, 10T)")
    size = int(match[1]) * unit
    if size > MAX_SIZE:
        raise InvalidArgument(f"{text!r} is larger than {MAX_SIZE} bytes")
    return size


def round_down(value: int, step: int) -> int:
    """The largest multiple of `step` that is not above `value`."""
    return value - value % step


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `value`."""
    return value + -value % step

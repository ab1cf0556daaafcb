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


_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms|s|min|h)")
_SECONDS: Final = {"us": 1e-6, "ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}
MAX_DURATION_S: Final = 7 * 24 * 3600.0


def parse_duration(text: str) -> float:
    """Seconds of "5s", "200ms", "50us", "1.5 s", "2min" or "1h", or of "0". Raises InvalidArgument for anything else.

    >>> parse_duration("200ms")
    0.2
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None and text.strip() != "0":
        raise InvalidArgument(f"{text!r} is not a duration (examples: 200ms, 5s, 2min, 0)")
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if seconds > MAX_DURATION_S:
        raise InvalidArgument(f"{text!r} is longer than a week")
    return seconds


def round_down(value: int, step: int) -> int:
    """The largest multiple of `step` that is not above `value`."""
    return value - value % step


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `value`."""
    return value + -value % step

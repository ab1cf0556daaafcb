"""What every block device is: a disk at the bottom of a stack, or a mapped device made of others.

`size`, offsets and lengths are bytes and whole sectors. A device has a number ("7:0", the kernel's major:minor) by which
tables and status lines name it, and counts its openers: tables that stand on it and clients that use it.
"""

from dataclasses import dataclass
from typing import Final

from mypy_extensions import mypyc_attr

from nbdmap.block.io import Io, Pending
from nbdmap.units import SECTOR

HOLE: Final = 1
"""Extent flag: not provisioned; a write may meet a full disk. NBD's NBD_STATE_HOLE."""
ZERO: Final = 2
"""Extent flag: reads as zeroes. NBD's NBD_STATE_ZERO."""

Extent = tuple[int, int]
"""(length in bytes, flags): a run of HOLE and ZERO bits; 0 is allocated data."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a device can do. All sizes in bytes.

    `logical_block` is the smallest unit of I/O; `discard`, `zero` and `cache` say whether DISCARD, WRITE_ZEROES and CACHE
    are supported; `fast_zero` whether WRITE_ZEROES with FAST_ZERO can succeed; `sparse` whether there may be extents
    other than data, so that asking for them is worth while; `io_min` and `io_opt` are the preferred request sizes
    (0 = no preference). `rotational` is a hint.
    """

    logical_block: int = SECTOR
    discard: bool = False
    zero: bool = False
    fast_zero: bool = False
    cache: bool = False
    sparse: bool = False
    io_min: int = 0
    io_opt: int = 0
    rotational: bool = False


@mypyc_attr(allow_interpreted_subclasses=True)
class Device:
    """Base of disks and mapped devices.

    `name` is how people call it, `number` its "major:minor". `submit` trusts that the range lies inside the device
    and is aligned to `limits.logical_block`: requests are checked once, where they enter.
    """

    name: str
    number: str
    size: int
    read_only: bool
    limits: Limits
    openers: int = 0
    holder: object = None
    """Who keeps metadata on it and must be the only one, such as a thin pool; None if nobody does."""
    absent: bool = False
    """Not reached since it was opened: size 0, limits and read_only are not known yet."""
    ways: int = 0
    """How many paths of multipath targets stand on it."""

    def submit(self, io: Io, offset: int) -> Pending:
        """Does `io` at byte `offset`. READ fills `io.data`. Raises NbdmapError with the errno of the failure.

        FLUSH (offset and length 0) ends when all writes that ended before it began are durable.
        """
        raise NotImplementedError

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """The extents from `offset` on, at least one; they may cover less than `length` but never more."""
        return [(length, 0)]

    def add_ways(self, count: int) -> None:
        """So many paths more (or less) stand on it: while there are any, the same storage is written by other ways too. Then it
        fails soon rather than late, and does not by itself repeat what it had done."""
        self.ways += count

    def restarts(self) -> bool:
        """Whether what it acknowledged and did not flush may be lost while it is in use: it is a server that may restart."""
        return False

    async def close(self) -> None:
        """Gives back what the device holds. Called once, when nobody has it open."""

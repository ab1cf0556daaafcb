"""zero: reads as zeroes, swallows writes (Documentation device-mapper/zero).

    0 20971520 zero
"""

from typing import Self

from nbdmap.block.device import ZERO, Extent, Limits
from nbdmap.block.io import DONE, READ, Io, Pending
from nbdmap.dm.args import Args
from nbdmap.dm.target import Spec, Target
from nbdmap.units import KIB

_ZEROES = bytes(64 * KIB)


class Zero(Target):
    """`zero`, without arguments. Discards succeed as well; write-zeroes is not offered, as in the kernel."""

    type_name = "zero"
    version = (1, 2, 0)

    @classmethod
    async def construct(cls, spec: Spec, args: Args) -> Self:
        """No words."""
        args.end()
        return cls(spec)

    def submit(self, io: Io, offset: int) -> Pending:
        """Fills the buffer of a read; everything else is done already."""
        if io.op is READ:
            for start in range(0, io.length, len(_ZEROES)):
                part = io.data[start : start + len(_ZEROES)]
                part[:] = _ZEROES[: len(part)]
        return DONE

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Zeroes, but no hole: a write can never meet a full disk."""
        return [(length, ZERO)]

    def limits(self) -> Limits:
        """Discards cost nothing; all extents are zeroes."""
        return Limits(discard=True, cache=True, sparse=True)

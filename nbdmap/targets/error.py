"""error: every request fails with EIO; a flush succeeds, as nothing is ever written.

    0 1024 error
    0 1024 error /dev/sda 0
"""

from typing import Self

from nbdmap.block.device import Limits
from nbdmap.block.io import Failed, Io, Pending
from nbdmap.dm.args import Args
from nbdmap.dm.target import Below, Spec, Target
from nbdmap.errors import IoFailed
from nbdmap.units import SECTOR


class Error(Target):
    """`error [<device> <start>]`: the device lends its logical block only. Any other number of words is ignored.

    As in Linux 6.12; 6.1 ignores all words.
    """

    type_name = "error"
    version = (1, 7, 0)
    flushed = False

    def __init__(self, spec: Spec, below: list[Below]) -> None:
        super().__init__(spec)
        self._below = below

    @classmethod
    async def construct(cls, spec: Spec, args: Args) -> Self:
        """A device and its first sector, or whatever."""
        if len(args) != 2:
            return cls(spec, [])
        device = await spec.open(args.word("device"))
        start = args.start()
        return cls(spec, [Below(device, start, spec.length)])

    def submit(self, io: Io, offset: int) -> Pending:
        """Fails."""
        what = f"{io.op.name.lower()} of {io.length} bytes at {offset}"
        return Failed(IoFailed(f"{what}: the error target fails every request"))

    def devices(self) -> list[Below]:
        """The device it was given, if any."""
        return self._below

    def limits(self) -> Limits:
        """Everything may be asked, and fails."""
        block = self._below[0].device.limits.logical_block if self._below else SECTOR
        return Limits(logical_block=block, discard=True, zero=True, fast_zero=True, cache=True)

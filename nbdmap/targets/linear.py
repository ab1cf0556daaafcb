"""linear: a range of the mapped device onto a range of another (Documentation device-mapper/linear).

    0 1024 linear /dev/sda 2048
"""

from typing import Self

from mypy_extensions import mypyc_attr

from nbdmap.block.device import Device, Extent
from nbdmap.block.io import Io, Pending
from nbdmap.dm.args import Args
from nbdmap.dm.target import Below, Spec, Target
from nbdmap.units import SECTOR


@mypyc_attr(allow_interpreted_subclasses=True)
class Linear(Target):
    """`linear <device> <start>`: sector s of the target is sector s + start of the device."""

    type_name = "linear"
    version = (1, 4, 0)

    def __init__(self, spec: Spec, device: Device, start: int) -> None:
        super().__init__(spec)
        self._device = device
        self._start = start
        self._shift = start - spec.begin

    @classmethod
    async def construct(cls, spec: Spec, args: Args) -> Self:
        """Two words: the device and the first sector on it."""
        reference = args.word("device")
        start = args.start()
        args.end()
        return cls(spec, await spec.open(reference), start)

    def submit(self, io: Io, offset: int) -> Pending:
        """Passes the request down, shifted."""
        return self._device.submit(io, offset + self._shift)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Those of the device, shifted."""
        return await self._device.extents(offset + self._shift, length)

    def devices(self) -> list[Below]:
        """The one range."""
        return [Below(self._device, self._start, self.length)]

    def table(self) -> str:
        """`<major:minor> <start>`"""
        return f"{self._device.number} {self._start // SECTOR}"

"""unstriped: one stripe of a striped device as a device of its own (Documentation device-mapper/unstriped).

    0 4096 unstriped 2 256 0 /dev/md0 0

Chunk k of the target is chunk k * stripes + stripe of the device. As in the kernel the stripe may be one too many, the
last rows may lie beyond the end of the device (requests there fail), and a discard is not offered. The kernel counts
sectors from the start of the mapped device instead of the target's; where the target is the first, that is the same.
"""

from dataclasses import replace
from typing import Final, Self

from nbdmap.block.device import Extent, Limits
from nbdmap.block.io import Failed, Io, Pending
from nbdmap.dm.args import Args
from nbdmap.dm.target import Below, Spec, Target, submit_chunks
from nbdmap.errors import InvalidArgument, IoFailed, NbdmapError
from nbdmap.units import SECTOR

MAX_UINT: Final = (1 << 32) - 1
MAX_CHUNKS: Final = 1024
"""One answer to block status looks at no more chunks than this."""


class Unstriped(Target):
    """`unstriped <stripes> <chunk sectors> <stripe> <device> <start>`"""

    type_name = "unstriped"
    version = (1, 1, 0)

    def __init__(self, spec: Spec, stripes: int, chunk: int, stripe: int, below: Below) -> None:
        super().__init__(spec)
        self._stripes = stripes
        self._chunk = chunk
        self._stripe = stripe
        self._device, self._start, _ = below

    @classmethod
    async def construct(cls, spec: Spec, args: Args) -> Self:
        """The number of stripes, the chunk in sectors, which stripe, the device and its first sector."""
        stripes = args.number("number of stripes", 1, MAX_UINT)
        chunk = args.number("chunk size", 1, MAX_UINT) * SECTOR
        stripe = args.number("stripe", 0, stripes if stripes > 1 else MAX_UINT)
        reference = args.word("device")
        start = args.start()
        args.end()
        if spec.length % chunk:
            raise InvalidArgument(f"length {spec.length // SECTOR} is not a multiple of the chunk, {chunk // SECTOR}")
        try:
            device = await spec.open(reference)
        except NbdmapError as error:  # the kernel says EINVAL to whatever is wrong with it
            raise InvalidArgument(error.message) from None
        return cls(spec, stripes, chunk, stripe, Below(device, start, spec.length))

    def submit(self, io: Io, offset: int) -> Pending:
        """Sends each chunk's piece to its place, side by side."""
        place, inside = divmod(offset - self.begin, self._chunk)
        if inside + io.length <= self._chunk:
            return self._piece(io, place, inside)
        return submit_chunks(io, place, inside, self._chunk, self._piece)

    def _piece(self, io: Io, place: int, inside: int) -> Pending:
        below = self._place(place) + inside
        if below + io.length > self._device.size:
            return Failed(IoFailed(f"bytes {below} to {below + io.length} are beyond the end of {self._device.name}"))
        return self._device.submit(io, below)

    def _place(self, place: int) -> int:
        """Where chunk `place` of the target is on the device."""
        return self._start + (place * self._stripes + self._stripe) * self._chunk

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Those of the device, chunk by chunk."""
        found: list[Extent] = []
        place, inside = divmod(offset - self.begin, self._chunk)
        while length and len(found) < MAX_CHUNKS:
            piece = min(self._chunk - inside, length)
            below = self._place(place) + inside
            if below + piece > self._device.size:
                found.append((length, 0))
                break
            extents = await self._device.extents(below, piece)
            found += extents
            covered = sum(size for size, _ in extents)
            if covered < piece:
                break
            length -= piece
            place += 1
            inside = 0
        return found

    def devices(self) -> list[Below]:
        """The device; the kernel checks no more of it than the target's own length."""
        return [Below(self._device, self._start, self.length)]

    def limits(self) -> Limits:
        """What the device can, but no discard or write-zeroes, as in the kernel."""
        return replace(self._device.limits, discard=False, zero=False, fast_zero=False)

    def table(self) -> str:
        """`<stripes> <chunk> <stripe> <major:minor> <start>`"""
        place = f"{self._device.number} {self._start // SECTOR}"
        return f"{self._stripes} {self._chunk // SECTOR} {self._stripe} {place}"

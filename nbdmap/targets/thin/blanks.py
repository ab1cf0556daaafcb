"""Free data blocks that read as zeroes already: around the first write to one of them nothing need be written.

On a sparse file that is every block that was never used, or that was discarded. The data device is asked for its holes
ahead of the blocks that are given out next, many at once.

Invariant: a block that is known was free when the device was asked, and has neither been given out nor written since: `given`
is called for each block that is given out, in the order of a cursor that only goes forward before the device is asked again,
and `forget` when somebody else may write.
"""

from typing import Final

from nbdmap.block.device import ZERO, Device
from nbdmap.errors import NbdmapError
from nbdmap.persist.data_map import DataMap

AHEAD: Final = 1024
"""Blocks about which the device is asked at once."""
WORTH: Final = 4
"""Of these, how many must be free: asking may cost as much as zeroing a few blocks."""


class Blanks:
    """What is known of the free blocks of `device`, of `size` bytes each."""

    def __init__(self, device: Device, size: int) -> None:
        self._device = device
        self._size = size
        self._next = self._end = 0
        """Something is known of these blocks."""
        self._known: set[int] = set()
        self._version = 0

    def forget(self) -> None:
        """Nothing is known any more."""
        self._next = self._end = 0
        self._known.clear()
        self._version += 1

    def knows(self, block: int) -> bool:
        """Whether `given` would end at once."""
        return self._next <= block < self._end

    async def given(self, block: int, data: DataMap) -> bool:
        """A block has just been given out, while no other can be; whether it reads as zeroes."""
        if not self.knows(block):
            await self._ask(block, data)
        return self.given_at_once(block)

    def given_at_once(self, block: int) -> bool:
        """As `given`, of a block of which something is known."""
        self._next = block + 1
        return block in self._known

    async def _ask(self, block: int, data: DataMap) -> None:
        """Learns of `block` and the free blocks behind it."""
        self.forget()
        free = b"\1" + data.free_behind(block, AHEAD - 1)
        device, size, version = self._device, self._size, self._version
        # After a restart a server may have lost a discard of which nobody knows.
        if free.count(1) < WORTH or not device.limits.sparse or device.restarts():
            return
        at, known = block * size, set[int]()
        try:
            extents = await device.extents(at, len(free) * size)
        except NbdmapError:
            return  # whatever is the matter with it, it will say so again
        for length, flags in extents:
            if flags & ZERO:
                known.update(range(-(-at // size), (at + length) // size))
            at += length
        if version == self._version:
            self._known = {one for one in known if free[one - block]}
            self._next, self._end = block, max(at // size, block + 1)

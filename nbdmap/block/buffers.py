"""Large buffers, kept for use again: a megabyte of fresh memory costs more to make than to fill.

A buffer is free again when nobody refers to it any more, which its reference count tells: the transport drops its
reference when the last byte is sent, a request when it has ended. So nothing has to be given back, and a buffer that is
still somewhere in use can never be handed out twice.
"""

import mmap
import sys
from typing import Final

from nbdmap.units import KIB, MIB

SMALLEST: Final = 64 * KIB
HEADROOM: Final = 4 * KIB
"""Beyond a power of two: a reply's header stands before its data."""
MOST_KEPT: Final = 32 * MIB

_FREE: Final = 3
"""References to a buffer that only the pool has: the list's, the loop's, and getrefcount's argument."""


class Buffers:
    """A pool for one event loop. `take` gives memory that is not touched before its use: pages are made on demand."""

    def __init__(self, most_kept: int = MOST_KEPT) -> None:
        self._classes: dict[int, list[mmap.mmap]] = {}
        self._most_kept = most_kept
        self.kept = 0
        """Bytes in the pool, in use or not."""

    def take(self, length: int) -> memoryview:
        """A buffer of exactly `length` bytes, of any content."""
        if length < SMALLEST:
            return memoryview(bytearray(length))
        size = (1 << (length - HEADROOM - 1).bit_length()) + HEADROOM
        pool = self._classes.setdefault(size, [])
        for buffer in pool:
            if sys.getrefcount(buffer) == _FREE:
                return memoryview(buffer)[:length]
        buffer = mmap.mmap(-1, size)
        if self.kept + size <= self._most_kept:
            self.kept += size
            pool.append(buffer)
        return memoryview(buffer)[:length]

"""Reading and writing a file opened with O_DIRECT: past the page cache, through aligned buffers of our own.

Invariant: a buffer is used by one thread at a time. A device has at most as many buffers as threads.
Offsets and lengths are multiples of the file's logical block.
"""

import errno
import mmap
import os
from typing import Final

from nbdmap.errors import Unsupported
from nbdmap.units import MIB

BUFFER: Final = MIB
"""Size of a buffer, and so the largest single transfer."""


class BounceBuffers:
    """Page-aligned buffers, kept for reuse; each call transfers at most BUFFER bytes and says how many."""

    def __init__(self) -> None:
        self._free: list[memoryview] = []

    def read(self, fd: int, data: memoryview, offset: int) -> int:
        """preadv(2) of the first bytes of `data`."""
        buffer = self._take()
        try:
            done = os.preadv(fd, (buffer[: len(data)],), offset)
            data[:done] = buffer[:done]
        finally:
            self._free.append(buffer)
        return done

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        """pwritev(2) of the first bytes of `data`."""
        buffer = self._take()
        length = min(len(data), BUFFER)
        try:
            buffer[:length] = data[:length]
            return os.pwritev(fd, (buffer[:length],), offset)
        finally:
            self._free.append(buffer)

    def _take(self) -> memoryview:
        try:
            return self._free.pop()
        except IndexError:
            return memoryview(mmap.mmap(-1, BUFFER, flags=mmap.MAP_PRIVATE))


def probe_logical_block(fd: int, path: str) -> int:
    """The smallest unit that O_DIRECT takes on this file."""
    buffer = memoryview(mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE))
    for block in (512, 4096):
        try:
            os.preadv(fd, (buffer[:block],), 0)
        except OSError as error:
            if error.errno == errno.EINVAL:
                continue
        return block  # another error speaks of the data, not of its alignment
    raise Unsupported(f"{path} cannot be read with O_DIRECT in blocks of 512 or 4096 bytes")

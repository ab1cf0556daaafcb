"""A disk in memory: sparse, bounded, gone when it is closed.

In a configuration: `ram0: {memory: 64MiB}`; in a table: `0 131072 linear ram0 0`.

Invariants: the disk is made of chunks of 64 KiB (the last one ends with the disk). A chunk is either resident, with the
bytes last written to it, or absent and reads as zeroes. `resident` is the sum of the lengths of the resident chunks and
never exceeds `limit`. Every request is done at once, without waiting, so each is atomic.
"""

import errno
from collections.abc import Iterable, Iterator
from typing import Final

from nbdmap.block.device import HOLE, ZERO, Device, Extent, Limits
from nbdmap.block.io import DISCARD, DONE, NO_HOLE, READ, WRITE, WRITE_ZEROES, Failed, Io, Pending
from nbdmap.errors import IoFailed
from nbdmap.units import KIB

CHUNK_SHIFT: Final = 16
CHUNK: Final = 64 * KIB
MAX_EXTENTS: Final = 4096
"""The largest number of extents one call answers with."""

_WITHIN: Final = CHUNK - 1
_ZEROES: Final = memoryview(bytes(CHUNK))
_LIMITS: Final = Limits(discard=True, zero=True, fast_zero=True, cache=True, sparse=True)


class MemoryDisk(Device):
    """`size` bytes of which at most `limit` are held; a write beyond it fails with ENOSPC and changes nothing."""

    def __init__(
        self, name: str, number: str, size: int, *, limit: int | None = None, read_only: bool = False
    ) -> None:
        self.name = name
        self.number = number
        self.size = size
        self.limit = size if limit is None else limit
        self.read_only = read_only
        self.limits = _LIMITS
        self.resident = 0
        self._chunks: dict[int, memoryview] = {}

    def submit(self, io: Io, offset: int) -> Pending:
        """As `Device.submit`; never waits."""
        try:
            self._do(io, offset)
        except IoFailed as error:
            return Failed(error)
        return DONE

    def _do(self, io: Io, offset: int) -> None:
        op = io.op
        start = offset & _WITHIN
        end = start + io.length
        if end > CHUNK and op <= WRITE:
            self._across(io, offset)
        elif op == READ:
            chunk = self._chunks.get(offset >> CHUNK_SHIFT)
            io.data[:] = _ZEROES[: io.length] if chunk is None else chunk[start:end]
        elif op == WRITE:
            chunk = self._chunks.get(offset >> CHUNK_SHIFT)
            if chunk is None:
                chunk = self._provision(offset >> CHUNK_SHIFT)
            chunk[start:end] = io.data
        elif op == DISCARD or (op == WRITE_ZEROES and not io.flags & NO_HOLE):
            self._punch(offset, io.length)
        elif op == WRITE_ZEROES:
            self._need(offset, io.length)
            for index, begin, stop in self._pieces(offset, io.length):
                self._zero(index, begin, stop)
                if index not in self._chunks:
                    self._provision(index)
        # FLUSH and CACHE: there is nothing to do.

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """As `Device.extents`: HOLE and ZERO where no chunk is resident."""
        end = offset + length
        found: list[Extent] = []
        position = run = offset  # [run, position) is resident data not yet reported; everything before `run` is
        for index in self._resident_in(offset >> CHUNK_SHIFT, -(-end >> CHUNK_SHIFT)):
            begin = max(index << CHUNK_SHIFT, offset)
            if begin > position:
                if position > run:
                    found.append((position - run, 0))
                found.append((begin - position, HOLE | ZERO))
                run = begin
                if len(found) >= MAX_EXTENTS - 1:
                    return found
            position = min((index + 1) << CHUNK_SHIFT, end)
        if position > run:
            found.append((position - run, 0))
        if end > position:
            found.append((end - position, HOLE | ZERO))
        return found

    async def close(self) -> None:
        """Forgets all data."""
        self._chunks.clear()
        self.resident = 0

    def _across(self, io: Io, offset: int) -> None:
        """A READ or WRITE of more than one chunk."""
        data = io.data
        if io.op == WRITE:
            self._need(offset, io.length)
        done = 0
        for index, begin, stop in self._pieces(offset, io.length):
            part = data[done : done + stop - begin]
            done += stop - begin
            chunk = self._chunks.get(index)
            if io.op == WRITE:
                (chunk if chunk is not None else self._provision(index))[begin:stop] = part
            else:
                part[:] = _ZEROES[: stop - begin] if chunk is None else chunk[begin:stop]

    def _punch(self, offset: int, length: int) -> None:
        """Frees the whole chunks of a range and zeroes the rest of it; costs no more than what is resident."""
        end = offset + length
        first, last = -(-offset >> CHUNK_SHIFT), (self.size + _WITHIN if end == self.size else end) >> CHUNK_SHIFT
        for index in list(self._resident_in(first, last)):
            del self._chunks[index]
            self.resident -= self._chunk_length(index)
        begin = offset >> CHUNK_SHIFT
        if begin < first:
            self._zero(begin, offset & _WITHIN, min(end - (begin << CHUNK_SHIFT), CHUNK))
        if last >= first and end > last << CHUNK_SHIFT:
            self._zero(last, 0, end & _WITHIN)

    def _zero(self, index: int, begin: int, stop: int) -> None:
        """Zeroes bytes [begin, stop) of a chunk; an absent one is zero already."""
        chunk = self._chunks.get(index)
        if chunk is not None:
            chunk[begin:stop] = _ZEROES[: stop - begin]

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """The range cut at chunks: (chunk, begin, stop), the last two within the chunk."""
        end = offset + length
        while offset < end:
            begin = offset & _WITHIN
            stop = min(begin + end - offset, CHUNK)
            yield offset >> CHUNK_SHIFT, begin, stop
            offset += stop - begin

    def _resident_in(self, first: int, last: int) -> Iterable[int]:
        """The resident chunks of [first, last) in order."""
        chunks = self._chunks
        if last - first <= len(chunks):
            return (index for index in range(first, last) if index in chunks)
        return sorted(index for index in chunks if first <= index < last)

    def _chunk_length(self, index: int) -> int:
        return min(CHUNK, self.size - (index << CHUNK_SHIFT))

    def _need(self, offset: int, length: int) -> None:
        """Raises ENOSPC unless every absent chunk of the range may become resident."""
        first, last = offset >> CHUNK_SHIFT, -(-(offset + length) >> CHUNK_SHIFT)
        wanted = min(last << CHUNK_SHIFT, self.size) - (first << CHUNK_SHIFT)
        wanted -= sum(map(self._chunk_length, self._resident_in(first, last)))
        if wanted > self.limit - self.resident:
            raise IoFailed(
                f"write to {self.name} at byte {offset}: {wanted} more bytes of memory exceed the limit of"
                f" {self.limit} bytes, of which {self.resident} are in use",
                errno.ENOSPC,
            )

    def _provision(self, index: int) -> memoryview:
        """Makes an absent chunk resident, full of zeroes."""
        length = self._chunk_length(index)
        if length > self.limit - self.resident:
            self._need(index << CHUNK_SHIFT, length)
        chunk = self._chunks[index] = memoryview(bytearray(length))
        self.resident += length
        return chunk

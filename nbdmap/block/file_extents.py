"""Where a file has data and where it has holes.

`find_extents` asks the file system (SEEK_DATA, SEEK_HOLE: lseek(2)), which may block. `KnownData` remembers what was
found to be data, so that the question asked before every large read costs no system call. It has one bit for each
granule of 1 MiB; invariant: a granule whose bit is set was wholly data when it was last looked at. A bit that is out of
date says "data" where there is a hole by now: that is always a legal answer, the opposite would not be.
"""

import errno
import os
from collections.abc import Iterator
from typing import Final

from nbdmap.block.device import HOLE, ZERO, Extent
from nbdmap.units import GIB, MIB, round_down, round_up

GRANULE: Final = MIB
MAX_EXTENTS: Final = 4096
"""The largest number of extents one call answers with."""
MAX_REMEMBERED: Final = 64 * GIB
"""How much of one run of data is remembered at once: it bounds the time that takes."""

_GRANULE_SHIFT: Final = 20
_WORD_SHIFT: Final = 6
_WORD_BITS: Final = 1 << _WORD_SHIFT

Run = tuple[int, int]
"""A half-open range of bytes: (begin, end)."""


class KnownData:
    """The granules known to hold data: a sparse bitmap in words of 64 bits."""

    __slots__ = ("_words",)

    def __init__(self) -> None:
        self._words: dict[int, int] = {}

    def covers(self, offset: int, end: int) -> bool:
        """Whether every byte of [offset, end) lies in a granule known to be data."""
        first = offset >> _GRANULE_SHIFT
        last = (end - 1) >> _GRANULE_SHIFT
        word = first >> _WORD_SHIFT
        if word == last >> _WORD_SHIFT:
            mask = (2 << (last - first)) - 1
            return self._words.get(word, 0) >> (first & (_WORD_BITS - 1)) & mask == mask
        return all(self._words.get(word, 0) & mask == mask for word, mask in _words(first, last + 1))

    def add(self, begin: int, end: int) -> None:
        """[begin, end) was seen to be data; the granules wholly inside it are remembered."""
        end = min(end, begin + MAX_REMEMBERED)
        for word, mask in _words(-(-begin >> _GRANULE_SHIFT), end >> _GRANULE_SHIFT):
            self._words[word] = self._words.get(word, 0) | mask

    def remove(self, begin: int, end: int) -> None:
        """Forgets every granule that [begin, end) touches; costs no more than what is remembered."""
        first, stop = begin >> _GRANULE_SHIFT, -(-end >> _GRANULE_SHIFT)
        if (stop - first) >> _WORD_SHIFT > len(self._words):
            first_word, last_word = first >> _WORD_SHIFT, stop >> _WORD_SHIFT
            self._words = {word: bits for word, bits in self._words.items() if not first_word <= word <= last_word}
            return
        for word, mask in _words(first, stop):
            if word in self._words:
                self._words[word] &= ~mask


def _words(first: int, stop: int) -> Iterator[tuple[int, int]]:
    """The granules [first, stop) as (word, mask of bits in it)."""
    while first < stop:
        word, bit = divmod(first, _WORD_BITS)
        count = min(_WORD_BITS - bit, stop - first)
        yield word, ((1 << count) - 1) << bit
        first += count


def find_extents(fd: int, offset: int, end: int, block: int) -> tuple[list[Extent], list[Run]]:
    """The extents of [offset, end), cut at MAX_EXTENTS, and the runs of data met, which may reach beyond that range.

    All borders are multiples of `block`. What lies behind the end of the file (it shrank) is called data, so that
    reading it shows the failure.
    """
    position = round_down(offset, GRANULE)  # to learn whether the first granule is data from its start
    if (_seek(fd, position, os.SEEK_HOLE) or 0) <= offset:
        position = offset
    found: list[Extent] = []
    runs: list[Run] = []
    reported = offset  # what lies before it is in `found`
    while reported < end and len(found) < MAX_EXTENTS - 1:
        data = _seek(fd, position, os.SEEK_DATA)
        if data is None:
            data = os.fstat(fd).st_size
        position = max(position, round_down(min(data, end), block))
        if position > reported:
            found.append((position - reported, HOLE | ZERO))
            reported = position
        if position < end:
            hole = _seek(fd, position, os.SEEK_HOLE)
            hole = end if hole is None else round_up(max(hole, position + 1), block)
            runs.append((position, hole))
            if hole > reported:
                _append_data(found, min(hole, end) - reported)
                reported = min(hole, end)
            position = hole
    return found, runs


def _append_data(found: list[Extent], length: int) -> None:
    """Adds data to the end of the extents, merged with data that is there already."""
    if found and found[-1][1] == 0:
        length += found.pop()[0]
    found.append((length, 0))


def _seek(fd: int, offset: int, whence: int) -> int | None:
    """The first data or hole from `offset` on; None when there is no data left, or `offset` is behind the end."""
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None

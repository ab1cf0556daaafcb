"""The tweaks of XTS (IEEE 1619): T times x^j for the j-th block of a sector, from the T of each sector.

    tweaks = make_tweaks(128 * KIB, 512)
    tweaks.expand(first)    # a row of 64 words for each 16 bytes of `first`

Compiled (setup.py), one is made from the one before, in 1.5 ns. The interpreter would take a thousand times as long; there all
are computed together, by numpy in a closed form: x^128 = x^7 + x^2 + x + 1, so a shift by up to 57 bits needs only one
reduction.
"""

from typing import Final, Protocol

import numpy as np
from librt.strings import read_i64_le
from librt.vecs import vec
from mypy_extensions import i64

from nbdmap.ciphers.arrays import Bytes, Words

COMPILED: Final = not __file__.endswith(".py")

_GROUP: Final = 32
"""Blocks whose tweaks are made from one by shifts: at most 57."""
_ONE, _TWO, _FIVE, _SEVEN = np.uint64(1), np.uint64(2), np.uint64(5), np.uint64(7)
_32: Final = np.uint64(32)


class Tweaks(Protocol):
    """Working memory for the tweaks of some sectors of one size."""

    def expand(self, first: Bytes) -> Words:
        """From the 16 bytes of each sector's first tweak a row of the tweaks of its blocks; valid until called again."""
        ...


def make_tweaks(size: int, sector_size: int) -> Tweaks:
    """For `size` bytes of sectors, or one."""
    rows = max(size // sector_size, 1)
    return Doubled(rows, sector_size) if COMPILED else Shifted(rows, sector_size)


class Doubled:
    """One from the one before."""

    def __init__(self, rows: int, sector_size: int) -> None:
        self._words: vec[i64] = vec[i64]([0] * (rows * sector_size // 8))
        self._width: i64 = sector_size // 8
        self._array: Bytes = np.frombuffer(memoryview(self._words), np.uint8)

    def expand(self, first: Bytes) -> Words:
        """As Tweaks has it."""
        return self.double(first.tobytes()).view(np.uint64).reshape(first.size // 16, -1)

    def double(self, heads: bytes) -> Bytes:
        """The same as bytes, one row behind the other; `heads` are the first tweaks."""
        words = self._words
        source: i64 = 0
        at: i64 = 0
        size: i64 = len(heads)
        while source < size:
            low: i64 = read_i64_le(heads, source)
            high: i64 = read_i64_le(heads, source + 8)
            source += 16
            end: i64 = at + self._width
            while at < end:
                words[at] = low
                words[at + 1] = high
                at += 2
                carry: i64 = high >> 63  # all ones, or none
                high = high << 1 | (low >> 63 & 1)
                low = low << 1 ^ (carry & 0x87)
        return self._array[: at << 3]


class Shifted:
    """All together, by numpy."""

    def __init__(self, rows: int, sector_size: int) -> None:
        blocks = sector_size // 16
        group = min(blocks, _GROUP)
        groups = blocks // group
        self._groups = groups
        self._tweaks = np.empty((rows * groups, group, 2), np.uint64)
        self._work = np.empty((4, rows * groups, group), np.uint64)
        self._left = np.tile(np.arange(group, dtype=np.uint64), (rows * groups, 1))  # one for each: shifted at once
        self._right = np.uint64(64) - self._left  # numpy shifts by 64 give 0
        self._heads = np.empty((rows, groups, 2), np.uint64)

    def expand(self, first: Bytes) -> Words:
        """As Tweaks has it."""
        heads = first.view(np.uint64).reshape(-1, 2)
        rows = len(heads)
        if self._groups > 1:
            heads = self._group_heads(heads)
        count = len(heads)
        tweaks, left, right = self._tweaks[:count], self._left[:count], self._right[:count]
        low, high, middle, carry = self._work[:, :count]
        low[:] = heads[:, :1]
        high[:] = heads[:, 1:]
        np.right_shift(high, right, out=carry)
        np.left_shift(high, left, out=high)
        np.right_shift(low, right, out=middle)
        np.bitwise_or(high, middle, out=tweaks[:, :, 1])
        np.left_shift(low, left, out=low)
        low ^= carry  # what is shifted out at the top comes in times x^7 + x^2 + x + 1
        carry <<= _ONE
        low ^= carry
        carry <<= _ONE
        low ^= carry
        carry <<= _FIVE
        np.bitwise_xor(low, carry, out=tweaks[:, :, 0])
        return tweaks.reshape(rows, -1)

    def _group_heads(self, first: Words) -> Words:
        """The first tweak of each group of each sector."""
        heads = self._heads[: len(first)]
        heads[:, 0] = first
        for number in range(1, self._groups):
            low, high = heads[:, number - 1, 0], heads[:, number - 1, 1]
            carry = high >> _32
            heads[:, number, 0] = low << _32 ^ carry ^ carry << _ONE ^ carry << _TWO ^ carry << _SEVEN
            heads[:, number, 1] = high << _32 | low >> _32
        return heads.reshape(-1, 2)

"""Chaining modes over many sectors at once, in numpy over one ECB call for all blocks.

A mode gets an IV and a source row for each sector and fills a target row. Rows that lie one after another may be encrypted in
place. One context for each 512-byte sector costs several microseconds a sector; here the work of all of them is a few
passes over the whole. XTS is IEEE 1619.
"""

from functools import cached_property
from typing import Final, Protocol

import numpy as np

from nbdmap.ciphers.arrays import SPARE, Bytes, Key, Words, words
from nbdmap.ciphers.blocks import Block
from nbdmap.ciphers.tweaks import Tweaks, make_tweaks
from nbdmap.units import KIB

PIECE: Final = 128 * KIB
"""Bytes that are worked on at a time: what is computed for them stays in the processor's cache."""


class Mode(Protocol):
    """How the blocks of a sector are chained. Rows: (sectors, sector size) bytes, contiguous; IVs: (sectors, IV size)."""

    iv_size: int

    def encrypt(self, ivs: Bytes, source: Bytes, target: Bytes) -> None:
        """Encrypts each row of `source` with its IV into the same row of `target`; at most PIECE bytes, or one row."""
        ...

    def decrypt(self, ivs: Bytes, source: Bytes, target: Bytes) -> None:
        """The reverse."""
        ...


class Scratch:
    """Working memory of modes for up to PIECE bytes of sectors of one size; those that never work at once may share it."""

    def __init__(self, sector_size: int) -> None:
        self.sector_size = sector_size
        self._all = np.zeros(max(PIECE, sector_size) + SPARE, np.uint8)

    def rows(self, count: int, width: int) -> Bytes:
        """The first `count` rows of `width` bytes."""
        return self._all[: count * width].reshape(count, width)

    def behind(self, count: int) -> Bytes:
        """The first `count` bytes and SPARE more, as a target for Block."""
        return self._all[: count + SPARE]

    @cached_property
    def tweaks(self) -> Tweaks:
        """Those of Xts."""
        return make_tweaks(PIECE, self.sector_size)


class Ecb:
    """Every block by itself."""

    iv_size = 0

    def __init__(self, block: Block, scratch: Scratch) -> None:
        self._block = block
        self._scratch = scratch

    def encrypt(self, ivs: Bytes, source: Bytes, target: Bytes) -> None:
        self._block.encrypt(source, self._scratch.behind(source.size))
        np.copyto(target, self._scratch.rows(*source.shape))

    def decrypt(self, ivs: Bytes, source: Bytes, target: Bytes) -> None:
        self._block.decrypt(source, self._scratch.behind(source.size))
        np.copyto(target, self._scratch.rows(*source.shape))


class Cbc:
    """Each block is XORed with the one before it: decrypted all at once, encrypted in lock step over the sectors."""

    def __init__(self, block: Block, scratch: Scratch) -> None:
        self.iv_size = block.size
        self._block = block
        self._scratch = scratch

    def encrypt(self, ivs: Bytes, source: Bytes, target: Bytes) -> None:
        size, count = self._block.size, len(source)
        before, room = ivs, self._scratch.behind(count * size)
        chained = self._scratch.rows(count, size)
        for start in range(0, source.shape[1], size):
            np.bitwise_xor(source[:, start : start + size], before, out=chained)
            self._block.encrypt(chained, room)
            before = target[:, start : start + size]
            before[:] = chained

    def decrypt(self, ivs: Bytes, source: Bytes, target: Bytes) -> None:
        size = self._block.size
        self._block.decrypt(source, self._scratch.behind(source.size))
        plain = self._scratch.rows(*source.shape)
        plain[:, size:] ^= source[:, :-size]
        plain[:, :size] ^= ivs
        np.copyto(target, plain)


class _Tweaked:
    """XOR with a tweak for each block, ECB, XOR with the tweak. `_mix` gives the tweaks, and the source with them.

    XOR is of bytes: as words, numpy would copy what does not lie aligned, and data of a reply never does.
    """

    iv_size = 16

    def __init__(self, block: Block, scratch: Scratch) -> None:
        self._block = block
        self._scratch = scratch

    def encrypt(self, ivs: Bytes, source: Bytes, target: Bytes) -> None:
        tweaks, mixed = self._mix(ivs, source)
        self._block.encrypt(mixed, self._scratch.behind(source.size))
        np.bitwise_xor(mixed, tweaks, out=target)

    def decrypt(self, ivs: Bytes, source: Bytes, target: Bytes) -> None:
        tweaks, mixed = self._mix(ivs, source)
        self._block.decrypt(mixed, self._scratch.behind(source.size))
        np.bitwise_xor(mixed, tweaks, out=target)

    def _mix(self, ivs: Bytes, source: Bytes) -> tuple[Bytes, Bytes]:
        raise NotImplementedError


class Xts(_Tweaked):
    """The IV, encrypted with the second key, is the first tweak of its sector."""

    def __init__(self, data: Block, tweak: Block, scratch: Scratch) -> None:
        super().__init__(data, scratch)
        self._tweak = tweak
        self._first = np.empty(max(PIECE // scratch.sector_size, 1) * 16 + SPARE, np.uint8)

    def _mix(self, ivs: Bytes, source: Bytes) -> tuple[Bytes, Bytes]:
        self._tweak.encrypt(ivs, self._first)
        tweaks = self._scratch.tweaks.expand(self._first[: ivs.size]).view(np.uint8)
        mixed = self._scratch.rows(*source.shape)
        np.bitwise_xor(source, tweaks, out=mixed)
        return tweaks, mixed


class BySize:
    """A mode that does few sectors one by one and many together."""

    def __init__(self, few: Mode, many: Mode, encrypted: int, decrypted: int) -> None:
        """Up to `encrypted` and `decrypted` sectors are few."""
        self.iv_size = many.iv_size
        self._few = few
        self._many = many
        self._encrypted = encrypted
        self._decrypted = decrypted

    def encrypt(self, ivs: Bytes, source: Bytes, target: Bytes) -> None:
        (self._few if len(source) <= self._encrypted else self._many).encrypt(ivs, source, target)

    def decrypt(self, ivs: Bytes, source: Bytes, target: Bytes) -> None:
        (self._few if len(source) <= self._decrypted else self._many).decrypt(ivs, source, target)


class Ctr:
    """The IV is a big-endian counter; its encrypted values are XORed with the data."""

    def __init__(self, block: Block, scratch: Scratch) -> None:
        self.iv_size = block.size
        self._block = block
        self._count = np.arange(scratch.sector_size // block.size, dtype=np.uint64)
        self._scratch = scratch

    def encrypt(self, ivs: Bytes, source: Bytes, target: Bytes) -> None:
        first = words(ivs).byteswap()
        stream = self._scratch.rows(*source.shape)
        counters = words(stream).reshape(len(source), len(self._count), -1)
        low = first[:, -1:] + self._count
        if self.iv_size == 16:
            high = first[:, :1] + (low < self._count)  # the carry
            counters[:, :, 0] = high.byteswap()
        counters[:, :, -1] = low.byteswap()
        self._block.encrypt(stream, self._scratch.behind(stream.size))
        np.bitwise_xor(stream, source, out=target)

    decrypt = encrypt


class Lrw(_Tweaked):
    """The tweak of a block is its number times the second key, in GF(2^128) with the last byte lowest.

    The number is the IV, plus one for each block. The product is linear in the number: one table for each of its bytes.
    """

    def __init__(self, block: Block, key: Key, scratch: Scratch) -> None:
        super().__init__(block, scratch)
        self._count = np.arange(scratch.sector_size // 16, dtype=np.uint64)
        self._tables = _products(key)

    def _mix(self, ivs: Bytes, source: Bytes) -> tuple[Bytes, Bytes]:
        first = words(ivs).byteswap()
        low = first[:, 1:] + self._count
        high = first[:, :1] + (low < self._count)  # the carry
        numbers = np.stack((low, high), axis=2).view(np.uint8).reshape(low.size, 16)
        tweaks = np.zeros((low.size, 2), np.uint64)
        for position in range(16):
            if numbers[:, position].any():
                tweaks ^= self._tables[position][numbers[:, position]]
        mixed = self._scratch.rows(*source.shape)
        rows = tweaks.reshape(len(source), -1).view(np.uint8)
        np.bitwise_xor(source, rows, out=mixed)
        return rows, mixed


def _products(key: Key) -> Words:
    """[position][byte]: byte times 256^position times `key`, as it lies in memory."""
    value = int.from_bytes(key, "big")
    bits = []
    for _ in range(128):
        bits.append(value)
        value = value << 1 ^ (value >> 127) * 0x1_00000000_00000000_00000000_00000087
    tables = np.zeros((16, 256, 2), np.uint64)
    for position in range(16):
        for bit in range(8):
            product = np.frombuffer(bits[8 * position + bit].to_bytes(16, "big"), np.uint64)
            tables[position, 1 << bit : 2 << bit] = tables[position, : 1 << bit] ^ product
    return tables

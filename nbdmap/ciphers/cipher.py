"""A sector cipher with its key: what turns the sectors of a crypt device into those of its disk, and back.

    cipher = SectorCipher(CipherSpec.parse("aes-xts-plain64"), key, sector_size=4096)
    cipher.decrypt(8, ciphertext, plaintext)

`sector` is the number of the first 512-byte sector, relative to the start of the encrypted range; lengths are multiples of the
encryption sector. Many pieces, each at its own place, are encrypted together: that costs much less than one by one. Source and
target may be the same, and else do not overlap. An object has working memory of its own: one thread at a time.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from nbdmap.ciphers.arrays import Bytes, Key, Words
from nbdmap.ciphers.keyed import Numbered, few_sectors, make_keyed
from nbdmap.ciphers.libcrypto import find_mode
from nbdmap.ciphers.modes import PIECE
from nbdmap.ciphers.spec import CipherSpec
from nbdmap.ciphers.tweaks import COMPILED
from nbdmap.ciphers.xts import XtsPlain64
from nbdmap.units import SECTOR

Buffer = bytes | bytearray | memoryview

_NUMBERS: Final = np.arange(PIECE // SECTOR, dtype=np.uint64)
_WRAP: Final = (1 << 64) - 1


class SectorCipher:
    """`iv_offset` is in sectors and added to every sector number; `large_sectors`: IVs count encryption sectors.

    Raises InvalidArgument or NotFound for what there is not, with the kernel's errno; a message never has the key.
    """

    def __init__(
        self, spec: CipherSpec, key: Key, *, sector_size: int = SECTOR, iv_offset: int = 0, large_sectors: bool = False
    ) -> None:
        self.spec = spec
        self.sector_size = sector_size
        self._iv_offset = iv_offset
        self._step = sector_size // SECTOR
        self._shift_bits = self._step.bit_length() - 1 if large_sectors else 0
        self._shift = np.uint64(self._shift_bits)
        self._mask = spec.key_count - 1
        self._keyed = make_keyed(spec, memoryview(key), sector_size)
        plain64 = spec.cipher == "aes" and spec.iv_mode == "plain64" and not (self._mask or spec.essiv_hash)
        self._xts: XtsPlain64 | None = None
        self._quick = None  # the shortest way for few sectors, where there is one
        if plain64 and spec.chain_mode == "xts" and COMPILED:
            self._xts = XtsPlain64(memoryview(key), sector_size, iv_offset=iv_offset, large_sectors=large_sectors)
        elif plain64 and spec.chain_mode in ("xts", "cbc"):
            self._quick = find_mode(spec.chain_mode, memoryview(key))
        self.quick = spec.cipher == "aes" and isinstance(self._keyed[0], Numbered)
        """Whether PIECE bytes take a small part of a millisecond."""
        self._few = tuple(count * sector_size for count in few_sectors(spec, sector_size))

    def encrypt(self, sector: int, source: Buffer, target: Any) -> None:
        """Encrypts the sectors in `source`, from number `sector` on, into `target`."""
        self._crypt(sector, source, target, encrypt=True)

    def decrypt(self, sector: int, source: Buffer, target: Any) -> None:
        """The reverse."""
        self._crypt(sector, source, target, encrypt=False)

    def _crypt(self, sector: int, source: Buffer, target: Any, *, encrypt: bool) -> None:
        size = self.sector_size
        if self._xts is not None:
            origin, result, crypt = memoryview(source), memoryview(target), self._xts.encrypt if encrypt else self._xts.decrypt
            for at in range(0, len(target), PIECE):
                end = at + PIECE
                crypt([sector + at // SECTOR], [origin[at:end]], result[at:end])
            return
        if self._quick is not None and len(target) <= self._few[not encrypt]:
            step = 1 if self._shift_bits else self._step
            number = (sector + self._iv_offset & _WRAP) >> self._shift_bits
            (self._quick.encryptor if encrypt else self._quick.decryptor).run_plain64(number, step, size, source, target)
            return
        rows = np.frombuffer(source, np.uint8).reshape(-1, size)
        results = np.frombuffer(target, np.uint8).reshape(-1, size)
        most = max(PIECE // size, 1)
        for first in range(0, len(rows), most):
            piece = rows[first : first + most]
            numbers = self._numbers(sector + first * self._step, len(piece))
            self._run(numbers, piece, results[first : first + most], encrypt)

    def encrypt_joined(self, sectors: Sequence[int], sources: Sequence[Buffer], target: Any) -> None:
        """Encrypts pieces together, each from its number in `sectors` on, into `target`, one behind the other; at most PIECE."""
        self._crypt_joined(sectors, sources, target, encrypt=True)

    def decrypt_joined(self, sectors: Sequence[int], sources: Sequence[Buffer], target: Any) -> None:
        """The reverse."""
        self._crypt_joined(sectors, sources, target, encrypt=False)

    def _crypt_joined(self, sectors: Sequence[int], sources: Sequence[Buffer], target: Any, *, encrypt: bool) -> None:
        size = self.sector_size
        if self._xts is not None:
            (self._xts.encrypt if encrypt else self._xts.decrypt)(sectors, sources, target)
            return
        if self._quick is not None and len(target) <= self._few[not encrypt]:
            at = 0
            for sector, source in zip(sectors, sources, strict=True):
                end = at + len(source)
                self._crypt(sector, source, target[at:end], encrypt=encrypt)
                at = end
            return
        rows = np.frombuffer(b"".join(sources), np.uint8).reshape(-1, size)
        numbers = self._numbers_of(sectors, [len(source) // size for source in sources])
        self._run(numbers, rows, np.frombuffer(target, np.uint8).reshape(-1, size), encrypt)

    def _numbers(self, sector: int, count: int) -> Words:
        """The number of each encryption sector's first 512-byte sector, as the IVs count."""
        first = np.uint64((sector + self._iv_offset) & _WRAP)
        return (_NUMBERS[:count] if self._step == 1 else _NUMBERS[:count] * np.uint64(self._step)) + first

    def _numbers_of(self, sectors: Sequence[int], counts: list[int]) -> Words:
        """Those of several pieces, one behind the other."""
        if counts.count(counts[0]) < len(counts):
            return np.concatenate([self._numbers(sector, count) for sector, count in zip(sectors, counts, strict=True)])
        firsts = np.array([sector + self._iv_offset & _WRAP for sector in sectors], np.uint64)
        return (firsts.reshape(-1, 1) + _NUMBERS[: counts[0]] * np.uint64(self._step)).reshape(-1)

    def _run(self, numbers: Words, source: Bytes, target: Bytes, encrypt: bool) -> None:
        """At most PIECE bytes, one number a row. With several keys, the rows of each key apart."""
        if not self._mask:
            keyed = self._keyed[0]
            (keyed.encrypt if encrypt else keyed.decrypt)(numbers >> self._shift if self._shift_bits else numbers, source, target)
            return
        keys = numbers & np.uint64(self._mask)
        for key in np.unique(keys):
            chosen = np.flatnonzero(keys == key)
            rows = source[chosen]
            keyed = self._keyed[key]
            (keyed.encrypt if encrypt else keyed.decrypt)(numbers[chosen] >> self._shift, rows, rows)
            target[chosen] = rows

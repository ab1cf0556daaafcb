"""aes-xts-plain64, which nearly every disk has, in as few steps as there can be.

    xts = XtsPlain64(key, 512, iv_offset=0, large_sectors=False)
    xts.decrypt([8, 4096], [ciphertext, other], plaintext)

For compiled code only (nbdmap.ciphers.tweaks says why); what it gives is what Xts of `modes` gives with the IVs of `ivs`.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from librt.strings import BytesWriter, write_i64_le

from nbdmap.ciphers.arrays import SPARE, Bytes, Key
from nbdmap.ciphers.blocks import make_block
from nbdmap.ciphers.modes import PIECE
from nbdmap.ciphers.tweaks import Doubled
from nbdmap.units import SECTOR

if TYPE_CHECKING:
    from mypy_extensions import i64

Buffer = bytes | bytearray | memoryview


class XtsPlain64:
    """Pieces of PIECE bytes at most together, each from its sector number on, into `target`, one behind the other."""

    def __init__(self, key: Key, sector_size: int, *, iv_offset: int, large_sectors: bool) -> None:
        half = len(key) // 2
        self._block = make_block("aes", key[:half])
        self._tweak = make_block("aes", key[half:])
        self._size: i64 = sector_size
        self._step: i64 = sector_size // SECTOR
        self._offset: i64 = iv_offset - (iv_offset >> 63 << 64)  # the same modulo 2^64
        shift = (sector_size // SECTOR).bit_length() - 1 if large_sectors else 0
        self._shift: i64 = shift
        self._mask: i64 = (1 << 64 - shift) - 1 if shift else -1  # of what a shift leaves
        self._tweaks = Doubled(PIECE // sector_size, sector_size)
        self._first = np.empty(PIECE // sector_size * 16 + SPARE, np.uint8)
        self._mixed = np.empty(PIECE + SPARE, np.uint8)

    def encrypt(self, sectors: Sequence[int], sources: Sequence[Buffer], target: Any) -> None:
        """Encrypts `sources`."""
        self._run(self._block.encrypt, sectors, sources, target)

    def decrypt(self, sectors: Sequence[int], sources: Sequence[Buffer], target: Any) -> None:
        """The reverse."""
        self._run(self._block.decrypt, sectors, sources, target)

    def _run(
        self, crypt: Callable[[Any, Any], object], sectors: Sequence[int], sources: Sequence[Buffer], target: Any
    ) -> None:
        source = sources[0] if len(sources) == 1 else b"".join(sources)
        size = len(source)
        tweaks = self._expand(self._ivs(sectors, sources))
        mixed = self._mixed[:size]
        np.bitwise_xor(np.frombuffer(source, np.uint8), tweaks, out=mixed)  # of bytes, as in `modes`
        crypt(mixed, self._mixed[: size + SPARE])
        np.bitwise_xor(mixed, tweaks, out=np.frombuffer(target, np.uint8))

    def _ivs(self, sectors: Sequence[int], sources: Sequence[Buffer]) -> bytes:
        ivs = BytesWriter()
        shift, mask = self._shift, self._mask
        for index in range(len(sources)):
            number: i64 = sectors[index]
            number += self._offset
            left: i64 = len(sources[index])
            while left > 0:
                write_i64_le(ivs, number >> shift & mask)
                write_i64_le(ivs, 0)
                number += self._step
                left -= self._size
        return ivs.getvalue()

    def _expand(self, ivs: bytes) -> Bytes:
        self._tweak.encrypt(ivs, self._first)
        return self._tweaks.double(self._first[: len(ivs)].tobytes())

"""Adiantum, as adiantum(xchacha12,aes) in the kernel's crypto API: a whole sector is one block (Crowley and Biggers, 2018).

    right += hash(left); right = AES(right); left ^= XChaCha(nonce right); right -= hash(left)

where right is the last 16 bytes, added as a little-endian number, and hash is Poly1305 over the tweak and length plus NHPoly1305
over left. The keys of AES, Poly1305 and NH are the stream of XChaCha with the nonce 1. The lanes of numpy are the sectors.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from nbdmap.ciphers.arrays import SPARE, Bytes, Key
from nbdmap.ciphers.blocks import Block, make_block

IV_SIZE: Final = 32
_RIGHT: Final = 16
_UNIT: Final = 1024
"""Bytes that NH makes 32 of."""
_PASSES: Final = 4
_NH_KEY: Final = (_UNIT // 4 + 4 * (_PASSES - 1)) * 4
_PRIME: Final = (1 << 130) - 5
_CLAMP: Final = 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
_128_BITS: Final = (1 << 128) - 1

Lanes = npt.NDArray[np.uint32]

_CONSTANTS: Final = np.frombuffer(b"expand 32-byte k", "<u4").reshape(4, 1)


def _rotate(rows: Lanes, bits: int) -> None:
    high = rows >> np.uint32(32 - bits)
    rows <<= np.uint32(bits)
    rows |= high


def _permute(a: Lanes, b: Lanes, c: Lanes, d: Lanes, rounds: int) -> tuple[Lanes, Lanes, Lanes, Lanes]:
    """ChaCha's rounds over the four rows of its state, each (4, lanes)."""
    for number in range(rounds):
        a += b
        d ^= a
        _rotate(d, 16)
        c += d
        b ^= c
        _rotate(b, 12)
        a += b
        d ^= a
        _rotate(d, 8)
        c += d
        b ^= c
        _rotate(b, 7)
        turn = -1 if number % 2 == 0 else 1  # to diagonals and back
        b, c, d = np.roll(b, turn, 0), np.roll(c, 2 * turn, 0), np.roll(d, -turn, 0)
    return a, b, c, d


def xchacha(key: Lanes, nonces: Lanes, length: int, rounds: int) -> Bytes:
    """The first `length` bytes of the stream of each nonce; key (8,), nonces (lanes, 6) words: one row a lane."""
    lanes = len(nonces)
    a = np.repeat(_CONSTANTS, lanes, 1)
    b, c = (np.repeat(key[part : part + 4].reshape(4, 1), lanes, 1) for part in (0, 4))
    d = np.ascontiguousarray(nonces[:, :4].T)
    first, _, _, last = _permute(a, b, c, d, rounds)
    blocks = -(-length // 64)
    wide = lanes * blocks
    start = np.empty((16, lanes, blocks), np.uint32)
    start[:4] = _CONSTANTS.reshape(4, 1, 1)
    start[4:8], start[8:12] = first[:, :, None], last[:, :, None]
    start[12], start[13] = np.arange(blocks, dtype=np.uint32), 0
    start[14:] = nonces[:, 4:6].T[:, :, None]
    flat = start.reshape(16, wide)
    rows = _permute(flat[:4].copy(), flat[4:8].copy(), flat[8:12].copy(), flat[12:].copy(), rounds)
    stream = np.concatenate(rows) + flat
    return np.ascontiguousarray(stream.T).view(np.uint8).reshape(lanes, blocks * 64)[:, :length]


def _poly1305(total: int, key: int, message: bytes) -> int:
    """Poly1305's sum, gone on with for whole blocks."""
    for at in range(0, len(message), 16):
        total = (total + int.from_bytes(message[at : at + 16], "little") + (1 << 128)) * key % _PRIME
    return total


class Adiantum:
    """A Mode."""

    iv_size = IV_SIZE

    def __init__(self, key: Key, rounds: int) -> None:
        self._rounds = rounds
        self._key = np.frombuffer(bytes(key), "<u4")
        nonce = np.zeros((1, 6), np.uint32)
        nonce[0, 0] = 1
        keys = xchacha(self._key, nonce, 32 + 16 + 16 + _NH_KEY, rounds).tobytes()
        self._aes: Block = make_block("aes", keys[:32])
        self._header_key = int.from_bytes(keys[32:48], "little") & _CLAMP
        self._poly_key = int.from_bytes(keys[48:64], "little") & _CLAMP
        words = np.frombuffer(keys[64:], "<u4")
        count = _UNIT // 16
        self._nh_keys = [words[4 * part : 4 * part + 4 * count].reshape(count, 4) for part in range(_PASSES)]

    def encrypt(self, ivs: Bytes, source: Bytes, target: Bytes) -> None:
        self._run(ivs, source, target, encrypt=True)

    def decrypt(self, ivs: Bytes, source: Bytes, target: Bytes) -> None:
        self._run(ivs, source, target, encrypt=False)

    def _run(self, ivs: Bytes, source: Bytes, target: Bytes, *, encrypt: bool) -> None:
        """The two ways differ in nothing but which side of AES is the nonce."""
        left = np.ascontiguousarray(source[:, :-_RIGHT])
        headers = [self._header(iv, left.shape[1]) for iv in ivs]
        entered = self._shift(source[:, -_RIGHT:], headers, self._hash(left), 1)
        room = np.empty(entered.size + SPARE, np.uint8)
        (self._aes.encrypt if encrypt else self._aes.decrypt)(entered, room)
        left_aes = room[: entered.size].reshape(entered.shape)
        nonces = np.zeros((len(source), 6), np.uint32)
        nonces[:, :4] = (left_aes if encrypt else entered).view(np.uint32)
        nonces[:, 4] = 1
        left ^= xchacha(self._key, nonces, left.shape[1], self._rounds)
        target[:, -_RIGHT:] = self._shift(left_aes, headers, self._hash(left), -1)
        target[:, :-_RIGHT] = left

    def _header(self, iv: Bytes, length: int) -> int:
        """The hash of the length and the tweak."""
        message = (8 * length).to_bytes(16, "little") + iv.tobytes()
        return _poly1305(0, self._header_key, message) & _128_BITS

    def _hash(self, left: Bytes) -> list[int]:
        """NHPoly1305 of each row."""
        sums = []
        for start in range(0, left.shape[1], _UNIT):
            words = np.ascontiguousarray(left[:, start : start + _UNIT]).view(np.uint32).reshape(len(left), -1, 4)
            passes = np.empty((len(left), _PASSES), np.uint64)
            for number, keys in enumerate(self._nh_keys):
                added = (words + keys[: words.shape[1]]).astype(np.uint64)
                products = added[:, :, 0] * added[:, :, 2] + added[:, :, 1] * added[:, :, 3]
                passes[:, number] = products.sum(1, dtype=np.uint64)
            sums.append(passes)
        hashes = np.concatenate(sums, 1)
        return [_poly1305(0, self._poly_key, row.tobytes()) & _128_BITS for row in hashes]

    @staticmethod
    def _shift(rights: Bytes, headers: list[int], hashes: list[int], sign: int) -> Bytes:
        """Adds both hashes to each right part, or takes them away."""
        moved = b"".join(
            (int.from_bytes(right.tobytes(), "little") + sign * (header + one) & _128_BITS).to_bytes(16, "little")
            for right, header, one in zip(rights, headers, hashes, strict=True)
        )
        return np.frombuffer(moved, np.uint8).reshape(-1, 16)

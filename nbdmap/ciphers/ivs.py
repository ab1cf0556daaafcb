"""IV generators: from sector numbers, all at once, to the IVs of dm-reference b.3.

A generator is a function of an array of 64-bit IV sector numbers that returns one row of IV bytes for each. eboiv and
those that look at the data as well (lmk, tcw, elephant) are in `vintage`.
"""

import hashlib
from collections.abc import Callable

import numpy as np

from nbdmap.ciphers.arrays import SPARE, Bytes, Key, Words
from nbdmap.ciphers.blocks import Block, make_block, mode_block_size
from nbdmap.ciphers.spec import HASHES, CipherSpec
from nbdmap.errors import InvalidArgument, NotFound

Ivs = Callable[[Words], Bytes]


def little_endian(numbers: Words, size: int) -> Bytes:
    """plain64: 64 bits, little-endian, zeroes behind; cut where an IV is shorter."""
    rows = np.zeros((len(numbers), max(size, 8) // 8), np.uint64)
    rows[:, 0] = numbers
    return rows.view(np.uint8)[:, :size]


def big_endian(numbers: Words, size: int) -> Bytes:
    """plain64be: zeroes, then 64 bits, big-endian; cut where an IV is shorter."""
    rows = np.zeros((len(numbers), max(size, 8) // 8), np.uint64)
    rows[:, -1] = numbers.byteswap()
    return rows.view(np.uint8)[:, :size]


def make_ivs(spec: CipherSpec, size: int, key: Key) -> Ivs:
    """The generator of `spec` for IVs of `size` bytes; `key` is that of the data."""
    if not size:
        return lambda numbers: np.empty((len(numbers), 0), np.uint8)
    mode = spec.iv_mode
    if mode == "plain":
        ivs: Ivs = lambda numbers: little_endian(numbers & np.uint64(0xFFFFFFFF), size)  # noqa: E731
    elif mode == "plain64be":
        ivs = lambda numbers: big_endian(numbers, size)  # noqa: E731
    elif mode == "benbi":
        shift = np.uint64(9 - (mode_block_size(spec).bit_length() - 1))
        ivs = lambda numbers: big_endian((numbers << shift) + np.uint64(1), size)  # noqa: E731
    elif mode == "null":
        ivs = lambda numbers: np.zeros((len(numbers), size), np.uint8)  # noqa: E731
    else:
        ivs = lambda numbers: little_endian(numbers, size)  # noqa: E731
    hash_name = spec.iv_options if mode == "essiv" else spec.essiv_hash
    return _encrypted(ivs, _essiv_block(spec, hash_name, key)) if hash_name else ivs


def _essiv_block(spec: CipherSpec, hash_name: str, key: Key) -> Block:
    """The cipher itself, with the hash of the key for its key."""
    if hash_name not in HASHES:
        raise NotFound(f"cipher {spec.text!r}: there is no hash {hash_name!r} (known: {', '.join(HASHES)})")
    try:
        digest = hashlib.new(hash_name if hash_name != "rmd160" else "ripemd160", key, usedforsecurity=False).digest()
    except ValueError:
        raise NotFound(f"cipher {spec.text!r}: this machine's OpenSSL has no hash {hash_name!r}") from None
    try:
        return make_block(spec.cipher, digest)
    except InvalidArgument:
        raise InvalidArgument(f"cipher {spec.text!r}: {hash_name} gives no key that {spec.cipher} can have") from None


def _encrypted(plain: Ivs, block: Block) -> Ivs:
    def ivs(numbers: Words) -> Bytes:
        rows = plain(numbers)
        room = np.empty(rows.size + SPARE, np.uint8)
        block.encrypt(rows, room)
        return room[: rows.size].reshape(rows.shape)

    return ivs

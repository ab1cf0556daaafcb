"""The splitter: what it splits it merges, every stripe counts, and the layout is that of the specification."""

import hashlib
import random

import pytest

from nbdmap.luks.af import merge, split
from nbdmap.luks.kdf import HASHES


@pytest.mark.parametrize("hash_name", HASHES)
@pytest.mark.parametrize("size", [1, 16, 32, 33, 64, 100])
def test_what_is_split_is_merged(hash_name: str, size: int) -> None:
    chance = random.Random(size)
    key = bytearray(chance.randbytes(size))
    material = split(key, 9, hash_name, chance.randbytes)
    assert len(material) == 9 * size
    assert merge(material, 9, hash_name) == key
    assert merge(split(key, 1, hash_name, chance.randbytes), 1, hash_name) == key


def test_every_stripe_counts() -> None:
    chance = random.Random(1)
    key = bytearray(chance.randbytes(64))
    material = split(key, 20, "sha256", chance.randbytes)
    for stripe in range(20):
        spoiled = bytearray(material)
        spoiled[stripe * 64 + chance.randrange(64)] ^= 1
        assert merge(spoiled, 20, "sha256") != key


def test_by_hand() -> None:
    """Two stripes of 40 bytes: the first is diffused in pieces of 32 and 8 bytes, numbered, and XORed to the second."""
    first, second = bytes(range(40)), bytes(range(100, 140))
    pieces = [hashlib.sha256(b"\0\0\0\0" + first[:32]).digest(), hashlib.sha256(b"\0\0\0\1" + first[32:]).digest()[:8]]
    wanted = bytes(a ^ b for a, b in zip(b"".join(pieces), second, strict=True))
    assert merge(bytearray(first + second), 2, "sha256") == wanted

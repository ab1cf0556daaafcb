"""nbdmap.ciphers.tweaks: both ways, beside the definition."""

import random

import numpy as np
import pytest

from nbdmap.ciphers.tweaks import COMPILED, Doubled, Shifted, Tweaks, make_tweaks

POLYNOMIAL = 0x87


def row(first: bytes, sector_size: int) -> bytes:
    """T, T times x, T times x^2, ..., in GF(2^128)."""
    value, tweaks = int.from_bytes(first, "little"), bytearray()
    for _ in range(sector_size // 16):
        tweaks += value.to_bytes(16, "little")
        value = (value << 1 & (1 << 128) - 1) ^ (value >> 127) * POLYNOMIAL
    return bytes(tweaks)


@pytest.mark.parametrize("kind", [Shifted, Doubled] if COMPILED else [Shifted])
@pytest.mark.parametrize("sector_size", [512, 1024, 4096])
def test_tweaks_are_powers_of_x(kind: type[Doubled | Shifted], sector_size: int) -> None:
    rng = random.Random(sector_size)
    tweaks: Tweaks = kind(4, sector_size)
    for count in (4, 1, 3):
        firsts = [rng.randbytes(16) for _ in range(count - 1)] + [b"\xff" * 16]
        rows = tweaks.expand(np.frombuffer(b"".join(firsts), np.uint8))
        assert [one.tobytes() for one in rows] == [row(first, sector_size) for first in firsts]


def test_what_is_compiled_doubles() -> None:
    assert isinstance(make_tweaks(8192, 512), Doubled if COMPILED else Shifted)

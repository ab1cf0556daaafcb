"""nbdmap.ciphers.xts: what it gives is what the other ways give, whichever the compiled build takes."""

import random

import pytest

from nbdmap.ciphers.blocks import make_block
from nbdmap.ciphers.cipher import SectorCipher
from nbdmap.ciphers.modes import PIECE
from nbdmap.ciphers.spec import CipherSpec
from nbdmap.ciphers.tweaks import COMPILED
from nbdmap.ciphers.xts import XtsPlain64
from tests.ciphers.test_tweaks import row

pytestmark = pytest.mark.skipif(not COMPILED, reason="words of 64 bits are the compiler's: make test-compiled")
KEY = bytes(range(64))


def by_hand(data: bytes, number: int, sector_size: int) -> bytes:
    """A sector, encrypted as IEEE 1619 says."""
    data_block, tweak_block = make_block("aes", KEY[:32]), make_block("aes", KEY[32:])
    room = bytearray(32)
    tweak_block.encrypt(number.to_bytes(16, "little"), room)
    tweaks = row(bytes(room[:16]), sector_size)
    mixed = bytes(a ^ b for a, b in zip(data, tweaks, strict=True))
    blocks = bytearray(sector_size + 16)
    data_block.encrypt(mixed, blocks)
    return bytes(a ^ b for a, b in zip(blocks, tweaks, strict=False))


@pytest.mark.parametrize(
    ("sector_size", "iv_offset", "large_sectors"),
    [
        (512, 0, False),
        (512, (1 << 64) - 8, False),
        (512, 1 << 63, False),
        (4096, 8, False),
        (4096, 8, True),
        (1024, (1 << 64) - 10, True),
    ],
)
def test_pieces_together(sector_size: int, iv_offset: int, large_sectors: bool) -> None:
    """Two sectors from number 8 on, and one at 1000."""
    step = sector_size // 512
    numbers = [(sector + iv_offset) % (1 << 64) // (step if large_sectors else 1) for sector in (8, 8 + step, 1000)]
    sources = [random.Random(1).randbytes(2 * sector_size), random.Random(2).randbytes(sector_size)]
    xts = XtsPlain64(KEY, sector_size, iv_offset=iv_offset, large_sectors=large_sectors)
    target = bytearray(3 * sector_size)
    xts.encrypt([8, 1000], sources, target)
    plain = b"".join(sources)
    for at, number in enumerate(numbers):
        span = slice(at * sector_size, (at + 1) * sector_size)
        assert target[span] == by_hand(plain[span], number, sector_size)
    again = bytearray(3 * sector_size)
    xts.decrypt([8, 1000], [target[: 2 * sector_size], target[2 * sector_size :]], again)
    assert again == plain


def test_in_place_and_a_whole_piece() -> None:
    plain = random.Random(3).randbytes(PIECE)
    data = bytearray(plain)
    xts = XtsPlain64(KEY, 512, iv_offset=0, large_sectors=False)
    xts.encrypt([0], [data], data)
    target = bytearray(PIECE)
    SectorCipher(CipherSpec.parse("aes-xts-plain64"), KEY).encrypt(0, plain, target)
    assert data == target
    xts.decrypt([0], [data], data)
    assert data == plain

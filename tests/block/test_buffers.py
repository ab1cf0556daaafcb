"""nbdmap.block.buffers: memory that is used again, and never twice at once."""

from nbdmap.block.buffers import HEADROOM, SMALLEST, Buffers
from nbdmap.units import KIB, MIB


def test_small_ones_are_not_kept() -> None:
    pool = Buffers()
    assert len(pool.take(SMALLEST - 1)) == SMALLEST - 1
    assert pool.kept == 0


def test_a_buffer_comes_back_when_nobody_has_it() -> None:
    pool = Buffers()
    first = pool.take(MIB + 28)
    first[:5] = b"first"
    second = pool.take(MIB + 28)
    assert bytes(second[:5]) != b"first"
    part = first[100:200]
    del first
    third = pool.take(MIB)
    assert bytes(third[:5]) != b"first"  # a part of it is still in use
    assert pool.kept == 3 * (MIB + HEADROOM)
    del part
    assert bytes(pool.take(MIB - 7)[:5]) == b"first"
    assert pool.kept == 3 * (MIB + HEADROOM)


def test_sizes_are_exact() -> None:
    pool = Buffers()
    for length in (SMALLEST, SMALLEST + HEADROOM, SMALLEST + HEADROOM + 1, MIB, 32 * MIB + 40):
        assert len(pool.take(length)) == length


def test_what_is_kept_is_bounded() -> None:
    pool = Buffers(most_kept=200 * KIB)
    taken = [pool.take(SMALLEST) for _ in range(10)]
    assert pool.kept == 2 * (SMALLEST + HEADROOM)
    assert len({id(view.obj) for view in taken}) == 10

import doctest

import pytest

from nbdmap import units
from nbdmap.errors import InvalidArgument
from nbdmap.units import GIB, KIB, MAX_SIZE, MIB, SECTOR, parse_size, round_down, round_up


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("2048s", 2048 * SECTOR),
        ("3K", 3 * KIB),
        ("3KiB", 3 * KIB),
        ("64MiB", 64 * MIB),
        ("64mib", 64 * MIB),
        (" 1 G ", GIB),
        ("2TiB", 2048 * GIB),
        ("1P", 1 << 50),
        ("7EiB", 7 << 60),
        (str(MAX_SIZE), MAX_SIZE),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5G", "1X", "1 KB", "0x10", "1G1", "1 2"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(InvalidArgument, match="is not a size") as caught:
        parse_size(text)
    assert repr(text) in caught.value.message


@pytest.mark.parametrize("text", ["8EiB", str(MAX_SIZE + 1), "99999999999999999999"])
def test_sizes_that_are_too_large(text: str) -> None:
    with pytest.raises(InvalidArgument, match=f"larger than {MAX_SIZE} bytes"):
        parse_size(text)


@pytest.mark.parametrize("value", [0, 1, 511, 512, 513, MAX_SIZE])
@pytest.mark.parametrize("step", [1, 3, 512, 4096])
def test_rounding(value: int, step: int) -> None:
    down, up = round_down(value, step), round_up(value, step)
    assert down % step == up % step == 0
    assert value - step < down <= value <= up < value + step


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(units).failed == 0

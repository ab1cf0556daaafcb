"""nbdmap.dm.args: words, numbers, groups."""

import pytest

from nbdmap.dm.args import Args, parse_number, split_words
from nbdmap.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \t\n\v\f\r", []),
        ("a", ["a"]),
        ("  7:0\t8 ", ["7:0", "8"]),
        (r"my\ disk.img 0", ["my disk.img", "0"]),
        (r"\ ", [" "]),
        (r"a\\b", ["a\\b"]),
        ("tail\\", ["tail\\"]),
        ('"no quotes"', ['"no', 'quotes"']),
    ],
)
def test_split(text: str, words: list[str]) -> None:
    assert split_words(text) == words


@pytest.mark.parametrize("word", ["", "-1", "+1", "0x10", "8k", "1.0", " 1", "１", "1_0"])
def test_what_is_no_number(word: str) -> None:
    with pytest.raises(InvalidArgument, match=r"chunk: .* is not a decimal number"):
        parse_number(word, "chunk")


@pytest.mark.parametrize("word", ["0", "9", "18446744073709551616", "1" + "0" * 5000])
def test_numbers_out_of_range(word: str) -> None:
    with pytest.raises(InvalidArgument, match=r"chunk: .* is not in the range 1 to 8"):
        parse_number(word, "chunk", 1, 8)


def test_numbers() -> None:
    assert parse_number("0", "x") == 0
    assert parse_number("007", "x") == 7
    assert parse_number("18446744073709551615", "x") == (1 << 64) - 1


def test_words_in_order() -> None:
    args = Args(["a", "5"])
    assert len(args) == 2
    assert args.word("first") == "a"
    assert args.number("second", 5, 5) == 5
    args.end()
    with pytest.raises(InvalidArgument, match="third is missing"):
        args.word("third")


def test_words_that_are_too_many() -> None:
    with pytest.raises(InvalidArgument, match="unexpected word 'x'"):
        Args(["x"]).end()


def test_groups() -> None:
    assert len(Args([]).group("features", 3)) == 0
    args = Args(["2", "a", "b", "c"])
    group = args.group("features", 3)
    assert [group.word("feature"), group.word("feature")] == ["a", "b"]
    group.end()
    assert args.word("rest") == "c"
    with pytest.raises(InvalidArgument, match="number of features: 3 announced, 1 given"):
        Args(["3", "a"]).group("features", 3)
    with pytest.raises(InvalidArgument, match="number of features: 4 is not in the range"):
        Args(["4", "a", "b", "c", "d"]).group("features", 3)

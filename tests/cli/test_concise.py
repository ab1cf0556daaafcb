"""The concise form, in and out again."""

import pytest
from hypothesis import given
from hypothesis import strategies as some

from nbdmap.cli.concise import ConciseDevice, parse_concise
from nbdmap.cli.errors import CommandFailed
from nbdmap.cli.render import concise


def test_the_parts_of_a_device() -> None:
    text = "a,,,,0 8 zero;\n b, UUID-b,7,  ro,0 8 zero,8 8 error;g\\,h,,,rw,0 8 linear /x\\\\ y 0;"
    assert list(parse_concise(text)) == [
        ConciseDevice("a", "", None, False, "0 8 zero"),
        ConciseDevice("b", "UUID-b", 7, True, "0 8 zero\n8 8 error"),
        ConciseDevice("g,h", "", None, False, "0 8 linear /x\\ y 0"),
    ]
    assert list(parse_concise("")) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a,,,rw", "Five comma-separated fields are required for each device, 4 are given: a,,,rw"),
        ("a;", "Five comma-separated fields"), ("a,,,xx,0 8 zero", "Invalid flags parameter 'xx'"),
        ("a,,x,,0 8 zero", "Invalid minor number 'x' of a"), ("a,,,,0 8 zero\\", "Backslash must be followed"),
    ],
)  # fmt: skip
def test_mistakes(text: str, complaint: str) -> None:
    with pytest.raises(CommandFailed) as caught:
        list(parse_concise(text))
    assert complaint in caught.value.line


def test_what_stands_before_a_mistake_is_found() -> None:
    devices = parse_concise("a,,,,0 8 zero;bad")
    assert next(devices).name == "a"
    with pytest.raises(CommandFailed):
        next(devices)


@given(some.lists(some.tuples(some.text("ab,;\\", min_size=1), some.text("ab,;\\"), some.integers(0, 99), some.booleans())))
def test_what_is_printed_is_read_again(devices: list[tuple[str, str, int, bool]]) -> None:
    line = {"start": 0, "length": 8, "target": "linear", "params": "a\\,b;c 0"}
    printed = concise(
        {"name": name, "uuid": uuid, "minor": minor, "read_only": read_only, "lines": [line]}
        for name, uuid, minor, read_only in devices
    )
    assert [(one.name, one.uuid, one.minor, one.read_only) for one in parse_concise(printed)] == devices
    assert all(one.table.rstrip() == "0 8 linear a\\,b;c 0" for one in parse_concise(printed))

"""Conditions of -S."""

import pytest
from hypothesis import given
from hypothesis import strategies as some

from nbdmap.cli.errors import UsageError
from nbdmap.cli.fields import INFO_FIELDS
from nbdmap.cli.report import find_field
from nbdmap.cli.selection import MAX_DEPTH, Selection, parse_selection

ROW: dict[str, str | int] = {"name": "lin", "uuid": "LVM-1", "open": 2, "segments": 1, "attr": "L--w"}


def parse(text: str) -> Selection:
    return parse_selection(text, lambda name: find_field(INFO_FIELDS, name))


@pytest.mark.parametrize(
    ("text", "selected"),
    [
        ("name=lin", True), ("name=li", False), ("name!=li", True), ("name = lin", True), ("NAME='lin'", True),
        ('name="lin x"', False), ("name=~^l", True), ("name!~n$", False), ("name=~(l.n)", True), ("open>1", True),
        ("open>=2", True), ("open<2", False), ("open<=2", True), ("open=2", True), ("open!=2", False),
        ("open>0 && segments=1", True), ("open>0,segments=2", False), ("open=0 || segments=1", True),
        ("open=0#segments=0", False), ("!(open=0)", True), ("!(open=0 || name=lin)", False),
        ("(open=0 || name=lin) && uuid=~^LVM", True), ("open=0 && name=lin || segments=1", True), ("all", True), ("", True),
        ("attr=L--w", True),
    ],
)  # fmt: skip
def test_conditions(text: str, selected: bool) -> None:
    selection = parse(text)
    assert selection.matches(ROW) is selected
    assert {one.id for one in selection.fields()} <= set(ROW)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("bad=1", "Unrecognised selection field: bad"), ("name", "Unrecognised comparison operator"),
        ("name lin", "Unrecognised comparison operator: lin"), ("name>1", "only with number fields"),
        ("open=x", "Failed to parse numeric value"), ("open=~1", "incompatible comparison type"),
        ("name='lin", "Missing end quote"), ("name=~'('", "failed to create regex"), ("name=a b=c", "a logical operator"),
        ("(name=a", "right parenthesis expected"), ("!name=a", "left parenthesis expected"), ("&& name=a", "a field name"),
        ("name=a &&", "a field name"), ("(" * (MAX_DEPTH + 1) + "name=a", "parentheses in one another"),
    ],
)  # fmt: skip
def test_mistakes(text: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert complaint in caught.value.line


@given(some.text(some.sampled_from("name=open lin()&&||!~'\"<>1,#"), max_size=40))
def test_any_text_is_a_condition_or_a_mistake(text: str) -> None:
    try:
        selection = parse(text)
    except UsageError:
        return
    assert selection.matches({**ROW, **{one.id: 0 if one.number else "" for one in INFO_FIELDS}}) in (True, False)

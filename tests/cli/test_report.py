"""Reports in columns, beyond what the transcripts show."""

import pytest

from nbdmap.cli.errors import UsageError
from nbdmap.cli.report import Field, Report, Style, choose, report_for, sort_keys

FIELDS = (
    Field("name", "Name", 6, False, "one", "A name.", lambda row: row[0]),
    Field("some_count", "#N", 3, True, "one", "A number.", lambda row: row[1]),
    Field("long", "LongHeading", 4, False, "two", "Its heading does not fit.", lambda row: row[0].upper()),
)
ROWS = (("b", 2), ("ä", 10), ("aaaaaaaa", 1))


def text(options: dict[str, str | None], selection: str | None = None) -> str:
    report = report_for(FIELDS, "name,some_count", options, selection)
    for row in ROWS:
        report.add(row)
    return report.text()


def test_columns_are_as_wide_as_their_widest_value_in_bytes() -> None:
    lines = text({}).splitlines()
    assert [len(line.encode()) for line in lines] == [12, 12, 12, 12]
    assert lines[0] == "Name     #N "


def test_a_heading_is_cut_to_its_column() -> None:
    report = Report([FIELDS[2]])
    report.add(("x", 0))
    assert report.text() == "Long\nX   \n"
    report = Report([FIELDS[2]], Style(aligned=False))
    report.add(("x", 0))
    assert report.text() == "LongHeading\nX\n"


@pytest.mark.parametrize(
    ("sort", "names"),
    [
        ("name", ["aaaaaaaa", "b", "ä"]), ("-name", ["ä", "b", "aaaaaaaa"]), ("some_count", ["aaaaaaaa", "b", "ä"]),
        ("-somecount,name", ["ä", "b", "aaaaaaaa"]), ("+long", ["aaaaaaaa", "b", "ä"]),
    ],
)  # fmt: skip
def test_rows_are_sorted(sort: str, names: list[str]) -> None:
    assert text({"sort": sort, "noheadings": None, "options": "name"}).splitlines() == names


def test_fields_are_found_without_case_and_underscores_and_by_section() -> None:
    assert [one.id for one in choose(FIELDS, "NAME,someCount,,long")] == ["name", "some_count", "long"]
    assert [one.id for one in choose(FIELDS, "one_all")] == ["name", "some_count"]
    assert len(choose(FIELDS, "all")) == 3
    with pytest.raises(UsageError, match="Unrecognised field: nosuch"):
        choose(FIELDS, "name,nosuch")
    with pytest.raises(UsageError, match="Unrecognised field: nosuch"):
        sort_keys(FIELDS, "-nosuch")


def test_the_options_add_to_the_default_and_shape_it() -> None:
    assert text({"options": "+long", "noheadings": None}).splitlines()[0] == "b:2:B"
    assert text({"separator": ", "}).splitlines()[:2] == ["Name, #N", "b, 2"]
    assert text({"nameprefixes": None, "noheadings": None}).splitlines()[0] == "DM_NAME='b':DM_SOME_COUNT='2'"
    assert text({"nameprefixes": None, "unquoted": None}).splitlines()[1] == "DM_NAME=b DM_SOME_COUNT=2"
    assert text({"rows": None}) == "Name b ä aaaaaaaa\n#N 2 10 1\n"


def test_selection_leaves_rows_out_or_marks_them() -> None:
    assert text({"noheadings": None}, "somecount>1").splitlines() == ["b:2", "ä:10"]
    assert text({"noheadings": None, "options": "name,selected"}, "name=b").splitlines() == ["b:1", "ä:0", "aaaaaaaa:0"]
    assert text({}, "name=none") == ""

"""Columns: fields, sort keys, headings, and the text of a report, as libdevmapper's dm_report makes it.

    Name             Maj Min Stat Open Targ Event  UUID
    lin              254   0 L--w    0    1      0 UUID-lin

Rules: a column is as wide as its initial width or its widest value, in bytes; numbers stand right. Without headings, and
without another separator, values are separated by ":". Field names are compared without case and underscores.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from nbdmap.cli.errors import UsageError
from nbdmap.cli.selection import Everything, Selection, parse_selection

Value = str | int


class Field(NamedTuple):
    """A column that can be had: `section` names the group it is of (name_all is all of them)."""

    id: str
    heading: str
    width: int
    number: bool
    section: str
    description: str
    value: Callable[[Any], Value]


class Style(NamedTuple):
    """How a report is laid out."""

    headings: bool = True
    aligned: bool = True
    separator: str = " "
    prefixes: bool = False
    quoted: bool = True
    rows: bool = False


_PLAIN: Final = Style()
_EVERYTHING: Final = Everything()
SELECTED: Final = Field("selected", "Selected", 8, True, "special", "Set if item passes selection criteria.", lambda row: 1)


def canonical(name: str) -> str:
    """What two spellings of one field name have in common."""
    return name.replace("_", "").lower()


def find_field(fields: Sequence[Field], name: str) -> Field | None:
    """The field called `name`."""
    wanted = canonical(name)
    return next((one for one in (SELECTED, *fields) if canonical(one.id) == wanted), None)


def choose(fields: Sequence[Field], words: str) -> list[Field]:
    """The columns for -o. Raises UsageError."""
    chosen: list[Field] = []
    for word in filter(None, words.split(",")):
        if found := find_field(fields, word):
            chosen.append(found)
            continue
        several = [one for one in fields if canonical(word) in ("all", f"{one.section}all")]
        if not several:
            raise UsageError(f"Unrecognised field: {word} (-o help lists them)")
        chosen += several
    return chosen


def sort_keys(fields: Sequence[Field], words: str) -> list[tuple[Field, bool]]:
    """(field, whether it is descending) for -O. Raises UsageError."""
    keys: dict[str, tuple[Field, bool]] = {}
    for word in filter(None, words.split(",")):
        found = find_field(fields, word.lstrip("+-") if word[0] in "+-" else word)
        if found is None:
            raise UsageError(f"Unrecognised field: {word.lstrip('+-')} (-o help lists them)")
        keys.setdefault(found.id, (found, word[0] == "-"))
    return list(keys.values())


class Report:
    """Rows being gathered, then their text."""

    def __init__(
        self, columns: Sequence[Field], style: Style = _PLAIN, keys: Sequence[tuple[Field, bool]] = (),
        selection: Selection = _EVERYTHING,
    ) -> None:  # fmt: skip
        self.columns = columns
        self.style = style
        self.keys = keys
        self.selection = selection
        self._rows: list[Mapping[str, Value]] = []

    def add(self, item: object) -> bool:
        """Adds a row unless the selection leaves it out; says whether the selection takes it."""
        used = {one.id: one for one in (*self.columns, *(key for key, _ in self.keys), *self.selection.fields())}
        row = {name: one.value(item) for name, one in used.items()}
        selected = self.selection.matches(row)
        shown = SELECTED in self.columns
        if shown:
            row[SELECTED.id] = int(selected)
        if selected or shown:
            self._rows.append(row)
        return selected

    def text(self) -> str:
        """The report; nothing when it has no rows."""
        if not self._rows:
            return ""
        rows = list(self._rows)
        for key, descending in reversed(self.keys):
            rows.sort(key=lambda row: _sort_value(row[key.id]), reverse=descending)
        lines = self._as_rows(rows) if self.style.rows else self._as_columns(rows)
        return "".join(f"{line}\n" for line in lines)

    def _as_columns(self, rows: Sequence[Mapping[str, Value]]) -> Iterable[str]:
        aligned = self.style.aligned
        widths = {
            one.id: max(one.width, *(_length(str(row[one.id])) for row in rows)) if aligned else 0 for one in self.columns
        }
        if self.style.headings:
            yield self.style.separator.join(
                one.heading[: widths[one.id]].ljust(widths[one.id]) if aligned else one.heading for one in self.columns
            )
        for row in rows:
            yield self.style.separator.join(self._cell(one, row, widths[one.id]) for one in self.columns)

    def _as_rows(self, rows: Sequence[Mapping[str, Value]]) -> Iterable[str]:
        for one in self.columns:
            heading = [one.heading] if self.style.headings else []
            yield self.style.separator.join([*heading, *(self._cell(one, row, 0) for row in rows)])

    def _cell(self, column: Field, row: Mapping[str, Value], width: int) -> str:
        text = str(row[column.id])
        if self.style.prefixes:
            quote = "'" if self.style.quoted else ""
            return f"DM_{column.id.upper()}={quote}{text}{quote}"
        padding = " " * (width - _length(text))
        return padding + text if column.number else text + padding


def _length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogateescape"))


def _sort_value(value: Value) -> bytes | int:
    return value.encode(errors="surrogateescape") if isinstance(value, str) else value


def report_for(
    fields: Sequence[Field], default: str, options: Mapping[str, str | None], selection: str | None = None
) -> Report:
    """An empty report as the options of the command line say (noheadings, o, O, separator, nameprefixes, unquoted, rows)."""
    chosen = options.get("options")
    words = default if not chosen else f"{default},{chosen[1:]}" if chosen.startswith("+") else chosen
    headings = "noheadings" not in options
    prefixes, rows = "nameprefixes" in options, "rows" in options
    separator = options.get("separator")
    style = Style(
        headings=headings,
        aligned=headings and not prefixes and not rows and separator is None,
        separator=separator if separator is not None else " " if headings else ":",
        prefixes=prefixes,
        quoted="unquoted" not in options,
        rows=rows,
    )
    keys = sort_keys(fields, options.get("sort") or "")
    chosen_rows: Selection = parse_selection(selection, lambda name: find_field(fields, name)) if selection else Everything()
    return Report(choose(fields, words), style, keys, chosen_rows)

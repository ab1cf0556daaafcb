"""The selection of -S: `name=lin`, `open>0 && segments=1`, `!(uuid=~^LVM)`.

Terms are a field, an operator (= != > >= < <= =~ !~) and a value, which may be quoted; they are joined by && or "," and by
|| or "#", and grouped by parentheses. Numbers are compared as numbers, text is compared whole, =~ looks for a regular
expression anywhere in the text.
"""

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

from nbdmap.cli.errors import UsageError

MAX_DEPTH: Final = 50
"""Parentheses in parentheses."""


class Column(Protocol):
    """What a selection needs to know of a field."""

    @property
    def id(self) -> str: ...

    @property
    def number(self) -> bool: ...


Row = Mapping[str, str | int]


class Selection(Protocol):
    """A condition on a row."""

    def matches(self, row: Row) -> bool:
        """Whether the row is selected."""
        ...

    def fields(self) -> Iterator[Any]:
        """The fields whose values it needs."""
        ...


class Everything:
    """No condition."""

    def matches(self, row: Row) -> bool:
        return True

    def fields(self) -> Iterator[Any]:
        return iter(())


class Term:
    """One comparison."""

    def __init__(self, field: Any, test: Callable[[Any], bool]) -> None:
        self.field = field
        self.test = test

    def matches(self, row: Row) -> bool:
        return self.test(row[self.field.id])

    def fields(self) -> Iterator[Any]:
        yield self.field


class Joined:
    """All, or any, of several."""

    def __init__(self, parts: Sequence[Selection], combine: Callable[[Iterator[bool]], bool]) -> None:
        self.parts = parts
        self.combine = combine

    def matches(self, row: Row) -> bool:
        return self.combine(part.matches(row) for part in self.parts)

    def fields(self) -> Iterator[Any]:
        for part in self.parts:
            yield from part.fields()


class Not:
    """The opposite."""

    def __init__(self, part: Selection) -> None:
        self.part = part

    def matches(self, row: Row) -> bool:
        return not self.part.matches(row)

    def fields(self) -> Iterator[Any]:
        return self.part.fields()


_OPERATORS: Final = ("=~", "!~", "=", "!=", ">=", ">", "<=", "<")
_COMPARE: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "=": operator.eq, "!=": operator.ne, ">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt,
}  # fmt: skip
_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
_NUMBER: Final = re.compile(r"[0-9]+")
_BARE: Final = re.compile(r"(?:(?!&&|,|\|\||#|\)| ).)*", re.DOTALL)
_CLOSING: Final = {"(": ")", "{": "}", "[": "]", '"': '"', "'": "'"}


def parse_selection(text: str, find: Callable[[str], Column | None]) -> Selection:
    """The condition that `text` says; `find` knows the fields. Raises UsageError."""
    if text.lower() == "all" or not text:
        return Everything()
    parser = _Parser(text, find)
    parsed = parser.any_of(0)
    if parser.rest():
        raise UsageError(f"Selection syntax error at '{parser.rest()}': a logical operator is expected")
    return parsed


class _Parser:
    def __init__(self, text: str, find: Callable[[str], Column | None]) -> None:
        self._text = text
        self._at = 0
        self._find = find

    def rest(self) -> str:
        """What is not read yet, without blanks before it."""
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1
        return self._text[self._at :]

    def _take(self, *words: str) -> str:
        rest = self.rest()
        word = next((word for word in words if rest.startswith(word)), "")
        self._at += len(word)
        return word

    def any_of(self, depth: int) -> Selection:
        parts = [self._all_of(depth)]
        while self._take("||", "#"):
            parts.append(self._all_of(depth))
        return Joined(parts, any) if len(parts) > 1 else parts[0]

    def _all_of(self, depth: int) -> Selection:
        parts = [self._one(depth)]
        while self._take("&&", ","):
            parts.append(self._one(depth))
        return Joined(parts, all) if len(parts) > 1 else parts[0]

    def _one(self, depth: int) -> Selection:
        negated = self._take("!")
        if not self._take("("):
            if negated:
                raise UsageError(f"Syntax error: left parenthesis expected at '{self.rest()}'")
            return self._term()
        if depth == MAX_DEPTH:
            raise UsageError(f"more than {MAX_DEPTH} parentheses in one another in a selection")
        inner = self.any_of(depth + 1)
        if not self._take(")"):
            raise UsageError(f"Syntax error: right parenthesis expected at '{self.rest()}'")
        return Not(inner) if negated else inner

    def _term(self) -> Selection:
        start = self.rest()
        match = _NAME.match(start)
        if match is None:
            raise UsageError(f"Selection syntax error at '{start}': a field name is expected")
        field = self._find(match[0])
        if field is None:
            raise UsageError(f"Unrecognised selection field: {match[0]} (-S help lists them)")
        self._at += match.end()
        sign = self._take(*_OPERATORS)
        if not sign:
            raise UsageError(f"Unrecognised comparison operator: {self.rest()}")
        if sign in ("=~", "!~"):
            return Term(field, self._pattern(field, sign))
        if not field.number and sign not in ("=", "!="):
            raise UsageError(f"Operator can be used only with number fields: {match[0]}{sign}")
        compare = _COMPARE[sign]
        wanted = self._number(field) if field.number else self._word('"', "'")
        return Term(field, lambda value: compare(value, wanted))

    def _number(self, field: Column) -> int:
        match = _NUMBER.match(self.rest())
        if match is None or len(match[0]) > 20:
            raise UsageError(f"Failed to parse numeric value for selection field {field.id}.")
        self._at += match.end()
        return int(match[0])

    def _pattern(self, field: Column, sign: str) -> Callable[[Any], bool]:
        if field.number:
            raise UsageError(f"incompatible comparison type for selection field {field.id}")
        text = self._word(*_CLOSING)
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise UsageError(f"failed to create regex matcher for selection field {field.id}: {error}") from None
        if sign == "!~":
            return lambda value: pattern.search(value) is None
        return lambda value: pattern.search(value) is not None

    def _word(self, *quotes: str) -> str:
        rest = self.rest()
        if rest and rest[0] in quotes:
            text, closing, _ = rest[1:].partition(_CLOSING[rest[0]])
            if not closing:
                raise UsageError("Missing end quote.")
            self._at += len(text) + 2
            return text
        match = _BARE.match(rest)
        assert match is not None  # it matches nothing, too
        self._at += match.end()
        return match[0]

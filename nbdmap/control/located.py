"""YAML read so that every value knows its line and column, and means what it says.

    disks:
      sda: {file: /srv/a.img, number: 8:0}

Built from libyaml's events, not by `yaml.compose`: that one takes the last of two equal keys without a word and runs out of
stack on deep nesting. Plain words are true, false, null or decimal numbers where they look like it (yes, no, on and off
are booleans, too); everything else is text, so `8:0` and `017` stay as they are written. Keys are always text.

Limits: MAX_BYTES, MAX_DEPTH, and MAX_NODES counted with every alias written out.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import yaml

from nbdmap.units import MIB

MAX_BYTES: Final = 8 * MIB
MAX_DEPTH: Final = 32
MAX_NODES: Final = 500_000

_CONSTANTS: Final = {
    "true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "null": None, "~": None, "": None,
}  # fmt: skip
_DECIMAL: Final = re.compile(r"-?(0|[1-9][0-9]{0,18})")
_TEXT_TAGS: Final = ("!", "tag:yaml.org,2002:str")


class Place(NamedTuple):
    """Line and column, from 1."""

    line: int
    column: int


class Problem(NamedTuple):
    """Something that is wrong at a place."""

    place: Place
    text: str


class Unreadable(Exception):
    """The text is not the YAML that is understood here; `problems` says what is wrong, once or more."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems[0].text)
        self.problems = problems


@dataclass(slots=True)
class Node:
    """One value. `content` is a dict or list of Nodes, or text, a number, a boolean or None."""

    place: Place
    content: Any
    is_block: bool = False
    """A literal block (`|`): its text begins on the line below."""
    keys: dict[str, Place] = field(default_factory=dict)
    """Where each key of a mapping stands."""
    count: int = 1
    """Nodes in it, aliases written out."""

    def plain(self) -> Any:
        """The value as plain Python data."""
        if isinstance(self.content, dict):
            return {key: node.plain() for key, node in self.content.items()}
        if isinstance(self.content, list):
            return [node.plain() for node in self.content]
        return self.content

    def at(self, path: tuple[int | str, ...]) -> "Node | None":
        """The node at a path of keys and indexes."""
        node: Node | None = self
        for step in path:
            content = node.content if node else None
            if isinstance(content, dict):
                node = content.get(step)
            elif isinstance(content, list) and isinstance(step, int) and step < len(content):
                node = content[step]
            else:
                return None
        return node

    def place_of(self, path: tuple[int | str, ...], *, key: bool = False) -> Place:
        """Where the value at `path` stands, or with `key` its key; for what is not there, what surrounds it."""
        node, place = self, self.place
        for step in path:
            content = node.content
            if isinstance(content, dict) and step in content:
                place = node.keys[str(step)]
                node = content[step]
            elif isinstance(content, list) and isinstance(step, int) and step < len(content):
                node = content[step]
                place = node.place
            else:
                return place
        return place if key or not path or isinstance(node.content, (dict, list)) else node.place


def read_yaml(raw: bytes) -> Node:
    """The one document of a file; an empty one is an empty mapping. Raises Unreadable."""
    if len(raw) > MAX_BYTES:
        raise Unreadable([Problem(Place(1, 1), f"the file has {len(raw)} bytes, at most {MAX_BYTES} are read")])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = _place_at(raw[: error.start].decode(errors="replace"))
        raise Unreadable([Problem(place, f"byte {raw[error.start]:#04x} is not UTF-8")]) from None
    try:
        return _Builder(text).document()
    except yaml.reader.ReaderError as error:
        reason = f"character {error.character:#x}: {error.reason}"
        raise Unreadable([Problem(_place_at(text[: error.position]), reason)]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise Unreadable([Problem(_place(mark), reason)]) from None


def _place(mark: Any) -> Place:
    return Place(mark.line + 1, mark.column + 1) if mark else Place(1, 1)


def _place_at(before: str) -> Place:
    """The place behind a piece of text."""
    return Place(before.count("\n") + 1, len(before) - before.rfind("\n"))


class _Builder:
    """Makes nodes of events."""

    def __init__(self, text: str) -> None:
        self._events = iter(yaml.parse(text, Loader=yaml.CSafeLoader))
        self._anchors: dict[str, Node] = {}
        self._problems: list[Problem] = []

    def document(self) -> Node:
        root = Node(Place(1, 1), {})
        documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._failure(event, "a second document: only one is read")
                root = self._node(next(self._events), ())
        if root.content is None:
            root = Node(root.place, {})
        if self._problems:
            raise Unreadable(self._problems)
        return root

    def _failure(self, event: yaml.Event, text: str) -> Unreadable:
        return Unreadable([*self._problems, Problem(_place(event.start_mark), text)])

    def _node(self, event: Any, path: tuple[str, ...]) -> Node:
        if len(path) > MAX_DEPTH:
            raise self._failure(event, f"more than {MAX_DEPTH} levels")
        if isinstance(event, yaml.AliasEvent):
            known = self._anchors.get(event.anchor or "")
            if known is None:
                raise self._failure(event, f"*{event.anchor} is not defined before, or stands inside itself")
            return known
        place = _place(event.start_mark)
        if isinstance(event, yaml.ScalarEvent):
            node = Node(place, self._scalar(event), is_block=event.style == "|")
        elif isinstance(event, yaml.SequenceStartEvent):
            self._check_tag(event, "seq")
            node = self._sequence(place, path)
        else:
            self._check_tag(event, "map")
            node = self._mapping(place, path)
        if node.count > MAX_NODES:
            raise self._failure(event, f"more than {MAX_NODES} values, with aliases written out")
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _check_tag(self, event: Any, kind: str) -> None:
        if event.tag not in (None, "!", f"tag:yaml.org,2002:{kind}"):
            self._problems.append(Problem(_place(event.start_mark), f"the tag {event.tag!r} is not understood"))

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        value: str = event.value
        if event.tag is not None and event.tag not in _TEXT_TAGS:
            self._check_tag(event, "str")
        if event.tag is not None or event.style:
            return value
        if value.lower() in _CONSTANTS:
            return _CONSTANTS[value.lower()]
        return int(value) if _DECIMAL.fullmatch(value) else value

    def _sequence(self, place: Place, path: tuple[str, ...]) -> Node:
        node = Node(place, [])
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            child = self._node(event, (*path, str(len(node.content))))
            node.content.append(child)
            node.count += child.count
            if node.count > MAX_NODES:
                break
        return node

    def _mapping(self, place: Place, path: tuple[str, ...]) -> Node:
        node = Node(place, {})
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise self._failure(event, "a key is one word")
            key, where = event.value, _place(event.start_mark)
            child = self._node(next(self._events), (*path, key))
            if key in node.keys:
                first = node.keys[key]
                self._problems.append(Problem(where, f"{'.'.join((*path, key))}: duplicate key (first at line {first.line})"))
            else:
                node.content[key], node.keys[key] = child, where
            node.count += child.count
            if node.count > MAX_NODES:
                break
        return node

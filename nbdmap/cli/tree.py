"""Who stands on whom, and `ls --tree`.

    Mid (254:2)
     |- (7:3)
     `-zeta (254:0)
        `- (7:0)

The order is dmsetup's: devices by name, and below each what it stands on, last opened first. A device that stands below
another is not shown at the top.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from nbdmap.cli.errors import UsageError
from nbdmap.cli.names import kernel_name

Info = Mapping[str, Any]
MAX_DEPTH: Final = 98
"""Deeper nodes are left out, as in dmsetup."""


class Node:
    """A device: `info` is None for one that is not mapped."""

    def __init__(self, number: str, name: str, blkdevname: str, info: Info | None) -> None:
        self.number = number
        self.name = name
        self.blkdevname = blkdevname
        self.info = info
        self.uses: list[Node] = []
        self.used_by: list[Node] = []


class Forest:
    """All devices with their links; `roots` has those that nobody stands on, `leaves` those that stand on nothing."""

    def __init__(self, infos: Sequence[Info]) -> None:
        self.nodes: dict[str, Node] = {}
        self.roots: dict[Node, None] = {}
        self.leaves: list[Node] = []
        self._infos = {f"{info['major']}:{info['minor']}": info for info in infos}
        for number in self._infos:
            node = self._add(number, "")
            if not node.used_by:
                self.roots[node] = None

    def _add(self, number: str, disk: str) -> Node:
        if node := self.nodes.get(number):
            return node
        info = self._infos.get(number)
        node = Node(number, info["name"], blkdevname(info), info) if info else Node(number, "", kernel_name(disk), None)
        self.nodes[number] = node
        below = info["dependencies"] if info is not None else []
        if not below:
            self.leaves.append(node)
        for one in below:
            child = self._add(f"{one['major']}:{one['minor']}", one["name"])
            self.roots.pop(child, None)
            if child not in node.uses:
                node.uses.append(child)
                child.used_by.append(node)
        return node


def blkdevname(info: Info) -> str:
    """What Linux calls the device in /sys/block; "" before its first table."""
    return f"dm-{info['minor']}" if info["loaded"] else ""


class Symbols(NamedTuple):
    """What the lines are drawn with."""

    empty: str
    branch: str
    vertical: str
    last: str
    single: str
    first: str


ASCII: Final = Symbols("  ", "|-", "| ", "`-", "---", "-+-")
UTF: Final = Symbols("  ", "├─", "│ ", "└─", "───", "─┬─")
_BEGIN, _END = "\033(0\017", "\033(B"
VT100: Final = Symbols(
    "  ", f"{_BEGIN}tq{_END}", f"{_BEGIN}x{_END} ", f"{_BEGIN}mq{_END}", f"{_BEGIN}qqq{_END}", f"{_BEGIN}qwq{_END}"
)
_SYMBOLS: Final = {"ascii": ASCII, "utf": UTF, "vt100": VT100}
_SWITCHES: Final = {
    "device": ("device", True), "blkdevname": ("blkdevname", True), "nodevice": ("device", False),
    "status": ("targets", True), "table": ("targets", True), "active": ("active", True), "open": ("open", True),
    "uuid": ("uuid", True), "rw": ("rw", True), "inverted": ("inverted", True), "compact": ("compact", True),
    "notrunc": ("truncate", False),
}  # fmt: skip
_ORDER: Final = ("device", "blkdevname", "nodevice", "status", "table", "active", "open", "uuid", "rw",
                 "utf", "vt100", "ascii", "inverted", "compact", "notrunc")  # fmt: skip


class TreeStyle(NamedTuple):
    """What `ls --tree -o` says. `width` is the widest line, beyond which "..." stands."""

    symbols: Symbols = ASCII
    width: int = 80
    device: bool = True
    blkdevname: bool = False
    targets: bool = False
    active: bool = False
    rw: bool = False
    open: bool = False
    uuid: bool = False
    compact: bool = False
    inverted: bool = False
    truncate: bool = True

    @property
    def attributes(self) -> bool:
        """Whether nodes have a part in brackets."""
        return self.active or self.rw or self.open or self.uuid

    @property
    def one_line(self) -> bool:
        """Whether a child follows its parent on the same line."""
        return self.compact and not self.attributes and not self.targets


def tree_style(options: str | None, *, utf: bool, width: int) -> TreeStyle:
    """The style for the words of -o, each of which may be abbreviated. Raises UsageError."""
    symbols = UTF if utf else ASCII
    switches: dict[str, bool] = {}
    for word in options.split(",") if options else []:
        name = next((one for one in _ORDER if one.startswith(word)), None)
        if name is None:
            raise UsageError(f"Tree options not recognised: {word}.")
        if name in _SYMBOLS:
            symbols = _SYMBOLS[name]
        else:
            switch, value = _SWITCHES[name]
            switches[switch] = value
    return TreeStyle(symbols, width, **switches)


def draw(infos: Sequence[Info], style: TreeStyle) -> str:
    """The whole output of `ls --tree`."""
    return "".join(f"{line}\n" for line in _Drawing(style).lines(Forest(infos)))


class _Drawing:
    def __init__(self, style: TreeStyle) -> None:
        self._style = style
        self._lines: list[str] = []
        self._line = ""
        self._widths = [0] * (MAX_DEPTH + 2)
        self._more = [False] * (MAX_DEPTH + 2)

    def lines(self, forest: Forest) -> Iterator[str]:
        self._walk(forest.leaves if self._style.inverted else list(forest.roots), 0)
        return (_truncated(line, self._style.width) if self._style.truncate else line for line in self._lines)

    def _walk(self, nodes: Sequence[Node], depth: int) -> None:
        for index, node in enumerate(nodes):
            below = node.used_by if self._style.inverted else node.uses
            self._draw(node, depth, last=index + 1 == len(nodes), has_children=bool(below))
            if below:
                self._walk(below, depth + 1)

    def _draw(self, node: Node, depth: int, *, last: bool, has_children: bool) -> None:
        style = self._style
        if depth > MAX_DEPTH or not (node.name or style.device or style.blkdevname):
            return
        self._more[depth] = not last
        self._widths[depth] = 0
        first_on_line = not self._line
        if not style.one_line or first_on_line:
            self._line += self._prefix(depth)
        offset = len(self._line)
        if style.one_line and not first_on_line:
            self._line += style.symbols.single if last else style.symbols.first
        self._line += "".join(self._text(node))
        if style.one_line:
            self._widths[depth] = len(self._line) - offset
        if not (style.one_line and has_children):
            self._lines.append(self._line)
            self._line = ""

    def _prefix(self, depth: int) -> str:
        symbols = self._style.symbols
        text = ""
        for level in range(depth):
            text += " " * (self._widths[level] + 1)
            if level == depth - 1:
                text += symbols.branch if self._more[depth] else symbols.last
            else:
                text += symbols.vertical if self._more[level + 1] else symbols.empty
        return text

    def _text(self, node: Node) -> Iterator[str]:
        style, info = self._style, node.info
        yield node.name
        if style.blkdevname and node.blkdevname:
            yield f" <{node.blkdevname}>"
        if style.device:
            yield f" ({node.number})"
        if info is not None and style.attributes:
            yield f" [{', '.join(_attributes(info, style))}]"


def _attributes(info: Info, style: TreeStyle) -> Iterable[str]:
    if style.active:
        yield "SUSPENDED" if info["suspended"] else "ACTIVE"
    if style.rw:
        yield "RO" if info["read_only"] else "RW"
    if style.open:
        yield str(info["open"])
    if style.uuid:
        yield info["uuid"]


def _truncated(line: str, width: int) -> str:
    """dmsetup's cut: a line that is too long loses its end from the last column on, and gets three dots there."""
    if len(line) < width or (len(line) == width and line[-1].isascii()):
        return line
    return line[: width - 1] + "..."

"""`ls --tree` beyond the transcripts: cut lines, options, shared devices."""

from typing import Any

import pytest

from nbdmap.cli.errors import UsageError
from nbdmap.cli.tree import ASCII, UTF, Forest, draw, tree_style


def info(name: str, minor: int, *below: tuple[int, int, str]) -> dict[str, Any]:
    return {
        "name": name, "uuid": "", "major": 254, "minor": minor, "suspended": False, "read_only": False, "open": 0, "loaded": True,
        "dependencies": [{"major": major, "minor": number, "name": other} for major, number, other in below],
    }  # fmt: skip


STACK = [
    info("a", 0, (254, 2, "c"), (254, 1, "b")),
    info("b", 1, (254, 2, "c"), (7, 0, "/dev/loop0")),
    info("c", 2, (7, 0, "/dev/loop0")),
]


def test_a_device_is_drawn_below_each_that_stands_on_it() -> None:
    assert draw(STACK, tree_style(None, utf=False, width=80)) == (
        "a (254:0)\n |-c (254:2)\n |  `- (7:0)\n `-b (254:1)\n    |-c (254:2)\n    |  `- (7:0)\n    `- (7:0)\n"
    )
    forest = Forest(STACK)
    assert [node.name for node in forest.roots] == ["a"]
    assert [node.name for node in forest.nodes["254:2"].used_by] == ["a", "b"]


def test_lines_that_are_too_long_are_cut() -> None:
    name = "x" * 90
    assert draw([info(name, 0)], tree_style(None, utf=False, width=80)) == "x" * 79 + "...\n"
    assert draw([info(name, 0)], tree_style("notrunc", utf=False, width=80)) == f"{name} (254:0)\n"
    exact = "x" * (80 - len(" (254:0)"))
    assert draw([info(exact, 0)], tree_style(None, utf=False, width=80)) == f"{exact} (254:0)\n"
    umlauts = "ü" * 80
    assert draw([info(umlauts, 0)], tree_style("nodevice", utf=False, width=80)) == "ü" * 79 + "...\n"


def test_options_may_be_abbreviated_and_the_locale_chooses_the_lines() -> None:
    style = tree_style("inv,comp,blk", utf=True, width=80)
    assert (style.inverted, style.compact, style.blkdevname, style.symbols) == (True, True, True, UTF)
    assert tree_style("asc", utf=True, width=80).symbols == ASCII
    for wrong in ("bad", "ascii,bad", "devices"):
        with pytest.raises(UsageError, match="Tree options not recognised"):
            tree_style(wrong, utf=True, width=80)


def test_nothing_is_drawn_of_no_devices() -> None:
    assert draw([], tree_style(None, utf=False, width=80)) == ""


def test_deep_stacks_stop_where_dmsetup_stops() -> None:
    chain = [info(f"d{number}", number, (254, number + 1, "")) for number in range(150)] + [info("end", 150)]
    assert draw(chain, tree_style("notrunc", utf=False, width=80)).count("\n") == 99

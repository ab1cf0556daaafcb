"""Names: mangling there and back, what is refused, LVM's parts."""

import re

import pytest
from hypothesis import given as for_all
from hypothesis import strategies

from nbdmap.cli.errors import CommandFailed
from nbdmap.cli.names import given, kernel_name, mangle, split_lvm, subsystem_of, unmangle, without_directory


@for_all(strategies.text(strategies.characters(codec="utf-8"), max_size=30))
def test_mangling_and_back(name: str) -> None:
    if "\\x" in name:
        return  # it may be mangled already
    assert re.fullmatch(r"[0-9A-Za-z#+.:=@_\\-]*", mangle(name))
    assert unmangle(mangle(name)) == name


def test_what_is_mangled_already_stays() -> None:
    assert mangle("x\\x20y") == "x\\x20y"
    assert mangle("umläut*") == "uml\\xc3\\xa4ut\\x2a"
    assert unmangle("bad\\x2y") == "bad\\x2y"


@pytest.mark.parametrize(
    ("word", "mode", "name"),
    [
        ("plain", "auto", "plain"), ("with space", "auto", "with space"), ("with\\x20space", "auto", "with space"),
        ("with\\x20space", "hex", "with\\x20space"), ("with\\x20space", "none", "with space"),
        ("a\\x20b c", "none", "a b c"), ("\\x5cx20", "hex", "\\x5cx20"),
    ],
)  # fmt: skip
def test_the_name_for_a_word(word: str, mode: str, name: str) -> None:
    assert given(word, mode) == name


@pytest.mark.parametrize(
    ("word", "complaint"),
    [("a\\x20b c", "mixed mangled and unmangled"), ("a\\x5cx20b", "mangled more than once")],
)
def test_names_that_are_mangled_wrongly(word: str, complaint: str) -> None:
    with pytest.raises(CommandFailed, match=complaint):
        given(word, "auto")


def test_paths() -> None:
    assert without_directory("/dev/mapper/lin") == without_directory("mapper/lin") == without_directory("lin") == "lin"
    for path in ("/dev/loop0", "/dev/mapper/a/b", "a/b"):
        with pytest.raises(CommandFailed, match=f"Device {path} not found"):
            without_directory(path)
    assert kernel_name("/dev/loop0") == "loop0"
    assert kernel_name("nbd://far/x") == "nbd://far/x"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("vg0-lv0", ("vg0", "lv0", "")), ("vg0-lv--a-layer", ("vg0", "lv-a", "layer")), ("vg--0-lv--a", ("vg-0", "lv-a", "")),
        ("plain", ("plain", "", "")), ("a-b-c-d", ("a", "b", "c")), ("", ("", "", "")), ("a-", ("a-", "", "")),
        ("a---b", ("a-", "b", "")),
    ],
)  # fmt: skip
def test_the_parts_of_lvm(name: str, parts: tuple[str, str, str]) -> None:
    assert split_lvm(name, "LVM")[1:] == parts
    assert split_lvm(name, "CRYPT") == ("CRYPT", "", "", "")


def test_the_subsystem_of_a_uuid() -> None:
    assert subsystem_of("LVM-0123-x") == "LVM"
    assert subsystem_of("plain") == ""

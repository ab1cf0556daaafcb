"""nbdinfo and nbdcopy: what exports look like, and copies in both directions."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import attempt, nbdsh, run
from tests.support.server import Server, serving

MIB = 1 << 20

CONFIG = """
disks:
  a: {file: a.img, size: 32MiB, create: true}
  ram0: {memory: 24MiB}
  ram1: {memory: 24MiB}
  sparse: {file: huge.img, size: 1TiB, create: true}
devices:
  lin:
    table: 0 65536 linear a 0
    export: {description: "a file, whole \N{GREEK SMALL LETTER ALPHA}"}
  str:
    table: 0 98304 striped 2 128 ram0 0 ram1 0
  joined:
    table: |
      0 65536 linear a 0
      65536 2048 zero
      67584 2048 error
    export: {name: "vg/joined one", read_only: true}
  huge: {table: 0 2147483648 linear sparse 0}
  hidden: {table: 0 8 zero, export: false}
  ro: {table: 0 65536 linear a 0, read_only: true}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(CONFIG) as running:
        yield running


def stamped(path: Path, size: int, seed: int) -> Path:
    """A file of random bytes with holes in it."""
    numbers = random.Random(seed)
    with path.open("wb") as out:
        out.truncate(size)
        for offset in range(0, size, 256 << 10):
            if numbers.random() < 0.6:
                os.pwrite(out.fileno(), numbers.randbytes(numbers.choice((4096, 65536, 256 << 10))), offset)
    return path


def info(*arguments: str) -> Any:
    return json.loads(run("nbdinfo", "--json", *arguments))


# --- nbdinfo ---------------------------------------------------------------------------------------------------------------


def test_list_names_every_export_and_no_other(server: Server) -> None:
    exports = {export["export-name"]: export for export in info("--list", server.uri())["exports"]}
    assert list(exports) == ["lin", "str", "vg/joined one", "huge", "ro"]  # in the order of the file
    assert exports["lin"]["description"] == "a file, whole α"
    assert exports["str"].get("description", "") == ""
    assert exports["huge"]["export-size"] == 1 << 40
    assert {name: export["is_read_only"] for name, export in exports.items()} == {
        "lin": False, "str": False, "vg/joined one": True, "huge": False, "ro": True,
    }  # fmt: skip
    for export in exports.values():
        assert export["contexts"] == ["base:allocation"]
        assert [export[f"block_size_{key}"] for key in ("minimum", "preferred", "maximum")] == [512, 4096, 32 * MIB]


def test_list_by_text_and_content(server: Server) -> None:
    text = run("nbdinfo", "--list", server.uri())
    assert 'export="lin"' in text
    assert "data" in run("nbdinfo", "--content", "--json", server.uri("lin"))


def test_flags(server: Server) -> None:
    whole = info(server.uri("lin"))
    assert (whole["protocol"], whole["TLS"], whole["structured"]) == ("newstyle-fixed", False, True)
    export = whole["exports"][0]
    can = {key.removeprefix("can_"): value for key, value in export.items() if key.startswith("can_")}
    assert can == {
        "cache": True, "df": True, "fast_zero": True, "flush": True, "fua": True, "multi_conn": True, "trim": True, "zero": True,
    }  # fmt: skip
    read_only = info(server.uri("ro"))["exports"][0]
    assert (read_only["is_read_only"], read_only["can_trim"], read_only["can_zero"]) == (True, False, False)
    for name in ("fua", "zero", "fast-zero", "cache", "df", "multi-conn", "structured-reply", "connect"):
        run("nbdinfo", "--can", name, server.uri("lin"))
    run("nbdinfo", "--is", "read-only", server.uri("ro"))
    assert attempt("nbdinfo", "--is", "read-only", server.uri("lin")).returncode == 2


def test_the_default_export_has_a_canonical_name(server: Server) -> None:
    script = """
h.set_opt_mode(True)
h.set_full_info(True)
h.connect_uri(URI)
h.opt_info()
assert h.get_canonical_export_name() == "lin", h.get_canonical_export_name()
assert h.get_export_description() == "a file, whole α"
h.set_export_name("vg/joined one")
h.opt_go()
assert h.get_canonical_export_name() == "vg/joined one"
assert h.get_size() == 34 << 20
"""
    nbdsh(script, server.uri(), connect=False)
    assert run("nbdinfo", "--size", server.uri()) == f"{32 * MIB}\n"


def test_an_unknown_or_hidden_export_is_refused_by_name(server: Server) -> None:
    for name in ("nothing", "hidden", "joined"):
        failed = attempt("nbdinfo", "--size", server.uri(name))
        assert failed.returncode == 1
    said = run("nbdsh", "-v", "-c", f"""
try:
    h.connect_uri({server.uri("nothing")!r})
except nbd.Error as error:
    print(error.errno)
""")  # fmt: skip
    assert said == "ENOENT\n"


def test_map_of_holes_zeroes_and_data(server: Server) -> None:
    name = "vg/joined one"
    nbdsh(
        "h.trim(32 << 20, 0); h.pwrite(b'x' * 65536, 1 << 20); h.pwrite(b'y' * 4096, 3 << 20)", server.uri("lin")
    )
    extents = json.loads(run("nbdinfo", "--map", "--json", server.uri(name)))
    assert [(one["offset"], one["length"], one["type"]) for one in extents] == [
        (0, MIB, 3),
        (MIB, 65536, 0),
        (MIB + 65536, 2 * MIB - 65536, 3),
        (3 * MIB, 4096, 0),
        (3 * MIB + 4096, 29 * MIB - 4096, 3),
        (32 * MIB, MIB, 2),
        (33 * MIB, MIB, 0),
    ]
    assert [one["description"] for one in extents][1] == "data"
    totals = json.loads(run("nbdinfo", "--map", "--totals", "--json", server.uri(name)))
    assert {one["type"]: one["size"] for one in totals} == {0: MIB + 65536 + 4096, 2: MIB, 3: 32 * MIB - 65536 - 4096}


def test_map_of_a_striped_device(server: Server) -> None:
    nbdsh("h.trim(48 << 20, 0); h.pwrite(b'x' * 65536, 65536)", server.uri("str"))
    assert json.loads(run("nbdinfo", "--map", "--json", server.uri("str"))) == [
        {"offset": 0, "length": 65536, "type": 3, "description": "hole,zero"},
        {"offset": 65536, "length": 65536, "type": 0, "description": "data"},
        {"offset": 131072, "length": 48 * MIB - 131072, "type": 3, "description": "hole,zero"},
    ]


def test_map_of_a_terabyte(server: Server) -> None:
    nbdsh("h.pwrite(b'x' * 4096, (1 << 40) - 4096)", server.uri("huge"))
    extents = json.loads(run("nbdinfo", "--map", "--json", server.uri("huge")))
    assert [(one["offset"], one["length"], one["type"]) for one in extents] == [
        (0, (1 << 40) - 4096, 3),
        ((1 << 40) - 4096, 4096, 0),
    ]


# --- nbdcopy ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lin", "str"])
@pytest.mark.parametrize("words", ["", "-C 4 -R 64", "--synchronous", "--allocated", "-S 0"])
def test_copy_there_and_back(server: Server, tmp_path: Path, name: str, words: str) -> None:
    options = words.split()
    size = {"lin": 32, "str": 48}[name] * MIB
    source = stamped(tmp_path / "a", size, seed=len(options))
    run("nbdcopy", "--flush", *options, source, server.uri(name))
    run("nbdcopy", *options, server.uri(name), tmp_path / "b")
    run("cmp", source, tmp_path / "b")
    back = run("sh", "-c", f"nbdcopy -C 4 --request-size=262144 {server.uri(name)!r} - | cmp - {source} && echo same")
    assert back == "same\n"


def test_copy_from_one_export_to_another(server: Server, tmp_path: Path) -> None:
    source = stamped(tmp_path / "a", 32 * MIB, seed=7)
    run("nbdcopy", source, server.uri("lin"))
    run("nbdcopy", "--flush", "-C", "4", server.uri("lin"), server.uri("str"))
    run("nbdcopy", server.uri("str"), tmp_path / "b")
    assert (tmp_path / "b").read_bytes()[: 32 * MIB] == source.read_bytes()


def test_copy_keeps_holes(server: Server, tmp_path: Path) -> None:
    source = stamped(tmp_path / "a", 32 * MIB, seed=8)
    with (server.directory / "a.img").open("r+b") as backing:
        os.posix_fallocate(backing.fileno(), 0, 32 * MIB)
    run("nbdcopy", "--flush", source, server.uri("lin"))
    assert (server.directory / "a.img").stat().st_blocks == pytest.approx(source.stat().st_blocks, abs=64)
    run("nbdcopy", server.uri("lin"), tmp_path / "b")
    assert (tmp_path / "b").stat().st_blocks == pytest.approx(source.stat().st_blocks, abs=64)


def test_copy_to_a_read_only_export_fails(server: Server, tmp_path: Path) -> None:
    source = stamped(tmp_path / "a", MIB, seed=9)
    failed = attempt("nbdcopy", source, server.uri("ro"))
    assert failed.returncode == 1
    assert "read-only" in failed.stderr or "Operation not permitted" in failed.stderr


def test_copy_of_an_error_target_fails(server: Server, tmp_path: Path) -> None:
    failed = attempt("nbdcopy", server.uri("vg/joined one"), tmp_path / "b")
    assert failed.returncode == 1
    assert "Input/output error" in failed.stderr

"""The benchmark, very small: every kind of row once over every transport. Nothing here depends on how fast anything is."""

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, Final

import pytest

from bench.__main__ import choose
from bench.measure import Result
from bench.rows import all_rows
from tests.support.programs import need
from tests.support.server import REPOSITORY, private_directory

pytestmark = pytest.mark.system

KINDS: Final = [
    "unix/read-4k-d32-x4,unix/write-1m-d4",
    "unix/fsync,unix/copy-*,unix/lean-read-4k-d32,unix/lean-write-4k-d1",
    "unix/stack-read-*,unix/memory-write-4k-*,unix/idle",
    "unix/mixed,unix/fairness",
    "tcp/read-64k-*,tcp/copy-in",
    "tls/write-4k-d8,tls/copy-out",
]
SECONDS: Final = 100.0


@pytest.fixture(autouse=True)
def _clients() -> None:
    need("fio", "fio")
    need("nbdcopy", "libnbd-bin")
    need("nbdkit", "nbdkit")


def start(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench", "--quick", "--directory", str(directory), *arguments]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def left_behind(directory: Path) -> list[str]:
    """Processes that were told of this directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(directory) in words and int(path.parent.name) != os.getpid():
            found.append(words)
    return found


@pytest.mark.parametrize("rows", KINDS)
def test_every_kind_of_row(rows: str, tmp_path: Path) -> None:
    kept = tmp_path / "r.json"
    with private_directory() as directory:
        bench = start(directory, "--seconds", "0.1", "--rows", rows, "--json", str(kept))
        try:
            output, errors = bench.communicate(timeout=SECONDS)
        finally:
            bench.kill()
        assert bench.returncode == 0, output + errors
        assert list(directory.iterdir()) == []
        assert left_behind(directory) == []
    data: dict[str, Any] = json.loads(kept.read_text())
    assert data["machine"]["versions"]["fio"].startswith("3.")
    assert [row["name"] for row in data["rows"]] == [row.name for row in choose(rows)]
    for row in data["rows"]:
        result = Result.from_json(row)
        assert set(result.outcomes) | set(result.notes) == set(result.servers)
        assert {result.subject, result.baseline} & set(result.servers) <= set(result.outcomes)
        assert all(outcome.value >= 0 and len(outcome.values) == 1 for outcome in result.outcomes.values())
        assert not result.speed or all(outcome.value > 0 and outcome.cpu_us is not None for outcome in result.outcomes.values())
        assert result.text in output
    ElementTree.fromstring(kept.with_suffix(".svg").read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_stays_behind_when_it_is_interrupted(number: signal.Signals) -> None:
    with private_directory() as directory:
        bench = start(directory, "--seconds", "30", "--rows", "unix/write-4k-d32")
        deadline = time.monotonic() + SECONDS
        while not any(words.startswith("fio ") for words in left_behind(directory)):
            assert bench.poll() is None, bench.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        bench.send_signal(number)
        bench.communicate(timeout=SECONDS)
        assert bench.returncode in (130, 143)
        assert left_behind(directory) == []
        assert list(directory.iterdir()) == []


def test_rows_are_named_once_and_found_by_pattern() -> None:
    names = [row.name for row in all_rows()]
    assert len(names) == len(set(names))
    assert [row.name for row in choose("tls/fsync,unix/mixed")] == ["tls/fsync", "unix/mixed"]
    assert len(choose("all")) == len(names) > len(choose(""))
    with pytest.raises(SystemExit, match="no row is called 'nonsense'"):
        choose("unix/mixed,nonsense")


def test_what_the_issues_ask_for_is_asked_for() -> None:
    wanted = {row.name: (row.at_least, row.at_most) for row in all_rows() if row.at_least or row.at_most}
    assert wanted == {
        "unix/read-4k-d32": (3.0, None), "unix/write-4k-d32": (1.5, None), "unix/read-4k-d1": (1.0, None),
        "unix/read-1m-d4": (1.4, None), "unix/write-1m-d4": (1.2, None), "unix/read-4k-d32-x4": (1.6, None),
        "unix/lean-read-4k-d32": (3.0, None), "unix/lean-write-4k-d32": (1.5, None), "unix/lean-read-4k-d1": (1.0, None),
        "unix/luks-read-4k-d32": (1.5, None), "unix/luks-write-4k-d32": (1.5, None), "unix/luks-read-1m-d4": (1.3, None),
        "unix/luks-write-1m-d4": (1.3, None), "unix/thin-read-4k-d32": (0.85, None), "unix/thin-first": (1.5, None),
        "unix/thin-snapshot": (1.5, None), "unix/stack-read-4k-d32": (0.85, None),
        "unix/mixed": (None, 3.0), "unix/idle": (None, 64.0),
    }  # fmt: skip

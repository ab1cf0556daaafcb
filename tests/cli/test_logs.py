"""The server's log: for people, for programs, for the journal, and for nobody."""

import fcntl
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients import attempt
from tests.support.process import SECONDS, listening, process
from tests.support.server import PROGRAM, REPOSITORY, private_directory


@pytest.fixture
def directory() -> Iterator[Path]:
    with private_directory() as made:
        yield made


def test_a_log_for_programs(directory: Path) -> None:
    with process(directory, "--device", "a=0 8 zero", "--listen", listening(directory), "--log", "json") as made:
        made.expect("export 'a'.*\n")
        made.popen.terminate()
        assert made.end() == 0
    entries = [json.loads(line) for line in made.log.splitlines()]
    assert {"level": "info", "logger": "nbdmap.cli.server", "message": "export 'a': 4096 bytes"} in [
        {key: value for key, value in entry.items() if key != "time"} for entry in entries
    ]


def test_a_log_for_the_journal(directory: Path) -> None:
    read_end, write_end = os.pipe()
    status = os.fstat(write_end)
    done = subprocess.run(
        [*PROGRAM, "serve", "none.yaml"], stderr=write_end, cwd=directory, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"},
    )  # fmt: skip
    os.close(write_end)
    with open(read_end) as log:
        assert log.read() == "<3>none.yaml: no such file\n"
    assert done.returncode == 1


def test_a_log_that_nobody_reads_stops_nothing(directory: Path) -> None:
    arguments = ("-v", "--device", "a=0 8 zero", "--listen", listening(directory))
    with process(directory, *arguments, pipesize=4096) as made:
        made.expect("export 'a'")
        assert made.popen.stderr is not None
        assert fcntl.fcntl(made.popen.stderr.fileno(), fcntl.F_GETPIPE_SZ) == 4096
        for _ in range(300):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(SECONDS)
                client.connect(str(directory / "nbd.sock"))
                assert client.recv(18, socket.MSG_WAITALL).startswith(b"NBDMAGIC")
                client.sendall(b"\xff" * 16)
                while client.recv(4096):
                    pass
        assert attempt("nbdinfo", "--size", listening(directory)).stdout == "4096\n"
        made.popen.terminate()
        assert made.popen.wait(2.0) == 0

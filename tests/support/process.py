"""`nbdmap serve` as a process whose log is read line by line while it runs."""

import contextlib
import os
import re
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tests.support.server import PROGRAM, REPOSITORY

SECONDS: Final = 20.0


class Process:
    """A process whose stderr is read line by line."""

    def __init__(self, directory: Path, *arguments: str, **options: Any) -> None:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "NBDMAP_SOCKET": str(directory / "admin.sock")}
        environment |= options.pop("environment", {})
        self.popen = subprocess.Popen(
            [*PROGRAM, "serve", *arguments], cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=environment, **options,
        )  # fmt: skip
        self.log = ""

    def expect(self, pattern: str) -> re.Match[str]:
        """Reads on until `pattern` is found in what was not looked at before."""
        deadline = time.monotonic() + SECONDS
        assert self.popen.stderr is not None
        start = len(self.log)
        while not (match := re.compile(pattern).search(self.log, start)):
            ready, _, _ = select.select([self.popen.stderr], [], [], max(0.0, deadline - time.monotonic()))
            more = os.read(self.popen.stderr.fileno(), 65536) if ready else b""
            assert more, f"{pattern!r} did not come:\n{self.log}"
            self.log += more.decode()
        return match

    def end(self) -> int:
        """Waits for its end; its status."""
        out, errors = self.popen.communicate(timeout=SECONDS)
        self.log += out.decode() + errors.decode()
        assert "Traceback" not in self.log, self.log
        return self.popen.returncode


@contextlib.contextmanager
def process(directory: Path, *arguments: str, **options: Any) -> Iterator[Process]:
    made = Process(directory, *arguments, **options)
    try:
        yield made
    finally:
        if made.popen.poll() is None:
            made.popen.kill()
        made.popen.communicate()


def serve(directory: Path, *arguments: str, **options: Any) -> tuple[int, str]:
    """Runs it to its end: status and output."""
    with process(directory, *arguments, **options) as made:
        return made.end(), made.log


def listening(directory: Path) -> str:
    return f"nbd+unix:///?socket={directory}/nbd.sock"

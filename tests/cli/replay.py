"""Runs the commands of tests/golden/dmsetup through the command line, against a mapper in this process.

The disks have the names, numbers and sizes that the loop devices had where the transcripts were recorded.
"""

import asyncio
import io
import json
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nbdmap.block.memory import MemoryDisk
from nbdmap.cli.main import run
from nbdmap.cli.rpc_client import refusal
from nbdmap.cli.session import Surroundings
from nbdmap.control.events import Events
from nbdmap.control.exports import Exports
from nbdmap.control.mapper import Mapper
from nbdmap.control.rpc import Methods, RpcError
from nbdmap.control.verbs import Verbs
from nbdmap.targets import TARGETS
from tests.vm.transcripts import Step

MIB = 1 << 20
DISKS = (64 * MIB, 64 * MIB, 64 * MIB, 64 * MIB, MIB, 64 * MIB, 64 * MIB, 1049088)
READ_ONLY, BLOCKS_OF_4K = 5, 6


class InProcess:
    """A Server that is called directly; what waits for long lets `meanwhile` happen."""

    def __init__(self, loop: asyncio.AbstractEventLoop, methods: Methods, meanwhile: Callable[[], None]) -> None:
        self._loop = loop
        self._methods = methods
        self._meanwhile = meanwhile

    def call(self, method: str, params: Mapping[str, Any]) -> Any:
        task = self._loop.create_task(self._methods.call(method, json.loads(json.dumps(params))))
        try:
            for _ in range(50):
                if not task.done():
                    self._loop.run_until_complete(asyncio.sleep(0))
            if not task.done():
                self._meanwhile()
            return json.loads(json.dumps(self._loop.run_until_complete(task)))
        except RpcError as error:
            raise refusal(error.answer()) from None

    def events(self) -> Iterator[Mapping[str, str]]:
        raise NotImplementedError

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command printed, and its exit status."""

    stdout: str
    stderr: str
    status: int


class World:
    """A mapper with the disks of the transcripts, a directory for their files, and what happens meanwhile."""

    def __init__(self, loop: asyncio.AbstractEventLoop, directory: Path) -> None:
        self.directory = directory
        self.mapper = Mapper(TARGETS, Events(lambda: 0.0))
        self._loop = loop
        self._server = InProcess(loop, Methods(Verbs(self.mapper, Exports(self.mapper))), self.do_meanwhile)
        self._later: list[str] = []
        for number, size in enumerate(DISKS):
            disk = MemoryDisk(f"/dev/loop{number}", f"7:{number}", size, read_only=number == READ_ONLY)
            if number == BLOCKS_OF_4K:
                disk.limits = replace(disk.limits, logical_block=4096)
            self.mapper.disks[disk.name] = disk

    def dmsetup(self, arguments: Sequence[str], given: str = "") -> Answer:
        """One command line of dmsetup's."""
        stdout, stderr = io.StringIO(), io.StringIO()

        def execute(command: Sequence[str]) -> None:
            stdout.write(subprocess.run(command, capture_output=True, check=False, text=True).stdout)

        around = Surroundings(io.StringIO(given), stdout, stderr, {}, str(self.directory), execute, lambda seconds: None)
        status = run(arguments, lambda path: self._server, around)
        return Answer(stdout.getvalue(), stderr.getvalue(), status)

    def step(self, step: Step) -> Answer | None:
        """Does a step of a transcript; None where nothing is to be compared."""
        if step.kind == "=":
            self._file(step.text).write_text("".join(f"{line}\n" for line in step.given))
        elif step.kind == "&":
            self._later.append(step.text)
        elif step.kind == "%":
            if step.words[0] in ("hold", "release"):
                self._hold_or_release(*step.words)
        else:
            answer = self._command(step.text, "".join(f"{line}\n" for line in step.given))
            self.do_meanwhile()
            return answer
        return None

    def do_meanwhile(self) -> None:
        """Does the commands that were started in the background."""
        while self._later:
            self._command(self._later.pop(0), "")

    def _command(self, text: str, given: str) -> Answer | None:
        program, *words = shlex.split(text)
        if program == "blockdev":
            info = self._server.call("info", {"name": words[1]})[0]
            value = {"--getsz": info["sectors"], "--getro": int(info["read_only"])}[words[0]]
            return Answer(f"{value}\n", "", 0)
        if program != "dmsetup":
            return None
        return self.dmsetup([word.replace("/tmp/", f"{self.directory}/") for word in words], given)

    def _file(self, path: str) -> Path:
        return self.directory / Path(path).name

    def _hold_or_release(self, what: str, name: str) -> None:
        device = self.mapper.devices[name]
        if what == "hold":
            device.openers += 1
        else:
            self._loop.run_until_complete(self.mapper.release(device))


@contextmanager
def world(directory: Path) -> Iterator[World]:
    """A World, closed at the end."""
    with asyncio.Runner() as runner:
        made = World(runner.get_loop(), directory)
        yield made
        runner.run(made.mapper.close())

"""tests/golden/dmsetup/kernel/multipath.txt done by nbdmap: requests, failing paths, suspends and uevents as Linux has them.

The transcript's shell commands are understood as far as it uses them; what a step printed must be what is recorded. Not compared
are event numbers (a path that fails is an event of its own here, in Linux those of one moment are one).
"""

import asyncio
import re
import shlex
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nbdmap.block.io import DISCARD, FLUSH, Io
from nbdmap.errors import IoFailed
from tests.cli.replay import World, world
from tests.support.disks import read, write
from tests.vm.transcripts import GOLDEN, Step, parse

if TYPE_CHECKING:
    from nbdmap.control.events import Listener

SECTOR: Final = 512
TURNS: Final = 30


class Guest:
    """What a transcript can do to a World."""

    def __init__(self, made: World) -> None:
        self._world = made
        self._loop = made._loop
        self._listener: Listener | None = None
        self._seen = ""
        self._meanwhile: list[str] = []

    def do(self, step: Step) -> str:
        """What the step prints; `&` is kept until a request waits."""
        if step.kind == "&":
            self._meanwhile.append(step.text)
            return ""
        if step.kind != "$":
            return ""
        printed = "".join(self._command(piece) for piece in _pieces(step.text))
        self._do_meanwhile()
        return printed

    def _do_meanwhile(self) -> None:
        while self._meanwhile:
            for piece in _pieces(self._meanwhile.pop(0)):
                self._command(piece)

    def _command(self, piece: str) -> str:
        match = re.fullmatch(r"(.*?)\s*(>>?)/tmp/seen", piece)
        if match:
            printed = self._command(match[1])
            self._seen = printed if match[2] == ">" else self._seen + printed
            return ""
        words = shlex.split(piece)
        match words:
            case ["dmsetup", *arguments]:
                return self._world.dmsetup(arguments).stdout
            case ["sh", script, *arguments]:
                return str(getattr(self, f"_{Path(script).name}")(*arguments))
            case ["cat", "/tmp/seen"]:
                return self._seen
            case ["echo", *rest]:
                return " ".join(rest) + "\n"
            case ["blkdiscard", path]:
                device = self._device(Path(path).name)
                self._request(device.submit(Io(DISCARD, device.size), 0))
                return ""
            case ["usleep", _]:
                return ""
        raise AssertionError(f"not understood: {piece}")

    def _device(self, name: str) -> Any:
        return self._world.mapper.find(name)

    def _request(self, request: Awaitable[object]) -> None:
        """Does a request; what is to happen meanwhile does when it waits."""
        task = asyncio.ensure_future(request, loop=self._loop)
        for _ in range(TURNS):
            if not task.done():
                self._loop.run_until_complete(asyncio.sleep(0))
        if not task.done():
            self._do_meanwhile()
        self._loop.run_until_complete(task)

    def _status(self, name: str) -> str:
        return self._world.dmsetup(["status", name]).stdout.split(" ", 3)[3]

    def _swap(self, name: str, table: str) -> str:
        return self._world.dmsetup(["load", name, "--table", table]).stdout + self._world.dmsetup(["resume", name]).stdout

    def _read(self, name: str, sector: str) -> str:
        try:
            self._request(read(self._device(name), int(sector) * SECTOR, SECTOR))
        except IoFailed:
            with suppress(IoFailed):  # the page cache reads again what a readahead could not
                self._request(read(self._device(name), int(sector) * SECTOR, SECTOR))
                return f"{SECTOR} bytes\n"
            return f"/dev/mapper/{name}: Input/output error\n0 bytes\n"
        return f"{SECTOR} bytes\n"

    def _write(self, name: str, sector: str, word: str, *options: str) -> str:
        device = self._device(name)
        self._request(write(device, int(sector) * SECTOR, (f"{word}\n" * SECTOR).encode()[:SECTOR]))
        if options:
            self._request(device.submit(Io(FLUSH, 0), 0))
        return "1 written\n"

    def _listen(self) -> str:
        self._listener = self._world.mapper.events.subscribe()
        return ""

    def _heard(self) -> str:
        """The events as the guest prints them."""
        assert self._listener
        printed = ""
        for event in self._listener._events:
            keys = {key: value for key, value in event.items() if key.startswith("DM_") or key in ("MAJOR", "MINOR", "SUBSYSTEM")}
            if "DM_ACTION" not in keys:
                keys = {key: value for key, value in keys.items() if not key.startswith("DM_")}
            place = f"{event['ACTION']}@/devices/virtual{event['DEVPATH']}"
            printed += "".join(f"{line}\n" for line in [place, *sorted(f"{key}={value}" for key, value in keys.items())])
        self._world.mapper.events.unsubscribe(self._listener)
        return printed


def _pieces(text: str) -> list[str]:
    return [piece.strip() for piece in text.split(";")]


def without_linux_s_own(events: str) -> list[str]:
    """Recorded uevents without those of the bdi, cookies, and the second remove, which the disk sends beside dm."""
    found: list[str] = []
    for block in re.split(r"(?m)^(?=\w+@)", events):
        block = block.replace("DM_COOKIE\n", "")
        if block and "/bdi/" not in block and block not in found[-1:]:
            found.append(block)
    return found


def test_what_linux_does_is_done(tmp_path: Path) -> None:
    steps, _ = parse((GOLDEN / "kernel" / "multipath.txt").read_text())
    compared = 0
    with world(tmp_path) as made:
        guest = Guest(made)
        for step in steps:
            printed, wanted = guest.do(step), step.stdout
            if step.kind != "$" or "events m" in step.text:
                continue
            if step.text == "sh /tmp/heard":
                recorded = re.sub(r"DM_SEQNUM=\d+", "DM_SEQNUM=n", wanted)
                assert without_linux_s_own(recorded) == without_linux_s_own(re.sub(r"DM_SEQNUM=\d+", "DM_SEQNUM=n", printed))
            else:
                assert printed == wanted, f"$ {step.text}"
            compared += bool(wanted)
    assert compared >= 25


def test_what_is_taken_from_recorded_events() -> None:
    one: Callable[[str], str] = lambda action: f"{action}@/devices/virtual/block/dm-2\nMAJOR=254\n"  # noqa: E731
    text = f"add@/devices/virtual/bdi/254:2\nSUBSYSTEM=bdi\n{one('add')}{one('change')}DM_COOKIE\n{one('remove')}{one('remove')}"
    assert without_linux_s_own(text) == [one("add"), one("change"), one("remove")]

"""The example scripts of the kernel's documents, run as they are written there, with a `dmsetup` that is nbdmap.

    seed/identity.sh joined.sh reverse.pl    device-mapper/linear.txt
    seed/striped.pl                          device-mapper/striped.txt
    seed/zero.sh                             device-mapper/zero.txt
    seed/delayed.sh delayed-writes.sh        device-mapper/delay.txt

and the two lines of features that device-mapper/flakey.txt has.

Once on loop devices, for which blockdev(8) is the real one, and once on plain files, which need no root: there a stand-in
for blockdev tells the size of a file.
"""

import contextlib
import os
import random
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.clients import nbdsh, run
from tests.support.loop import loop_device
from tests.support.programs import need
from tests.support.server import REPOSITORY, Server, serving

SCRIPTS: Final = Path(__file__).parent / "seed"
MIB: Final = 1 << 20
EXTENT: Final = 4 * MIB
CHUNK: Final = 128 << 10
TEN_TERABYTES: Final = 10 << 40

BLOCKDEV: Final = """#!/bin/sh
[ "$1" = --getsize ] && echo $(($(stat -L -c %s "$2") / 512))
"""


class Bench:
    """A server without devices, disks of chosen sizes with known bytes, and the scripts' surroundings."""

    def __init__(self, server: Server, directory: Path, kind: str, stack: contextlib.ExitStack) -> None:
        self.server = server
        self._directory = directory
        self._kind = kind
        self._stack = stack
        self._bin = directory / "bin"
        self._bin.mkdir()
        command = f"PYTHONPATH={shlex.quote(str(REPOSITORY))} exec {shlex.quote(sys.executable)} -m nbdmap"
        self._program("dmsetup", f'#!/bin/sh\n{command} "$@"\n')
        if kind == "file":
            self._program("blockdev", BLOCKDEV)

    def _program(self, name: str, text: str) -> None:
        (self._bin / name).write_text(text)
        (self._bin / name).chmod(0o755)

    def disks(self, *sizes: int) -> list[str]:
        """The paths of new disks. What is on them is what `content` says."""
        paths = []
        for number, size in enumerate(sizes):
            path = self._directory / f"disk{number}"
            path.write_bytes(self.content(number, size))
            paths.append(self._stack.enter_context(loop_device(path)) if self._kind == "loop" else str(path))
        return paths

    def content(self, number: int, size: int) -> bytes:
        """Bytes that stand at one place of one disk only."""
        return random.Random(number).randbytes(size)

    def script(self, name: str, *arguments: str) -> str:
        """Runs a script of the documents; what it prints."""
        path = f"{self._bin}:{os.environ['PATH']}"
        interpreter = (SCRIPTS / name).read_text().partition("\n")[0].removeprefix("#!").split()
        words = interpreter if interpreter[0].startswith("/") else ["/bin/sh"]
        need(words[0], "perl")
        variables = {"NBDMAP_SOCKET": str(self.server.admin)}
        return run("env", f"PATH={path}", *words, SCRIPTS / name, *arguments, extra=variables)

    def dmsetup(self, *arguments: str) -> str:
        return run(self._bin / "dmsetup", *arguments, extra={"NBDMAP_SOCKET": str(self.server.admin)})

    def number(self, path: str, *, of: str) -> str:
        """The major:minor that stands for a disk in the table of a device: a loop device's own, or what nbdmap gave a file."""
        if self._kind == "loop":
            status = os.stat(path)
            return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        words = [word for line in self.dmsetup("table", of).splitlines() for word in line.split() if ":" in word]
        assert all(word.startswith("240:") for word in words)
        opened = sorted(set(words), key=words.index)
        return opened[int(path[-1])]

    def read(self, export: str) -> bytes:
        out = self._directory / "out"
        run("nbdcopy", self.server.uri(export), out)
        return out.read_bytes()

    def raw(self, path: str) -> bytes:
        """What is on a disk, past nbdmap."""
        return Path(path).read_bytes()


@pytest.fixture(params=["loop", "file"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    with contextlib.ExitStack() as stack, serving() as server:
        yield Bench(server, tmp_path, request.param, stack)


def test_identity(bench: Bench) -> None:
    (disk,) = bench.disks(9 * MIB)
    assert bench.script("identity.sh", disk) == ""
    assert bench.dmsetup("table", "identity") == f"0 18432 linear {bench.number(disk, of='identity')} 0\n"
    assert bench.read("identity") == bench.content(0, 9 * MIB)
    nbdsh("h.pwrite(b'z' * 4096, 8 << 20); h.flush()", bench.server.uri("identity"))
    assert bench.raw(disk)[8 * MIB :][:8192] == b"z" * 4096 + bench.content(0, 9 * MIB)[8 * MIB + 4096 :][:4096]


def test_joined(bench: Bench) -> None:
    """The second disk's data follows the first's."""
    first, second = bench.disks(5 * MIB, 7 * MIB)
    assert bench.script("joined.sh", first, second) == ""
    low, high = (bench.number(disk, of="joined") for disk in (first, second))
    assert bench.dmsetup("table", "joined") == f"0 10240 linear {low} 0\n10240 14336 linear {high} 0\n"
    assert bench.read("joined") == bench.content(0, 5 * MIB) + bench.content(1, 7 * MIB)
    nbdsh("h.pwrite(b'z' * 8192, (5 << 20) - 4096); h.flush()", bench.server.uri("joined"))
    assert bench.raw(first)[-4096:] == bench.raw(second)[:4096] == b"z" * 4096


@pytest.mark.parametrize(("size", "extents"), [(24 * MIB, 6), (34 * MIB, 7)], ids=["whole", "rest"])
def test_reverse(bench: Bench, size: int, extents: int) -> None:
    """Extents of 4 MiB from the last to the first; the script leaves out one more where the size is no multiple."""
    (disk,) = bench.disks(size)
    assert bench.script("reverse.pl", disk) == ""
    number = bench.number(disk, of="reverse")
    lines = [f"{8192 * place} 8192 linear {number} {8192 * (extents - 1 - place)}\n" for place in range(extents)]
    assert bench.dmsetup("table", "reverse") == "".join(lines)
    content = bench.content(0, size)
    pieces = [content[start : start + EXTENT] for start in range(0, extents * EXTENT, EXTENT)]
    assert bench.read("reverse") == b"".join(reversed(pieces))


def test_striped(bench: Bench) -> None:
    """Chunks of 128 KiB, dealt to three disks, as much of each as the smallest has."""
    sizes = (6 * MIB, 5 * MIB + 256 * 1024 + 512, 8 * MIB)
    disks = bench.disks(*sizes)
    assert bench.script("striped.pl", *disks) == ""
    rows = min(sizes) // CHUNK
    numbers = [bench.number(disk, of="stripe_dev") for disk in disks]
    legs = " ".join(f"{number} 0" for number in numbers)
    assert bench.dmsetup("table", "stripe_dev") == f"0 {rows * 3 * 256} striped 3 256 {legs}\n"
    contents = [bench.content(number, size) for number, size in enumerate(sizes)]
    dealt = [content[row * CHUNK : (row + 1) * CHUNK] for row in range(rows) for content in contents]
    assert bench.read("stripe_dev") == b"".join(dealt)
    status = f"0 {rows * 3 * 256} striped 3 {' '.join(numbers)} 1 AAA\n"
    assert bench.dmsetup("status", "stripe_dev") == status


def test_zero(bench: Bench) -> None:
    assert bench.script("zero.sh") == ""
    assert bench.dmsetup("table", "zero1") == f"0 {TEN_TERABYTES // 512} zero \n"
    script = """
assert h.get_size() == 10 << 40
h.pwrite(b"x" * 4096, (10 << 40) - 4096)
for offset in (0, 5 << 40, (10 << 40) - 4096):
    assert h.pread(4096, offset) == bytes(4096)
"""
    nbdsh(script, bench.server.uri("zero1"))


TIMED: Final = """
import time
def took(call):
    begun = time.monotonic()
    call()
    return time.monotonic() - begun
"""


def test_delayed(bench: Bench) -> None:
    """Reads and writes of 500 ms; a status line while one waits is in tests/vm/test_faults.py and tests/targets."""
    (disk,) = bench.disks(MIB)
    assert bench.script("delayed.sh", disk) == ""
    number = bench.number(disk, of="delayed")
    assert bench.dmsetup("table", "delayed") == f"0 2048 delay {number} 0 500\n"
    assert bench.dmsetup("status", "delayed") == "0 2048 delay 0 0 0\n"
    script = f"""{TIMED}
assert took(lambda: h.pread(4096, 0)) >= 0.499
assert took(lambda: h.pwrite(b"d" * 4096, 0)) >= 0.499
assert took(lambda: h.flush()) >= 0.499
"""
    nbdsh(script, bench.server.uri("delayed"))
    assert bench.raw(disk)[:8192] == b"d" * 4096 + bench.content(0, MIB)[4096:8192]


def test_delayed_writes_on_another_device(bench: Bench) -> None:
    first, second = bench.disks(MIB, MIB)
    assert bench.script("delayed-writes.sh", first, second) == ""
    low, high = (bench.number(disk, of="delayed") for disk in (first, second))
    assert bench.dmsetup("table", "delayed") == f"0 2048 delay {low} 0 0 {high} 0 500\n"
    script = f"""{TIMED}
assert h.pread(1 << 20, 0) == open({first!r}, "rb").read()
assert took(lambda: h.pwrite(b"d" * 4096, 4096)) >= 0.499
assert h.pread(1 << 20, 0) == open({first!r}, "rb").read()
h.flush()
"""
    nbdsh(script, bench.server.uri("delayed"))
    assert bench.raw(first) == bench.content(0, MIB)
    assert bench.raw(second)[4096:8192] == b"d" * 4096


def test_flakeys_examples(bench: Bench) -> None:
    """`corrupt_bio_byte 32 r 1 0` and `corrupt_bio_byte 224 w 0 32`: since the flag REQ_META has another number, the second
    does nothing, in Linux too."""
    (disk,) = bench.disks(MIB)
    content = bench.content(0, MIB)
    for name, words in (("reads", "corrupt_bio_byte 32 r 1 0"), ("meta", "corrupt_bio_byte 224 w 0 32")):
        bench.dmsetup("create", name, "--table", f"0 2048 flakey {disk} 0 0 1 5 {words}")
        assert bench.dmsetup("table", name) == f"0 2048 flakey {bench.number(disk, of=name)} 0 0 1 5 {words}\n"
        assert bench.dmsetup("status", name) == "0 2048 flakey \n"
    script = "import sys\nd = h.pread(4096, 8192)\nassert (d[31], d[:31] + d[32:]) == (1, bytes.fromhex(sys.argv[1]))"
    expected = content[8192:12288]
    script = script.replace("sys.argv[1]", repr((expected[:31] + expected[32:]).hex()))
    nbdsh(script, bench.server.uri("reads"))
    nbdsh("h.pwrite(b'w' * 4096, 0); h.flush()", bench.server.uri("meta"))
    assert bench.raw(disk) == b"w" * 4096 + content[4096:]


def test_a_name_in_use_is_refused_as_dmsetup_does(bench: Bench) -> None:
    (disk,) = bench.disks(MIB)
    bench.script("identity.sh", disk)
    with pytest.raises(AssertionError, match="Device or resource busy"):
        bench.script("identity.sh", disk)
    assert bench.dmsetup("remove", "identity") == ""
    bench.script("identity.sh", disk)

"""Failures below reach the client as the right NBD error, and what a flush has acknowledged survives kill -9.

A killed process loses what it had not yet given to the kernel; what the kernel had not yet given to the disk is the matter
of tests/block/test_file_sync.py.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.clients import PACKAGES, PRELUDE, environment, nbdsh, run, wait_until
from tests.support.loop import loop_device, small_tmpfs
from tests.support.programs import need
from tests.support.server import Server, serving

MIB: Final = 1 << 20

STACK: Final = """
disks:
  a: {file: a.img, size: 32MiB, create: true}
  b: {file: b.img, size: 32MiB, create: true}
devices:
  linear: {table: 0 65536 linear a 0}
  striped: {table: 0 98304 striped 2 128 a 8192 b 8192}
  stacked: {table: "0 50000 linear striped 1000\\n50000 8000 linear b 0"}
"""

# Two connections: what the first has written and got answered, a flush on the second makes durable (CAN_MULTI_CONN).
WRITE: Final = """
import os, random
other = nbd.NBD()
other.connect_uri(URI)
assert h.can_multi_conn()
SIZE = h.get_size() // 4096
numbers = random.Random(SEED)
blocks = {numbers.randrange(SIZE): numbers.randbytes(4096) for _ in range(400)}
durable = dict(list(blocks.items())[:300])
by_fua = dict(list(blocks.items())[300:])
for number, data in durable.items():
    h.pwrite(data, number * 4096)
other.flush()
for number, data in by_fua.items():
    h.pwrite(data, number * 4096, nbd.CMD_FLAG_FUA)
print("acknowledged", flush=True)
try:  # more load, until the server is killed
    while True:
        h.pwrite(b"?" * 512, h.get_size() - 512)
except nbd.Error:
    pass
"""

CHECK: Final = """
import random
SIZE = h.get_size() // 4096
numbers = random.Random(SEED)
blocks = {numbers.randrange(SIZE): numbers.randbytes(4096) for _ in range(400)}
for number, data in blocks.items():
    if number != SIZE - 1:
        assert h.pread(4096, number * 4096) == data, number
"""


# --- kill -9 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("export", ["linear", "striped", "stacked"])
def test_what_was_acknowledged_survives_kill_9(export: str) -> None:
    with serving(STACK) as server:
        for seed in range(2):
            words = [PRELUDE, f"URI = {server.uri(export)!r}; SEED = {seed}", "h.connect_uri(URI)", WRITE]
            command = ["nbdsh", *(word for text in words for word in ("-c", text))]
            need("nbdsh", PACKAGES["nbdsh"])
            with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as client:
                assert client.stdout is not None
                assert client.stdout.readline() == "acknowledged\n"
                server.kill()
                assert client.wait(10) == 0
            server.start()  # on the sockets that the dead one has left behind
            nbdsh(f"SEED = {seed}\n{CHECK}", server.uri(export))


# --- full disks ------------------------------------------------------------------------------------------------------------

FULL: Final = """
h.set_strict_mode(0)
M = 1 << 20
for place in range(3):
    h.pwrite(bytes([place + 1]) * M, place * M)
said = fails(errno.ENOSPC, h.pwrite, b"x" * (8 * M), 8 * M)
fails(errno.ENOSPC, h.pwrite, b"x" * (8 * M), 8 * M, nbd.CMD_FLAG_FUA)
fails(errno.ENOSPC, h.zero, 8 * M, 8 * M, nbd.CMD_FLAG_NO_HOLE)
for place in range(3):
    assert h.pread(M, place * M) == bytes([place + 1]) * M
h.flush()
h.trim(24 * M, 8 * M)
h.trim(2 * M, 0)
h.pwrite(b"y" * M, 16 * M)
h.flush()
assert h.pread(M, 16 * M) == b"y" * M and h.pread(M, 2 * M) == b"\\3" * M
"""


def test_a_full_file_system_is_enospc(tmp_path: Path) -> None:
    point = tmp_path / "small"
    point.mkdir()
    with small_tmpfs(point, 4 * MIB):
        config = f"""
disks: {{thin: {{file: {point}/a.img, size: 32MiB, create: true}}}}
devices: {{disk: {{table: 0 65536 linear thin 0}}}}
"""
        with serving(config) as server:
            nbdsh(FULL, server.uri("disk"))


def test_memory_that_is_used_up_is_enospc() -> None:
    config = """
disks: {ram: {memory: 32MiB, limit: 4MiB}}
devices: {disk: {table: 0 65536 linear ram 0}}
"""
    with serving(config) as server:
        nbdsh(FULL, server.uri("disk"))


# --- disks that fail -------------------------------------------------------------------------------------------------------


def test_a_failed_flush_is_told_and_remembered(tmp_path: Path) -> None:
    """The kernel takes the writes to a loop device and fails to keep them; it would say so to one fdatasync only."""
    point = tmp_path / "small"
    point.mkdir()
    with small_tmpfs(point, 4 * MIB):
        (point / "a.img").touch()
        os.truncate(point / "a.img", 32 * MIB)
        with loop_device(point / "a.img") as loop, serving(f"devices: {{disk: {{table: 0 65536 linear {loop} 0}}}}") as server:
            script = """
h.pwrite(b"x" * (8 << 20), 8 << 20)
assert "data may be lost" in fails(errno.EIO, h.flush) + fails(errno.EIO, h.flush)
fails(errno.EIO, h.flush)
fails(errno.EIO, h.pwrite, b"x" * 512, 0, nbd.CMD_FLAG_FUA)
assert h.pread(512, 0) == bytes(512)
"""
            nbdsh(script, server.uri("disk"))
            server.process.terminate()
            assert server.process.wait(2) == 1, server.log()  # its last flush fails, too
            server.start()
            server.verb("remove", "disk")


def test_eio_of_a_stripe_is_told_by_its_text_and_its_status() -> None:
    config = """
disks: {a: {memory: 16MiB}, b: {memory: 16MiB}}
devices:
  bad: {table: "0 16384 linear a 0\\n16384 16384 error", export: false}
  striped: {table: 0 65536 striped 2 128 bad 0 b 0}
"""
    with serving(config) as server:
        before = server.verb("status", "striped")
        assert before.endswith(" 1 AA\n")
        script = """
h.pwrite(b"x" * 4096, 0)
assert "error target" in fails(errno.EIO, h.pread, 65536, 16 << 20)
assert "error target" in fails(errno.EIO, h.pwrite, bytes(1 << 20), 20 << 20)
fails(errno.EIO, h.zero, 1 << 20, 20 << 20)
fails(errno.EIO, h.trim, 1 << 20, 20 << 20)
assert h.pread(65536, (16 << 20) + 65536) == bytes(65536)
assert h.pread(4096, 0) == b"x" * 4096
h.flush()
"""
        nbdsh(script, server.uri("striped"))
        assert server.verb("status", "striped") == before.replace("AA", "DA")
        assert "Event number:      0" not in server.verb("info", "striped")


def test_a_file_that_was_cut_off_is_eio() -> None:
    with serving(STACK) as server:
        os.truncate(server.directory / "a.img", MIB)
        script = """
assert "has become shorter" in fails(errno.EIO, h.pread, 4096, 8 << 20)
assert h.pread(4096, 0) == bytes(4096)
"""
        nbdsh(script, server.uri("linear"))


# --- a remote that vanishes ------------------------------------------------------------------------------------------------


class Remote:
    """nbdkit on a file, which can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self.socket, self.image, self._pidfile = (directory / name for name in ("far.sock", "far.img", "far.pid"))
        self.image.touch()
        os.truncate(self.image, 16 * MIB)

    def start(self) -> None:
        """Returns when it serves: nbdkit goes to the background then."""
        self.socket.unlink(missing_ok=True)
        self._pidfile.unlink(missing_ok=True)
        run("nbdkit", "-U", self.socket, "-P", self._pidfile, "file", self.image)

    def kill(self) -> None:
        """It is gone when its socket's other ends have noticed, at the latest when it is no process any more."""
        pid = int(self._pidfile.read_text())
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text())


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[tuple[Remote, Server]]:
    need("nbdkit", PACKAGES["nbdkit"])
    directory = Path("/tmp") / f"nbdmap-far-{os.getpid()}"  # a short path
    directory.mkdir()
    far = Remote(directory)
    far.start()
    try:
        config = f"""
disks: {{far: {{nbd: "nbd+unix:///?socket={far.socket}"}}, near: {{memory: 16MiB}}}}
devices: {{disk: {{table: "0 32768 linear far 0\\n32768 32768 linear near 0"}}}}
"""
        with serving(config) as server:
            yield far, server
    finally:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            far.kill()
        run("rm", "-rf", directory)


@contextlib.contextmanager
def conversation(server: Server, script: str) -> Iterator["subprocess.Popen[str]"]:
    """A client that says and waits for lines; its end must be a good one."""
    words = [PRELUDE, f"h.connect_uri({server.uri('disk')!r})", "import sys, time\n" + script]
    command = ["nbdsh", *(word for text in words for word in ("-c", text))]
    with subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as client:  # fmt: skip
        yield client
        assert client.wait(30) == 0


def said(client: "subprocess.Popen[str]") -> str:
    assert client.stdout is not None
    return client.stdout.readline().strip()


def tell(client: "subprocess.Popen[str]") -> None:
    assert client.stdin is not None
    client.stdin.write("go on\n")


def test_a_short_absence_of_a_remote_is_not_noticed(remote: tuple[Remote, Server]) -> None:
    far, server = remote
    script = """
h.pwrite(b"1" * 4096, 0)
h.flush()
h.pwrite(b"2" * 4096, 4096)
print("written", flush=True)
sys.stdin.readline()
cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"3" * 4096)), 8192), h.aio_flush()]
h.poll(100)
print("waiting", flush=True)
while cookies:
    h.poll(-1)
    cookies = [one for one in cookies if not h.aio_command_completed(one)]
assert h.pread(12288, 0) == b"1" * 4096 + b"2" * 4096 + b"3" * 4096
"""
    with conversation(server, script) as client:
        assert said(client) == "written"
        far.kill()
        tell(client)
        assert said(client) == "waiting"
        far.start()
    assert far.image.read_bytes()[:12288] == b"1" * 4096 + b"2" * 4096 + b"3" * 4096


def test_a_long_absence_of_a_remote_is_eio_until_it_is_back(remote: tuple[Remote, Server]) -> None:
    """The one slow test: requests wait for 10 seconds before they fail. What does not need the remote is not held up."""
    far, server = remote
    script = """
h.pwrite(b"1" * 4096, 0)
h.flush()
print("written", flush=True)
sys.stdin.readline()
begun = time.monotonic()
read = h.aio_pread(nbd.Buffer(4096), 0)
assert h.pread(4096, 16 << 20) == bytes(4096) and time.monotonic() - begun < 5
try:
    while not h.aio_command_completed(read):
        h.poll(-1)
    raise SystemExit("the read succeeded")
except nbd.Error as error:
    assert error.errnum == errno.EIO, error.string
assert 5 < time.monotonic() - begun < 20
begun = time.monotonic()
fails(errno.EIO, h.pwrite, bytes(4096), 0)
fails(errno.EIO, h.flush)
assert time.monotonic() - begun < 2
print("failed", flush=True)
sys.stdin.readline()
deadline = time.monotonic() + 10
while True:
    try:
        assert h.pread(4096, 0) == b"1" * 4096
        break
    except nbd.Error:
        assert time.monotonic() < deadline
        time.sleep(0.05)
h.pwrite(b"4" * 4096, 0)
h.flush()
"""
    with conversation(server, script) as client:
        assert said(client) == "written"
        far.kill()
        tell(client)
        assert said(client) == "failed"
        far.start()
        tell(client)
    assert far.image.read_bytes()[:4096] == b"4" * 4096

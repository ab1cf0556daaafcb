"""Tables are exchanged under load: no request is lost, none is done twice or out of order, and no connection ends.

What is written is known block by block. Where the data itself moves, it is copied while the device is suspended, as pvmove
would: a write that got past the suspend would be missing afterwards.
"""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.clients import PACKAGES, PRELUDE, attempt, environment, nbdsh, run
from tests.support.programs import need
from tests.support.server import Admin, Server, serving

MIB: Final = 1 << 20
SECTORS: Final = 32768

CONFIG = f"""
disks:
  a: {{file: a.img, size: 16MiB, create: true}}
  b: {{file: b.img, size: 16MiB, create: true}}
  ram: {{memory: 64MiB}}
devices:
  disk: {{table: 0 {SECTORS} linear a 0}}
  lower: {{table: 0 {SECTORS} linear a 0}}
  elastic: {{table: 0 {SECTORS} linear ram 0}}
"""

SAME_DATA: Final = (
    f"0 {SECTORS} linear a 0\n",
    f"0 1000 linear a 0\n1000 {SECTORS - 1000} linear a 1000\n",
    f"0 {SECTORS} linear lower 0\n",
    f"0 {SECTORS} striped 1 64 a 0\n",
)
"""Tables that find each sector at the same place by different ways."""

# Several writers on one connection. Each keeps to its own block and overwrites it again and again, always after the
# answer to the write before: what stands there in the end must be the last stamp. Reads in between must see the latest.
STAMPS: Final = """
BLOCK, WRITERS = 4096, 64
stamp = lambda writer, round: (writer << 32 | round).to_bytes(8, "big") * (BLOCK // 8)
place = lambda writer: writer * (h.get_size() // WRITERS)
def finish(cookies):
    while cookies:
        cookies = [one for one in cookies if not h.aio_command_completed(one)]
        if cookies:
            h.poll(-1)
print("begun", flush=True)
for round in range(1, ROUNDS + 1):
    out = [nbd.Buffer.from_bytearray(bytearray(stamp(writer, round))) for writer in range(WRITERS)]
    finish([h.aio_pwrite(data, place(writer)) for writer, data in enumerate(out)])
    if round % 10 == 0:
        read = [nbd.Buffer(BLOCK) for _ in range(WRITERS)]
        finish([h.aio_pread(data, place(writer)) for writer, data in enumerate(read)] + [h.aio_flush()])
        for writer, data in enumerate(read):
            assert bytes(data.to_bytearray()) == stamp(writer, round), f"writer {writer}, round {round}"
for writer in range(WRITERS):
    assert h.pread(BLOCK, place(writer)) == stamp(writer, ROUNDS)
h.shutdown()
"""


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(CONFIG) as running:
        yield running


@contextlib.contextmanager
def load(*command: str) -> Iterator["subprocess.Popen[str]"]:
    """A client that works meanwhile; the block waits for its end, and it must be a good one."""
    need(command[0], PACKAGES[command[0]])
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
            out, error = process.communicate(timeout=40)
        except BaseException:
            process.kill()
            raise
    assert process.returncode == 0, f"{' '.join(command)[-500:]}\n{out[-1000:]}{error[-3000:]}"


def stamps(server: Server, rounds: int) -> "contextlib.AbstractContextManager[subprocess.Popen[str]]":
    connect = f"ROUNDS = {rounds}; h.connect_uri({server.uri('disk')!r})"
    return load("nbdsh", "-c", PRELUDE, "-c", connect, "-c", STAMPS)


def fio(server: Server) -> "contextlib.AbstractContextManager[subprocess.Popen[str]]":
    return load(
        "fio", "--name=v", "--verify_state_save=0", "--ioengine=nbd", f"--uri={server.uri('disk')}",
        "--rw=randrw", "--bs=4k", "--iodepth=32",
        "--numjobs=4", "--thread", "--size=3m", "--offset_increment=4m", "--loops=6", "--fsync=64",
        "--verify=crc32c", "--do_verify=1", "--verify_fatal=1",
    )  # fmt: skip


def test_by_the_verbs(server: Server) -> None:
    """The way an operator does it: suspend, reload, resume, each a command."""
    swaps = 0
    with stamps(server, 120) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "begun\n"
        while client.poll() is None or swaps < 2:
            server.verb("suspend", "disk")
            server.verb("reload", "disk", stdin=SAME_DATA[swaps % len(SAME_DATA)])
            server.verb("resume", "disk")
            swaps += 1
    assert server.log().count("connected to 'disk'") == 1


@pytest.mark.parametrize("noflush", [False, True], ids=["flush", "noflush"])
def test_as_fast_as_it_goes(server: Server, noflush: bool) -> None:
    swaps = 0
    with Admin(server) as admin, fio(server) as client:
        while client.poll() is None or swaps < 10:
            table = SAME_DATA[swaps % len(SAME_DATA)]
            admin.call("load", name="disk", table=table)
            if swaps % 3:
                admin.call("suspend", name="disk", noflush=noflush)
            admin.call("resume", name="disk", noflush=noflush)
            swaps += 1
    assert server.log().count("connected to 'disk'") == 8  # each of fio's jobs asks for the size first


def test_the_data_moves(server: Server) -> None:
    """While it is suspended, everything is copied to the other disk, the old one is spoilt, and the table follows."""
    places = [(server.directory / "a.img", "a"), (server.directory / "b.img", "b")]
    moves = 0
    with Admin(server) as admin, stamps(server, 60) as client:
        while client.poll() is None or moves < 4:
            (old, _), (new, name) = places[moves % 2], places[(moves + 1) % 2]
            admin.call("load", name="disk", table=f"0 {SECTORS} linear {name} 0")
            admin.call("suspend", name="disk", noflush=bool(moves % 4 > 1))
            shutil.copyfile(old, new)
            spoil(old)
            admin.call("resume", name="disk")
            moves += 1
    assert server.log().count("connected to 'disk'") == 1


def spoil(path: Path) -> None:
    """Overwrites it in place: whoever still reads it gets what nobody has written."""
    with path.open("r+b") as out:
        out.write(b"\xee" * (16 * MIB))


def test_below_a_stack(server: Server) -> None:
    """The swapped device is not the exported one but below it."""
    server.verb("reload", "disk", "--table", f"0 {SECTORS} linear lower 0")
    server.verb("resume", "disk")
    places = [(server.directory / "a.img", "a"), (server.directory / "b.img", "b")]
    moves = 0
    with Admin(server) as admin, stamps(server, 60) as client:
        while client.poll() is None or moves < 4:
            (old, _), (new, name) = places[moves % 2], places[(moves + 1) % 2]
            admin.call("suspend", name="lower")
            shutil.copyfile(old, new)
            spoil(old)
            admin.call("load", name="lower", table=f"0 {SECTORS} linear {name} 0")
            admin.call("resume", name="lower")
            moves += 1


def test_a_table_that_cannot_be_changes_nothing(server: Server) -> None:
    with stamps(server, 300):
        for table in (f"0 {SECTORS} linear nowhere 0", f"0 {SECTORS} linear a 1", f"0 {SECTORS} linear disk 0", "0 8 nonsense"):
            refused = server.try_verb("reload", "disk", "--table", table)
            assert refused.returncode == 1
            assert refused.stderr
        assert server.try_verb("remove", "disk").returncode == 1
    assert server.verb("table", "disk").startswith(f"0 {SECTORS} linear ")


def test_a_suspended_device_holds_its_clients(server: Server) -> None:
    """Requests of connected clients wait, clients may come, and all is done in the order of its arrival afterwards."""
    server.verb("suspend", "disk")
    script = """
import time
other = nbd.NBD()
other.connect_uri(URI)
writes = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(bytes([number]) * 512)), 0) for number in range(50)]
flush = h.aio_flush()
data = nbd.Buffer(512)
read = other.aio_pread(data, 4096)
h.poll(200)
assert not any(h.aio_command_completed(one) for one in writes + [flush]), "answered while suspended"
print("waiting", flush=True)
for handle, cookies in ((h, writes + [flush]), (other, [read])):
    while cookies:
        handle.poll(-1)
        cookies = [one for one in cookies if not handle.aio_command_completed(one)]
assert h.pread(512, 0) == bytes([49]) * 512
"""
    with load("nbdsh", "-c", f"URI = {server.uri('disk')!r}", "-c", "h.connect_uri(URI)", "-c", script) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "waiting\n"
        server.verb("resume", "disk")


def test_a_server_with_held_requests_still_stops(server: Server) -> None:
    """SIGTERM with a suspended device: the client is told, and the process ends in time (see Server.stop)."""
    server.verb("suspend", "disk")
    script = """
cookie = h.aio_pwrite(nbd.Buffer(512), 0)
h.poll(100)
print("waiting", flush=True)
try:
    while not h.aio_command_completed(cookie):
        h.poll(-1)
    raise SystemExit("the write succeeded")
except nbd.Error as error:
    assert error.errnum in (errno.ESHUTDOWN, errno.ENOTCONN, errno.EIO), error.string
"""
    connect = f"h.connect_uri({server.uri('disk')!r})"
    with load("nbdsh", "-c", PRELUDE, "-c", connect, "-c", script) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "waiting\n"
        server.stop()


# --- size ------------------------------------------------------------------------------------------------------------------


def test_a_new_size_is_seen_by_new_connections(server: Server) -> None:
    server.verb("reload", "elastic", "--table", f"0 {2 * SECTORS} linear ram 0")
    assert run("nbdinfo", "--size", server.uri("elastic")) == f"{16 * MIB}\n"
    server.verb("resume", "elastic")
    assert run("nbdinfo", "--size", server.uri("elastic")) == f"{32 * MIB}\n"
    nbdsh("h.pwrite(b'x' * 512, (32 << 20) - 512)", server.uri("elastic"))


def test_a_connected_client_keeps_its_size(server: Server) -> None:
    grow, shrink = 2 * SECTORS, SECTORS // 2
    script = """
import sys
h.set_strict_mode(0)
print("first", flush=True)
sys.stdin.readline()
fails(errno.EINVAL, h.pread, 512, 16 << 20)
h.pwrite(b"y" * 512, (16 << 20) - 512)
assert h.get_size() == 16 << 20
print("second", flush=True)
sys.stdin.readline()
fails(errno.EIO, h.pread, 512, (16 << 20) - 512)
fails(errno.EIO, h.pwrite, bytes(512), (16 << 20) - 512)
assert h.pread(512, (8 << 20) - 512) == bytes(512)
"""
    command = ["nbdsh", "-c", PRELUDE, "-c", f"h.connect_uri({server.uri('elastic')!r})", "-c", script]
    with subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        for word, sectors in (("first", grow), ("second", shrink)):
            assert client.stdout.readline() == f"{word}\n"
            server.verb("reload", "elastic", "--table", f"0 {sectors} linear ram 0")
            server.verb("resume", "elastic")
            client.stdin.write("\n")
            client.stdin.flush()
        assert client.wait(20) == 0
    assert run("nbdinfo", "--size", server.uri("elastic")) == f"{8 * MIB}\n"
    assert attempt("nbdinfo", server.uri("elastic")).returncode == 0

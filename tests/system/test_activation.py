"""How clients get to a server, and what they find there: socket activation, --run, IPv6, names, limits, changes at run time."""

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.clients import attempt, nbdsh, run
from tests.support.server import REPOSITORY, Server, private_directory, serving

MIB: Final = 1 << 20
CONFIG: Final = """
disks: {ram: {memory: 32MiB}, other: {memory: 8MiB}}
devices:
  first: {table: 0 65536 linear ram 0, export: {description: the first}}
  second: {table: 0 16384 linear other 0, export: {name: two words/und mehr, max_connections: 2}}
  shown: {table: 0 16384 linear other 0, export: {read_only: true}}
  inner: {table: 0 16384 linear other 0, export: false}
"""


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory with an `nbdmap` on the path of clients, and a configuration."""
    with private_directory() as place:
        command = f"PYTHONPATH={shlex.quote(str(REPOSITORY))} exec {shlex.quote(sys.executable)} -m nbdmap"
        (place / "nbdmap").write_text(f'#!/bin/sh\n{command} "$@"\n')
        (place / "nbdmap").chmod(0o755)
        (place / "c.yaml").write_text(f"admin: {place}/admin.sock\n{CONFIG}")
        yield place


# --- started by the client -------------------------------------------------------------------------------------------------


def test_nbdinfo_starts_the_server(directory: Path) -> None:
    info = json.loads(run("nbdinfo", "--json", "--list", "[", directory / "nbdmap", "serve", directory / "c.yaml", "]"))
    assert [export["export-name"] for export in info["exports"]] == ["first", "two words/und mehr", "shown"]
    assert run("nbdinfo", "--size", "--", "[", directory / "nbdmap", "serve", "-q", directory / "c.yaml", "]") == f"{32 * MIB}\n"


def test_nbdcopy_starts_the_server(directory: Path) -> None:
    image = directory / "a.img"
    image.write_bytes(b"abcd" * (2 * MIB))
    copied = directory / "b.img"
    words = ("nbdmap", "serve", "-q", "--admin", directory / "copy.sock", "--device", f"d=0 16384 linear {image} 0")
    run("nbdcopy", "--", "[", directory / words[0], *words[1:], "]", copied)
    assert copied.read_bytes() == image.read_bytes()


def test_nbdsh_starts_the_server(directory: Path) -> None:
    words = [str(directory / "nbdmap"), "serve", "-q", str(directory / "c.yaml")]
    script = f"""
h.set_export_name("two words/und mehr")
h.connect_systemd_socket_activation({words!r})
assert h.get_size() == 8 << 20
h.pwrite(b"s" * 512, 0)
h.flush()
assert h.pread(512, 0) == b"s" * 512
"""
    nbdsh(script, connect=False)


def test_run_gives_the_command_its_uri(directory: Path) -> None:
    """The exit status is the command's, and two clients share the private socket."""
    script = 'nbdinfo --size "$uri" && qemu-img info -f raw "$uri" | grep -c "virtual size: 32 MiB" && nbdmap ls && exit 7'
    words = ("serve", directory / "c.yaml", "--run", script)
    done = attempt(directory / "nbdmap", *words, extra={"PATH": f"{directory}:/usr/bin:/bin"})
    assert done.returncode == 7, done.stderr
    assert done.stdout.splitlines()[:2] == [str(32 * MIB), "1"]
    assert [line.split("\t")[0] for line in done.stdout.splitlines()[2:]] == ["first", "inner", "second", "shown"]


def test_read_only_for_everything(directory: Path) -> None:
    image = directory / "a.img"
    image.write_bytes(bytes(MIB))
    image.chmod(0o400)
    words = (directory / "nbdmap", "serve", "-r", "--device", f"d=0 2048 linear {image} 0", "--run")
    check = 'nbdinfo --is read-only "$uri" && ! qemu-io -f raw -c "write 0 4k" "$uri"'
    assert attempt(*words, check).returncode == 0


# --- addresses -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(CONFIG, listen=["nbd://[::1]:0", "nbd://127.0.0.1:0", "nbd://localhost:0"]) as running:
        yield running


def test_ipv6_and_ipv4(server: Server) -> None:
    six, four, both = server.addresses()
    assert six.startswith("[::1]:")
    for address in (six, four, both, both.replace("localhost", "127.0.0.1")):
        assert run("nbdinfo", "--size", f"nbd://{address}/first") == f"{32 * MIB}\n"
    nbdsh("h.pwrite(b'6' * 512, 0)", f"nbd://{six}/first")
    nbdsh("assert h.pread(512, 0) == b'6' * 512", f"nbd://{four}/first")


# --- names -----------------------------------------------------------------------------------------------------------------


def described(server: Server) -> dict[str, Any]:
    exports = json.loads(run("nbdinfo", "--json", "--list", server.uri()))["exports"]
    return {export["export-name"]: export.get("description", "") for export in exports}


def test_names_and_descriptions(server: Server) -> None:
    assert described(server) == {"first": "the first", "two words/und mehr": "", "shown": ""}
    assert run("nbdinfo", "--size", server.uri("two words/und mehr")) == f"{8 * MIB}\n"
    for unknown in ("second", "inner", "first ", "FIRST", "x" * 4000):
        assert attempt("nbdinfo", server.uri(unknown)).returncode == 1


def test_no_more_than_max_connections() -> None:
    """The third is told why; INFO does not count; a place is free again when somebody leaves."""
    script = """
other = nbd.NBD()
other.set_export_name("two words/und mehr")
other.connect_unix(URI.partition("socket=")[2])
third = nbd.NBD()
said = []
third.set_debug(True)
third.set_debug_callback(lambda context, message: said.append(message) and 0 or 0)
try:
    third.connect_uri(URI)
    raise SystemExit("one too many")
except nbd.Error:
    assert "already has 2 clients" in "".join(said), said
other.shutdown()
import time
deadline = time.monotonic() + 5
while True:  # the server may hear of the end of one after the begin of the next
    again = nbd.NBD()
    try:
        again.connect_uri(URI)
        break
    except nbd.Error:
        assert time.monotonic() < deadline
        time.sleep(0.01)
assert len(again.pread(512, 0)) == 512
"""
    with serving(CONFIG) as server:
        nbdsh(script, server.uri("two words/und mehr"))


def test_exports_come_and_go_at_run_time() -> None:
    with serving(CONFIG) as server:
        server.verb("create", "new", "--table", "0 2048 zero")
        assert run("nbdinfo", "--size", server.uri("new")) == f"{MIB}\n"
        server.verb("rename", "new", "newer")
        assert attempt("nbdinfo", server.uri("new")).returncode == 1
        assert run("nbdinfo", "--size", server.uri("newer")) == f"{MIB}\n"
        server.verb("remove", "newer")
        assert attempt("nbdinfo", server.uri("newer")).returncode == 1
        server.verb("export", "inner")
        assert "inner" in described(server)
        server.verb("unexport", "inner")
        assert "inner" not in described(server)
        server.verb("unexport", "first")
        assert run("nbdinfo", "--size", server.uri()) == f"{8 * MIB}\n"  # the default is the first that is left
        server.verb("create", "--notable", "empty")
        assert "empty" not in described(server)
        server.verb("remove_all")
        assert described(server) == {}
        assert attempt("nbdinfo", server.uri()).returncode == 1


def test_a_device_with_a_client_is_busy(server: Server) -> None:
    script = f"""
import subprocess
def verb(*words):
    command = [{sys.executable!r}, "-m", "nbdmap", *words]
    environment = {{"PYTHONPATH": {str(REPOSITORY)!r}, "NBDMAP_SOCKET": {str(server.admin)!r}}}
    return subprocess.run(command, env=environment, capture_output=True, text=True)
busy = verb("remove", "shown")
assert busy.returncode == 1 and "busy" in busy.stderr.lower(), busy
assert verb("unexport", "shown").returncode == 0
assert len(h.pread(512, 0)) == 512
assert "Open count:        1" in verb("info", "shown").stdout
assert verb("export", "shown").returncode == 0
"""
    nbdsh(script, server.uri("shown"))


def test_a_flush_on_one_connection_covers_the_others(server: Server) -> None:
    script = """
handles = [nbd.NBD() for _ in range(8)]
for handle in handles:
    handle.connect_uri(URI)
    assert handle.can_multi_conn()
for number, handle in enumerate(handles):
    handle.pwrite(bytes([number]) * 4096, 4096 * number)
h.flush()
for number, handle in enumerate(handles):
    for other in range(8):
        assert handle.pread(4096, 4096 * other) == bytes([other]) * 4096
"""
    nbdsh(script, server.uri("first"))

"""`nbdmap serve` as a process: how it starts, what it tells, how it reloads and how it ends."""

import asyncio
import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from nbdmap.cli import server
from nbdmap.cli.serve import Options
from nbdmap.nbd.uri import Uri
from tests.support.certificates import make_certificates
from tests.support.clients import attempt, nbdsh, run
from tests.support.clients import environment as environment_of_clients
from tests.support.process import SECONDS, Process, listening, process, serve
from tests.support.programs import need
from tests.support.server import PROGRAM, REPOSITORY, private_directory, serving

DISKS: Final = "disks: {d0: {memory: 1M}, d1: {memory: 1M}}\n"


@pytest.fixture
def directory() -> Iterator[Path]:
    with private_directory() as made:
        yield made


# --- --run -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "status"), [("true", 0), ("exit 7", 7), ("kill -9 $$", 137), ("nosuchprogram-x", 127)])
def test_the_status_of_the_command_is_ours(directory: Path, command: str, status: int) -> None:
    assert serve(directory, "--device", "a=0 8 zero", "--run", command)[0] == status


def test_the_command_has_the_variables_of_nbdkit(directory: Path) -> None:
    names = ("uri", "nbd", "unixsocket", "port", "exportname", "tls", "NBDMAP_SOCKET")
    script = "".join(f'echo "{name}=[${name}]"; ' for name in names) + 'test -S "$unixsocket" && test -S "$NBDMAP_SOCKET"'
    status, log = serve(directory, "--device", "a=0 8 zero", "--run", script, environment={"TMPDIR": str(directory)})
    assert status == 0
    assert re.fullmatch(
        r"uri=\[nbd\+unix:///\?socket=(?P<private>\S+)/nbd.sock\]\nnbd=\[nbd\+unix:///\?socket=(?P=private)/nbd.sock\]\n"
        r"unixsocket=\[(?P=private)/nbd.sock\]\nport=\[\]\nexportname=\[\]\ntls=\[\]\n"
        r"NBDMAP_SOCKET=\[(?P=private)/admin.sock\]\n",
        log,
    ), log
    assert list(directory.iterdir()) == [], "everything is cleaned up"


def test_a_client_in_the_command(directory: Path) -> None:
    need("nbdinfo", "libnbd-bin")
    (directory / "disk.img").write_bytes(bytes(1 << 20))
    status, log = serve(directory, "--device", "a=0 2048 linear disk.img 0", "--run", 'nbdinfo --size "$uri"')
    assert (status, log) == (0, "1048576\n")


def test_verbs_in_the_command_ask_this_server(directory: Path) -> None:
    status, log = serve(directory, "--device", "a=0 8 zero; 8 8 error", "--run", f"{sys.executable} -m nbdmap table")
    assert (status, log) == (0, "a: 0 8 zero \na: 8 8 error \n")


def test_a_signal_ends_the_command_too(directory: Path) -> None:
    script = "trap 'echo caught >&2; exit 9' TERM; echo ready >&2; while :; do sleep 60 & wait $!; done"
    with process(directory, "--device", "a=0 8 zero", "--run", script, start_new_session=True) as made:
        made.expect("ready")
        made.popen.terminate()
        made.expect("caught")
        try:
            assert made.popen.wait(SECONDS) == 9
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(made.popen.pid, signal.SIGKILL)  # the sleep, which holds our pipe


def test_the_command_is_not_started_when_a_device_fails(directory: Path) -> None:
    status, log = serve(directory, "--device", "a=0 8 linear gone 0", "--run", "echo started")
    assert (status, log) == (
        1, "nbdmap: error: --device a: line 1: linear: gone: no mapped device, disk or file has this name\n"
    )  # fmt: skip


# --- start -----------------------------------------------------------------------------------------------------------------


def test_the_demo(directory: Path) -> None:
    with process(directory, "--listen", listening(directory), "--pidfile", "pid") as made:
        made.expect("export 'thin'")
        assert f"listening on {listening(directory)}\n" in made.log
        assert f"admin socket {directory}/admin.sock\n" in made.log
        exports = ["linear", "joined", "striped", "zero", "error", "slow", "flakey", "dust", "stack", "paths", "secret", "thin"]
        for name in exports:
            assert re.search(rf"export '{name}': \d+ bytes, .+\n", made.log)
        names = [one["export-name"] for one in json.loads(run("nbdinfo", "--list", "--json", listening(directory)))["exports"]]
        assert names == exports
        nbdsh("h.pwrite(b'x' * 65536 * 4, 0); assert h.pread(65536 * 4, 0) == b'x' * 65536 * 4",
              f"nbd+unix:///stack?socket={directory}/nbd.sock")  # fmt: skip
        made.popen.terminate()
        assert made.end() == 0


def test_ready_reload_and_stop_are_told_to_systemd(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(directory / "notify"))
        manager.settimeout(SECONDS)
        (directory / "c.yaml").write_text("devices: {a: {table: 0 8 zero}}")
        environment = {"NOTIFY_SOCKET": str(directory / "notify")}
        with process(directory, "c.yaml", "--listen", listening(directory), environment=environment) as made:
            assert manager.recv(4096) == b"READY=1\nSTATUS=1 devices"
            made.popen.send_signal(signal.SIGHUP)
            assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+", manager.recv(4096))
            assert manager.recv(4096) == b"READY=1\nSTATUS=1 devices"
            made.popen.terminate()
            assert manager.recv(4096) == b"STOPPING=1"
            assert made.end() == 0


def test_the_pidfile_is_there_when_the_server_is_ready_and_gone_with_it() -> None:
    with serving("devices: {a: {table: 0 8 zero}}") as running:
        assert running.pidfile.read_text() == f"{running.process.pid}\n"
        assert run("nbdinfo", "--size", running.uri("a")) == "4096\n"
        running.stop()
        assert not running.pidfile.exists()
        assert not running.socket.exists()
        assert not running.admin.exists()


def test_an_address_in_use_is_told_before_a_disk_is_touched(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (directory / "c.yaml").write_text(
            f"listen: nbd://127.0.0.1:{port}\ndisks: {{a: {{file: a.img, size: 1M, create: true}}}}\n"
        )
        assert serve(directory, "c.yaml", "--pidfile", "pid") == (
            1, f"nbdmap: error: listen on 127.0.0.1:{port}: Address already in use\n"
        )  # fmt: skip
    assert [path.name for path in directory.iterdir()] == ["c.yaml"]


def test_an_admin_socket_that_somebody_asked_for_must_be_there(directory: Path) -> None:
    (directory / "file").touch()
    status, log = serve(directory, "--listen", listening(directory), "--device", "a=0 8 zero", "--admin", "file/admin.sock")
    assert status == 1
    assert re.fullmatch(rf"nbdmap: error: .*{directory}/file/?.*\n", log), log


async def test_the_usual_admin_socket_may_be_missing(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ready = asyncio.Event()
    monkeypatch.delenv("NBDMAP_SOCKET", raising=False)
    monkeypatch.setattr(server, "admin_path", lambda: "/dev/null/admin.sock")
    monkeypatch.setattr(server, "notify", lambda environment, state: ready.set())
    options = Options(tables=(("a", "0 8 zero"),))
    program = server.Program(options, server.read(options), (Uri(socket=f"{directory}/nbd.sock"),), [])
    work = asyncio.ensure_future(program.run())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        async with asyncio.timeout(SECONDS):
            await ready.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            assert await work == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert "without an admin socket: " in caplog.text


def test_read_only_is_meant_for_everything(directory: Path) -> None:
    (directory / "a.img").write_bytes(bytes(1 << 20))
    (directory / "a.img").chmod(0o400)
    config = "disks: {f: {file: a.img, size: 1M, create: true}}\ndevices: {a: {table: 0 8 linear f 0}}"
    with serving(config, arguments=["-r"], directory=directory) as running:
        assert json.loads(run("nbdinfo", "--json", running.uri("a")))["exports"][0]["is_read_only"]


def test_socket_activation(directory: Path) -> None:
    need("nbdinfo", "libnbd-bin")
    (directory / "c.yaml").write_text("listen: nbd://127.0.0.1:1\ndevices: {a: {table: 0 8 zero}, b: {table: 0 16 zero}}")
    assert run("nbdinfo", "--size", "--", "[", *PROGRAM, "serve", "-q", "c.yaml", "]", cwd=directory,
               extra={"PYTHONPATH": str(REPOSITORY), "NBDMAP_SOCKET": str(directory / "admin.sock")}) == "4096\n"  # fmt: skip


def test_sockets_of_systemd_take_the_place_of_others(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "nbd.sock"))
        listener.listen()
        starter = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid());"
            "os.execv(sys.executable, [sys.executable, '-m', 'nbdmap', 'serve', *sys.argv[2:]])"
        )
        done = subprocess.run(
            [sys.executable, "-c", starter, str(listener.fileno()), "--run", "true"], pass_fds=[listener.fileno(), 3],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "LISTEN_FDS": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        2, "nbdmap serve: sockets come from systemd (LISTEN_FDS): --listen and --run do not go together with them\n"
    )  # fmt: skip


# --- what is wrong ---------------------------------------------------------------------------------------------------------


def test_check(directory: Path) -> None:
    (directory / "good.yaml").write_text("disks: {a: {file: /not/there}}\ndevices: {b: {table: 0 8 linear a 0}}")
    assert serve(directory, "--check", "good.yaml") == (0, "good.yaml: good\n")
    (directory / "bad.yaml").write_text("disks:\n  a: {fiel: x}\ndevices:\n  b: {table: 0 8 linaer a 0}\n")
    problems = (
        "nbdmap: error: bad.yaml:2:3: disks.a: should be a mapping with one of the keys file, memory, nbd\n"
        "nbdmap: error: bad.yaml:4:14: devices.b.table: line 1: unknown target type 'linaer' (did you mean 'linear'?)\n"
    )
    assert serve(directory, "--check", "bad.yaml") == (1, problems)
    assert serve(directory, "bad.yaml") == (1, problems)
    assert serve(directory, "none.yaml") == (1, "nbdmap: error: none.yaml: no such file\n")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--device", "a"], "--device 'a': is not NAME=TABLE"),
        (["--device", "=0 8 zero"], "--device '=0 8 zero': is not NAME=TABLE"),
        (["--device", "a=0 8 zero", "--device", "a=0 8 zero"], "--device 'a=0 8 zero': given twice"),
        (["--run", "true", "--listen", "nbd://h"], "--run serves on a private socket and does not go together with --listen"),
        (["--listen", "nbd://h/e"], "--listen 'nbd://h/e': an export ('e') has no place in a URI to listen on"),
        (["-v", "-q"], "--verbose and --quiet do not go together"),
    ],
)
def test_usage(directory: Path, arguments: list[str], problem: str) -> None:
    assert serve(directory, *arguments) == (2, f"nbdmap serve: {problem}\n")


# --- signals ---------------------------------------------------------------------------------------------------------------


def test_a_reload_under_a_client(directory: Path) -> None:
    file = directory / "c.yaml"
    file.write_text(DISKS + "devices: {a: {table: 0 2048 linear d0 0}, old: {table: 0 8 zero}}")
    with process(directory, "c.yaml", "--listen", listening(directory)) as made:
        made.expect("export 'old'")
        script = (
            "import os, signal, sys\n"
            "h.pwrite(b'0' * 512, 0)\n"
            f"open({str(file)!r}, 'w').write({DISKS + 'devices: {a: {table: 0 2048 linear d1 0}}'!r})\n"
            f"os.kill({made.popen.pid}, signal.SIGHUP)\n"
            "while h.pread(512, 0) != bytes(512): pass\n"
            "h.pwrite(b'1' * 512, 0); assert h.pread(512, 0) == b'1' * 512\n"
        )
        nbdsh(script, f"nbd+unix:///a?socket={directory}/nbd.sock")
        made.expect("reloaded c.yaml: all done")
        assert "old: removed" in made.log
        assert run("nbdinfo", "--list", listening(directory)).count("export=") == 1
        file.write_text("devices: {a: {tabel: x}}")
        made.popen.send_signal(signal.SIGHUP)
        made.expect(r"c.yaml:1:15: devices.a.tabel: unknown key \(did you mean 'table'\?\)\n(.*\n)*.*nothing was reloaded")
        file.write_text(f"admin: elsewhere\n{DISKS}devices: {{a: {{table: 0 8 linear gone 0}}, new: {{table: 0 8 zero}}}}")
        made.popen.send_signal(signal.SIGHUP)
        made.expect("reloaded c.yaml: 1 problems")
        assert "warning: admin has changed; that takes a restart\n" in made.log
        assert "error: c.yaml:3:22: devices.a.table: line 1: linear: gone: no mapped device" in made.log
        assert run("nbdinfo", "--list", listening(directory)).count("export=") == 2
        made.popen.terminate()
        assert made.end() == 0


def test_a_reload_renews_certificates(directory: Path) -> None:
    make_certificates(directory / "tls")
    config = "listen: nbds://localhost:0\ntls: {certificates: tls}\ndevices: {a: {table: 0 8 zero}}"
    (directory / "c.yaml").write_text(config)
    with process(directory, "c.yaml") as made:
        uri = f"{made.expect('listening on (nbds://.*)')[1]}/a?tls-certificates={directory}/"
        assert run("nbdinfo", "--size", uri + "tls") == "4096\n"
        make_certificates(directory / "new")
        assert attempt("nbdinfo", "--size", uri + "new").returncode == 1
        (directory / "tls").rename(directory / "old")
        made.popen.send_signal(signal.SIGHUP)
        made.expect("tls/server-cert.pem is missing\n.*nothing was reloaded")
        (directory / "new").rename(directory / "tls")
        made.popen.send_signal(signal.SIGHUP)
        made.expect("reloaded c.yaml: all done")
        assert run("nbdinfo", "--size", uri + "tls") == "4096\n"
        assert attempt("nbdinfo", "--size", uri + "old").returncode == 1
        made.popen.terminate()
        assert made.end() == 0


def test_a_storm_of_signals_does_no_harm(directory: Path) -> None:
    (directory / "c.yaml").write_text(DISKS + "devices: {a: {table: 0 8 linear d0 0}}")
    with process(directory, "c.yaml", "--listen", listening(directory)) as made:
        made.expect("export 'a'")
        for _ in range(300):
            made.popen.send_signal(signal.SIGHUP)
        made.expect("reloaded c.yaml: all done")
        assert run("nbdinfo", "--size", listening(directory)) == "4096\n"
        for _ in range(20):
            made.popen.send_signal(signal.SIGHUP)
            made.popen.send_signal(signal.SIGTERM)
            made.popen.send_signal(signal.SIGINT)
        begun = time.monotonic()
        assert made.end() == 0
        assert time.monotonic() - begun < 2.0


def test_without_a_file_there_is_nothing_to_reload(directory: Path) -> None:
    with process(directory, "--device", "a=0 8 zero", "--listen", listening(directory)) as made:
        made.expect("export 'a'")
        made.popen.send_signal(signal.SIGHUP)
        made.expect("there is no configuration file to reload")
        made.popen.send_signal(signal.SIGINT)
        assert made.end() == 0


@contextlib.contextmanager
def stuck(directory: Path) -> Iterator[Process]:
    """A server with a request in flight that does not end: its device is suspended."""
    with process(directory, "--device", "a=0 8 zero", "--listen", listening(directory), "--pidfile", "pid") as made:
        made.expect("export 'a'")
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "NBDMAP_SOCKET": str(directory / "admin.sock")}
        subprocess.run([*PROGRAM, "suspend", "a"], env=environment, check=True)
        script = (
            "h.set_strict_mode(0); h.connect_uri(URI); b = nbd.Buffer(512); h.aio_pread(b, 0)\n"
            "try: h.pread(512, 1 << 40)\n"
            "except nbd.Error: print('refused, so the first is inside', flush=True)\n"
            "h.poll(-1)"
        )
        with subprocess.Popen(
            [need("nbdsh", "python3-libnbd"), "-c", f"URI = {listening(directory)!r}", "-c", script],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment_of_clients(),
        ) as client:  # fmt: skip
            try:
                assert client.stdout
                assert b"inside" in client.stdout.readline()
                yield made
            finally:
                client.kill()


def test_it_ends_within_two_seconds_whatever_is_in_flight(directory: Path) -> None:
    with stuck(directory) as made:
        begun = time.monotonic()
        made.popen.terminate()
        assert made.end() == 0
        assert time.monotonic() - begun < 2.0
    assert list(directory.iterdir()) == []


def test_a_second_signal_ends_it_at_once(directory: Path) -> None:
    with stuck(directory) as made:
        while made.popen.poll() is None:
            made.popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                made.popen.wait(0.05)
        assert made.popen.returncode == 128 + signal.SIGTERM
    assert not (directory / "pid").exists()


def test_it_ends_with_the_process_that_started_it(directory: Path) -> None:
    starter = (
        "import subprocess, sys\n"
        "server = subprocess.Popen([sys.executable, '-m', 'nbdmap', 'serve', '--exit-with-parent', *sys.argv[1:]])\n"
        "print(server.pid, flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "NBDMAP_SOCKET": str(directory / "admin.sock")}
    with subprocess.Popen(
        [sys.executable, "-c", starter, "--device", "a=0 8 zero", "--listen", listening(directory)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    ) as parent:  # fmt: skip
        assert parent.stdin
        assert parent.stdout
        assert parent.stderr
        ended = os.pidfd_open(int(parent.stdout.readline()))
        try:
            assert any(b"export 'a'" in line for line in parent.stderr)
            parent.stdin.close()
            assert select.select([ended], [], [], SECONDS)[0]
        finally:
            os.close(ended)

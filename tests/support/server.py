"""A real `nbdmap serve` process for tests, and the verbs that drive it.

    with serving("disks: {ram0: {memory: 64MiB}}\ndevices: {lin: {table: 0 8 linear ram0 0}}") as server:
        run("nbdinfo", server.uri("lin"))

It listens on a Unix socket in a directory of its own (and wherever the test says), so that many may run at once. Readiness
is what it tells the service manager (sd_notify), its end a pidfd: nothing sleeps. When the block ends it is stopped with
SIGTERM, and must end with 0 within STOP_SECONDS and without a traceback.
"""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

START_SECONDS: Final = 20.0
STOP_SECONDS: Final = 4.0
"""The server promises 2 s, on a machine that has time for it."""
REPOSITORY: Final = Path(__file__).resolve().parents[2]
PROGRAM: Final = (sys.executable, "-m", "nbdmap")

_TROUBLE: Final = re.compile(r"Traceback|never retrieved|never awaited|internal error|failed unexpectedly|Exception ignored")


class Server:
    """One process. `directory` is its own, and where relative paths of its configuration start."""

    def __init__(self, directory: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.directory = directory
        self.socket = directory / "nbd.sock"
        self.admin = directory / "admin.sock"
        self.pidfile = directory / "pid"
        self._log = directory / "log"
        self.environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "NBDMAP_SOCKET": str(self.admin), **environment}
        self._arguments = arguments
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        """Starts it and returns when it is ready. AssertionError, with what it wrote, when it ends instead."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as readiness:
            address = self.directory / "notify"
            address.unlink(missing_ok=True)
            readiness.bind(str(address))
            with self._log.open("ab") as log:
                self.process = subprocess.Popen(
                    [*PROGRAM, "serve", "--pidfile", str(self.pidfile), *self._arguments],
                    env={**self.environment, "NOTIFY_SOCKET": str(address)},
                    cwd=self.directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                )  # fmt: skip
            ended = os.pidfd_open(self.process.pid)
            try:
                while True:
                    ready, _, _ = select.select([readiness.fileno(), ended], [], [], START_SECONDS)
                    if ended in ready or not ready:
                        self.process.kill()
                        status = self.process.wait()
                        raise AssertionError(f"nbdmap serve did not get ready (exit status {status}):\n{self.log()}")
                    if b"READY=1" in readiness.recv(4096).split(b"\n"):
                        break
            finally:
                os.close(ended)
        assert self.pidfile.read_text() == f"{self.process.pid}\n"

    def stop(self) -> None:
        """Ends it as an operator would, and checks that it ended as it should."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            status = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            self.process.wait()
            raise AssertionError(f"nbdmap serve did not end within {STOP_SECONDS} s of SIGTERM:\n{self.log()}") from None
        assert status == 0, f"exit status {status}:\n{self.log()}"
        assert not _TROUBLE.search(self.log()), self.log()

    def kill(self) -> None:
        """What a crash is: no time to write anything."""
        self.process.kill()
        self.process.wait()

    def log(self) -> str:
        """What it wrote on stdout and stderr so far."""
        return self._log.read_text(errors="replace")

    # --- where clients go --------------------------------------------------------------------------------------------

    def uri(self, export: str = "") -> str:
        """The URI of an export on the Unix socket."""
        return f"nbd+unix:///{quote(export, safe='')}?socket={self.socket}"

    def addresses(self) -> list[str]:
        """HOST:PORT of each TCP address that it listens on, in the order of the configuration."""
        return re.findall(r"listening on nbds?://(\S+:\d+)", self.log())

    def tcp(self, export: str = "", scheme: str = "nbd") -> str:
        """The URI of an export at the first of these addresses."""
        return f"{scheme}://{self.addresses()[0]}/{quote(export, safe='')}"

    # --- verbs -------------------------------------------------------------------------------------------------------

    def verb(self, *arguments: str, stdin: str = "", timeout: float = 30) -> str:
        """What `nbdmap ARGUMENTS...` prints; it must succeed."""
        done = self.try_verb(*arguments, stdin=stdin, timeout=timeout)
        assert done.returncode == 0, f"nbdmap {' '.join(arguments)}: status {done.returncode}: {done.stderr}\n{self.log()}"
        return done.stdout

    def try_verb(self, *arguments: str, stdin: str = "", timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """`nbdmap ARGUMENTS...`, however it ends."""
        return subprocess.run(
            [*PROGRAM, *arguments], env=self.environment, cwd=self.directory, input=stdin,
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip


class Admin:
    """A connection to a server's admin socket: the same verbs, hundreds of times faster than by the command line."""

    def __init__(self, server: Server) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(str(server.admin))
        self._lines = self._socket.makefile("rb")

    def __enter__(self) -> "Admin":
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()

    def call(self, method: str, **params: object) -> Any:
        """The result of a verb, which must succeed."""
        self._socket.sendall(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode() + b"\n")
        answer = json.loads(self._lines.readline())
        assert "result" in answer, answer
        return answer["result"]


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """A new directory whose name is short enough for the path of a Unix socket."""
    directory = Path(tempfile.mkdtemp(prefix="nbdmap-", dir="/tmp"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@contextlib.contextmanager
def serving(
    config: str = "",
    *,
    listen: Sequence[str] = (),
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> Iterator[Server]:
    """A server of the disks and devices in `config` (YAML), on its Unix socket and on `listen`; stopped at the end."""
    with contextlib.ExitStack() as stack:
        directory = directory or stack.enter_context(private_directory())
        uris = [f"nbd+unix:///?socket={directory}/nbd.sock", *listen]
        (directory / "c.yaml").write_text(f"listen: {uris}\nadmin: {directory}/admin.sock\n{config}")
        server = Server(directory, ["c.yaml", *arguments], environment or {})
        server.start()
        try:
            yield server
        except BaseException:
            if server.process.poll() is None:
                server.kill()
            sys.stderr.write(server.log())
            raise
        else:
            server.stop()

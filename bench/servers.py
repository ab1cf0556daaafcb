"""The servers that are compared, and how each is started on the same file over the same transport.

Each is run as its documentation recommends for a plain file: nbdkit with its file plugin, qemu-nbd with the page cache
(`--cache=writeback`), nbd-server with flush, FUA and trim. What a server cannot do it says by raising Unable.
"""

import contextlib
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from bench.processes import Failed, Process, running
from bench.site import REPOSITORY, Backing, Site
from nbdmap.units import SECTOR

START_SECONDS: Final = 20.0
COMPILED: Final = REPOSITORY / "build" / "compiled"
"""Where `make compiled` puts the package; what is measured as `nbdmap`, if it is there."""
EXPORT: Final = "disk"


class Transport(StrEnum):
    """How a client reaches a server."""

    UNIX = "unix"
    TCP = "tcp"
    TLS = "tls"


class Unable(Exception):
    """A server, or a client with it, cannot take part in a row; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where one server listens, and what it serves."""

    site: Site
    transport: Transport
    backing: Backing
    socket: Path
    port: int

    @property
    def admin(self) -> Path:
        """nbdmap's admin socket."""
        return self.socket.with_suffix(".admin")

    @property
    def tls(self) -> bool:
        """Whether TLS is required."""
        return self.transport is Transport.TLS

    @property
    def unix(self) -> bool:
        """Whether it is a Unix socket."""
        return self.transport is Transport.UNIX

    def uri(self, export: str) -> str:
        """For libnbd."""
        if self.unix:
            return f"nbd+unix:///{export}?socket={self.socket}"
        return f"nbds://localhost:{self.port}/{export}" if self.tls else f"nbd://127.0.0.1:{self.port}/{export}"

    @property
    def file(self) -> str:
        """The path of what is served."""
        return str(self.site.file(self.backing))


def _nbdkit(place: Place) -> list[str]:
    where = ["-U", str(place.socket)] if place.unix else ["-i", "127.0.0.1", "-p", str(place.port)]
    tls = ["--tls=require", f"--tls-certificates={place.site.certificates}"] if place.tls else []
    what = ["file", place.file]
    if place.backing is Backing.MEMORY:
        what = ["memory", str(place.site.size)]
    return ["nbdkit", "-f", "-e", EXPORT, *where, *tls, *what]


def _qemu_nbd(place: Place) -> list[str]:
    where = ["-k", str(place.socket)] if place.unix else ["-b", "127.0.0.1", "-p", str(place.port)]
    tls: list[str] = []
    if place.tls:
        credentials = f"tls-creds-x509,id=tls0,endpoint=server,verify-peer=no,dir={place.site.certificates}"
        tls = ["--object", credentials, "--tls-creds", "tls0"]
    return ["qemu-nbd", "--cache=writeback", "-f", "raw", "-t", "-e", "16", "-x", EXPORT, *where, *tls, place.file]


def _nbd_server(place: Place) -> list[str]:
    where = f"unixsock = {place.socket}" if place.unix else f"listenaddr = 127.0.0.1\nport = {place.port}"
    if place.tls:
        files = {"cacertfile": "ca-cert", "certfile": "server-cert", "keyfile": "server-key"}
        where += "\nforce_tls = true" + "".join(f"\n{key} = {place.site.certificates}/{name}.pem" for key, name in files.items())
    config = place.site.unique("nbd-server.conf")
    config.write_text(
        f"[generic]\n{where}\n[{EXPORT}]\nexportname = {place.file}\nflush = true\nfua = true\ntrim = true\nrotational = false\n"
    )
    return ["nbd-server", "-C", str(config)]


STACK: Final = """
  left0: {{table: "0 {half} linear back 0", export: false}}
  right0: {{table: "0 {half} linear back {half}", export: false}}
  left1: {{table: "0 {half} linear left0 0", export: false}}
  right1: {{table: "0 {half} linear right0 0", export: false}}
  {export}: {{table: "0 {whole} striped 2 128 left1 0 right1 0"}}
"""
"""striped over two linears over linears."""


def nbdmap_config(place: Place) -> str:
    """The configuration file of a server of one export."""
    sectors = place.site.size_of(place.backing) // SECTOR
    disk = f"memory: {place.site.size}" if place.backing is Backing.MEMORY else f"file: {place.file}"
    where = f"nbd+unix:///?socket={place.socket}" if place.unix else f"nbd{'s' * place.tls}://127.0.0.1:{place.port}"
    devices = f"\n  {EXPORT}: {{table: 0 {sectors} linear back 0}}\n"
    if place.backing is Backing.STACK:
        devices = STACK.format(half=sectors // 2, whole=sectors, export=EXPORT)
    tls = f"tls: {{certificates: {place.site.certificates}}}\n" if place.tls else ""
    return f"listen: ['{where}']\nadmin: {place.admin}\n{tls}disks: {{back: {{{disk}}}}}\ndevices: {devices}"


def _nbdmap(place: Place) -> list[str]:
    config = place.site.unique("nbdmap.yaml")
    config.write_text(nbdmap_config(place))
    return [sys.executable, "-m", "nbdmap", "serve", "-q", str(config)]


PURE: Final = "nbdmap, pure Python"

PROGRAMS: Final[dict[str, Callable[[Place], list[str]]]] = {
    "nbdmap": _nbdmap, "nbdkit": _nbdkit, "qemu-nbd": _qemu_nbd, "nbd-server": _nbd_server,
}  # fmt: skip


@dataclass(frozen=True)
class Contestant:
    """A server in a row: the program, what it serves where that is not the row's, and so how it is called."""

    name: str
    program: str
    backing: Backing | None = None
    command: Callable[[Place], list[str]] | None = None
    """How the program is started, where that is not as in PROGRAMS."""


ALL: Final = tuple(Contestant(name, name) for name in PROGRAMS)
NBDMAP, NBDKIT, QEMU_NBD, NBD_SERVER = ALL
WITH_PURE: Final = (NBDMAP, Contestant(PURE, "nbdmap"), NBDKIT, QEMU_NBD, NBD_SERVER)
STACKED: Final = Contestant("nbdmap, stacked", "nbdmap", Backing.STACK)


class Server:
    """A server that runs."""

    def __init__(self, contestant: Contestant, process: Process, place: Place) -> None:
        self.contestant = contestant
        self.name = contestant.name
        self.process = process
        self.place = place
        self.uri = place.uri(EXPORT)
        self.asks_certificate = place.tls and self.name == NBD_SERVER.name
        """It lets in no client without a certificate."""


def new_place(site: Site, transport: Transport, backing: Backing) -> Place:
    """A place of its own: a path, and a port that is free."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return Place(site, transport, backing, site.unique("nbd.sock"), one.getsockname()[1])


def wait_until_up(place: Place, process: Process) -> None:
    """Returns when it accepts clients."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        with socket.socket(socket.AF_UNIX if place.unix else socket.AF_INET) as one:
            try:
                one.connect(str(place.socket) if place.unix else ("127.0.0.1", place.port))
                return
            except OSError:
                if time.monotonic() > deadline or not process.alive():
                    raise Failed(f"it does not get ready: {process.said()}") from None
                time.sleep(0.02)


@contextlib.contextmanager
def serving(site: Site, contestant: Contestant, transport: Transport, backing: Backing) -> Iterator[Server]:
    """A server for the length of a block. Raises Unable when it cannot do that, Failed when it does not start."""
    name = contestant.program
    if name != "nbdmap" and shutil.which(name) is None:
        raise Unable(f"{name} is not installed")
    place = new_place(site, transport, contestant.backing or backing)
    command = (contestant.command or PROGRAMS[name])(place)
    pidfile = None
    if name == "nbd-server":  # makes itself a daemon: in the foreground it serves one client only
        pidfile = site.unique("pid")
        command += ["-p", str(pidfile)]
    package = COMPILED if contestant.name != PURE and COMPILED.is_dir() else REPOSITORY
    with running(command, site.unique(f"{name}.log"), pidfile=pidfile, environment={"PYTHONPATH": str(package)}) as process:
        wait_until_up(place, process)
        yield Server(contestant, process, place)

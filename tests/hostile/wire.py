"""What hostile clients share: blocking sockets that say exactly what they are told, and what they do to a process.

They speak to a real `nbdmap serve`; a deadline on every socket turns a hang into a failure.
"""

import contextlib
import os
import re
import resource
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Self

import pytest

from nbdmap.nbd import constants as nbd
from nbdmap.nbd.constants import Info, Opt, Rep
from tests.support import server as processes
from tests.support.handshake import BOTH, info, option
from tests.support.server import Server, serving

SECONDS: Final = 10.0
MIB: Final = 1 << 20
HERE: Final = Path(__file__).parent
LONGEST_NAME: Final = "n" * 4096

CONFIG: Final = f"""
disks:
  mem: {{memory: 64MiB}}
  file: {{file: a.img, size: 64MiB, create: true}}
devices:
  ram: {{table: 0 131072 linear mem 0}}
  img: {{table: 0 131072 linear file 0}}
  zero: {{table: 0 17179869184 zero}}
  long: {{table: 0 8 zero, export: {{name: {LONGEST_NAME}, description: {"d" * 4096}}}}}
"""

Address = str | Path | tuple[str, int]


class Raw:
    """A client that does what none should."""

    def __init__(self, where: Address, seconds: float = SECONDS) -> None:
        self.socket = socket.socket(socket.AF_INET if isinstance(where, tuple) else socket.AF_UNIX)
        self.socket.settimeout(seconds)
        self.socket.connect(where if isinstance(where, tuple) else str(where))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """All of it; a server that has closed meanwhile is no failure here."""
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            more = self.socket.recv(min(count - len(data), MIB))
            assert more, f"the server has closed after {bytes(data[:64])!r}"
            data += more
        return bytes(data)

    def rest(self) -> bytes:
        """Everything until the server closes; TimeoutError when it does not."""
        data = bytearray()
        with contextlib.suppress(ConnectionError):
            while more := self.socket.recv(MIB):
                data += more
        return bytes(data)

    def reset(self) -> None:
        """Leaves without a good-bye: TCP says RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    # --- handshake -----------------------------------------------------------------------------------------------------

    def greet(self, flags: bytes = BOTH) -> Self:
        assert self.exactly(18).startswith(b"NBDMAGICIHAVEOPT")
        self.send(flags)
        return self

    def replies(self) -> list[tuple[int, int, bytes]]:
        """(option, type, data) up to the final one."""
        found = []
        while True:
            magic, number, kind, length = nbd.OPTION_REPLY.unpack(self.exactly(20))
            assert magic == nbd.REPLY_MAGIC
            assert kind < 2**31 or length <= nbd.MAX_STRING, "an error's text is short"
            found.append((number, kind, self.exactly(length)))
            if kind == Rep.ACK or kind >= 2**31:
                return found

    def ask(self, number: int, data: bytes = b"") -> int:
        """Sends an option: the type of its last reply."""
        self.send(option(number, data))
        found = self.replies()
        assert {answered for answered, _, _ in found} == {number}
        return found[-1][1]

    def go(self, name: str = "", options: Sequence[int] = ()) -> Self:
        """Into transmission."""
        self.greet()
        for number in options:
            query = b"base:allocation"
            raw = name.encode()
            contexts = struct.pack(">I", len(raw)) + raw + struct.pack(">II", 1, len(query)) + query
            assert self.ask(number, contexts if number == Opt.SET_META_CONTEXT else b"") == Rep.ACK
        assert self.ask(Opt.GO, info(name, Info.BLOCK_SIZE)) == Rep.ACK
        return self

    # --- transmission --------------------------------------------------------------------------------------------------

    def simple(self, length: int = 0) -> tuple[int, int, bytes]:
        """error, cookie, data"""
        magic, error, cookie = nbd.SIMPLE_REPLY.unpack(self.exactly(16))
        assert magic == nbd.SIMPLE_REPLY_MAGIC
        return error, cookie, self.exactly(0 if error else length)

    def read(self, offset: int = 0, length: int = 512) -> bytes:
        self.send(request(nbd.Cmd.READ, 1, offset, length))
        error, cookie, data = self.simple(length)
        assert (error, cookie) == (0, 1)
        return data


def request(command: int, cookie: int = 1, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> bytes:
    """A request as it is sent with simple or structured replies."""
    return nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, command, cookie, offset, length) + payload


def serves(server: Server, export: str = "ram") -> None:
    """A new client is served: the server lives."""
    with Raw(server.socket) as client:
        assert len(client.go(export).read()) == 512


# --- the process ---------------------------------------------------------------------------------------------------------


def tcp(server: Server) -> tuple[str, int]:
    host, _, port = server.addresses()[0].rpartition(":")
    return host, int(port)


def resident(server: Server) -> int:
    """Bytes of memory it has now."""
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", text)[0]) << 10


def cpu_seconds(server: Server) -> float:
    words = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def descriptors(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def openers(server: Server) -> dict[str, int]:
    """How often each device is open."""
    with processes.Admin(server) as admin:
        return {device["name"]: device["open"] for device in admin.call("info")}


def raise_descriptor_limit(wanted: int) -> None:
    """For this process and those it starts; the test is skipped where the hard limit forbids it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"the hard limit of descriptors is {hard}; {wanted} are needed")
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextlib.contextmanager
def hasty(seconds: float, config: str = CONFIG, listen: Sequence[str] = ()) -> Iterator[Server]:
    """A server whose handshake deadline is shorter than the real one."""
    program = processes.PROGRAM
    with contextlib.ExitStack() as stack:
        processes.PROGRAM = (*program[:2], "tests.hostile.hasty")  # type: ignore[misc]
        try:
            running = serving(config, listen=listen, environment={"HANDSHAKE_SECONDS": str(seconds)})
            server = stack.enter_context(running)
        finally:
            processes.PROGRAM = program  # type: ignore[misc]
        yield server

"""What the clients of one server have in common: the exports that they may choose, memory, and bounds for all together."""

import asyncio
import socket
from typing import TYPE_CHECKING, Final, Protocol

from nbdmap.block.buffers import Buffers
from nbdmap.block.device import Device
from nbdmap.nbd.handshake import Exports
from nbdmap.nbd.transmission import ReceiveBuffer
from nbdmap.server.poll import BusyPoll
from nbdmap.units import MIB

if TYPE_CHECKING:
    from nbdmap.server.connection import Connection

MAX_UNSENT_TOGETHER: Final = 1024 * MIB
"""Of all clients that do not read their replies; beyond it the one that has not read for longest is dropped."""

SEND_BUFFER: Final = MIB
"""Asked of the kernel for a Unix socket: a client that must come twice for a reply of 1 MiB gets half as many."""


class DeviceExports(Exports, Protocol):
    """What the server serves: exports to negotiate, and the devices behind them."""

    def open(self, name: str) -> Device:
        """The device of the export with this canonical name, one opener more. Raises NotFound or Busy."""
        ...

    async def release(self, device: Device) -> None:
        """Takes back one `open`."""
        ...


class Shared:
    """What all clients of one server share: the set of them, and memory, which an idle client needs none of."""

    def __init__(self) -> None:
        self.clients: set[Connection] = set()
        self.closed = False
        """The server has stopped: who was accepted in its last moment is not served."""
        self.buffers = Buffers()
        self.receive = ReceiveBuffer()
        self.poll = BusyPoll()
        self._choked: dict[Connection, None] = {}  # whose replies are not read, the longest first

    def choke(self, client: "Connection") -> None:
        """A client holds more than MAX_UNSENT; the oldest of those go when all of them hold too much."""
        self._choked[client] = None
        held = {one: one.unsent() for one in self._choked}
        together = sum(held.values())
        for one in list(held):
            if together <= MAX_UNSENT_TOGETHER:
                break
            together -= held[one]
            one.drop_unread()

    def unchoke(self, client: "Connection") -> None:
        """It reads again, or is gone."""
        self._choked.pop(client, None)


def widen(transport: asyncio.Transport) -> None:
    """Lets the kernel take a large reply whole, where it does not find that size by itself, as it does for TCP."""
    connected = transport.get_extra_info("socket")
    if connected is not None and connected.family == socket.AF_UNIX:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)


def peer_name(transport: asyncio.Transport) -> str:
    """How logs call the client."""
    peer = transport.get_extra_info("peername")
    return f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "unix client"

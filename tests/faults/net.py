"""Unix sockets in memory on the virtual loop: the real Listener and the tests' client talk over them, in virtual time.

What is written arrives in the next turn of the loop. A listening socket is a real one, never connected to.
"""

import asyncio
import socket
from typing import TYPE_CHECKING, Any, cast

from tests.crash.clock import VirtualLoop

if TYPE_CHECKING:
    from collections.abc import Callable


class MemoryTransport(asyncio.Transport):
    """One end of a connection."""

    def __init__(self, loop: asyncio.AbstractEventLoop, protocol: asyncio.BaseProtocol) -> None:
        super().__init__()
        self._loop = loop
        self._protocol = protocol
        self._arrived = bytearray()
        self._paused = False
        self._closing = False
        self._eof = False  # the other end will send no more
        self._lost = False
        self.other: MemoryTransport

    def start(self) -> None:
        """The connection is made."""
        self._protocol.connection_made(self)

    def write(self, data: Any) -> None:
        if not self._closing and not self.other._lost:
            self.other._arrived += data
            self._loop.call_soon(self.other._deliver)

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """There are none."""

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        self._loop.call_soon(self._deliver)

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self._lose)

    def abort(self) -> None:
        self.close()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def can_write_eof(self) -> bool:
        return False

    def _lose(self) -> None:
        if not self._lost:
            self._lost = True
            self._protocol.connection_lost(None)
            self.other._eof = True
            self._loop.call_soon(self.other._deliver)

    def _deliver(self) -> None:
        protocol = self._protocol
        while self._arrived and not self._paused and not self._closing:
            if isinstance(protocol, asyncio.BufferedProtocol):
                into = cast("memoryview", protocol.get_buffer(-1))
                count = min(len(into), len(self._arrived))
                into[:count] = self._arrived[:count]
                del self._arrived[:count]
                protocol.buffer_updated(count)
            else:
                data = bytes(self._arrived)
                self._arrived.clear()
                cast("asyncio.Protocol", protocol).data_received(data)
        if self._eof and not self._arrived and not self._closing:
            self._eof = False
            if not cast("asyncio.Protocol", protocol).eof_received():
                self.close()


class MemoryServer:
    """What `create_unix_server` returns."""

    def __init__(self, loop: "NetLoop", listening: socket.socket) -> None:
        self._loop = loop
        self._listening = listening
        self.path: str = listening.getsockname()

    def close(self) -> None:
        self._loop.servers.pop(self.path, None)
        self._listening.close()


class NetLoop(VirtualLoop):
    """A virtual loop with Unix sockets."""

    def __init__(self) -> None:
        super().__init__()
        self.servers: dict[str, Callable[[], asyncio.BaseProtocol]] = {}

    async def create_unix_server(self, protocol_factory: Any, path: Any = None, *, sock: Any = None, **_: Any) -> Any:
        self.servers[sock.getsockname()] = protocol_factory
        return MemoryServer(self, sock)

    async def create_unix_connection(self, protocol_factory: Any, path: Any = None, **_: Any) -> Any:
        if path not in self.servers:
            raise ConnectionRefusedError(path)
        protocol = protocol_factory()
        here = MemoryTransport(self, protocol)
        there = MemoryTransport(self, self.servers[path]())
        here.other, there.other = there, here
        here.start()
        there.start()
        return here, protocol

"""Listening sockets, and the clients that came through them.

Listens on `nbd://HOST:PORT`, `nbds://` (TLS required), `nbd+unix:///?socket=PATH` and on sockets that systemd passes.
Nothing of a device is touched before a client has chosen an export.
"""

import asyncio
import errno
import logging
import os
import socket
import ssl
import stat
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from nbdmap.errors import InvalidArgument, IoFailed, from_os_error
from nbdmap.nbd.handshake import TlsMode
from nbdmap.nbd.uri import Uri
from nbdmap.server.connection import Connection, DeviceExports, Shared

BACKLOG: Final = 1024
GRACE_SECONDS: Final = 1.2
"""How long requests in flight may take to finish when the server stops."""

log = logging.getLogger(__name__)


class Listener:
    """All sockets of one server and their clients."""

    def __init__(self, exports: DeviceExports, context: ssl.SSLContext | None, tls_required: bool) -> None:
        self._exports = exports
        self._context = context
        self._tls_required = tls_required
        self._servers: list[asyncio.Server] = []
        self._paths: list[str] = []
        self._waiting: list[tuple[socket.socket, TlsMode]] = []
        self._shared = Shared()
        self.clients = self._shared.clients
        self.uris: list[Uri] = []
        """Where it listens, with the port that was really taken."""

    def _mode(self, tls: bool) -> TlsMode:
        if self._context is None:
            if tls or self._tls_required:
                raise InvalidArgument("TLS is required, but no certificates are given (tls: certificates)")
            return TlsMode.OFF
        return TlsMode.REQUIRED if tls or self._tls_required else TlsMode.OFFERED

    async def listen(self, uri: Uri, *, accept: bool = True) -> None:
        """Begins to listen at `uri`. Port 0 takes a free one. Without `accept` clients wait in line until `accept` is
        called, so that an address is taken before the first disk is opened. Raises IoFailed naming the address."""
        mode = self._mode(uri.tls)
        if uri.socket:
            sockets = [_unix_socket(uri.socket)]
            self._paths.append(uri.socket)
        else:
            sockets = await _tcp_sockets(uri.host, uri.port)
        for one in sockets:
            self._put(one, mode)
        if accept:
            await self.accept()
        port = uri.port if uri.socket else sockets[0].getsockname()[1]
        self.uris.append(replace(uri, port=port, tls=mode is TlsMode.REQUIRED))

    async def adopt(self, descriptors: Sequence[int], *, accept: bool = True) -> None:
        """Listens on sockets that were passed in (systemd socket activation). Only TCP and Unix streams are taken."""
        for descriptor in descriptors:
            one = socket.socket(fileno=descriptor)
            if one.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX) or one.type != socket.SOCK_STREAM:
                raise InvalidArgument(f"descriptor {descriptor} is neither a TCP nor a Unix stream socket")
            self._put(one, self._mode(False))
        if accept:
            await self.accept()

    def _put(self, listening: socket.socket, mode: TlsMode) -> None:
        listening.setblocking(False)
        try:
            listening.listen(BACKLOG)
        except OSError as error:
            where = f"listen on {listening.getsockname()}"
            listening.close()
            raise from_os_error(error, where) from error
        self._waiting.append((listening, mode))

    async def accept(self) -> None:
        """Lets in the clients of every socket that does not accept yet."""
        while self._waiting:
            await self._serve(*self._waiting.pop(0))

    def renew(self, context: ssl.SSLContext) -> None:
        """Clients that come from now on get this context: certificates are renewed without a restart."""
        self._context = context

    async def _serve(self, listening: socket.socket, mode: TlsMode) -> None:
        loop = asyncio.get_running_loop()

        def connection() -> Connection:
            return Connection(self._exports, mode, self._context, self._shared)

        if listening.family == socket.AF_UNIX:
            server = await loop.create_unix_server(connection, sock=listening, backlog=BACKLOG)
        else:
            server = await loop.create_server(connection, sock=listening, backlog=BACKLOG)
        self._servers.append(server)

    async def close(self) -> None:
        """Stops accepting, lets requests in flight finish for GRACE_SECONDS, cancels them, then drops every client."""
        for server in self._servers:
            server.close()
        for listening, _ in self._waiting:
            listening.close()
        for path in self._paths:
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
        clients = list(self.clients)
        for client in clients:
            client.shut_down()
        waiting = [asyncio.ensure_future(client.wait_closed()) for client in clients]
        for step in (None, Connection.cancel, Connection.abort):
            if step is not None:
                for client in list(self.clients):
                    step(client)
            if waiting:
                await asyncio.wait(waiting, timeout=GRACE_SECONDS if step is None else GRACE_SECONDS / 8)
        for task in waiting:
            task.cancel()


async def _tcp_sockets(host: str, port: int) -> list[socket.socket]:
    """One listening socket for each address of `host`; with port 0 all take the port of the first."""
    loop = asyncio.get_running_loop()
    where = f"listen on {host}:{port}"
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise IoFailed(f"{where}: {error.strerror or error}", errno.EADDRNOTAVAIL) from error
    sockets: list[socket.socket] = []
    for family, kind, protocol, _, address in dict.fromkeys(found):
        one = socket.socket(family, kind, protocol)
        sockets.append(one)
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # accepted sockets inherit it, on every loop
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((address[0], port, *address[2:]))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL and len(found) > len(sockets):
                sockets.pop().close()  # "localhost" names ::1 on machines without IPv6
                continue
            for other in sockets:
                other.close()
            raise from_os_error(error, where) from error
        port = port or one.getsockname()[1]
    return sockets


def _unix_socket(path: str) -> socket.socket:
    """A listening Unix socket; one that was left behind by a dead server is replaced, a live one is not."""
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            one.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_stale(path):
                raise
            os.unlink(path)
            one.bind(path)
    except OSError as error:
        one.close()
        raise from_os_error(error, f"listen on {path}") from error
    return one


def _is_stale(path: str) -> bool:
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
    return False

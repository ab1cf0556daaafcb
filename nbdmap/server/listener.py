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
from nbdmap.server.connection import Connection
from nbdmap.server.shared import DeviceExports, Shared

BACKLOG: Final = 1024
KEEPALIVE_SECONDS: Final = 120
"""A TCP client that says nothing for so long is asked whether it is still there; one that is not is forgotten."""
PORT_TRIES: Final = 16
"""Free ports of the first address that are tried on the others."""
GRACE_SECONDS: Final = 0.8
"""How long requests in flight may take to finish when the server stops."""

log = logging.getLogger(__name__)


class Listener:
    """All sockets of one server and their clients."""

    def __init__(self, exports: DeviceExports, context: ssl.SSLContext | None, tls_required: bool) -> None:
        self._exports = exports
        self._context = context
        self._tls_required = tls_required
        self._servers: list[asyncio.Server] = []
        self._paths: dict[str, tuple[int, int]] = {}  # device and inode of each Unix socket: only our own are taken away
        self._waiting: list[tuple[socket.socket, TlsMode]] = []
        self._shared = Shared()
        self.clients = self._shared.clients
        self.poll = self._shared.poll
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
            listening = _unix_socket(uri.socket)
            status = os.stat(uri.socket)
            self._paths[uri.socket] = status.st_dev, status.st_ino
            sockets = [listening]
        else:
            sockets = await _tcp_sockets(uri.host, uri.port)
        port = uri.port if uri.socket else sockets[0].getsockname()[1]
        self.uris.append(replace(uri, port=port, tls=mode is TlsMode.REQUIRED))
        self._waiting += [(one, mode) for one in sockets]
        if accept:
            await self.accept()

    async def adopt(self, descriptors: Sequence[int], *, accept: bool = True) -> None:
        """Listens on sockets that were passed in (systemd socket activation). Only TCP and Unix streams are taken."""
        mode = self._mode(False)
        for descriptor in descriptors:
            try:
                one = socket.socket(fileno=descriptor)
            except OSError as error:
                raise from_os_error(error, f"descriptor {descriptor}") from error
            if one.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX) or one.type != socket.SOCK_STREAM:
                one.close()
                raise InvalidArgument(f"descriptor {descriptor} is neither a TCP nor a Unix stream socket")
            try:
                _prepare(one)
            except OSError as error:
                one.close()
                raise from_os_error(error, f"listen on descriptor {descriptor}") from error
            self._waiting.append((one, mode))
        if accept:
            await self.accept()

    async def accept(self) -> None:
        """Lets in the clients of every socket that does not accept yet."""
        while self._waiting:
            listening, mode = self._waiting.pop(0)
            try:
                await self._serve(listening, mode)
            except BaseException:
                listening.close()
                raise

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
        for path, inode in self._paths.items():
            _unlink(path, inode)
        self._shared.closed = True
        clients = list(self.clients)
        for client in clients:
            client.shut_down()
        await asyncio.sleep(0)  # those with nothing in flight, most of them, are gone after this
        for step in (None, Connection.cancel, Connection.abort):
            if step is not None:
                for client in list(self.clients):
                    step(client)
            waiting = [client.gone for client in clients if not client.gone.done()]
            if waiting:
                await asyncio.wait(waiting, timeout=GRACE_SECONDS if step is None else GRACE_SECONDS / 8)


async def _tcp_sockets(host: str, port: int) -> list[socket.socket]:
    """One listening socket for each address of `host`; with port 0 all take the port of the first."""
    loop = asyncio.get_running_loop()
    where = f"listen on {host}:{port}"
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not the name of a host"
        raise IoFailed(f"{where}: {reason or error}", errno.EADDRNOTAVAIL) from error
    addresses = [(family, str(address[0]), address[2:]) for family, _, _, _, address in dict.fromkeys(found)]
    for _ in range(PORT_TRIES):
        try:
            return _bind_all(addresses, port)
        except OSError as error:
            if port or error.errno != errno.EADDRINUSE:
                raise from_os_error(error, where) from error
    raise IoFailed(f"{where}: no port is free on all of its addresses", errno.EADDRINUSE)


def _bind_all(addresses: Sequence[tuple[int, str, tuple[int, ...]]], port: int) -> list[socket.socket]:
    """A listening socket for each (family, host, rest) that this machine has; all of them or none."""
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, host, rest in addresses:
            try:
                one = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
                sockets.append(one)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind((host, port, *rest))
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    sockets.pop().close()
                elif error.errno != errno.EAFNOSUPPORT:
                    raise
                missing = error  # "localhost" names ::1 on machines without IPv6
                continue
            _prepare(one)
            port = port or one.getsockname()[1]
        if missing is not None and not sockets:
            raise missing
    except OSError:
        for one in sockets:
            one.close()
        raise
    return sockets


def _prepare(listening: socket.socket) -> None:
    """Listens, with what accepted sockets inherit."""
    listening.setblocking(False)
    if listening.family != socket.AF_UNIX:
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
    listening.listen(BACKLOG)


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
        _prepare(one)
    except OSError as error:
        one.close()
        raise from_os_error(error, f"listen on {path}") from error
    return one


def _is_stale(path: str) -> bool:
    """Whether the path is a socket that nobody listens on."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EPROTOTYPE):  # a full backlog, a socket of another kind
                raise
    return False


def _unlink(path: str, inode: tuple[int, int]) -> None:
    """Takes a socket's file away, if it is still the one that was made."""
    try:
        status = os.lstat(path)
        if (status.st_dev, status.st_ino) == inode:
            os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("%s: %s", path, error.strerror)

"""One connection to an NBD server: opened, negotiated, perhaps encrypted, then requests out and replies in.

Requests given to `send` leave together at the end of the loop's turn; replies are received by asyncio's BufferedProtocol
through nbd.replies. A link never reconnects: when it is lost it says so once, and who owns it decides (see remote.py).

Invariant: TLS starts on a stream from which nothing was received behind the server's consent; whatever arrives between
that and the end of the TLS handshake closes the link, so nothing said in clear is ever taken for something said in secret.
"""

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable
from typing import Final, cast

from nbdmap.errors import InvalidArgument, IoFailed, NbdmapError, ProtocolError, from_os_error
from nbdmap.nbd.client import Agreement, ClientHandshake
from nbdmap.nbd.constants import Cmd
from nbdmap.nbd.negotiation import State
from nbdmap.nbd.replies import ReplyReader, Request
from nbdmap.nbd.uri import Uri

CONNECT_TIMEOUT_S: Final = 10.0
CLOSE_TIMEOUT_S: Final = 1.0
_HANDSHAKE_BUFFER: Final = 4096

Answered = Callable[["Link", list[Request]], None]
"""Told of requests that are finished."""
Lost = Callable[["Link", Exception], None]
"""Told once when an open link is no more, unless it was closed on purpose."""


def tls_context(uri: Uri) -> ssl.SSLContext | None:
    """What `uri` asks for: a client's context, or None for a plain connection. Raises IoFailed if a file is missing."""
    if not uri.tls:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not uri.tls_verify_peer:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    directory = uri.tls_certificates
    try:
        if not directory:
            context.load_default_certs()
            return context
        if uri.tls_verify_peer:
            context.load_verify_locations(f"{directory}/ca-cert.pem")
        try:
            context.load_cert_chain(f"{directory}/client-cert.pem", f"{directory}/client-key.pem")
        except FileNotFoundError:
            pass  # the server may do without
    except OSError as error:
        raise from_os_error(error, f"certificates in {directory}") from error
    except ValueError as error:
        raise InvalidArgument(f"certificates in {directory!r}: {error}") from error
    return context


async def open_link(uri: Uri, context: ssl.SSLContext | None, answered: Answered, lost: Lost) -> "Link":
    """Connects and negotiates within CONNECT_TIMEOUT_S. Raises NbdmapError that names the URI.

    With a context, or if the URI wants it, the link is encrypted or there is none.
    """
    loop = asyncio.get_running_loop()
    link = Link(uri, context or tls_context(uri), answered, lost)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            if uri.socket:
                await loop.create_unix_connection(lambda: link, uri.socket)
            else:
                await loop.create_connection(lambda: link, uri.host, uri.port)
            await link.negotiate()
    except TimeoutError:
        link.abort()
        raise IoFailed(f"{uri}: no answer within {CONNECT_TIMEOUT_S:g} s") from None
    except OSError as error:
        link.abort()
        foreign = isinstance(error, ssl.SSLError | socket.gaierror)  # whose errno is not Linux's
        raise IoFailed(f"{uri}: {error.strerror or error}", errno.EIO if foreign else error.errno or errno.EIO) from error
    except ValueError as error:  # a host or a name for TLS that cannot be one, as the resolver and ssl say it
        link.abort()
        raise InvalidArgument(f"{uri}: {error}") from error
    except NbdmapError as error:
        link.abort()
        error.message = f"{uri}: {error.message}"
        error.args = (error.message,)
        raise
    except BaseException:
        link.abort()
        raise
    return link


class Link(asyncio.BufferedProtocol):
    """`agreement` is what was negotiated; `closed` is done when the connection is gone."""

    def __init__(self, uri: Uri, context: ssl.SSLContext | None, answered: Answered, lost: Lost) -> None:
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._uri = uri
        self._context = context
        self._answered = answered
        self._lost: Lost | None = lost
        self._transport: asyncio.Transport | None = None
        self._handshake = ClientHandshake(uri.export, tls=context is not None)
        self._turn: asyncio.Future[None] = self._loop.create_future()  # the handshake's state has changed
        self._buffer = memoryview(bytearray(_HANDSHAKE_BUFFER))
        self._reader: ReplyReader | None = None
        self._outgoing: list[bytes | memoryview] = []

    @property
    def agreement(self) -> Agreement:
        return self._handshake.agreement

    # --- negotiation ---------------------------------------------------------------------------------------------------
    async def negotiate(self) -> None:
        """Ends when requests can be sent. Raises the handshake's error, or an OSError of TLS."""
        handshake = self._handshake
        await self._turn
        if handshake.state is State.STARTING_TLS:
            assert self._transport is not None, "that is where the state comes from"
            assert self._context is not None, "TLS was asked for"
            self._turn = self._loop.create_future()
            name = self._uri.tls_hostname or self._uri.host
            self._transport = await self._loop.start_tls(self._transport, self, self._context, server_hostname=name)
            handshake.tls_started()
            self._speak()
            await self._turn
        if handshake.state is not State.TRANSMISSION:
            raise handshake.error
        if handshake.leftover:
            raise ProtocolError("the server sends replies before there were requests")
        self._reader = ReplyReader(handshake.agreement)

    def _speak(self) -> None:
        """Sends what the handshake says; wakes `negotiate` when it is its turn."""
        if self._handshake.output and self._transport and not self._transport.is_closing():
            self._transport.write(bytes(self._handshake.output))
        self._handshake.output.clear()
        if self._handshake.state is not State.NEGOTIATING and not self._turn.done():
            if self._handshake.state is State.STARTING_TLS and self._transport:
                self._transport.pause_reading()  # start_tls reads on
            self._turn.set_result(None)

    # --- asyncio's side ------------------------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer if self._reader is None or self._lost is None else self._reader.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self._reader is None:
            self._handshake.feed(self._buffer[:nbytes])
            self._speak()
        elif self._lost is not None:
            try:
                finished = self._reader.advance(nbytes)
            except ProtocolError as error:
                self._drop(error)
                return
            if finished:
                self._answered(self, finished)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set_result(None)
        if self._reader is None:
            self._handshake.eof()
            self._speak()
        self._drop(exc or ConnectionResetError(errno.ECONNRESET, "the server closed the connection"))

    def _drop(self, error: Exception) -> None:
        lost = self._lost
        self.abort()
        if lost is not None and self._reader is not None:
            lost(self, error)

    # --- the owner's side ----------------------------------------------------------------------------------------------
    def send(self, request: Request) -> None:
        """Sends a request; a WRITE's `data` must stay as it is until it is answered."""
        assert self._reader is not None, "negotiated"
        if not self._outgoing:
            self._loop.call_soon(self._write)
        self._outgoing.append(self._reader.begin(request))
        if request.command == Cmd.WRITE:
            self._outgoing.append(request.data)

    def abandon(self, request: Request) -> None:
        """Nobody waits for the request any more; its memory is no longer written to."""
        assert self._reader is not None, "negotiated"
        self._reader.abandon(request)

    def hang_up(self) -> None:
        """Says DISC and closes when that is sent; whatever still arrives is not looked at."""
        self._lost = None
        if self._transport is not None and not self._transport.is_closing():
            self.send(Request(Cmd.DISC, 0, 0))
            self._write()
            self._transport.close()

    async def close(self) -> None:
        """Hangs up and waits until the connection is gone."""
        self.hang_up()
        await asyncio.wait([self.closed], timeout=CLOSE_TIMEOUT_S)
        self.abort()

    def abort(self) -> None:
        """Closes at once."""
        self._lost = None
        self._outgoing = []
        if self._transport is not None:
            self._transport.abort()

    def _write(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if outgoing and self._transport is not None and not self._transport.is_closing():
            self._transport.writelines(outgoing)

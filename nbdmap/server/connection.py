"""One client: handshake, TLS, and then its requests, run as they arrive.

All requests that have arrived are parsed and started in one wake-up, each driven eagerly; those that are done at once leave
together in one `writelines`. A request that waits goes on in a task of its own and answers when it is done. Bounded on
all sides: MAX_REQUESTS and MAX_BYTES in flight, MAX_UNSENT bytes of replies that the client does not read, MAX_BATCH
requests before other connections have their turn; beyond any of them nothing more is parsed or received.
"""

import asyncio
import logging
import ssl
from functools import partial
from typing import Final, cast

from nbdmap.block.device import Device
from nbdmap.block.io import DONE, Continued, Deferred, Pending, Plug
from nbdmap.errors import NbdmapError, ProtocolError
from nbdmap.nbd.constants import Cmd
from nbdmap.nbd.handshake import ServerHandshake, State, TlsMode
from nbdmap.nbd.transmission import Request, RequestReader
from nbdmap.server.door import Door
from nbdmap.server.serving import Reply, Serving
from nbdmap.server.shared import MAX_UNSENT_TOGETHER, DeviceExports, Shared, peer_name, widen
from nbdmap.units import KIB, MIB

MAX_REQUESTS: Final = 64
MAX_BYTES: Final = 64 * MIB
MAX_UNSENT: Final = 4 * MIB
MAX_BATCH: Final = 64
TURN_BYTES: Final = 256 * KIB
"""Received from one client; then the others have their turn, however fast it sends."""
BATCH_BYTES: Final = MIB
"""Replies of one wake-up are handed to the transport when they reach this size, so that it can say stop."""
HANDSHAKE_SECONDS: Final = 10.0
HANDSHAKE_BUFFER: Final = 4 * KIB

_READ: Final = int(Cmd.READ)
_WRITE: Final = int(Cmd.WRITE)
_DISC: Final = int(Cmd.DISC)

log = logging.getLogger(__name__)


class Connection(asyncio.BufferedProtocol):
    """The protocol object of one client. `server` is told when it comes and goes."""

    def __init__(self, exports: DeviceExports, tls: TlsMode, context: ssl.SSLContext | None, shared: Shared) -> None:
        self._exports = exports
        self._context = context
        self._shared = shared
        self._clients = shared.clients
        self._handshake = ServerHandshake(exports, tls)
        self._handshake_buffer = memoryview(bytearray(HANDSHAKE_BUFFER))
        self._tls_running = False
        self._gated = 0  # bytes that were decrypted before start_tls had returned, in the handshake's buffer
        self._transport: asyncio.Transport
        self._peer = ""
        self._device: Device | None = None
        self._reader: RequestReader | None = None
        self._door: Door
        self._serving: Serving
        self._out: Reply = []
        self._out_bytes = 0
        self._plug = Plug()
        self._requests = 0  # in flight, beyond the wake-up that started them
        self._bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._deferred: set[Deferred] = set()
        self._leaving: asyncio.Task[None] | None = None
        self.gone: asyncio.Future[None]
        """Done when the client is gone, its requests are done and its device is given back. Not to be cancelled."""
        self._stopped = False  # nothing more is taken for now, for one of the reasons below
        self._choked = False  # the transport holds more than MAX_UNSENT
        self._reading = True
        self._turn = 0  # bytes received since the others had theirs
        self._more_due = False
        self._eof = False
        self._ending = False  # no more requests are taken; closes when the last is answered
        self._lost = False

    # --- the transport's calls -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come: greet it, and give it HANDSHAKE_SECONDS."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=MAX_UNSENT)
        widen(self._transport)
        self._peer = peer_name(self._transport)
        self._clients.add(self)
        self.gone = asyncio.get_running_loop().create_future()
        self._deadline = asyncio.get_running_loop().call_later(HANDSHAKE_SECONDS, self._expire)
        if self._shared.closed:
            self._transport.abort()
        else:
            self._send_handshake()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        if self._reader is not None:
            return self._reader.get_buffer()
        return self._handshake_buffer[self._gated :]

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have come."""
        if self._reader is not None:
            self._reader.advance(nbytes)
            self._turn += nbytes
            if self._turn >= TURN_BYTES:
                self._continue_soon()
            self._serve()
            self._shared.poll.served(self._requests)
        elif self._tls_running and self._handshake.state is State.STARTING_TLS:
            self._gated += nbytes
        elif not self._ending:
            self._handshake.feed(self._handshake_buffer[:nbytes])
            self._after_handshake()

    def eof_received(self) -> bool:
        """The client will send no more; what it asked for is still answered, in clear at least: TLS ends both ways."""
        if self._reader is None:
            self._handshake.eof()
            self._after_handshake()
            return False
        self._eof = True
        self._continue_soon()
        return not self._tls_running

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone. Requests in flight run to their end; then the device is given back."""
        if self._lost:
            return
        self._lost = self._ending = True
        self._update_stopped()
        self._deadline.cancel()
        self._clients.discard(self)
        self._shared.unchoke(self)
        if exc is not None:
            log.debug("%s: connection lost: %s", self._peer, exc)
        self._release_when_idle()

    def pause_writing(self) -> None:
        """The client does not read its replies: take no more requests."""
        self._choked = True
        self._update_stopped()
        self._shared.choke(self)

    def resume_writing(self) -> None:
        """The client reads again."""
        self._choked = False
        self._shared.unchoke(self)
        self._update_stopped()
        self._continue_soon()

    # --- handshake -----------------------------------------------------------------------------------------------------

    def _expire(self) -> None:
        log.info("%s: no export chosen within %g s", self._peer, HANDSHAKE_SECONDS)
        self._transport.abort()

    def _send_handshake(self) -> None:
        if self._handshake.output:
            self._transport.write(bytes(self._handshake.output))
            self._handshake.output.clear()

    def _after_handshake(self) -> None:
        self._send_handshake()
        state = self._handshake.state
        if state is State.TRANSMISSION:
            self._start_transmission()
        elif state is State.STARTING_TLS:
            self._start_task(self._start_tls())
        elif state is State.CLOSED:
            if self._handshake.failure:
                log.info("%s: %s", self._peer, self._handshake.failure)
            self._ending = True
            self._deadline.cancel()
            self._transport.close()

    async def _start_tls(self) -> None:
        assert self._context is not None
        if self._handshake.state is not State.STARTING_TLS:
            return  # more came in clear
        self._tls_running = True  # start_tls takes the transport before it first waits: nothing in clear comes here after this
        loop = asyncio.get_running_loop()
        left = max(0.1, self._deadline.when() - loop.time())
        try:
            transport = await loop.start_tls(
                self._transport, self, self._context, server_side=True, ssl_handshake_timeout=left, ssl_shutdown_timeout=1.0
            )
            if transport is None or self._transport.is_closing():
                raise ConnectionAbortedError("closed before it was up")
            self._transport = transport
            self._transport.set_write_buffer_limits(high=MAX_UNSENT)
            self._handshake.tls_started()
        except (OSError, ProtocolError, asyncio.CancelledError) as error:
            log.info("%s: TLS: %s", self._peer, error)
            self._transport.abort()
            self.connection_lost(None)  # a connection that is lost within TLS's own handshake is not reported to us
            return
        gated, self._gated = self._gated, 0
        if gated:
            self._handshake.feed(self._handshake_buffer[:gated])
            self._after_handshake()

    def _start_transmission(self) -> None:
        self._deadline.cancel()
        session = self._handshake.session
        try:
            self._device = self._exports.open(session.export.name)
        except NbdmapError as error:
            log.info("%s: %s", self._peer, error.message)
            self._transport.abort()
            return
        log.info("%s: connected to %r", self._peer, session.export.name)
        self._door = Door(session)
        self._serving = Serving(self._device, session, self._shared.buffers.take, self._plug)
        self._reader = RequestReader(session.extended, self._shared.receive, self._shared.buffers.take)
        self._reader.feed(self._handshake.leftover)
        self._handshake_buffer = memoryview(b"")
        self._serve()

    # --- requests ------------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Starts the requests that have arrived, as far as the limits allow, each eagerly."""
        reader = self._reader
        assert reader is not None
        next_request, check, serve = reader.next, self._door.check, self._serving.serve
        parked: list[tuple[Deferred, Request, Reply]] = []
        borrowed = False  # somebody waits who has a payload in the reader's buffer
        self._plug.active = True
        try:
            for _ in range(MAX_BATCH):
                if self._stopped:
                    break
                request = next_request()
                if request is None:
                    if self._eof:
                        self._end()
                    break
                if request.command == _DISC:
                    self._end()
                    break
                refusal = check(request)
                if refusal is not None:
                    self._out.append(self._serving.replies.error(request, refusal.error, refusal.text))
                    continue
                reply: Reply = []
                pending = serve(request, reply)
                if pending is DONE:
                    self._put(request, reply)
                elif isinstance(pending, Deferred):
                    self._count(request, 1)
                    parked.append((pending, request, reply))
                elif self._start(pending, request, reply):
                    borrowed |= request.borrowed
                if self._out_bytes >= BATCH_BYTES:
                    self._pull()
                    self._flush_out()
                    self._plug.active = True
            else:
                self._continue_soon()
        except ProtocolError as error:
            log.info("%s: %s", self._peer, error.message)
            self._end()
        self._pull()
        if self._after_pull(parked) or borrowed:
            reader.renew()
        else:
            reader.settle()
        self._flush_out()
        self._throttle()

    def _put(self, request: Request, reply: Reply) -> None:
        """Keeps a reply until it is sent with others."""
        self._out += reply
        if request.command == _READ:
            self._out_bytes += request.length

    def _pull(self) -> None:
        """Does what targets have put off. If that fails nothing that was read is answered, and the client is dropped."""
        try:
            self._plug.pull()
        except Exception:
            log.exception("%s: dropped, what was read could not be finished", self._peer)
            self._out = []
            self._end()
            self.abort()

    def _start(self, pending: Pending, request: Request, reply: Reply) -> bool:
        """Runs a request eagerly; leaves one that waits to a task of its own, and returns True then."""
        try:
            yielded = pending.send(None)
        except StopIteration:
            self._put(request, reply)
            return False
        except (Exception, asyncio.CancelledError) as error:
            self._out.append(self._serving.failure(request, error, self._peer))
            return False
        self._count(request, 1)
        self._start_task(Continued(pending, yielded)).add_done_callback(partial(self._finish, request, reply))
        return True

    def _after_pull(self, parked: list[tuple[Deferred, Request, Reply]]) -> bool:
        """Answers those that have ended, and the others when they do; True if one of these has borrowed the receive buffer."""
        borrowed = False
        if parked and self._stopped:
            self._continue_soon()
        for pending, request, reply in parked:
            if pending.ended:
                self._answer(request, reply, pending.error)
            else:
                borrowed |= request.borrowed
                self._deferred.add(pending)
                pending.then(partial(self._finish_deferred, pending, request, reply))
        return borrowed

    def _finish_deferred(self, pending: Deferred, request: Request, reply: Reply, error: BaseException | None) -> None:
        self._deferred.discard(pending)
        if self._stopped or not self._plug.active:
            self._continue_soon()
        self._answer(request, reply, error)

    def _answer(self, request: Request, reply: Reply, error: BaseException | None) -> None:
        self._count(request, -1)
        self._put(request, reply if error is None else [self._serving.failure(request, error, self._peer)])

    def _count(self, request: Request, change: int) -> None:
        """Counts a request in flight, or out again."""
        self._requests += change
        if request.command <= _WRITE:  # or a read
            self._bytes += change * request.length
        self._update_stopped()

    def _update_stopped(self) -> None:
        full = self._requests >= MAX_REQUESTS or self._bytes >= MAX_BYTES
        self._stopped = full or self._choked or self._ending or self._lost

    def _finish(self, request: Request, reply: Reply, task: asyncio.Task[None]) -> None:
        """A request that had to wait has ended."""
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            reply = [self._serving.failure(request, error, self._peer)]
        self._count(request, -1)
        self._put(request, reply)
        self._continue_soon()

    def _flush_out(self) -> None:
        if self._out and not self._lost:
            self._transport.writelines(self._out)
        self._out = []
        self._out_bytes = 0

    def _continue_soon(self) -> None:
        """Sends what was put and goes on with the requests that wait, once, at the end of this turn of the loop."""
        if not self._more_due:
            self._more_due = True
            asyncio.get_running_loop().call_soon(self._continue)

    def _continue(self) -> None:
        self._more_due = False
        self._turn = 0
        self._flush_out()
        if self._reader is not None and not self._ending:
            self._serve()
        elif self._ending:
            self._close_when_idle()

    def _throttle(self) -> None:
        """Receives only while what arrives could be started."""
        want = not self._stopped and self._turn < TURN_BYTES
        if want is not self._reading and not self._lost:
            self._reading = want
            if want:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def _start_task(self, work: Pending) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._check_gone()

    def _check_gone(self) -> None:
        if self._lost and not self._tasks and self._device is None and self._leaving is None and not self.gone.done():
            self.gone.set_result(None)

    # --- the end -------------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Takes no more requests, and closes when those in flight are answered."""
        self._ending = True
        self._update_stopped()
        self._continue_soon()

    def _close_when_idle(self) -> None:
        if not self._requests:
            if not self._lost:
                self._transport.close()
            self._release_when_idle()

    def _release_when_idle(self) -> None:
        if self._lost and not self._requests and self._device is not None:
            device, self._device = self._device, None
            log.info("%s: left %r", self._peer, device.name)
            self._leaving = asyncio.get_running_loop().create_task(self._leave(device))
        self._check_gone()

    async def _leave(self, device: Device) -> None:
        """Gives the device back; no `cancel` ends that."""
        try:
            await self._exports.release(device)
        except Exception:
            log.exception("%s: %r was not closed in good order", self._peer, device.name)
        self._leaving = None
        self._check_gone()

    def shut_down(self) -> None:
        """The server stops: options are refused from now on, requests in flight are finished, then the client is left."""
        if self._reader is None:
            self._handshake.shutting_down = True
            self._transport.close()
        self._end()

    def cancel(self) -> None:
        """Cancels what is in flight: it is answered with ESHUTDOWN, and the client is left."""
        for pending in list(self._deferred):
            pending.cancel()
        for task in self._tasks:
            task.cancel()

    def unsent(self) -> int:
        """Bytes of replies that the client has not read."""
        return self._transport.get_write_buffer_size()

    def drop_unread(self) -> None:
        """Drops the connection because too many replies are not read."""
        log.info("%s: dropped, clients that do not read hold more than %d MiB", self._peer, MAX_UNSENT_TOGETHER // MIB)
        self._shared.unchoke(self)
        self.abort()

    def abort(self) -> None:
        """Drops the connection, whatever has not been sent."""
        self._transport.abort()

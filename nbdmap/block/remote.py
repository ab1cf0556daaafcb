"""A disk that is an export of another NBD server: `far: {nbd: "nbd://10.0.0.2/export"}` or the URI itself in a table.

    0 2097152 linear nbd://10.0.0.2/export 0

Many requests share one connection. When it is lost, requests in flight and new ones wait while the disk connects again,
and are then sent again; past a deadline they fail with EIO, and later ones fail at once until an attempt in the background
succeeds. A server that comes back with another size or fewer abilities is refused. One that is away at the very first may be
waited for in the same way; until then the disk is `absent`.

Invariants: what a flush acknowledged is on the server, over every reconnection: acknowledged writes that no flush has covered
are kept (see unflushed.py) and sent again, in order and completed, before anything else. With `replay=False` they are not
kept; then the flushes under way at the loss, or else the first one after it, fail. This trusts that nobody else writes to the
export, and that writes which overlap are not in flight at once. A path of a multipath target is written by other ways, too:
while there are such `ways`, nothing is kept or sent again, and requests fail as soon as the connection is lost.
"""

import asyncio
import errno
import logging
import os
import ssl
from collections.abc import Coroutine
from typing import Final

from nbdmap.block.device import Device, Extent, Limits
from nbdmap.block.io import (
    CACHE,
    DISCARD,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    WRITE,
    WRITE_ZEROES,
    Failed,
    Io,
    Pending,
    run_all,
)
from nbdmap.block.link import Link, open_link, tls_context
from nbdmap.block.reconnect import Reconnect, Waiting, difference
from nbdmap.block.unflushed import WRITES, Unflushed
from nbdmap.errors import AccessRefused, InvalidArgument, IoFailed, NbdmapError, Unsupported
from nbdmap.nbd import constants as nbd
from nbdmap.nbd.client import Agreement
from nbdmap.nbd.constants import Cmd
from nbdmap.nbd.replies import NOWHERE, Request, whole_blocks
from nbdmap.nbd.uri import Uri
from nbdmap.units import GIB, MIB, SECTOR, round_down

MAX_UNFLUSHED: Final = 64 * MIB
"""The most acknowledged writes that are kept for another time; beyond it the server is told to flush."""
WAY_PAUSE_S: Final = 1.0
"""The longest pause between attempts to connect of a disk that is one of several ways."""
MAX_EFFECT: Final = GIB
"""The longest request without payload; longer ones are split."""

_log: Final = logging.getLogger(__name__)

_COMMANDS: Final = {  # op: (command, the flags it may carry); the flags have the protocol's numbers
    READ: (Cmd.READ, 0),
    WRITE: (Cmd.WRITE, FUA),
    DISCARD: (Cmd.TRIM, FUA),
    WRITE_ZEROES: (Cmd.WRITE_ZEROES, FUA | NO_HOLE | FAST_ZERO),
    CACHE: (Cmd.CACHE, 0),
}
class RemoteDisk(Device):
    """Made by `connect`. `size` is the export's, rounded down to its logical block."""

    @classmethod
    async def connect(
        cls,
        uri: Uri,
        *,
        name: str,
        number: str,
        read_only: bool = False,
        tls: ssl.SSLContext | None = None,
        reconnect: Reconnect | None = None,
        replay: bool = True,
        may_be_absent: bool = False,
    ) -> "RemoteDisk":
        """Connects to the export. `tls` replaces the context that the URI's parameters describe. Raises NbdmapError.

        With `may_be_absent` a disk that cannot be reached is returned all the same: its requests fail until it can be.
        """
        disk = cls(uri, tls or tls_context(uri), reconnect or Reconnect(), replay)
        disk.name, disk.number, disk.read_only = name, number, read_only
        try:
            link = await disk._open()
        except InvalidArgument:
            raise
        except NbdmapError as error:
            if not may_be_absent:
                raise
            disk._be_absent(error)
            return disk
        disk._describe(link.agreement)
        disk._link = link
        return disk

    def __init__(self, uri: Uri, tls: ssl.SSLContext | None, reconnect: Reconnect, replay: bool) -> None:
        self.uri = uri
        self._tls = tls
        self._policy = reconnect
        self._replay = replay
        self._agreement: Agreement
        self._link: Link | None = None
        self._restoring: Link | None = None  # the next connection, while these are sent again on it
        self._repeated: list[Waiting] = []
        self._waiting: dict[Waiting, None] = {}  # every request that is not finished, oldest first
        self.refusal = ""
        """Why requests fail at once."""
        self._trouble = ""  # why the last attempt to connect failed
        self._unflushed = Unflushed(replay)
        self._relief = asyncio.Lock()
        self._losses = 0  # how often acknowledged writes were lost, and how many of those a flush has reported
        self._reported = 0
        self._pause_s = 0.0
        self._reconnecting: asyncio.Task[None] | None = None
        self._deadline: asyncio.Task[None] | None = None
        self._watch: asyncio.TimerHandle | None = None  # for a server that is silent

    def _be_absent(self, error: NbdmapError) -> None:
        self.absent = True
        self.size = 0
        self.limits = Limits()
        self.refusal = f"{self.name}: not there yet: {error.message}"
        _log.warning("%s", self.refusal)
        self._pause_s = self._policy.first_pause_s
        self._reconnecting = asyncio.get_running_loop().create_task(self._reconnect())

    def _describe(self, agreement: Agreement) -> None:
        block = max(SECTOR, agreement.minimum_block)
        flags = agreement.flags
        self.absent = False
        self.size = round_down(agreement.size, block)
        self.read_only = self.read_only or bool(flags & nbd.READ_ONLY)
        self._agreement = agreement
        self._payload = round_down(min(agreement.maximum_block, nbd.MAX_PAYLOAD), block)
        self.limits = Limits(
            logical_block=block,
            discard=bool(flags & nbd.SEND_TRIM),
            zero=bool(flags & nbd.SEND_WRITE_ZEROES),
            fast_zero=bool(flags & nbd.SEND_WRITE_ZEROES and flags & nbd.SEND_FAST_ZERO),
            cache=bool(flags & nbd.SEND_CACHE),
            sparse=agreement.allocation is not None,
            io_min=agreement.preferred_block,
            rotational=bool(flags & nbd.ROTATIONAL),
        )

    # --- requests ------------------------------------------------------------------------------------------------------
    def submit(self, io: Io, offset: int) -> Pending:
        """As `Device.submit`; longer requests than the server takes are split."""
        if self.absent:
            return Failed(IoFailed(self.refusal))
        if io.op == FLUSH:
            return self._flush()
        most = self._payload if io.op in (READ, WRITE, CACHE) else MAX_EFFECT
        if io.length <= most:
            return self._one(io, offset)
        starts = range(0, io.length, most)
        return run_all([self._one(io.part(at, min(most, io.length - at)), offset + at) for at in starts])

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """As `Device.extents`, by BLOCK_STATUS; all data when the server does not tell."""
        if not self.limits.sparse or (self._link is not None and self._link.agreement.allocation is None):
            return [(length, 0)]
        request = await self._perform(Cmd.BLOCK_STATUS, offset, min(length, MAX_EFFECT))
        if request.error:
            raise self._failed("block status", request)
        return whole_blocks(request.extents, self.limits.logical_block) or [(min(length, self.limits.logical_block), 0)]

    async def _one(self, io: Io, offset: int) -> None:
        """A request that the server takes as it is."""
        command, allowed = _COMMANDS[io.op]
        if not io.length:
            return
        self._check_supported(io)
        flags = io.flags & allowed
        durable_by_flush = flags & FUA and not self._agreement.flags & nbd.SEND_FUA
        if durable_by_flush:
            flags &= ~FUA
        request = await self._perform(command, offset, io.length, io.data, flags)
        if request.error:
            if request.error == errno.EOPNOTSUPP:
                raise Unsupported(self._failed(io.op.name, request).message)
            raise self._failed(io.op.name, request)
        if durable_by_flush:
            await self._flush()
        elif self._unflushed.size > MAX_UNFLUSHED:
            await self._relieve()

    def _check_supported(self, io: Io) -> None:
        op, limits = io.op, self.limits
        if self.read_only and op in (WRITE, DISCARD, WRITE_ZEROES):
            raise AccessRefused(f"{self.name} is read-only")
        missing = (op == DISCARD and not limits.discard) or (op == CACHE and not limits.cache)
        if op == WRITE_ZEROES:
            missing = not limits.zero or bool(io.flags & FAST_ZERO and not limits.fast_zero)
        if missing:
            raise Unsupported(f"{self.name}: the server cannot do {op.name} with flags {io.flags:#x}")

    async def _flush(self) -> None:
        """Ends when the server has flushed. Fails, once, when it may have forgotten what it acknowledged."""
        reported = self._reported
        if self._agreement.flags & nbd.SEND_FLUSH:
            request = await self._perform(Cmd.FLUSH, 0, 0)
            if request.error:
                raise self._failed("flush", request)
        if self._losses > reported:
            self._reported = self._losses
            raise IoFailed(f"{self.name}: the server forgot writes that it had acknowledged")

    async def _relieve(self) -> None:
        """Empties the record of unflushed writes when it is full; who comes later waits, and finds it done."""
        async with self._relief:
            if self._unflushed.size <= MAX_UNFLUSHED:
                return
            mark = self._unflushed.mark()
            try:
                request = await self._perform(Cmd.FLUSH, 0, 0)
            except IoFailed:
                return  # there is no connection: the record stays for the next one
            if request.error:
                self._losses += 1
                self._unflushed.flushed(mark)

    async def _perform(
        self, command: Cmd, offset: int, length: int, data: memoryview = NOWHERE, flags: int = 0
    ) -> Waiting:
        """Has the server do one request, over as many connections as that takes; returns it with its answer."""
        if self.refusal:
            raise IoFailed(self.refusal)
        request = Waiting(command, offset, length, data, flags)
        request.mark = self._unflushed.mark()
        self._waiting[request] = None
        if self._link is not None:
            self._link.send(request)
        if self._watch is None and self._policy.silence_s is not None:
            self._look(None, 0.0)
        try:
            await request.answer
        except asyncio.CancelledError:
            self._waiting.pop(request, None)
            if self._link is not None:
                self._link.abandon(request)
            raise
        return request

    def _failed(self, what: str, request: Request) -> IoFailed:
        text = request.message or os.strerror(request.error)
        return IoFailed(f"{what.lower()} of {self.name} at byte {request.offset}: {text}", request.error)

    # --- the connection ------------------------------------------------------------------------------------------------
    def _open(self) -> Coroutine[None, None, Link]:
        return open_link(self.uri, self._tls, self._on_answers, self._on_loss)

    def _on_answers(self, link: Link, finished: list[Request]) -> None:
        """Notes what the server now has, in the order of its answers, and wakes who waits."""
        leaving = False
        for request in finished:
            assert isinstance(request, Waiting)
            if request.error == errno.ESHUTDOWN:
                leaving = True
                if request in self._waiting:
                    continue  # for the next connection
            self._pause_s = 0.0
            if request in self._waiting:
                del self._waiting[request]
                if not request.error and self._agreement.flags & nbd.SEND_FLUSH:
                    if request.command in WRITES:
                        self._unflushed.note(request)
                    elif request.command == Cmd.FLUSH:
                        self._unflushed.flushed(request.mark)
            request.end()
        if leaving:
            link.hang_up()
            self._on_loss(link, IoFailed("the server is shutting down", errno.ESHUTDOWN))

    def _on_loss(self, link: Link, error: Exception) -> None:
        """The connection is gone: its requests wait for the next one."""
        if link is self._restoring:
            self._restoring = None
            for request in self._repeated:
                request.end()
        if link is not self._link:
            return
        self._link = None
        self._trouble = str(error)
        _log.info("%s: the connection to %s is lost: %s", self.name, self.uri, error)
        now = self._policy.clock()
        for waiting in self._waiting:
            waiting.restart()
            if waiting.lost_at is None:
                waiting.lost_at = now
        if not self._unflushed.whole:
            self._losses += not self.ways
            self._unflushed.flushed(self._unflushed.mark())
        if self.ways:
            self._give_up(f"the connection to {self.uri} is lost: {error}")
        else:
            self._deadline = asyncio.get_running_loop().create_task(self._give_up_late())
        self._reconnecting = asyncio.get_running_loop().create_task(self._reconnect())

    def add_ways(self, count: int) -> None:
        """As Device.add_ways."""
        self.ways += count
        self._unflushed.keep(self._replay and not self.ways)

    def restarts(self) -> bool:
        """As Device.restarts."""
        return True

    @property
    def silence_s(self) -> float | None:
        """How long the server may take to answer."""
        return self._policy.silence_s

    def _look(self, seen: "Waiting | None", since: float) -> None:
        """Gives the connection up when its oldest request is still that which it was `silence_s` ago."""
        loop, silence_s = asyncio.get_running_loop(), self._policy.silence_s
        assert silence_s is not None, "else nobody looks"
        self._watch = None
        oldest = next(iter(self._waiting), None)
        if oldest is None or self._link is None:
            return
        now = loop.time()
        if oldest is not seen:
            seen, since = oldest, now
        elif now - since >= silence_s:
            link = self._link
            link.abort()
            self._on_loss(link, TimeoutError(errno.ETIMEDOUT, f"no answer for {silence_s:g} s"))
            return
        self._watch = loop.call_later(silence_s / 4, self._look, seen, since)

    def _end_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()

    async def _give_up_late(self) -> None:
        await self._policy.sleep(self._policy.deadline_s)
        self._give_up(f"no connection to {self.uri} for {self._policy.deadline_s:g} s: {self._trouble}")

    def _give_up(self, reason: str) -> None:
        """Fails what waits, and from now on what comes."""
        refusal = f"{self.name}: {reason}"
        if refusal != self.refusal:
            _log.warning("%s", refusal)
        self._fail_all(refusal)

    def _fail_all(self, refusal: str) -> None:
        self.refusal = refusal
        waiting, self._waiting = self._waiting, {}
        for request in waiting:
            request.end(IoFailed(refusal))

    async def _reconnect(self) -> None:
        """Tries until there is a connection to the same export on which everything acknowledged is in place."""
        policy = self._policy
        while True:
            if self._pause_s:
                await policy.sleep(self._pause_s * (0.5 + policy.random() / 2))
            longest_s = min(policy.longest_pause_s, WAY_PAUSE_S) if self.ways else policy.longest_pause_s
            self._pause_s = min(longest_s, max(policy.first_pause_s, 2 * self._pause_s))
            try:
                link = await self._open()
            except NbdmapError as error:
                self._trouble = error.message
                continue
            self._restoring = link
            try:
                if self.absent:
                    self._describe(link.agreement)
                changed = difference(self._agreement, link.agreement, self)
                if not changed:
                    await self._restore(link)
                    break
                self._end_deadline()
                self._give_up(f"{self.uri} is not the same any more: {changed}")
                link.hang_up()
            except (NbdmapError, OSError) as error:
                self._trouble = str(error)
                link.abort()
            except asyncio.CancelledError:
                link.abort()
                raise
            finally:
                self._restoring = None
        self._resume(link)

    def _resume(self, link: Link) -> None:
        """Sends again, in order, what waited; gives up what has waited too long over several connections."""
        _log.info("%s: connected to %s again", self.name, self.uri)
        self._end_deadline()
        self._link = link
        self.refusal = ""
        now = self._policy.clock()
        for request in list(self._waiting):
            if request.lost_at is not None and now - request.lost_at > self._policy.deadline_s:
                del self._waiting[request]
                request.end(IoFailed(f"{self.name}: given up after more than one connection: {self._trouble}"))
            elif request.command == Cmd.BLOCK_STATUS and link.agreement.allocation is None:
                del self._waiting[request]
                request.extents = [(request.length, 0)]
                request.end()
            else:
                link.send(request)

    async def _restore(self, link: Link) -> None:
        """Sends the unflushed writes again. Raises when the connection is lost; a write that fails is reported by flush."""
        for batch in [*self._unflushed.batches(), []]:
            if self._restoring is not link:
                raise ConnectionResetError(errno.ECONNRESET, "the connection was lost again")
            self._repeated = [Waiting(one.command, one.offset, one.length, one.data, one.flags) for one in batch]
            for request in self._repeated:
                link.send(request)
            for request in self._repeated:
                await request.answer
                if request.error and request.error != errno.ESHUTDOWN:
                    _log.warning("%s: %s", self.name, self._failed("repeated write", request).message)
                    self._losses += 1

    async def close(self) -> None:
        """Ends everything; requests that still wait fail with EIO."""
        if self._watch is not None:
            self._watch.cancel()
        for task in (self._reconnecting, self._deadline):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._fail_all(f"{self.name} is closed")
        link, self._link = self._link, None
        if link is not None:
            await link.close()

"""An NBD server for tests: a disk with a volatile cache, which can be held up, made to fail, and made to crash."""

import asyncio
import errno
import ssl
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nbdmap.errors import NotFound
from nbdmap.nbd import constants as nbd
from nbdmap.nbd.constants import Chunk, Cmd
from nbdmap.nbd.handshake import Export, ServerHandshake, Session, State, TlsMode
from nbdmap.nbd.uri import Uri

ALL = nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.SEND_FUA | nbd.SEND_TRIM | nbd.SEND_WRITE_ZEROES | nbd.SEND_CACHE | nbd.SEND_FAST_ZERO


@dataclass(frozen=True)
class Asked:
    """A request as it arrived."""

    command: Cmd
    offset: int = 0
    length: int = 0
    flags: int = 0


@dataclass
class FakeServer:
    """`data` is what clients see, `durable` what a crash leaves. `log` has every request but DISC, in order of arrival."""

    path: Path
    size: int = 1 << 20
    flags: int = ALL
    blocks: tuple[int, int, int] = (1, 4096, 32 << 20)
    context: ssl.SSLContext | None = None
    tcp: bool = False
    refused: frozenset[int] = frozenset()
    """Options that are answered as if they were unknown."""
    greeting: bytes = b""
    """Sent instead of the real one."""
    failure: Callable[[Asked], int] = lambda asked: 0
    """The errno to answer a request with."""
    held: Callable[[Asked], bool] = lambda asked: True
    """Which requests wait for `open`."""
    extents: Sequence[tuple[int, int]] = ()
    junk: bytes = b""
    """Sent in front of each reply."""
    junk_behind: bytes = b""
    log: list[Asked] = field(default_factory=list)
    connections: int = 0
    discs: int = 0

    def __post_init__(self) -> None:
        self.data = bytearray(self.size)
        self.durable = bytearray(self.size)
        self.open = asyncio.Event()  # requests wait for it
        self.open.set()
        self.arrived = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    # --- what tests do -------------------------------------------------------------------------------------------------
    async def __aenter__(self) -> "FakeServer":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def uri(self) -> Uri:
        if not self.tcp:
            return Uri(socket=str(self.path), export="disk", tls=self.context is not None)
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        return Uri("127.0.0.1", port, export="disk", tls=self.context is not None)

    async def start(self) -> None:
        if self.tcp:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        else:
            self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def stop(self) -> None:
        """Stops to listen and drops all connections."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.path.unlink(missing_ok=True)
        await self.drop()

    async def drop(self) -> None:
        """Drops all connections; requests that wait are forgotten."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in list(self._writers):
            writer.transport.abort()
        self._writers.clear()

    async def crash(self) -> None:
        """Drops all connections and everything that was not flushed."""
        await self.drop()
        self.data[:] = self.durable

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until something that arrived makes `condition` true."""
        async with self.arrived:
            await self.arrived.wait_for(condition)

    # --- Exports -------------------------------------------------------------------------------------------------------
    def list(self) -> Sequence[tuple[str, str]]:
        return [("disk", "")]

    def find(self, name: str) -> Export:
        if name != "disk":
            raise NotFound(f"there is no export {name!r}")
        return Export("disk", "", self.size, self.flags, *self.blocks)

    # --- one connection ------------------------------------------------------------------------------------------------
    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.connections += 1
        async with self.arrived:
            self.arrived.notify_all()
        try:
            await self._talk(reader, writer)
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.transport.abort()
            async with self.arrived:
                self.arrived.notify_all()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handshake = ServerHandshake(self, TlsMode.REQUIRED if self.context else TlsMode.OFF)
        if self.greeting:
            handshake.output[:] = self.greeting
        writer.write(bytes(handshake.output))
        handshake.output.clear()
        handshake.feed(await reader.readexactly(4))
        while handshake.state is not State.TRANSMISSION:
            writer.write(bytes(handshake.output))
            handshake.output.clear()
            await writer.drain()
            if handshake.state is State.STARTING_TLS:
                assert self.context is not None
                await writer.start_tls(self.context)
                handshake.tls_started()
            if handshake.state is State.CLOSED:
                return
            option = await reader.readexactly(16)
            _, number, length = struct.unpack(">QII", option)
            data = await reader.readexactly(length)
            if number in self.refused:
                handshake.output += struct.pack(">QIII", nbd.REPLY_MAGIC, number, nbd.Rep.ERR_UNSUP, 0)
            else:
                handshake.feed(option + data)
        writer.write(bytes(handshake.output))
        await self._transmit(reader, writer, handshake.session)

    async def _transmit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, session: Session) -> None:
        header = nbd.EXTENDED_REQUEST if session.extended else nbd.REQUEST
        background: set[asyncio.Task[None]] = set()
        try:
            while True:
                _, flags, kind, cookie, offset, length = header.unpack(await reader.readexactly(header.size))
                if kind == Cmd.DISC:
                    self.discs += 1
                    return
                payload = await reader.readexactly(length) if kind == Cmd.WRITE else b""
                asked = Asked(Cmd(kind), offset, length, flags & ~nbd.CMD_FLAG_PAYLOAD_LEN)
                async with self.arrived:
                    self.log.append(asked)
                    self.arrived.notify_all()
                if self.open.is_set() or not self.held(asked):
                    writer.write(self._answer(asked, cookie, payload, session) + self.junk_behind)
                else:
                    background.add(asyncio.ensure_future(self._late(writer, asked, cookie, payload, session)))
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)

    async def _late(
        self, writer: asyncio.StreamWriter, asked: Asked, cookie: int, payload: bytes, session: Session
    ) -> None:
        await self.open.wait()
        writer.write(self._answer(asked, cookie, payload, session))

    def _answer(self, asked: Asked, cookie: int, payload: bytes, session: Session) -> bytes:
        error = self.failure(asked)
        result = b"" if error else self._do(asked, payload)
        if not (session.extended or session.structured):
            return self.junk + nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, error, cookie) + result
        kind = Chunk.NONE
        if error:
            kind, result = Chunk.ERROR, struct.pack(">IH", error, 11) + b"said so: no"
        elif asked.command == Cmd.READ:
            kind, result = Chunk.OFFSET_DATA, struct.pack(">Q", asked.offset) + result
        elif asked.command == Cmd.BLOCK_STATUS:
            kind = Chunk.BLOCK_STATUS_EXT if session.extended else Chunk.BLOCK_STATUS
            entry, runs = ">QQ" if session.extended else ">II", self.extents or [(asked.length, 0)]
            head = struct.pack(">II", 1, len(runs)) if session.extended else struct.pack(">I", 1)
            result = head + b"".join(struct.pack(entry, *run) for run in runs)
        if session.extended:
            header = nbd.EXTENDED_REPLY.pack(nbd.EXTENDED_REPLY_MAGIC, 1, kind, cookie, asked.offset, len(result))
        else:
            header = nbd.STRUCTURED_REPLY.pack(nbd.STRUCTURED_REPLY_MAGIC, 1, kind, cookie, len(result))
        return self.junk + header + result

    def _do(self, asked: Asked, payload: bytes) -> bytes:
        end = asked.offset + asked.length
        assert end <= self.size, errno.EINVAL
        if asked.command == Cmd.READ:
            return bytes(self.data[asked.offset : end])
        if asked.command in (Cmd.WRITE, Cmd.WRITE_ZEROES, Cmd.TRIM):
            self.data[asked.offset : end] = payload or bytes(asked.length)
            if asked.flags & nbd.CMD_FLAG_FUA:
                self.durable[asked.offset : end] = self.data[asked.offset : end]
        if asked.command == Cmd.FLUSH:
            self.durable[:] = self.data
        return b""

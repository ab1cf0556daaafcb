"""A plain NBD client for tests: says exactly the bytes it is told, and understands replies by hand."""

import asyncio
import os
import struct
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar, Self

from nbdmap.block.device import Device
from nbdmap.control.events import Events
from nbdmap.control.exports import Exports, ExportSettings
from nbdmap.control.mapper import Mapper
from nbdmap.dm.device import MappedDevice
from nbdmap.dm.table import parse_table
from nbdmap.nbd import constants as nbd
from nbdmap.nbd.uri import Uri
from nbdmap.server.listener import Listener
from nbdmap.targets import TARGETS
from tests.support.disks import FakeOpener


class Stack:
    """A mapper with exports and a listener on a Unix socket."""

    def __init__(self, directory: str) -> None:
        self.mapper = Mapper(TARGETS, Events(lambda: 0.0))
        self.exports = Exports(self.mapper)
        self.listener = Listener(self.exports, None, False)
        self.socket = os.path.join(directory, "nbd.sock")

    async def add(self, name: str, table: str, *disks: Device, settings: ExportSettings | None = None) -> MappedDevice:
        """A device that is exported."""
        self.mapper.disks.update({disk.number: disk for disk in disks})
        device = await self.mapper.create(name, table=None)
        await device.load(parse_table(table), FakeOpener(*disks), read_only=False)
        await device.resume()
        self.exports.add(device, settings or ExportSettings())
        return device


@asynccontextmanager
async def serving() -> AsyncIterator[Stack]:
    """A stack that listens; closed at the end."""
    with tempfile.TemporaryDirectory() as directory:
        stack = Stack(directory)
        await stack.listener.listen(Uri(socket=stack.socket))
        try:
            yield stack
        finally:
            await stack.listener.close()
            for client in Client.open:
                client.writer.transport.abort()
            await asyncio.gather(*(client.writer.wait_closed() for client in Client.open), return_exceptions=True)
            Client.open.clear()


class Client:
    """One connection."""

    open: ClassVar[list["Client"]] = []
    """Those that `serving` closes at its end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, path: str) -> Self:
        client = cls(*await asyncio.open_unix_connection(path, limit=1 << 26))
        cls.open.append(client)
        return client

    async def greet(self) -> Self:
        """The greeting and the client's flags."""
        assert await self.reader.readexactly(18) == b"NBDMAGICIHAVEOPT\0\3"
        self.writer.write(struct.pack(">I", 3))
        return self

    async def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Sends an option and reads replies to the final one."""
        self.writer.write(nbd.OPTION.pack(nbd.OPTION_MAGIC, option, len(data)) + data)
        replies = []
        while True:
            magic, same, kind, length = nbd.OPTION_REPLY.unpack(await self.reader.readexactly(20))
            assert (magic, same) == (nbd.REPLY_MAGIC, option)
            replies.append((kind, await self.reader.readexactly(length)))
            if kind == nbd.Rep.ACK or kind >= 2**31:
                return replies

    async def go(self, name: str = "", options: Sequence[int] = ()) -> tuple[int, int]:
        """Negotiates `options` and enters transmission; the export's size and flags."""
        raw = name.encode()
        for option in options:
            data = b""
            if option == nbd.Opt.SET_META_CONTEXT:
                query = nbd.BASE_ALLOCATION.encode()
                data = struct.pack(">I", len(raw)) + raw + struct.pack(">II", 1, len(query)) + query
            assert (await self.option(option, data))[-1][0] == nbd.Rep.ACK
        replies = await self.option(nbd.Opt.GO, struct.pack(">I", len(raw)) + raw + b"\0\0")
        assert replies[-1][0] == nbd.Rep.ACK, replies
        kind, size, flags = struct.unpack(">HQH", replies[0][1])
        assert kind == nbd.Info.EXPORT
        return size, flags

    def ask(self, command: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> None:
        """Sends a request."""
        self.writer.write(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, command, cookie, offset, length) + payload)

    def ask_all(self, *requests: tuple[int, int, int, int, bytes]) -> None:
        """Sends (command, cookie, offset, length, payload) all in one piece."""
        pack, magic = nbd.REQUEST.pack, nbd.REQUEST_MAGIC
        self.writer.write(b"".join(pack(magic, 0, *request) + payload for *request, payload in requests))

    async def simple(self, length: int = 0) -> tuple[int, int, bytes]:
        """A simple reply: error, cookie, and `length` bytes of data if it succeeded."""
        magic, error, cookie = nbd.SIMPLE_REPLY.unpack(await self.reader.readexactly(16))
        assert magic == nbd.SIMPLE_REPLY_MAGIC
        return error, cookie, await self.reader.readexactly(0 if error else length)

    async def chunk(self) -> tuple[int, int, int, bytes]:
        """A structured chunk: flags, type, cookie, payload."""
        magic, flags, kind, cookie, length = nbd.STRUCTURED_REPLY.unpack(await self.reader.readexactly(20))
        assert magic == nbd.STRUCTURED_REPLY_MAGIC
        return flags, kind, cookie, await self.reader.readexactly(length)

    async def extended_chunk(self) -> tuple[int, int, int, int, bytes]:
        """An extended chunk: flags, type, cookie, offset, payload."""
        magic, flags, kind, cookie, offset, length = nbd.EXTENDED_REPLY.unpack(await self.reader.readexactly(32))
        assert magic == nbd.EXTENDED_REPLY_MAGIC
        return flags, kind, cookie, offset, await self.reader.readexactly(length)

    async def at_end(self) -> bytes:
        """What still comes before the server closes."""
        return await self.reader.read()

    def close(self) -> None:
        self.writer.close()

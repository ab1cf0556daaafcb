"""The remote-disk client against a server that breaks off at every byte, in both directions, and falsifies each byte.

The first connection is the treacherous one; those after it are honest. A break in the handshake fails `connect`; one after
it is not noticed by requests, and nothing that was acknowledged is lost, even when the server forgets all that it had not
flushed. What is falsified may fail or give other data, but nothing hangs, leaks, or raises what is not declared.
"""

import asyncio
import os
from pathlib import Path
from typing import Any, Final

import pytest

from nbdmap.block.io import DISCARD, FLUSH, WRITE_ZEROES, Io
from nbdmap.block.remote import RemoteDisk
from nbdmap.errors import NbdmapError
from tests.support.disks import read, write
from tests.support.fake_nbd import FakeServer
from tests.support.remote import MAKES, Time

QUIET_TURNS: Final = 60
"""Turns of the loop without a byte or a request, after which the two wait for each other."""
WAYS: Final = pytest.mark.parametrize(
    ("make", "forgets"), [("extended", False), ("extended", True), ("structured", True), ("simple", True)]
)
A, B, C = bytes(range(256)) * 2, b"b" * 512, b"c" * 512


class Treacherous(FakeServer):
    """Breaks its first connection off after `to_client` or `from_client` bytes, or falsifies the byte `falsify`."""

    to_client: int = 1 << 40
    from_client: int = 1 << 40
    falsify: int = -1
    flip: int = 0xFF
    forgets: bool = False
    sent = 0
    received = 0
    honest = False

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.honest:
            await super()._talk(reader, writer)
            return
        self.honest = True
        try:
            await super()._talk(Reading(self, reader), Writing(self, writer))  # type: ignore[arg-type]
        finally:
            if self.forgets:
                self.data[:] = self.durable
            if not writer.is_closing():
                await writer.drain()


class Reading:
    """A stream that ends after `from_client` bytes."""

    def __init__(self, server: Treacherous, reader: asyncio.StreamReader) -> None:
        self._server, self._reader = server, reader

    async def readexactly(self, count: int) -> bytes:
        server = self._server
        left = server.from_client - server.received
        data = await self._reader.readexactly(min(count, left))
        server.received += len(data)
        if len(data) < count:
            raise EOFError
        return data


class Writing:
    """A stream that ends after `to_client` bytes, and falsifies one."""

    def __init__(self, server: Treacherous, writer: asyncio.StreamWriter) -> None:
        self._server, self._writer = server, writer

    def write(self, data: bytes) -> None:
        server = self._server
        begin = server.sent
        if begin <= server.falsify < begin + len(data):
            at = server.falsify - begin
            data = data[:at] + bytes([data[at] ^ server.flip]) + data[at + 1 :]
        data = data[: server.to_client - begin]
        server.sent += len(data)
        self._writer.write(data)
        if server.sent == server.to_client:
            self._writer.close()
            raise EOFError

    async def drain(self) -> None:
        await self._writer.drain()


async def work(disk: RemoteDisk) -> dict[str, Any]:
    """Some of everything; what was read."""
    await asyncio.gather(write(disk, 0, A), write(disk, 4096, B), write(disk, 8192, C))
    await disk.submit(Io(FLUSH, 0), 0)
    await write(disk, 512, B)
    await disk.submit(Io(WRITE_ZEROES, 512), 8192)
    await disk.submit(Io(DISCARD, 512), 4096)
    await write(disk, 1024, C, 1)
    seen = await asyncio.gather(read(disk, 0, 512), read(disk, 512, 512), read(disk, 8192, 512))
    runs = await disk.extents(0, 65536)
    await disk.submit(Io(FLUSH, 0), 0)
    return {"seen": seen, "runs": runs}


async def session(server: Treacherous, time: Time) -> dict[str, Any] | NbdmapError:
    """Connects and works; what came of it. Where both sides wait for ever, the server hangs up."""
    found: list[dict[str, Any] | NbdmapError] = []

    async def client() -> None:
        try:
            disk = await RemoteDisk.connect(server.uri, name="far", number="7:0", reconnect=time.policy())
        except NbdmapError as error:
            found.append(error)
            return
        try:
            found.append(await work(disk))
        except NbdmapError as error:
            found.append(error)
        finally:
            await disk.close()

    task = asyncio.ensure_future(client())
    async with asyncio.timeout(20):
        quiet, before = 0, (0, 0, 0)
        while not task.done():
            await asyncio.sleep(0)
            now = (server.sent, server.received, len(server.log))
            quiet, before = (quiet + 1, now) if now == before else (0, now)
            if quiet == QUIET_TURNS:
                await server.drop()
                quiet = -10 * QUIET_TURNS
    await task
    return found[0]


class Bench:
    """Runs sessions one after another and looks for what they leave behind."""

    def __init__(self, path: Path, make: str) -> None:
        self._path, self._make = path / "s", make
        self._tasks = len(asyncio.all_tasks())
        self._descriptors = 0

    async def run(self, **treason: Any) -> tuple[Treacherous, dict[str, Any] | NbdmapError]:
        server = Treacherous(self._path, size=65536, refused=MAKES[self._make])
        for name, value in treason.items():
            setattr(server, name, value)
        async with server:
            outcome = await session(server, Time())
        async with asyncio.timeout(5):
            while len(asyncio.all_tasks()) > self._tasks:  # noqa: ASYNC110
                await asyncio.sleep(0)
        self._descriptors = self._descriptors or len(os.listdir("/proc/self/fd"))
        return server, outcome

    def check(self) -> None:
        assert len(os.listdir("/proc/self/fd")) <= self._descriptors


def good(server: Treacherous, outcome: dict[str, Any] | NbdmapError) -> bool:
    """Whether everything was as it should be, at the client and on the disk."""
    after = A + B + C
    zeroes = server.durable[8192:8704] == bytes(512) and server.durable[4096:4608] == bytes(512)
    seen = isinstance(outcome, dict) and outcome["seen"] == [A, B, bytes(512)]
    return seen and zeroes and server.durable[: len(after)] == after


async def measure(bench: Bench) -> tuple[int, int, int]:
    """An honest session: the bytes to the client, those from it, and those to it until it is connected."""
    server, outcome = await bench.run()
    assert good(server, outcome)
    low, high = 0, server.sent  # connected after `high` bytes, not after `low`
    while high - low > 1:
        middle = (low + high) // 2
        _, outcome = await bench.run(to_client=middle)
        low, high = (low, middle) if isinstance(outcome, dict) else (middle, high)
    return server.sent, server.received, high


@WAYS
async def test_the_server_breaks_off_after_every_byte_it_sends(tmp_path: Path, make: str, forgets: bool) -> None:
    """N8 for the client: never a wrong byte, never a hang; after the handshake never an error either."""
    bench = Bench(tmp_path, make)
    sent, _, handshake = await measure(bench)
    for cut in range(handshake, sent):
        server, outcome = await bench.run(to_client=cut, forgets=forgets)
        assert good(server, outcome), f"cut after {cut} of {sent} bytes: {outcome}"
    bench.check()


@WAYS
async def test_the_server_breaks_off_after_every_byte_it_receives(tmp_path: Path, make: str, forgets: bool) -> None:
    """N8 for the client, the other direction: half a request is sent again as a whole."""
    bench = Bench(tmp_path, make)
    _, received, _ = await measure(bench)
    failed = 0
    for cut in range(0, received, 1 if make == "extended" else 3):
        server, outcome = await bench.run(from_client=cut, forgets=forgets)
        if isinstance(outcome, NbdmapError):
            failed = cut
            assert not server.log, f"cut after {cut} of {received} bytes: {outcome}"
        else:
            assert good(server, outcome), f"cut after {cut} of {received} bytes"
    assert 0 < failed < received / 2
    bench.check()


@pytest.mark.parametrize(("make", "flip"), [("extended", 0x01), ("extended", 0xFF), ("structured", 0xFF), ("simple", 0x80)])
async def test_each_byte_of_the_server_is_falsified(tmp_path: Path, make: str, flip: int) -> None:
    """Replies that are not what they should be, in the handshake and after it: declared failures, or other data."""
    bench = Bench(tmp_path, make)
    server, outcome = await bench.run()
    assert good(server, outcome)
    for at in range(server.sent):
        server, outcome = await bench.run(falsify=at, flip=flip)
        if isinstance(outcome, dict):
            assert all(len(one) == 512 for one in outcome["seen"])
            assert sum(length for length, _ in outcome["runs"]) > 0
    bench.check()



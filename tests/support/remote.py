"""What tests of RemoteDisk share: a clock of their own and a disk on a fake server."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

from nbdmap.block.device import Device
from nbdmap.block.io import READ, Io
from nbdmap.block.reconnect import Reconnect
from nbdmap.block.remote import RemoteDisk
from nbdmap.nbd.constants import Cmd, Opt
from tests.support.fake_nbd import FakeServer

ONLY_SIMPLE = frozenset({Opt.EXTENDED_HEADERS, Opt.STRUCTURED_REPLY})
MAKES = {"extended": frozenset[int](), "structured": frozenset({Opt.EXTENDED_HEADERS}), "simple": ONLY_SIMPLE}
DEADLINE = 10.0


class Time:
    """A clock that tests move. Pauses between attempts take no time; the deadline passes when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        self.late = asyncio.Event()
        self.ninth = asyncio.Event()  # pause

    async def sleep(self, duration: float) -> None:
        if duration == DEADLINE:
            await self.late.wait()
            return
        self.pauses.append(duration)
        if len(self.pauses) == 9:
            self.ninth.set()
        await asyncio.sleep(0)

    def policy(self) -> Reconnect:
        return Reconnect(0.1, 5.0, DEADLINE, random=lambda: 1.0, sleep=self.sleep, clock=lambda: self.now)


@asynccontextmanager
async def connected(
    server: FakeServer, time: Time | None = None, *, read_only: bool = False, replay: bool = True
) -> AsyncIterator[RemoteDisk]:
    policy = (time or Time()).policy()
    disk = await RemoteDisk.connect(
        server.uri, name="far", number="7:0", read_only=read_only, reconnect=policy, replay=replay
    )
    try:
        yield disk
    finally:
        await disk.close()


def begin(request: Awaitable[None]) -> "asyncio.Future[None]":
    return asyncio.ensure_future(request)


def commands(server: FakeServer) -> list[Cmd]:
    return [asked.command for asked in server.log]


async def read_one(disk: Device) -> None:
    await disk.submit(Io(READ, 512, memoryview(bytearray(512))), 0)

"""N9, for the server as a whole: what clients do not read is bounded together, and the one that has not read for longest goes."""

import asyncio
import struct

import pytest

from nbdmap.nbd import constants as nbd
from nbdmap.nbd.constants import Cmd
from nbdmap.server import shared
from tests.support.nbd import Client, Stack, serving

MIB = 1 << 20
TOGETHER = 64 * MIB
EACH = 16 * MIB


async def never_reads(stack: Stack) -> tuple[asyncio.Transport, asyncio.Future[None]]:
    """A client that asks for 4 x EACH and reads nothing, and what is done when it is gone."""
    lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    class Deaf(asyncio.Protocol):
        def connection_lost(self, exc: Exception | None) -> None:
            lost.set_result(None)

    transport, _ = await asyncio.get_running_loop().create_unix_connection(Deaf, stack.socket)
    go = nbd.OPTION.pack(nbd.OPTION_MAGIC, nbd.Opt.GO, 10) + struct.pack(">I4sH", 4, b"zero", 0)
    reads = b"".join(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, Cmd.READ, n, 0, EACH) for n in range(4))
    transport.pause_reading()
    transport.write(struct.pack(">I", 3) + go + reads)
    return transport, lost


def held(stack: Stack) -> int:
    return sum(client.unsent() for client in stack.listener.clients)


async def test_n9_replies_that_nobody_reads_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """N9: 20 clients read nothing: the oldest are dropped, those that came last and a good one stay."""
    monkeypatch.setattr(shared, "MAX_UNSENT_TOGETHER", TOGETHER)
    async with serving() as stack:
        await stack.add("zero", f"0 {1 << 20} zero")
        good = await (await Client.connect(stack.socket)).greet()
        await good.go("zero")
        deaf = []
        async with asyncio.timeout(20):
            for number in range(20):
                deaf.append(await never_reads(stack))
                while held(stack) < min(number + 1, 3) * EACH // 2:  # noqa: ASYNC110
                    await asyncio.sleep(0)
                for _ in range(10):
                    await asyncio.sleep(0)
                assert held(stack) <= TOGETHER + 2 * EACH
                good.ask(Cmd.READ, 7, 0, 512)
                assert await good.simple(512) == (0, 7, bytes(512))
        assert len(stack.listener.clients) < 10
        for transport, _ in deaf:
            transport.abort()
        async with asyncio.timeout(5):
            while len(stack.listener.clients) > 1:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert nobody_is_choked(stack)


def nobody_is_choked(stack: Stack) -> bool:
    """Whether nobody counts as one that does not read."""
    (client,) = stack.listener.clients
    return not client._shared._choked


async def test_n9_who_reads_again_is_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow client that reads between its requests does not add up."""
    monkeypatch.setattr(shared, "MAX_UNSENT_TOGETHER", TOGETHER)
    async with serving() as stack:
        await stack.add("zero", f"0 {1 << 20} zero")
        slow = await (await Client.connect(stack.socket)).greet()
        await slow.go("zero")
        for number in range(20):
            slow.ask(Cmd.READ, number, 0, EACH)
            error, cookie, data = await slow.simple(EACH)
            assert (error, cookie, len(data)) == (0, number, EACH)

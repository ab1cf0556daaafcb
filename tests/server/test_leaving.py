"""nbdmap.server.connection: how clients leave, and what a cancellation reaches and what it does not."""

import asyncio
import logging
import struct

import pytest

from nbdmap.block.device import Device
from nbdmap.block.io import Io
from nbdmap.errors import IoFailed
from nbdmap.nbd import constants as nbd
from nbdmap.nbd.constants import Cmd, Opt
from nbdmap.server import listener
from tests.support.disks import FakeDisk
from tests.support.handshake import option
from tests.support.nbd import Client, Stack, serving


async def turns(count: int = 50) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def ready(stack: Stack) -> Client:
    client = await (await Client.connect(stack.socket)).greet()
    await client.go()
    return client


async def test_a_request_without_data_that_waits() -> None:
    async with serving() as stack:
        disk = FakeDisk("7:0")
        await stack.add("a", "0 64 linear 7:0 0", disk)
        client = await ready(stack)
        disk.gate = asyncio.Event()
        client.ask(Cmd.TRIM, 1, 0, 4096)
        client.ask(Cmd.FLUSH, 2)
        await turns()
        disk.gate.set()
        assert sorted([(await client.simple())[:2] for _ in range(2)]) == [(0, 1), (0, 2)]


class Cancelling(FakeDisk):
    """Awaits what was cancelled elsewhere: the first step of the request raises CancelledError."""

    async def submit(self, io: Io, offset: int) -> None:
        raise asyncio.CancelledError


async def test_a_request_that_is_cancelled_in_its_first_step_is_answered() -> None:
    async with serving() as stack:
        await stack.add("a", "0 64 linear 7:0 0", Cancelling("7:0"))
        client = await ready(stack)
        client.ask(Cmd.READ, 1, 0, 512)
        client.ask(Cmd.READ, 2, 0, 0)
        assert await client.simple() == (nbd.Error.ESHUTDOWN, 1, b"")
        assert await client.simple() == (0, 2, b"")


async def test_what_comes_behind_the_last_option_is_ignored() -> None:
    async with serving() as stack:
        await stack.add("a", "0 64 zero")
        client = await (await Client.connect(stack.socket)).greet()
        client.writer.write(option(Opt.ABORT) + b"x" * 10000)
        magic, number, kind, length = struct.unpack(">QIII", await client.reader.readexactly(20))
        assert (magic, number, kind, length) == (nbd.REPLY_MAGIC, Opt.ABORT, nbd.Rep.ACK, 0)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await client.reader.readexactly(1)
        await turns()
        assert not stack.listener.clients


async def test_a_device_is_given_back_even_if_the_stop_cancels_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "GRACE_SECONDS", 0.001)
    async with serving() as stack:
        device = await stack.add("a", "0 64 zero")
        client = await ready(stack)
        (connection,) = stack.listener.clients
        release, waiting, let_go = stack.exports.release, asyncio.Event(), asyncio.Event()

        async def slow(opened: Device) -> None:
            waiting.set()
            await let_go.wait()
            await release(opened)

        monkeypatch.setattr(stack.exports, "release", slow)
        client.ask(Cmd.DISC, 1)
        await waiting.wait()
        connection.cancel()
        await turns()
        assert device.openers == 1
        let_go.set()
        await connection.gone
        assert device.openers == 0


async def test_a_device_that_does_not_close_in_good_order_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as stack:
        await stack.add("a", "0 64 zero")
        client = await ready(stack)
        (connection,) = stack.listener.clients

        async def failing(opened: Device) -> None:
            raise IoFailed("close: Input/output error")

        monkeypatch.setattr(stack.exports, "release", failing)
        with caplog.at_level(logging.ERROR):
            client.ask(Cmd.DISC, 1)
            await connection.gone
        assert "'a' was not closed in good order" in caplog.text
        assert "Input/output error" in caplog.text

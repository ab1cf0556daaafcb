"""nbdmap.server.connection with a device that serves the requests of one wake-up together."""

import asyncio
from collections.abc import Callable

import pytest

from nbdmap.block.device import Limits
from nbdmap.block.io import DONE, FLUSH, READ, WRITE, Deferred, Io, Pending
from nbdmap.errors import IoFailed
from nbdmap.nbd.constants import Cmd
from tests.support.disks import FakeDisk
from tests.support.nbd import Client, serving


class Batching(FakeDisk):
    """Parks requests while there is a plug, as crypt does; `hold` keeps them beyond the wake-up."""

    def __init__(self) -> None:
        super().__init__("7:0", limits=Limits(discard=True))
        self.batches: list[int] = []
        self.parked: list[tuple[Io, int, Deferred]] = []
        self.hold = False
        self.cancelled = 0

    def submit(self, io: Io, offset: int) -> Pending:
        if io.op is FLUSH or not io.plug.active:
            self.do(io, offset)
            return DONE
        pending = Deferred(self.cancel)
        if not self.parked:
            io.plug.add(self.run)
        self.parked.append((io, offset, pending))
        return pending

    def do(self, io: Io, offset: int) -> None:
        if io.op is READ:
            io.data[:] = self.bytes[offset : offset + io.length]
        elif io.op is WRITE:
            self.bytes[offset : offset + io.length] = io.data

    def run(self) -> None:
        if self.hold:
            return
        parked, self.parked = self.parked, []
        self.batches.append(len(parked))
        for io, offset, pending in parked:
            error = self.failure(io, offset)
            if error is None:
                self.do(io, offset)
            pending.finish(error)

    def cancel(self) -> None:
        self.cancelled += 1
        parked, self.parked = self.parked, []
        for _, _, pending in parked:
            pending.finish(asyncio.CancelledError())


async def ready(path: str) -> Client:
    client = await (await Client.connect(path)).greet()
    await client.go("a", [])
    return client


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not come")


async def test_requests_of_one_wake_up_are_served_together() -> None:
    async with serving() as stack:
        disk = Batching()
        await stack.add("a", "0 64 linear 7:0 0", disk)
        client = await ready(stack.socket)
        client.ask_all(*((Cmd.WRITE, n, n * 512, 512, bytes([n]) * 512) for n in range(30)))
        for n in range(30):
            assert await client.simple() == (0, n, b"")
        client.ask_all(*((Cmd.READ, n, n * 512, 512, b"") for n in range(30)))
        for n in range(30):
            assert await client.simple(512) == (0, n, bytes([n]) * 512)
        assert disk.batches == [30, 30]


async def test_a_failure_is_of_its_request_alone() -> None:
    async with serving() as stack:
        disk = Batching()
        await stack.add("a", "0 64 linear 7:0 0", disk)
        disk.failure = lambda io, offset: IoFailed("bad sector") if offset == 512 else None
        client = await ready(stack.socket)
        client.ask_all(*((Cmd.READ, n, n * 512, 512, b"") for n in range(3)))
        assert await client.simple(512) == (0, 0, bytes(512))
        assert (await client.simple())[:2] == (5, 1)
        assert await client.simple(512) == (0, 2, bytes(512))


async def test_more_than_may_be_in_flight_is_served_in_turns() -> None:
    async with serving() as stack:
        disk = Batching()
        await stack.add("a", "0 64 linear 7:0 0", disk)
        client = await ready(stack.socket)
        client.ask_all(*((Cmd.READ, n, 0, 512, b"") for n in range(200)))
        for n in range(200):
            assert await client.simple(512) == (0, n, bytes(512))
        assert sum(disk.batches) == 200
        assert max(disk.batches) <= 64


async def test_borrowed_payloads_outlive_the_wake_up() -> None:
    """What is parked beyond it has its bytes in the receive buffer, which the next requests must not overwrite."""
    async with serving() as stack:
        disk = Batching()
        disk.hold = True
        await stack.add("a", "0 64 linear 7:0 0", disk)
        client = await ready(stack.socket)
        client.ask_all(*((Cmd.WRITE, n, n * 512, 512, bytes([n + 1]) * 512) for n in range(4)))
        await until(lambda: len(disk.parked) == 4)
        other = await ready(stack.socket)
        disk.hold = False
        other.ask_all(*((Cmd.WRITE, n, (n + 8) * 512, 512, b"x" * 512) for n in range(4)))
        await until(lambda: len(disk.parked) == 8)
        disk.run()
        for n in range(4):
            assert await client.simple() == (0, n, b"")
        assert disk.bytes[: 4 * 512] == b"".join(bytes([n + 1]) * 512 for n in range(4))


async def test_a_stop_cancels_what_is_parked() -> None:
    async with serving() as stack:
        disk = Batching()
        disk.hold = True
        device = await stack.add("a", "0 64 linear 7:0 0", disk)
        client = await ready(stack.socket)
        client.ask_all((Cmd.READ, 1, 0, 512, b""))
        await until(lambda: len(disk.parked) == 1)
        [connection] = stack.listener.clients
        connection.cancel()
        assert (await client.simple())[0] == 108  # ESHUTDOWN
        assert disk.cancelled == 1
        await until(lambda: device.live is not None and device.live.in_flight == 0)


class Late(Batching):
    """Reads are done at once, and their bytes come when the plug is pulled, as crypt has it."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = False

    def submit(self, io: Io, offset: int) -> Pending:
        if io.op is READ:
            io.plug.add(lambda: self.fill(io, offset))
            return DONE
        return super().submit(io, offset)

    def fill(self, io: Io, offset: int) -> None:
        if self.broken:
            raise RuntimeError("no key")
        self.do(io, offset)


async def test_nothing_is_answered_before_what_was_put_off_is_done() -> None:
    """Not even when the replies are too many to be kept until the end of the wake-up."""
    async with serving() as stack:
        disk = Late()
        await stack.add("a", "0 1024 linear 7:0 0", disk)
        disk.bytes[:] = bytes(range(256)) * (disk.size // 256)
        client = await ready(stack.socket)
        client.ask_all(*((Cmd.READ, n, 0, 256 << 10, b"") for n in range(12)))
        for n in range(12):
            assert await client.simple(256 << 10) == (0, n, bytes(disk.bytes[: 256 << 10]))


async def test_a_client_is_dropped_when_what_was_read_cannot_be_finished(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as stack:
        disk = Late()
        disk.broken = True
        device = await stack.add("a", "0 64 linear 7:0 0", disk)
        client = await ready(stack.socket)
        client.ask_all((Cmd.WRITE, 1, 0, 512, b"x" * 512), (Cmd.READ, 2, 0, 512, b""))
        assert await client.reader.read() == b""
        await until(lambda: not stack.listener.clients and not device.openers)
        assert "what was read could not be finished" in caplog.text

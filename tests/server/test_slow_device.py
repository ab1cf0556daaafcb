"""A slow device keeps nobody waiting but who uses it. Nothing here is timed: the slow requests take for ever."""

import asyncio
import os
from pathlib import Path

import pytest

from nbdmap.block.file import FileDisk
from nbdmap.dm.device import MappedDevice
from nbdmap.nbd.constants import Cmd
from nbdmap.server.connection import MAX_REQUESTS
from tests.support.disks import FakeDisk
from tests.support.gate import Gate
from tests.support.nbd import Client, Stack, serving

AN_HOUR = 3_600_000


async def ready(stack: Stack, name: str) -> Client:
    client = await (await Client.connect(stack.socket)).greet()
    await client.go(name, [])
    return client


def held(device: MappedDevice) -> str:
    assert device.live is not None
    return device.live.status_lines()[0].params


async def works(client: Client, requests: int = 300) -> None:
    """A client whose reads and writes are answered, many at once and one after another."""
    client.ask_all(*((Cmd.WRITE, n, n % 64 * 512, 512, bytes([n % 64]) * 512) for n in range(requests)))
    for n in range(requests):
        assert await client.simple() == (0, n, b"")
    for n in range(requests):
        client.ask(Cmd.READ, n, n % 64 * 512, 512)
        assert await client.simple(512) == (0, n, bytes([n % 64]) * 512)
    client.ask(Cmd.FLUSH, 1)
    assert await client.simple() == (0, 1, b"")


async def until_held(device: MappedDevice, wanted: str) -> None:
    for _ in range(10_000):
        if held(device) == wanted:
            return
        await asyncio.sleep(0)
    raise AssertionError(f"{held(device)!r} is not {wanted!r}")


async def test_a_delayed_device_holds_nobody_else_up() -> None:
    """Clients fill their windows on the slow device; others go on, on another device and on the same disk below."""
    async with serving() as stack:
        disk = FakeDisk("7:0")
        slow = await stack.add("slow", f"0 64 delay 7:0 512 {AN_HOUR}", disk)
        await stack.add("fast", "0 64 linear 7:0 0", disk)
        stuck = [await ready(stack, "slow") for _ in range(4)]
        for number, client in enumerate(stuck):
            command = (Cmd.READ, Cmd.WRITE)[number % 2]
            client.ask_all(*((command, n, n % 64 * 512, 512, b"s" * 512 if number % 2 else b"") for n in range(100)))
        await until_held(slow, f"{2 * MAX_REQUESTS} {2 * MAX_REQUESTS} 0")
        await works(await ready(stack, "fast"))
        late = await ready(stack, "slow")
        late.ask(Cmd.FLUSH, 7)
        await until_held(slow, f"{2 * MAX_REQUESTS} {2 * MAX_REQUESTS} 1")
        await works(await ready(stack, "fast"))
        assert held(slow) == f"{2 * MAX_REQUESTS} {2 * MAX_REQUESTS} 1"
        await slow.suspend()
        assert await late.simple() == (0, 7, b"")
        for number, client in enumerate(stuck):
            for n in range(MAX_REQUESTS):
                error, cookie, _ = await client.simple(0 if number % 2 else 512)
                assert (error, cookie) == (0, n)
        assert disk.bytes[512 * 512 : (512 + 64) * 512] == b"s" * 64 * 512


async def test_a_stop_does_not_wait_for_the_hour() -> None:
    async with serving() as stack:
        slow = await stack.add("slow", f"0 64 delay 7:0 0 {AN_HOUR}", FakeDisk("7:0"))
        client = await ready(stack, "slow")
        client.ask_all(*((Cmd.READ, n, 0, 512, b"") for n in range(10)))
        await until_held(slow, "10 0 0")
        [connection] = stack.listener.clients
        connection.cancel()
        answers = {(await client.simple())[:2] for _ in range(10)}
        assert answers == {(108, n) for n in range(10)}  # ESHUTDOWN
        await until_held(slow, "0 0 0")


async def test_a_disk_whose_sync_hangs_holds_nobody_else_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others go on, on other files and on the same one; only their flushes of it wait."""
    sync = os.fdatasync
    opened: list[int] = []
    gate = Gate(sync)
    monkeypatch.setattr(os, "fdatasync", lambda fd: gate(fd) if os.fstat(fd).st_ino == opened[0] else sync(fd))
    async with serving() as stack:
        disks: list[FileDisk] = []
        for name in ("slow", "fast"):
            disk = await FileDisk.open(tmp_path / name, name=name, number=f"7:{len(disks)}", create=True, size=1 << 20)
            disks.append(disk)
            await stack.add(name, f"0 64 linear {disk.number} 0", disk)
        opened.append((tmp_path / "slow").stat().st_ino)
        stuck = await ready(stack, "slow")
        stuck.ask_all((Cmd.WRITE, 1, 0, 512, b"s" * 512), (Cmd.FLUSH, 2, 0, 0, b""))
        assert await stuck.simple() == (0, 1, b"")
        await gate.entered.wait()
        await works(await ready(stack, "fast"))
        neighbour = await ready(stack, "slow")
        neighbour.ask_all((Cmd.READ, 3, 0, 512, b""), (Cmd.WRITE, 4, 512, 512, b"n" * 512))
        assert await neighbour.simple(512) == (0, 3, b"s" * 512)
        assert await neighbour.simple() == (0, 4, b"")
        gate.open()
        assert await stuck.simple() == (0, 2, b"")
    for disk in disks:
        await disk.close()

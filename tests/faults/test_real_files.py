"""The same over real files, sockets and threads: system calls fail, in FileDisk's module only, on uvloop.

What cannot be virtual here is not waited for: stalls end when the test says so, and only one run has an I/O that never ends.
"""

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, cast

import pytest

from nbdmap.block import file as file_module
from nbdmap.block import syscalls
from nbdmap.block.device import Device
from nbdmap.block.file import FileDisk
from nbdmap.block.io import FLUSH, READ, WRITE, Io
from nbdmap.units import SECTOR
from tests.crash.disks import Fault
from tests.crash.stacks import LinearFiles, StripedFiles, Tables
from tests.faults.harness import KINDS, STOP, Kind, Plan, Run, Served
from tests.support.nbd import Client, serving

REAL: Final = {
    "eio": KINDS["eio"],
    "enospc": KINDS["enospc-half-done"],
    "flush-eio": KINDS["flush-eio"],
    "short-write": KINDS["short-write"],
    "short-read": KINDS["short-read"],
}
STACKS: Final[dict[str, type[Tables]]] = {"linear": LinearFiles, "striped": StripedFiles}


class FailingCalls:
    """Stands in for `os` and `syscalls` in FileDisk's module; asks a plan before each call on the disk."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name) if hasattr(os, name) else getattr(syscalls, name)

    def _fault(self, kind: str) -> Fault:
        return self._plan.fault(kind, waits=False) or Fault()

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        fault = self._fault("read")
        fault.strike()
        return os.preadv(fd, (buffers[0][: fault.bytes_of(len(buffers[0]))],), offset, flags)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        fault = self._fault("write")
        done = os.pwritev(fd, (buffers[0][: fault.bytes_of(len(buffers[0]))],), offset)
        fault.strike()
        return done

    def fdatasync(self, fd: int) -> None:
        self._fault("flush").strike()
        os.fdatasync(fd)

    def sync_range(self, fd: int, offset: int, length: int) -> None:
        self._fault("range").strike()
        syscalls.sync_range(fd, offset, length)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        self._fault("zero").strike()
        syscalls.fallocate(fd, mode, offset, length)


@contextlib.contextmanager
def failing(plan: Plan) -> Iterator[None]:
    """FileDisk's system calls fail as planned."""
    module = cast("Any", file_module)
    calls = FailingCalls(plan)
    before = module.os, module.syscalls
    module.os = module.syscalls = calls
    try:
        yield
    finally:
        module.os, module.syscalls = before


class RealRun(Run):
    """A run over files in `directory`."""

    directory: Path

    @asynccontextmanager
    async def disks(self, images: Sequence[bytes]) -> AsyncIterator[list[Device]]:
        with failing(self.plan):
            disks: list[Device] = []
            for index, image in enumerate(images):
                path = self.directory / str(index)
                path.write_bytes(image)
                disks.append(await FileDisk.open(path, name=f"disk{index}", number=f"7:{index}"))
            yield disks
            for disk in disks:
                await disk.close()


def leftovers() -> tuple[int, int]:
    """Open descriptors and threads."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


async def every_site(stack: str, kind: Kind, directory: Path) -> int:
    """The number of runs it took."""
    runs = 0
    for at_once in (False, True):
        for sticky in (False, True):
            for site in range(1000):
                one = RealRun(STACKS[stack](), kind, site, sticky, 3, at_once, slack=30.0)
                one.directory = directory
                await one.session([os.urandom(sectors * SECTOR) for sectors in one.scenario.sectors])
                if not one.plan.hits:
                    break
                runs += 1
    return runs


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("kind", REAL)
async def test_every_site(stack: str, kind: str, tmp_path: Path) -> None:
    await without_a_fault(stack, tmp_path)
    before = leftovers()
    runs = await every_site(stack, REAL[kind], tmp_path)
    print(f"faults {stack} real files {kind}: {runs} runs")
    assert runs >= 4
    assert leftovers() == before


async def without_a_fault(stack: str, directory: Path) -> None:
    """A run without a fault, so that what stays open for good is open."""
    one = RealRun(STACKS[stack](), REAL["eio"], 1 << 30, False, 3, False, slack=30.0)
    one.directory = directory
    await one.session([bytes(sectors * SECTOR) for sectors in one.scenario.sectors])


async def test_a_file_that_has_become_shorter(tmp_path: Path) -> None:
    path = tmp_path / "a"
    disk = await FileDisk.open(path, name="a", number="7:0", create=True, size=64 * SECTOR)
    async with serving() as stack:
        device = await stack.add("dev", "0 64 linear 7:0 0", disk)
        client = await (await Client.connect(stack.socket)).greet()
        served = Served(client, (await client.go())[0], device.limits)
        os.truncate(path, 8 * SECTOR)
        with pytest.raises(Exception, match="the server says no"):
            await served.submit(Io(READ, 16 * SECTOR, memoryview(bytearray(16 * SECTOR))), 0)
        assert served.error == errno.EIO
        await served.submit(Io(READ, 8 * SECTOR, memoryview(bytearray(8 * SECTOR))), 0)
        await stack.listener.close()
        await served.end()
    await disk.close()


async def test_a_sync_that_never_ends_stops_neither_others_nor_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = threading.Event()
    monkeypatch.setattr(os, "fdatasync", lambda fd: stuck.wait(60) or None)
    disk = await FileDisk.open(tmp_path / "a", name="a", number="7:0", create=True, size=64 * SECTOR)
    loop = asyncio.get_running_loop()
    async with serving() as stack:
        device = await stack.add("dev", "0 64 linear 7:0 0", disk)
        clients = [await (await Client.connect(stack.socket)).greet() for _ in range(2)]
        one, two = [Served(client, (await client.go())[0], device.limits) for client in clients]
        flush = asyncio.ensure_future(one.submit(Io(FLUSH, 0), 0))
        for served in (one, two):
            await served.submit(Io(WRITE, SECTOR, memoryview(b"x" * SECTOR)), 0)
            await served.submit(Io(READ, SECTOR, memoryview(bytearray(SECTOR))), 0)
        assert not flush.done()
        begun = loop.time()
        await stack.listener.close()
        assert loop.time() - begun <= STOP
        stuck.set()
        flush.cancel()
        await asyncio.gather(one.end(), two.end(), flush, return_exceptions=True)
        for _ in range(10_000):
            if not device.openers:
                break
            await asyncio.sleep(0)
        assert not device.openers
    await disk.close()

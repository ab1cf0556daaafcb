"""nbdmap.targets.delay, in virtual time."""

import asyncio
import gc
from typing import Any

import pytest

from nbdmap.block.device import HOLE, ZERO, Limits
from nbdmap.block.io import CACHE, DISCARD, DONE, FLUSH, FUA, READ, WRITE, WRITE_ZEROES, Deferred, Io, Op
from nbdmap.block.memory import MemoryDisk
from nbdmap.dm.table import Table
from nbdmap.errors import InvalidArgument, IoFailed
from nbdmap.targets import delay
from tests.crash.clock import run
from tests.support.disks import ALL, FakeDisk, build, eio, mapped, read, write


def now() -> float:
    return asyncio.get_running_loop().time()


async def took_ms(table: Table, op: Op, length: int = 512) -> int:
    """How long a request takes, in milliseconds."""
    begun = now()
    await table.submit(Io(op, length, memoryview(bytearray(length))), 0)
    return round((now() - begun) * 1000)


def status(table: Table) -> str:
    return table.status_lines()[0].params


@pytest.mark.parametrize(
    ("words", "reads", "writes", "flushes"),
    [
        ("7:0 8 30", (30, "7:0", 8), (30, "7:0", 8), (30, "7:0")),
        ("7:0 8 30 7:1 16 40", (30, "7:0", 8), (40, "7:1", 16), (40, "7:1")),
        ("7:0 8 30 7:1 16 40 7:1 24 50", (30, "7:0", 8), (40, "7:1", 16), (50, "7:1")),
        ("7:0 8 0 7:1 16 40 7:0 0 0", (0, "7:0", 8), (40, "7:1", 16), (0, "7:0 7:1")),
    ],
)
def test_each_class_has_its_device_and_its_time(
    words: str, reads: tuple[int, str, int], writes: tuple[int, str, int], flushes: tuple[int, str]
) -> None:
    async def main() -> None:
        disks = {number: FakeDisk(number) for number in ("7:0", "7:1")}
        table = await build(f"0 4 error\n4 64 delay {words}", *disks.values())
        for op, (ms, number, start) in {READ: reads, CACHE: reads, WRITE: writes, DISCARD: writes, WRITE_ZEROES: writes}.items():
            begun = now()
            await table.submit(Io(op, 512, memoryview(bytearray(512))), 6 * 512)
            assert round((now() - begun) * 1000) == ms
            assert disks[number].log.pop() == (op.name.lower(), (start + 2) * 512, 512, 0)
        begun = now()
        await table.submit(Io(FLUSH, 0), 0)
        assert round((now() - begun) * 1000) == flushes[0]
        assert [number for number in sorted(disks) if disks[number].log] == flushes[1].split()
        assert all(log == ("flush", 0, 0, 0) for disk in disks.values() for log in disk.log)
        assert table.table_lines()[1].params == words

    run(main())


def test_no_delay_is_no_detour() -> None:
    async def main() -> None:
        disk = FakeDisk("7:0")
        disk.submit = lambda io, offset: DONE  # type: ignore[method-assign]
        table = await build("0 8 delay 7:0 0 0 7:0 0 5", disk)
        assert table.submit(Io(READ, 512, memoryview(bytearray(512))), 0) is DONE
        assert isinstance(table.submit(Io(WRITE, 512, memoryview(bytes(512))), 0), Deferred)
        await asyncio.sleep(1)

    run(main())


def test_time_runs_from_the_arrival_and_order_is_kept() -> None:
    async def main() -> None:
        disk = FakeDisk("7:0")
        table = await build("0 64 delay 7:0 0 100", disk)
        ends: list[tuple[int, int]] = []

        async def one(number: int) -> None:
            await asyncio.sleep(number / 1000)
            await table.submit(Io(READ, 512, memoryview(bytearray(512))), number * 512)
            ends.append((number, round(now() * 1000)))

        await asyncio.gather(*(one(number) for number in range(64)))
        assert ends == [(number, number + 100) for number in range(64)]
        assert [entry[1] for entry in disk.log] == [number * 512 for number in range(64)]

    run(main())


def test_many_at_once_have_one_timer_and_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 in flight; they are issued in turns of MAX_TURN, between which others run."""

    async def main() -> None:
        disk = FakeDisk("7:0")
        table = await build("0 8 delay 7:0 0 100", disk)
        loop = asyncio.get_running_loop()
        timers = 0
        call_at = loop.call_at

        def counted(when: float, *arguments: Any, **options: Any) -> asyncio.TimerHandle:
            nonlocal timers
            timers += 1
            return call_at(when, *arguments, **options)

        monkeypatch.setattr(loop, "call_at", counted)
        ended = 0

        def count(error: BaseException | None) -> None:
            nonlocal ended
            ended += 1

        for _ in range(10_000):
            pending = table.submit(Io(WRITE, 512, memoryview(bytes(512))), 0)
            assert isinstance(pending, Deferred)
            pending.then(count)
        assert (timers, len(asyncio.all_tasks()), status(table)) == (1, 1, "0 10000 0")
        seen: set[int] = set()
        await asyncio.sleep(0.1)
        while ended < 10_000:
            await asyncio.sleep(0)
            seen.add(ended)
        assert len(seen) >= 10_000 // delay.MAX_TURN - 1
        assert round(now() * 1000) == 100
        assert status(table) == "0 0 0"

    run(main())


def test_requests_leave_no_garbage() -> None:
    """No cycles: with 10,000 in flight the collector would stop the loop for longer than requests may be late."""

    async def main() -> None:
        table = await build("0 8 delay 7:0 0 100", MemoryDisk("disk", "7:0", 4096))
        gc.collect()
        gc.disable()
        try:
            for _ in range(100):
                assert isinstance(table.submit(Io(READ, 512, memoryview(bytearray(512))), 0), Deferred)
            await asyncio.sleep(0.2)
            assert status(table) == "0 0 0"
            assert gc.collect() < 50
        finally:
            gc.enable()

    run(main())


def test_failures_come_late_too() -> None:
    async def main() -> None:
        disk = FakeDisk("7:0")
        table = await build("0 8 delay 7:0 0 20", disk)
        disk.failure = eio
        with pytest.raises(IoFailed, match="broken on purpose"):
            await read(table, 0, 512)
        assert round(now() * 1000) == 20

    run(main())


def test_a_slow_device_below() -> None:
    """The request is counted while it is held back, not while the device works on it."""

    async def main() -> None:
        disk = FakeDisk("7:0")
        disk.gate = asyncio.Event()
        table = await build("0 8 delay 7:0 0 20", disk)
        task = asyncio.create_task(took_ms(table, READ))
        await asyncio.sleep(0.01)
        assert status(table) == "1 0 0"
        await asyncio.sleep(0.1)
        assert (status(table), len(disk.log), task.done()) == ("0 0 0", 1, False)
        disk.gate.set()
        assert await task == 110

    run(main())


def test_status_counts_each_class() -> None:
    async def main() -> None:
        table = await build("0 8 delay 7:0 0 20 7:0 0 30 7:0 0 40", FakeDisk("7:0"))
        tasks = [asyncio.create_task(took_ms(table, op, 0 if op is FLUSH else 512)) for op in (READ, CACHE, WRITE, FLUSH)]
        for ms, wanted in ((10, "2 1 1"), (15, "0 1 1"), (10, "0 0 1"), (10, "0 0 0")):
            await asyncio.sleep(ms / 1000)
            assert status(table) == wanted
        assert await asyncio.gather(*tasks) == [20, 20, 30, 40]

    run(main())


@pytest.mark.parametrize("noflush", [False, True])
def test_a_suspend_issues_what_is_held_back(noflush: bool) -> None:
    async def main() -> None:
        disk = FakeDisk("7:0")
        device = await mapped("slow", "0 8 delay 7:0 0 5000000", disk)
        task = asyncio.create_task(write(device, 0, b"x" * 512))
        later = asyncio.create_task(write(device, 512, b"y" * 512))
        await asyncio.sleep(1)
        assert device.live is not None
        assert (disk.log, status(device.live)) == ([], "0 2 0")
        await device.suspend(noflush=noflush)
        await asyncio.gather(task, later)
        assert (round(now()), status(device.live)) == (1, "0 0 0")
        assert disk.bytes[:1024] == b"x" * 512 + b"y" * 512
        held = asyncio.create_task(write(device, 0, b"z" * 512))
        await asyncio.sleep(1)
        await device.resume()
        await held
        assert round(now()) == 5002
        await device.close()

    run(main())


@pytest.mark.parametrize("when", ["held back", "on its way"])
def test_a_cancelled_request_ends_at_once(when: str) -> None:
    async def main() -> None:
        disk = FakeDisk("7:0")
        table = await build("0 8 delay 7:0 0 50", disk)
        disk.gate = asyncio.Event()
        task, other = (asyncio.create_task(read(table, at, 512)) for at in (0, 512))
        await asyncio.sleep(0.01 if when == "held back" else 0.06)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert round(now() * 1000) == (10 if when == "held back" else 60)
        assert status(table) == ("1 0 0" if when == "held back" else "0 0 0")
        disk.gate.set()
        await other
        assert [entry[1] for entry in disk.log] == ([512] if when == "held back" else [0, 512])
        await table.close()

    run(main())


async def test_holes_are_told_only_where_reads_are_not_delayed() -> None:
    disk = FakeDisk("7:0")
    disk.runs = [(4096, HOLE | ZERO), (1020 * 512, 0)]
    quick = await build("0 4 error\n4 64 delay 7:0 4 0 7:0 4 9", disk)
    assert await quick.extents(2048, 4096) == [(2048, HOLE | ZERO), (2048, 0)]
    slow = await build("0 64 delay 7:0 0 1", disk)
    assert await slow.extents(0, 4096) == [(4096, 0)]
    assert (quick.targets[1].limits().sparse, slow.limits.sparse) == (True, False)


async def test_limits() -> None:
    table = await build("0 8 delay 7:0 0 1 7:1 0 1", FakeDisk("7:0", limits=ALL), FakeDisk("7:1", limits=Limits(4096)))
    assert table.limits == Limits(logical_block=4096)
    one = (await build("0 8 delay 7:0 0 1", FakeDisk("7:0"))).limits
    assert (one.discard, one.zero, one.fast_zero, one.cache, one.sparse) == (True, True, True, True, False)


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        ("", "3, 6 or 9 words are needed, 0 given"),
        ("7:0 0 1 7:0", "3, 6 or 9 words are needed, 4 given"),
        ("7:0 x 1", "start sector: 'x' is not a decimal number"),
        ("7:0 0 1 7:0 x 1", "write start sector: 'x' is not a decimal number"),
        ("7:0 0 1 7:0 0 1 7:0 0 -1", "flush delay: '-1' is not a decimal number"),
        ("7:0 0 4294967296", "delay: 4294967296 is not in the range 0 to 4294967295"),
        ("7:0 0 1 7:0 1020 1", "sectors 1020 to 1028 are beyond the end of disk7:0"),
    ],
)
async def test_bad_words(params: str, complaint: str) -> None:
    disk = FakeDisk("7:0")
    with pytest.raises(InvalidArgument) as caught:
        await build(f"0 8 delay {params}", disk)
    assert f"line 1: delay: {complaint}" in caught.value.message
    assert disk.openers == 0


async def test_a_write_keeps_its_flags() -> None:
    disk = FakeDisk("7:0")
    await write(await build("0 8 delay 7:0 0 1", disk), 0, b"x" * 512, FUA)
    assert disk.log == [("write", 0, 512, FUA)]

"""nbdmap.targets.log_writes: what enters the log and when, and what a replay gives. The kernel's log of the same requests is
in tests/vm/test_faults.py."""

import asyncio
import errno
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from nbdmap.block.device import HOLE, ZERO, Limits
from nbdmap.block.io import CACHE, DISCARD, FLUSH, FUA, WRITE, Io
from nbdmap.dm.device import MappedDevice
from nbdmap.errors import InvalidArgument, IoFailed
from nbdmap.targets import log_writes
from nbdmap.targets.log_writes import END, Flag, Logged
from tests.crash.clock import run
from tests.crash.logwrites import load, replay
from tests.support.disks import FakeDisk, build, eio, mapped, read, write

SECTORS = 256
LIMITS = Limits(discard=True)


async def logged(
    log_sectors: int = 4096, block: int = 512, begin: int = 0
) -> tuple[MappedDevice, FakeDisk, FakeDisk]:
    disk = FakeDisk("7:0", SECTORS, Limits(logical_block=block, discard=True))
    log = FakeDisk("7:1", log_sectors)
    disk.bytes[:] = random.Random(1).randbytes(disk.size)
    lead = f"0 {begin} error\n" if begin else ""
    return await mapped("log", f"{lead}{begin} {SECTORS - begin} log-writes 7:0 7:1", disk, log), disk, log


async def flush(device: MappedDevice) -> None:
    await device.submit(Io(FLUSH, 0), 0)


async def discard(device: MappedDevice, offset: int, length: int, flags: int = 0) -> None:
    await device.submit(Io(DISCARD, length, flags=flags), offset)


def status(device: MappedDevice) -> str:
    assert device.live is not None
    return device.live.status_lines()[-1].params


def kinds(log: FakeDisk) -> list[tuple[int, int, Flag]]:
    return [(entry.sector, entry.sectors, entry.flags) for entry in load(bytes(log.bytes))]


async def close(device: MappedDevice) -> None:
    await device.suspend()
    await device.close()


async def test_a_write_is_logged_when_it_is_flushed() -> None:
    device, disk, log = await logged()
    before = bytes(disk.bytes)
    await write(device, 0, b"a" * 1024)
    await discard(device, 4096, 512)
    await write(device, 2048, b"b" * 512)
    assert (status(device), bytes(log.bytes)) == ("0 0", bytes(log.size))
    await flush(device)
    assert status(device) == f"4 {4 + 2 + 1}"
    await write(device, 512, b"c" * 512)
    await device.message(0, ["mark", "half way"])
    await write(device, 8192, b"d" * 512, FUA)
    await read(device, 0, 512)
    assert kinds(log) == [
        (0, 2, Flag(0)), (8, 1, Flag.DISCARD), (4, 1, Flag(0)), (0, 0, Flag.FLUSH), (0, 0, Flag.MARK), (16, 1, Flag.FUA),
    ]  # fmt: skip
    await close(device)
    entries = load(bytes(log.bytes))
    assert [(entry.sector, entry.flags) for entry in entries[-2:]] == [(1, Flag(0)), (0, Flag.MARK)]
    assert [entry.data for entry in entries if entry.flags & Flag.MARK] == [b"half way", END.encode()]
    image = bytearray(before)
    replay(entries, image)
    assert image == disk.bytes
    assert log.log[-1] == ("flush", 0, 0, 0)


async def test_sectors_are_those_of_the_mapped_device() -> None:
    device, disk, log = await logged(begin=8)
    await write(device, 10 * 512, b"x" * 512, FUA)
    assert disk.bytes[10 * 512 : 11 * 512] == b"x" * 512
    assert kinds(log) == [(10, 1, Flag.FUA)]
    await close(device)


async def test_blocks_of_4096() -> None:
    device, _, log = await logged(block=4096)
    await device.message(0, ["mark", "x" * 5000])
    await write(device, 8192, b"x" * 8192, FUA)
    assert status(device) == "2 39"
    marked, written = load(bytes(log.bytes))
    assert marked.data == b"x" * (4096 - 33)
    assert written == Logged(2, 2, Flag.FUA, b"x" * 8192)
    assert log.log[1:3] == [("write", 0, 4096, 0), ("write", 8192, 4096 + 8192, 0)]
    await close(device)


async def test_a_fua_write_takes_with_it_what_it_overlaps() -> None:
    device, _, log = await logged()
    for sector, sectors in ((9, 1), (1, 2), (2, 3), (20, 1)):
        await write(device, sector * 512, bytes(sectors * 512))
    await discard(device, 4 * 512, 512, FUA)
    assert [kind[0] for kind in kinds(log)] == [1, 2, 4]
    await flush(device)
    await device.message(0, ["mark", "now"])
    assert [kind[0] for kind in kinds(log)] == [1, 2, 4, 9, 20, 0, 0]
    await close(device)


@pytest.mark.parametrize("order", ["first", "second"])
def test_flushes_that_overlap_log_in_the_order_of_writes(order: str) -> None:
    """Whichever of two flushes ends first, an earlier write of the same sector stands before a later one."""

    async def main() -> None:
        device, disk, log = await logged()
        gates = [asyncio.Event(), asyncio.Event()]
        plain = disk.submit
        flushes = iter(gates)

        async def submit(io: Io, offset: int) -> None:
            if io.op is FLUSH and (gate := next(flushes, None)):
                await gate.wait()
            await plain(io, offset)

        disk.submit = submit  # type: ignore[method-assign]
        await write(device, 0, b"1" * 512)
        one = asyncio.create_task(flush(device))
        await asyncio.sleep(0)
        await write(device, 0, b"2" * 512)
        two = asyncio.create_task(flush(device))
        await asyncio.sleep(0)
        await write(device, 0, b"3" * 512)
        for gate in gates if order == "first" else gates[::-1]:
            gate.set()
            await asyncio.sleep(0.1)
        await asyncio.gather(one, two)
        await close(device)
        entries = load(bytes(log.bytes))
        assert [entry.data[:1] for entry in entries if entry.sectors] == [b"1", b"2", b"3"]
        flags = [entry.flags for entry in entries]
        middle = [Flag.FLUSH, Flag(0), Flag.FLUSH] if order == "first" else [Flag(0), Flag.FLUSH, Flag.FLUSH]
        assert flags == [Flag(0), *middle, Flag(0), Flag.MARK]

    run(main())


async def test_a_flush_that_fails_covers_nothing() -> None:
    device, disk, log = await logged()
    await write(device, 0, b"a" * 512)
    disk.failure = eio
    with pytest.raises(IoFailed):
        await flush(device)
    with pytest.raises(IoFailed):
        await write(device, 512, b"b" * 512)
    assert status(device) == "0 0"
    disk.failure = lambda io, offset: None
    await flush(device)
    assert status(device) == "2 3"
    await close(device)
    assert [kind[0] for kind in kinds(log)] == [0, 0, 0]


async def test_what_waits_in_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writes, "MAX_UNFLUSHED", 4096)
    device, disk, log = await logged()
    for number in range(9):
        await write(device, number * 512, b"a" * 512)
        assert status(device) == ("0 0" if number < 4 else "5 10" if number < 9 else "")
    assert [entry[0] for entry in disk.log].count("flush") == 1
    disk.failure = lambda io, offset: IoFailed("no") if io.op is FLUSH else None
    for number in range(9):
        await write(device, number * 512, b"b" * 512)
    assert status(device) == "5 10 logging_disabled"
    disk.failure = lambda io, offset: None
    await close(device)
    assert log.log[-1][0] == "flush"
    assert bytes(log.bytes[:512]) == bytes(512)


async def test_long_logs_are_written_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writes, "MAX_APPEND", 2048)
    device, disk, log = await logged()
    for number in range(7):
        await write(device, number * 512, bytes([number]) * 512)
    await flush(device)
    assert [entry[1:3] for entry in log.log] == [(512, 2048), (2560, 2048), (4608, 2048), (6656, 1536)]
    await close(device)
    image = bytearray(disk.size)
    replay(load(bytes(log.bytes)), image)
    assert image[: 7 * 512] == disk.bytes[: 7 * 512]


async def test_a_full_log_ends_the_logging_only() -> None:
    device, disk, log = await logged(log_sectors=8)
    await write(device, 0, b"a" * 512, FUA)
    await write(device, 0, b"b" * 1024, FUA)
    assert status(device) == "2 5"
    await write(device, 0, b"c" * 512, FUA)
    assert status(device) == "2 5 logging_disabled"
    await write(device, 512, b"d" * 512, FUA)
    assert disk.bytes[:1024] == b"c" * 512 + b"d" * 512
    await device.message(0, ["mark", "late"])
    await close(device)
    assert kinds(log) == [(0, 1, Flag.FUA), (0, 2, Flag.FUA)]


async def test_a_log_that_fails_ends_the_logging_only(caplog: pytest.LogCaptureFixture) -> None:
    device, disk, log = await logged()
    log.failure = lambda io, offset: IoFailed("no space", errno.ENOSPC) if io.op is WRITE else None
    await write(device, 0, b"a" * 512, FUA)
    assert status(device).endswith("logging_disabled")
    assert disk.bytes[:512] == b"a" * 512
    assert caplog.messages == ["log-writes on disk7:0: logging ends: the log cannot be written: no space"]
    await close(device)


async def test_a_cancelled_request_leaves_no_gap_in_the_log() -> None:
    device, _, log = await logged()
    log.gate = asyncio.Event()
    first = asyncio.create_task(write(device, 0, b"a" * 512, FUA))
    second = asyncio.create_task(write(device, 512, b"b" * 512, FUA))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    second.cancel()
    await asyncio.sleep(0)
    assert not first.done()
    log.gate.set()
    for task in (first, second):
        with pytest.raises(asyncio.CancelledError):
            await task
    await write(device, 1024, b"c" * 512, FUA)
    assert [entry.data[:1] for entry in load(bytes(log.bytes))] == [b"a", b"b", b"c"]
    await close(device)


async def test_discards_of_a_device_that_has_none_are_logged() -> None:
    disk, log = FakeDisk("7:0", SECTORS, Limits()), FakeDisk("7:1")
    device = await mapped("log", f"0 {SECTORS} log-writes 7:0 7:1", disk, log)
    await discard(device, 0, 512, FUA)
    assert disk.log == []
    assert kinds(log) == [(0, 1, Flag.FUA | Flag.DISCARD)]
    await close(device)


async def test_a_table_that_was_never_live_leaves_the_log_alone() -> None:
    disk, log = FakeDisk("7:0", SECTORS), FakeDisk("7:1")
    await (await build(f"0 {SECTORS} log-writes 7:0 7:1", disk, log)).close()
    assert log.log == []
    table = await build(f"0 {SECTORS} log-writes 7:0 7:1", disk, log, read_only=True)
    for target in table.targets:
        await target.resume()
    await table.close()
    assert log.log == []


async def test_extents_and_limits() -> None:
    device, disk, _ = await logged()
    await device.submit(Io(CACHE, 512), 0)
    assert (disk.log, status(device)) == ([("cache", 0, 512, 0)], "0 0")
    disk.runs = [(512, HOLE | ZERO), (255 * 512, 0)]
    assert await device.extents(0, 1024) == [(512, HOLE | ZERO), (512, 0)]
    assert device.limits == Limits(discard=True)
    assert device.live is not None
    assert device.live.table_lines()[0].params == "7:0 7:1"
    await close(device)


@pytest.mark.parametrize("words", [["hello"], ["mark"], ["mark", "a", "b"], ["hello", "a"]])
async def test_bad_messages(words: list[str]) -> None:
    device, _, _ = await logged()
    with pytest.raises(InvalidArgument, match="is not 'mark <text>'"):
        await device.message(0, words)
    await device.message(0, ["MARK", "a"])
    assert status(device) == "1 1"
    await close(device)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("", "device is missing"),
        ("7:0", "log device is missing"),
        ("7:0 7:6", "log device: disk7:6 has a logical block of 4096 bytes, disk7:0 one of 512"),
    ],
)
async def test_bad_words(words: str, complaint: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await build(f"0 64 log-writes {words}", FakeDisk("7:0"), FakeDisk("7:6", limits=Limits(logical_block=4096)))
    assert caught.value.message == f"line 1: log-writes: {complaint}"


def test_clients_at_random(tmp_path: Path) -> None:
    """Several clients, a disk that ends requests in random order: each replay up to a flush is what the disk held for sure,
    and one to the end is the disk; by replay-log, too, where it is installed."""

    class Slow(FakeDisk):
        async def submit(self, io: Io, offset: int) -> None:
            await asyncio.sleep(rng.random())
            await super().submit(io, offset)

    rng = random.Random(11)
    disk, log = Slow("7:0", SECTORS, LIMITS), FakeDisk("7:1", 8192)
    before = disk.bytes[:] = rng.randbytes(disk.size)

    async def client(device: MappedDevice, number: int) -> None:
        for turn in range(40):
            first = rng.randrange(SECTORS - 8)
            length = rng.randrange(1, 8) * 512
            match rng.randrange(6):
                case 0:
                    await flush(device)
                case 1:
                    await discard(device, first * 512, length)
                case 2:
                    await write(device, first * 512, bytes([number, turn]) * (length // 2), FUA)
                case _:
                    await write(device, first * 512, bytes([number, turn]) * (length // 2))

    async def main() -> None:
        device = await mapped("log", f"0 {SECTORS} log-writes 7:0 7:1", disk, log)
        await asyncio.gather(*(client(device, number) for number in range(6)))
        await close(device)

    run(main())
    image = bytearray(before)
    replay(load(bytes(log.bytes)), image)
    assert image == disk.bytes
    if program := shutil.which("replay-log"):
        (tmp_path / "log").write_bytes(log.bytes)
        (tmp_path / "disk").write_bytes(before)
        subprocess.run([program, "--log", tmp_path / "log", "--replay", tmp_path / "disk"], check=True, timeout=20)
        assert (tmp_path / "disk").read_bytes() == disk.bytes

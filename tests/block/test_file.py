import asyncio
import errno
import itertools
import os
import random
import resource
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from nbdmap.block import file as file_module
from nbdmap.block import syscalls
from nbdmap.block.device import HOLE, ZERO, Device
from nbdmap.block.file import INLINE_READ, INLINE_WRITE, POOLED_WRITES, SLOW_WRITE_NS, WRITE_SLICE, FileDisk
from nbdmap.block.io import (
    DISCARD,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    WRITE,
    WRITE_ZEROES,
    Io,
)
from nbdmap.errors import IoFailed, NotFound, Unsupported
from nbdmap.units import KIB, MIB, SECTOR
from tests.contract import disk as contract
from tests.contract.disk import act, at_once, read, refusal, write
from tests.support.gate import Gate
from tests.support.loop import loop_device, small_tmpfs

SIZE = 2 * MIB + 512 * KIB
ABSENT = HOLE | ZERO
Job = Callable[..., Any]


@pytest.fixture
async def disk(tmp_path: Path) -> AsyncIterator[FileDisk]:
    disk = await make(tmp_path / "a.img")
    yield disk
    await disk.close()


async def make(path: Path, **options: Any) -> FileDisk:
    return await FileDisk.open(
        path, name="sda", number="8:0", create=True, size=SIZE, clock=lambda: 1_700_000_000.0, **options
    )


def failing(number: int) -> Job:
    def fail(*_arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


async def started(request: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """The request in a task that has begun."""
    task = asyncio.create_task(request)
    await asyncio.sleep(0)
    return task


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", contract.CONTRACT)
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
async def test_contract(tmp_path: Path, check: Callable[[Device], Awaitable[None]], direct: bool) -> None:
    try:
        disk = await make(tmp_path / "a.img", direct=direct)
    except Unsupported as error:
        pytest.skip(error.message)
    await check(disk)
    await disk.close()


@pytest.mark.parametrize("check", contract.CONTRACT)
async def test_contract_in_memory(tmp_path: Path, check: Callable[[Device], Awaitable[None]]) -> None:
    """tmpfs knows neither RWF_NOWAIT nor ZERO_RANGE."""
    with small_tmpfs(tmp_path, 2 * SIZE):
        disk = await make(tmp_path / "a.img")
        await check(disk)
        await disk.close()


@pytest.mark.parametrize("check", contract.CONTRACT)
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
async def test_contract_on_a_block_device(
    tmp_path: Path, check: Callable[[Device], Awaitable[None]], direct: bool
) -> None:
    with (tmp_path / "backing").open("wb") as backing:
        backing.truncate(SIZE)
    with loop_device(tmp_path / "backing", "--sector-size", "4096") as path:
        disk = await FileDisk.open(path, name="sda", number="8:0", direct=direct)
        await check(disk)
        assert await disk.extents(0, SIZE) == [(SIZE, 0)]
        await disk.close()


def test_contract_on_the_loop_of_asyncio(tmp_path: Path) -> None:
    async def main() -> None:
        disk = await make(tmp_path / "a.img")
        await contract.random_operations(disk, seed=7)
        await disk.close()

    asyncio.run(main())


# --- opening and closing ----------------------------------------------------------------------------------------------


async def test_what_it_is(disk: FileDisk, tmp_path: Path) -> None:
    assert (disk.name, disk.number, disk.size, disk.read_only) == ("sda", "8:0", SIZE, False)
    assert disk.path == str(tmp_path / "a.img")
    assert disk.limits.sparse


async def test_no_thread_and_no_descriptor_outlives_it(tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    threads = set(threading.enumerate())
    disk = await make(tmp_path / "a.img")
    await write(disk, 0, b"x" * SECTOR, FUA)
    assert any(thread.name.startswith("nbdmap sda") for thread in threading.enumerate())
    await disk.close()
    with pytest.raises(NotFound):
        await FileDisk.open(tmp_path / "none", name="sda", number="8:0")
    assert set(threading.enumerate()) <= threads
    assert sorted(os.listdir("/proc/self/fd")) == before


async def test_cancelling_open_closes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    gate = Gate(os.fsync)
    monkeypatch.setattr(os, "fsync", gate)
    opening = asyncio.create_task(make(tmp_path / "a.img"))
    await gate.entered.wait()
    opening.cancel()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert sorted(os.listdir("/proc/self/fd")) == before


async def test_read_only(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(b"x" * SECTOR)
    disk = await FileDisk.open(tmp_path / "a.img", name="sda", number="8:0", read_only=True)
    assert await read(disk, 0, SECTOR) == b"x" * SECTOR
    assert at_once(disk.submit(Io(FLUSH, 0), 0))  # nothing can have changed
    assert (await refusal(write(disk, 0, b"y" * SECTOR))).errno == errno.EBADF
    await disk.close()


# --- reading ----------------------------------------------------------------------------------------------------------


async def test_cached_data_is_read_at_once(disk: FileDisk) -> None:
    await write(disk, 0, b"x" * 64 * KIB)
    buffer = bytearray(64 * KIB)
    assert at_once(disk.submit(Io(READ, len(buffer), memoryview(buffer)), 0))
    assert buffer == b"x" * 64 * KIB


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EOPNOTSUPP])
async def test_what_is_not_cached_is_read_in_a_thread(
    disk: FileDisk, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    await write(disk, 0, b"x" * 64 * KIB)
    real = os.preadv
    threads: list[str] = []

    def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(number, os.strerror(number))
        threads.append(threading.current_thread().name)
        return real(fd, [buffers[0][:4096]], offset)  # short, as the kernel may

    monkeypatch.setattr(os, "preadv", preadv)
    assert await read(disk, SECTOR, 32 * KIB) == b"x" * 32 * KIB
    assert len(threads) == 8
    assert threads[0].startswith("nbdmap sda")


async def test_a_short_read_is_completed_in_a_thread(disk: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    await write(disk, 0, b"x" * 4096 + b"y" * 4096)
    real = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, to, at, flags=0: real(fd, [to[0][:4096]] if flags else to, at)
    )
    assert await read(disk, 0, 8192) == b"x" * 4096 + b"y" * 4096


async def test_a_very_large_read_does_not_hold_up_the_loop(tmp_path: Path) -> None:
    disk = await FileDisk.open(tmp_path / "b.img", name="sda", number="8:0", create=True, size=INLINE_READ + SECTOR)
    buffer = memoryview(bytearray(disk.size))
    assert at_once(disk.submit(Io(READ, INLINE_READ, buffer[:INLINE_READ]), 0))
    task = await started(disk.submit(Io(READ, disk.size, buffer), 0))
    assert not task.done()
    await task
    await disk.close()


@pytest.mark.parametrize("direct", [False, True])
async def test_a_file_truncated_behind_us_is_eio(tmp_path: Path, direct: bool) -> None:
    disk = await make(tmp_path / "a.img", direct=direct)
    os.truncate(tmp_path / "a.img", 8192 + 100)
    error = await refusal(read(disk, 4096, 16 * KIB))
    assert error.errno == errno.EIO
    place = 8192 if direct else 8192 + 100
    assert error.message == (
        f"read of {disk.path} at byte {place}: the file has become shorter, {SIZE} bytes expected"
    )
    await disk.close()


async def test_a_failed_read_names_path_and_offset(disk: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", failing(errno.EIO))
    error = await refusal(read(disk, 4096, 4096))
    assert isinstance(error, IoFailed)
    assert error.message == f"read of {disk.path} at byte 4096: Input/output error"
    assert error.errno == errno.EIO


async def test_the_buffer_is_left_alone_once_a_cancelled_read_has_ended(
    disk: FileDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    gate = Gate(real)
    monkeypatch.setattr(os, "preadv", lambda *a: failing(errno.EAGAIN)() if len(a) == 4 else gate(*a))
    await write(disk, 0, b"x" * 4096)
    buffer = bytearray(4096)
    task = asyncio.create_task(disk.submit(Io(READ, 4096, memoryview(buffer)), 0))
    await gate.entered.wait()
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    assert not any(buffer)
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert buffer == b"x" * 4096


# --- writing ----------------------------------------------------------------------------------------------------------


async def test_small_writes_are_done_at_once_and_big_ones_are_not(disk: FileDisk) -> None:
    data = memoryview(bytes(INLINE_WRITE + SECTOR))
    assert at_once(disk.submit(Io(WRITE, WRITE_SLICE, data[:WRITE_SLICE]), 0))
    assert not at_once(disk.submit(Io(WRITE, len(data), data), 0))
    assert not at_once(disk.submit(Io(WRITE, SECTOR, data[:SECTOR], FUA), 0))


async def test_between_the_slices_of_a_large_write_others_have_their_turn(
    disk: FileDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random.Random(1).randbytes(INLINE_WRITE)
    story: list[object] = []
    write = os.pwritev

    def noting(fd: int, parts: Sequence[memoryview], offset: int) -> int:
        story.append(offset)
        return write(fd, parts, offset)

    monkeypatch.setattr(os, "pwritev", noting)
    task = asyncio.create_task(disk.submit(Io(WRITE, len(data), memoryview(data)), SECTOR))
    while not task.done():
        story.append("turn")
        await asyncio.sleep(0)
    await task
    slices = [step for step in story if step != "turn"]
    assert slices == [SECTOR + start for start in range(0, INLINE_WRITE, WRITE_SLICE)]
    assert all(story[story.index(one) + 1] == "turn" for one in slices[:-1])
    assert await read(disk, SECTOR, len(data)) == data


async def test_a_large_write_goes_on_in_a_thread_when_a_slice_was_slow(disk: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(1).randbytes(INLINE_WRITE)
    monkeypatch.setattr(file_module, "perf_counter_ns", itertools.count(0, SLOW_WRITE_NS + 1).__next__)
    story: list[tuple[int, bool]] = []
    write = os.pwritev

    def noting(fd: int, parts: Sequence[memoryview], offset: int) -> int:
        story.append((offset, threading.current_thread() is threading.main_thread()))
        return write(fd, parts, offset)

    monkeypatch.setattr(os, "pwritev", noting)
    await disk.submit(Io(WRITE, len(data), memoryview(data)), 0)
    assert story == [(0, True), (WRITE_SLICE, False)]
    assert await read(disk, 0, len(data)) == data


async def test_after_a_slow_write_the_next_ones_go_to_the_threads(
    disk: FileDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0
    took = SLOW_WRITE_NS + 1

    def clock() -> int:
        nonlocal now
        now += took
        return now

    monkeypatch.setattr(file_module, "perf_counter_ns", clock)
    io = Io(WRITE, SECTOR, memoryview(b"x" * SECTOR))
    assert at_once(disk.submit(io, 0))
    task = await started(disk.submit(io, SECTOR))
    assert not task.done()
    await task  # slow again, so it counts from the start
    took = SLOW_WRITE_NS
    for index in range(POOLED_WRITES):
        task = await started(disk.submit(io, index * SECTOR))
        assert not task.done()
        await task
    assert at_once(disk.submit(io, 0))


async def test_small_writes_do_not_wait_on_the_loop_for_the_lock_of_the_file(
    disk: FileDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(syscalls.fallocate)
    monkeypatch.setattr(syscalls, "fallocate", gate)
    discard = asyncio.create_task(act(disk, DISCARD, 0, MIB))
    await gate.entered.wait()
    small = await started(write(disk, MIB, b"x" * SECTOR))
    assert not small.done()
    await small
    gate.open()
    await discard
    assert at_once(write(disk, MIB, b"x" * SECTOR))


async def test_a_short_write_is_completed(disk: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, *rest: real(fd, [parts[0][:4096]], *rest))
    for flags in (0, FUA):
        data = os.urandom(12 * KIB)
        await write(disk, SECTOR, data, flags)
        assert await read(disk, SECTOR, 12 * KIB) == data


async def test_fua_writes_once_and_syncs_the_range(disk: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write, real_sync = os.pwritev, syscalls.sync_range
    calls: list[tuple[str, int, int]] = []

    def pwritev(fd: int, parts: list[memoryview], offset: int) -> int:
        calls.append(("write", offset, len(parts[0])))
        return real_write(fd, parts, offset)

    def sync_range(fd: int, offset: int, length: int) -> None:
        calls.append(("sync", offset, length))
        real_sync(fd, offset, length)

    monkeypatch.setattr(os, "pwritev", pwritev)
    monkeypatch.setattr(syscalls, "sync_range", sync_range)
    await write(disk, 3 * SECTOR, b"x" * SECTOR, FUA)
    assert calls == [("write", 3 * SECTOR, SECTOR), ("sync", 3 * SECTOR, SECTOR)]


async def test_a_fua_write_undoes_nothing_that_came_after_it(disk: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by tests/linear: what was read of a FUA write under way, and then overwritten, must not come back."""
    gate = Gate(syscalls.sync_range)
    monkeypatch.setattr(syscalls, "sync_range", gate)
    durable = asyncio.create_task(write(disk, 0, b"a" * SECTOR, FUA))
    await gate.entered.wait()
    assert await read(disk, 0, SECTOR) == b"a" * SECTOR
    await write(disk, 0, b"b" * SECTOR)
    gate.open()
    await durable
    assert await read(disk, 0, SECTOR) == b"b" * SECTOR


@pytest.mark.parametrize("flags", [0, FUA])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
async def test_a_failed_write_keeps_its_errno_and_latches_nothing(
    disk: FileDisk, monkeypatch: pytest.MonkeyPatch, number: int, flags: int
) -> None:
    monkeypatch.setattr(os, "pwritev", failing(number))
    error = await refusal(write(disk, 4096, b"x" * SECTOR, flags))
    assert error.errno == number
    assert error.message == f"write of {disk.path} at byte 4096: {os.strerror(number)}"
    monkeypatch.undo()
    await write(disk, 4096, b"x" * SECTOR, FUA)
    await act(disk, FLUSH)


async def test_a_full_disk(tmp_path: Path) -> None:
    with small_tmpfs(tmp_path, MIB):
        disk = await make(tmp_path / "a.img")
        await write(disk, 0, b"x" * 512 * KIB)
        for flags in (0, FUA):
            assert (await refusal(write(disk, MIB, b"y" * MIB, flags))).errno == errno.ENOSPC
        await act(disk, DISCARD, 512 * KIB, 2 * MIB)
        await write(disk, 0, b"z" * 512 * KIB, FUA)
        assert (await refusal(act(disk, WRITE_ZEROES, 0, SIZE, NO_HOLE))).errno == errno.ENOSPC
        await disk.close()


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 1 MiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
async def test_a_file_beyond_its_limit(tmp_path: Path) -> None:
    disk = await FileDisk.open(tmp_path / "a.img", name="sda", number="8:0", create=True, size=MIB)
    os.truncate(disk.path, 0)
    disk.size = SIZE
    assert (await refusal(write(disk, MIB, b"x" * SECTOR))).errno == errno.EFBIG
    await disk.close()

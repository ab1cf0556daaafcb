"""FileDisk again: durability, freeing space, and extents."""

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from nbdmap.block import syscalls
from nbdmap.block.device import HOLE, ZERO
from nbdmap.block.file import FileDisk
from nbdmap.block.io import CACHE, DISCARD, FAST_ZERO, FLUSH, FUA, NO_HOLE, WRITE, WRITE_ZEROES, Io, Op, run_all
from nbdmap.errors import NbdmapError, Unsupported
from nbdmap.units import GIB, KIB, MIB, SECTOR
from tests.contract.disk import act, all_extents, at_once, read, refusal, write
from tests.support.gate import Gate
from tests.support.loop import loop_device

SIZE = 4 * MIB + 512 * KIB
ABSENT = HOLE | ZERO
MOMENT = "2023-11-14T22:13:20+00:00"


@pytest.fixture
async def disk(tmp_path: Path) -> AsyncIterator[FileDisk]:
    disk = await make(tmp_path / "a.img")
    yield disk
    await disk.close()


async def make(path: Path, **options: Any) -> FileDisk:
    return await FileDisk.open(
        path, name="sda", number="8:0", create=True, size=SIZE, clock=lambda: 1_700_000_000.0, **options
    )


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The descriptors fdatasync was called with."""
    calls: list[int] = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    return calls


def failing(number: int) -> Callable[..., Any]:
    def fail(*_arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def refuse_fallocate(monkeypatch: pytest.MonkeyPatch, *modes: int) -> None:
    """fallocate is not supported in these modes."""
    real = syscalls.fallocate

    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        if mode & ~syscalls.KEEP_SIZE in modes:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        real(fd, mode, offset, length)

    monkeypatch.setattr(syscalls, "fallocate", fallocate)


def flush(disk: FileDisk) -> asyncio.Task[None]:
    return asyncio.create_task(act(disk, FLUSH))


# --- flush and the group commit ---------------------------------------------------------------------------------------


async def test_the_first_flush_syncs_even_if_nothing_was_written(disk: FileDisk, syncs: list[int]) -> None:
    await act(disk, FLUSH)
    assert len(syncs) == 1


async def test_a_flush_with_nothing_new_is_done_at_once(disk: FileDisk, syncs: list[int]) -> None:
    await act(disk, FLUSH)
    assert at_once(disk.submit(Io(FLUSH, 0), 0))
    for op, length in ((WRITE, SECTOR), (WRITE, MIB), (DISCARD, MIB), (WRITE_ZEROES, MIB)):
        await disk.submit(Io(op, length, memoryview(b"x" * length if op == WRITE else b"")), 0)
        await act(disk, FLUSH)
        assert at_once(disk.submit(Io(FLUSH, 0), 0))
    assert len(syncs) == 5


async def test_flushes_that_arrive_during_one_share_the_next(disk: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(os.fdatasync)
    monkeypatch.setattr(os, "fdatasync", gate)
    first = flush(disk)
    await gate.entered.wait()
    await write(disk, 0, b"x" * SECTOR)
    others = [flush(disk) for _ in range(20)]
    await asyncio.sleep(0)
    assert gate.calls == 1
    gate.open()
    await asyncio.gather(first, *others)
    assert gate.calls == 2


async def test_a_flush_during_one_that_covers_it_waits_for_that_alone(
    disk: FileDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(os.fdatasync)
    monkeypatch.setattr(os, "fdatasync", gate)
    first = flush(disk)
    await gate.entered.wait()
    second = flush(disk)  # nothing ended since the running one began
    await asyncio.sleep(0)
    assert not second.done()
    gate.open()
    await asyncio.gather(first, second)
    assert gate.calls == 1


async def test_a_write_that_ends_while_a_flush_runs_is_not_counted_as_durable(
    disk: FileDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = Gate(os.pwritev)
    syncing = Gate(os.fdatasync)
    monkeypatch.setattr(os, "pwritev", writing)
    monkeypatch.setattr(os, "fdatasync", syncing)
    monkeypatch.setattr(disk, "_inline_write", 0)
    big = asyncio.create_task(write(disk, 0, b"x" * MIB))  # begun before the flush, in a thread
    await writing.entered.wait()
    first = flush(disk)
    await syncing.entered.wait()
    writing.open()
    await big
    syncing.open()
    await first
    await act(disk, FLUSH)
    assert syncing.calls == 2


async def test_a_cancelled_flush_leaves_the_others_served(disk: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(os.fdatasync)
    monkeypatch.setattr(os, "fdatasync", gate)
    first = flush(disk)
    await gate.entered.wait()
    await write(disk, 0, b"x" * SECTOR)
    others = [flush(disk) for _ in range(3)]
    await asyncio.sleep(0)
    first.cancel()
    others[0].cancel()
    gate.open()
    results = await asyncio.gather(first, *others, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError] * 2 + [type(None)] * 2
    assert gate.calls == 2


# --- failures are latched ---------------------------------------------------------------------------------------------


async def everything_durable_is_refused(disk: FileDisk, because: str) -> None:
    for request, what in (
        (act(disk, FLUSH), "flush of {}"),
        (write(disk, 4096, b"x" * SECTOR, FUA), "write of {} at byte 4096"),
        (act(disk, DISCARD, 0, SECTOR, FUA), "flush of {}"),
        (act(disk, WRITE_ZEROES, 0, SECTOR, FUA), "flush of {}"),
    ):
        error = await refusal(request)
        assert error.errno == errno.EIO
        assert error.message == f"{what.format(disk.path)} is refused: {because}; data may be lost"
    await write(disk, 0, b"x" * SECTOR)  # what promises nothing goes on
    assert await read(disk, 0, SECTOR) == b"x" * SECTOR


async def test_a_failed_flush_is_latched(disk: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(failing(errno.ENOSPC))
    monkeypatch.setattr(os, "fdatasync", gate)
    first = flush(disk)
    await gate.entered.wait()
    second = flush(disk)
    await asyncio.sleep(0)
    gate.open()
    errors = await asyncio.gather(first, second, return_exceptions=True)
    assert [error.errno for error in errors if isinstance(error, NbdmapError)] == [errno.ENOSPC, errno.EIO]
    monkeypatch.undo()
    await everything_durable_is_refused(
        disk, f"flush of {disk.path} failed at {MOMENT}: No space left on device"
    )


async def test_a_failed_flush_is_latched_even_when_it_was_cancelled(
    disk: FileDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(failing(errno.EIO))
    monkeypatch.setattr(os, "fdatasync", gate)
    task = flush(disk)
    await gate.entered.wait()
    task.cancel()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    monkeypatch.undo()
    await everything_durable_is_refused(disk, f"flush of {disk.path} failed at {MOMENT}: Input/output error")


@pytest.mark.parametrize("direct", [False, True])
async def test_a_failed_synchronous_write_is_latched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    disk = await make(tmp_path / "a.img", direct=direct)
    monkeypatch.setattr(*((os, "fdatasync") if direct else (syscalls, "sync_range")), failing(errno.EIO))
    error = await refusal(write(disk, 0, b"x" * 4096, FUA))
    assert error.message == f"write of {disk.path} at byte 0: Input/output error"
    monkeypatch.undo()
    because = f"synchronous write of {disk.path} at byte 0 failed at {MOMENT}: Input/output error"
    assert because in (await refusal(act(disk, FLUSH))).message
    if not direct:
        await everything_durable_is_refused(disk, because)
    await disk.close()


async def test_a_synchronous_write_beside_a_failing_flush_fails_too(
    disk: FileDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(os.pwritev)
    monkeypatch.setattr(os, "pwritev", gate)
    monkeypatch.setattr(os, "fdatasync", failing(errno.EIO))
    writing = asyncio.create_task(write(disk, 0, b"x" * SECTOR, FUA))
    await gate.entered.wait()
    await refusal(act(disk, FLUSH))
    gate.open()
    assert "is refused" in (await refusal(writing)).message


async def test_the_first_failure_is_the_one_that_is_told(disk: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(failing(errno.EIO))
    monkeypatch.setattr(syscalls, "sync_range", gate)
    writing = asyncio.create_task(write(disk, 0, b"x" * SECTOR, FUA))
    await gate.entered.wait()
    monkeypatch.setattr(os, "fdatasync", failing(errno.ENXIO))
    await refusal(act(disk, FLUSH))
    gate.open()
    await refusal(writing)
    assert "No such device" in (await refusal(act(disk, FLUSH))).message


# --- discard, zeroes, cache -------------------------------------------------------------------------------------------


async def test_discard_gives_the_space_back(disk: FileDisk) -> None:
    await write(disk, 0, b"x" * SIZE)
    await act(disk, DISCARD, 0, SIZE)
    assert os.stat(disk.path).st_blocks == 0
    assert await read(disk, 0, SIZE) == bytes(SIZE)
    assert os.stat(disk.path).st_size == SIZE


@pytest.mark.parametrize("op", [DISCARD, WRITE_ZEROES])
async def test_a_whole_huge_disk_is_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: Op) -> None:
    disk = await FileDisk.open(tmp_path / "big.img", name="sdb", number="8:16", create=True, size=8 << 40)
    gate = Gate(syscalls.fallocate)
    gate.open()
    monkeypatch.setattr(syscalls, "fallocate", gate)
    await act(disk, op, 0, disk.size)
    assert gate.calls == 1
    assert await disk.extents(0, disk.size) == [(disk.size, ABSENT)]
    await disk.close()


@pytest.mark.parametrize("op", [DISCARD, WRITE_ZEROES])
async def test_fua_on_them_is_a_flush_behind(disk: FileDisk, syncs: list[int], op: Op) -> None:
    await act(disk, op, 0, MIB)
    assert syncs == []
    await act(disk, op, 0, MIB, FUA)
    assert len(syncs) == 1


async def test_no_hole_keeps_the_space(disk: FileDisk) -> None:
    await act(disk, WRITE_ZEROES, 0, MIB, NO_HOLE)
    assert os.stat(disk.path).st_blocks * SECTOR >= MIB


@pytest.mark.parametrize("flags", [0, NO_HOLE])
async def test_zeroes_are_written_when_there_is_no_other_way(
    disk: FileDisk, monkeypatch: pytest.MonkeyPatch, flags: int
) -> None:
    refuse_fallocate(monkeypatch, syscalls.PUNCH_HOLE, syscalls.ZERO_RANGE)
    await write(disk, 0, b"x" * SIZE)
    with pytest.raises(Unsupported, match="cannot zero faster than by writing"):
        await act(disk, WRITE_ZEROES, SECTOR, 2 * MIB, flags | FAST_ZERO)
    assert await read(disk, 0, SIZE) == b"x" * SIZE
    await act(disk, WRITE_ZEROES, SECTOR, 2 * MIB, flags)
    assert await read(disk, 0, SIZE) == b"x" * SECTOR + bytes(2 * MIB) + b"x" * (SIZE - 2 * MIB - SECTOR)


async def test_without_holes_the_limits_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_fallocate(monkeypatch, syscalls.PUNCH_HOLE)
    disk = await make(tmp_path / "a.img")
    assert (disk.limits.discard, disk.limits.zero, disk.limits.fast_zero) == (False, True, False)
    with pytest.raises(Unsupported, match="cannot discard"):
        await act(disk, DISCARD, 0, SECTOR)
    with pytest.raises(Unsupported):
        await act(disk, WRITE_ZEROES, 0, SECTOR, FAST_ZERO)
    await disk.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize(("op", "what"), [(DISCARD, "discard"), (WRITE_ZEROES, "zeroing")])
async def test_another_failure_keeps_its_errno(
    disk: FileDisk, monkeypatch: pytest.MonkeyPatch, op: Op, what: str, number: int
) -> None:
    monkeypatch.setattr(syscalls, "fallocate", failing(number))
    error = await refusal(act(disk, op, 4096, SECTOR))
    assert (error.message, error.errno) == (f"{what} of {disk.path} at byte 4096: {os.strerror(number)}", number)


async def test_a_block_device_discards_and_zeroes(tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(b"x" * MIB)
    with loop_device(backing) as path:
        disk = await FileDisk.open(path, name="sda", number="8:0")
        await act(disk, DISCARD, 0, 256 * KIB)
        await act(disk, WRITE_ZEROES, 256 * KIB, 256 * KIB, FAST_ZERO | FUA)
        assert await read(disk, 0, MIB) == bytes(512 * KIB) + b"x" * 512 * KIB
        await disk.close()
    assert backing.stat().st_blocks * SECTOR == 512 * KIB


async def test_cache_asks_the_kernel_to_read_ahead(disk: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *what: asked.append(what))
    await act(disk, CACHE, 4096, MIB)
    assert asked == [(4096, MIB, os.POSIX_FADV_WILLNEED)]


async def test_a_direct_disk_has_no_cache(tmp_path: Path) -> None:
    disk = await make(tmp_path / "a.img", direct=True)
    assert not disk.limits.cache
    with pytest.raises(Unsupported, match="past the page cache"):
        await act(disk, CACHE, 0, SECTOR)
    await disk.close()


# --- extents ----------------------------------------------------------------------------------------------------------


async def test_known_data_is_answered_at_once_until_it_is_freed(disk: FileDisk) -> None:
    await write(disk, 0, b"x" * 2 * MIB)
    assert not at_once(disk.extents(0, SECTOR))
    assert await disk.extents(0, SECTOR) == [(SECTOR, 0)]
    assert at_once(disk.extents(MIB, MIB))  # the rest of the run has been learnt with it
    assert await disk.extents(0, 3 * MIB) == [(2 * MIB, 0), (MIB, ABSENT)]
    await act(disk, DISCARD, MIB, 4096)
    assert at_once(disk.extents(0, MIB))
    assert not at_once(disk.extents(MIB, 4096))
    assert await disk.extents(MIB - 4096, 12288) == [(4096, 0), (4096, ABSENT), (4096, 0)]


async def test_the_short_last_granule_can_be_known(disk: FileDisk) -> None:
    await write(disk, 4 * MIB, b"x" * 512 * KIB)
    assert await all_extents(disk, 0, SIZE) == [(4 * MIB, ABSENT), (512 * KIB, 0)]
    assert at_once(disk.extents(4 * MIB + SECTOR, 512 * KIB - SECTOR))


async def test_extents_of_a_huge_sparse_disk(tmp_path: Path) -> None:
    disk = await FileDisk.open(tmp_path / "big.img", name="sdb", number="8:16", create=True, size=8 << 40)
    begun = time.process_time()
    await write(disk, 4 << 40, b"x" * 4096)
    assert await disk.extents(0, disk.size) == [(4 << 40, ABSENT), (4096, 0), ((4 << 40) - 4096, ABSENT)]
    assert time.process_time() - begun < 1
    await run_all([act(disk, DISCARD, index * GIB, GIB) for index in range(4)])
    await disk.close()


async def test_a_failed_search_names_path_and_offset(disk: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "lseek", failing(errno.EIO))
    with pytest.raises(NbdmapError, match=r"extents of .*a.img at byte 4096: Input/output error"):
        await disk.extents(4096, 4096)

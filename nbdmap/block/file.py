"""A disk that is a file or a block device of this machine.

In a configuration: `sda: {file: /srv/a.img, size: 1GiB, create: true}`; in a table any path: `0 8192 linear /srv/a.img 0`.

What may wait for the medium never runs on the event loop but in the disk's own threads; what the page cache answers runs
inline, which is ten times cheaper. Reads know the difference beforehand (RWF_NOWAIT), small writes do not: one that took
longer than SLOW_WRITE_NS sends the next POOLED_WRITES to the threads, and while a big write or a discard holds the
file's lock the small ones go there as well.

Durability, the invariants:
- `_changes` counts writes, discards and zeroings when they end, before they are answered; `_durable` is what it was when
  the last successful fdatasync began. A flush ends when `_durable` has reached what `_changes` was when the flush began.
- One fdatasync runs at a time. A flush that arrives meanwhile waits for the next, which all that wait share.
- When an fdatasync, or the writing out of a FUA write, fails, the kernel has forgotten what it could not write and
  would report success the next time. So the failure is latched, in the thread that saw it: from then on every flush and
  FUA fails.
"""

import asyncio
import errno
import logging
import mmap
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from time import perf_counter_ns
from typing import Final, Self, TypeVar, TypeVarTuple

from nbdmap.block import syscalls
from nbdmap.block.device import Device, Extent, Limits
from nbdmap.block.direct import BounceBuffers
from nbdmap.block.file_extents import GRANULE, KnownData, Run, find_extents
from nbdmap.block.file_open import open_file
from nbdmap.block.io import (
    CACHE,
    DISCARD,
    DONE,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    WRITE,
    Failed,
    Io,
    Pending,
)
from nbdmap.block.threads import Threads
from nbdmap.errors import IoFailed, Unsupported, from_os_error
from nbdmap.units import KIB, MIB, round_up

INLINE_READ: Final = 4 * MIB
"""The largest read tried on the event loop: copying it takes some 150 us."""
INLINE_WRITE: Final = MIB
"""The largest write done on the event loop: 60 us over cached pages, 230 into new ones; a thread costs 45 to 80 more."""
WRITE_SLICE: Final = 256 * KIB
"""Of a larger write on the event loop; between two slices the others have their turn, 15 to 60 us later."""
SLOW_WRITE_NS: Final = 2_000_000
POOLED_WRITES: Final = 64
"""After a slow write: how many are done in threads before one is tried on the event loop again."""

_ZEROES: Final = memoryview(mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))
_TRY_IN_THREAD: Final = (errno.EAGAIN, errno.EOPNOTSUPP)

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")


class FileDisk(Device):
    """Made by `FileDisk.open`; the thread methods are those named `_..._now`: they block."""

    def __init__(
        self, path: str, name: str, number: str, *, read_only: bool, direct: bool, clock: Callable[[], float]
    ) -> None:
        self.path = path
        self.name = name
        self.number = number
        self.read_only = read_only
        self.direct = direct
        self.size = 0
        self.limits = Limits()
        self._fd = -1
        self._clock = clock
        self._threads = Threads(name)
        self._bounce = BounceBuffers() if direct else None
        self._known_data = KnownData()
        self._is_block_device = False
        self._inline_read = 0  # the largest read and the largest write done on the event loop
        self._inline_read_flags = 0
        self._inline_write = 0 if direct else INLINE_WRITE
        self._pooled_writes = 0
        self._lock_holders = 0
        self._changes = 0 if read_only else 1  # whatever was written before it was opened may not be durable either
        self._durable = 0
        self._sync_ended: asyncio.Event | None = None
        self._sync_failure: str | None = None

    @classmethod
    async def open(
        cls,
        path: str | os.PathLike[str],
        *,
        name: str,
        number: str,
        read_only: bool = False,
        direct: bool = False,
        create: bool = False,
        size: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Opens `path` as a disk; see `open_file` for `create`, `size` and what is refused."""
        disk = cls(os.fspath(path), name, number, read_only=read_only, direct=direct, clock=clock)
        try:
            await disk._threads.run(disk._open_now, create, size)
            return disk
        except BaseException as error:
            failure = error  # compiled code must not wait within an except clause, see setup.py
        await disk.close()
        raise failure

    async def close(self) -> None:
        """Waits for what is under way, ends the threads and closes the file. It does not flush."""
        await self._threads.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def submit(self, io: Io, offset: int) -> Pending:
        """As `Device.submit`; done at once when the page cache can."""
        op = io.op
        if op is READ:
            if io.length <= self._inline_read:
                try:
                    if os.preadv(self._fd, (io.data,), offset, self._inline_read_flags) == io.length:
                        return DONE
                except OSError as error:
                    if error.errno not in _TRY_IN_THREAD:
                        return Failed(from_os_error(error, self._what("read", offset)))
            return self._in_thread("read", offset, self._read_now, io.data, offset)
        if op is WRITE:
            data = io.data
            if not (io.length > self._inline_write or self._pooled_writes or self._lock_holders or io.flags & FUA):
                if io.length > WRITE_SLICE:
                    return self._write_in_slices(data, offset)
                self._changes += 1
                try:
                    done = self._write_some_now(data, offset)
                except OSError as error:
                    return Failed(from_os_error(error, self._what("write", offset)))
                if done == io.length:
                    return DONE
                data, offset = data[done:], offset + done
            return self._write_in_thread(data, offset, durable=bool(io.flags & FUA))
        if op is FLUSH:
            return self._flush()
        if op is CACHE:
            if not self.limits.cache:
                return Failed(Unsupported(f"{self.path} is read past the page cache"))
            return self._in_thread("caching", offset, self._cache_now, offset, io.length)
        return self._free(io, offset)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """As `Device.extents`; at once where the range is known to be data."""
        end = offset + length
        if self._known_data.covers(offset, end) or not self.limits.sparse:
            return [(length, 0)]
        found, runs = await self._in_thread("extents", offset, self._extents_now, offset, end)
        for begin, stop in runs:
            self._known_data.add(begin, stop if stop < self.size else round_up(stop, GRANULE))
        return found

    async def _write_in_slices(self, data: memoryview, offset: int) -> None:
        """A large write of which each slice is done at once."""
        while not (self._pooled_writes or self._lock_holders):
            self._changes += 1
            try:
                done = self._write_some_now(data[:WRITE_SLICE], offset)
            except OSError as error:
                raise from_os_error(error, self._what("write", offset)) from error
            data, offset = data[done:], offset + done
            if not data:
                return
            await asyncio.sleep(0)
        await self._write_in_thread(data, offset, durable=False)

    async def _write_in_thread(self, data: memoryview, offset: int, *, durable: bool) -> None:
        self._pooled_writes = max(self._pooled_writes - 1, 0)
        if durable:
            self._check_latch("write", offset)
        holds_lock = len(data) > INLINE_WRITE
        self._lock_holders += holds_lock
        try:
            job = self._write_durably_now if durable else self._write_now
            await self._in_thread("write", offset, job, data, offset)
        finally:
            self._lock_holders -= holds_lock
            self._changes += 1
        if durable:
            self._check_latch("write", offset)  # the failure of a sync beside ours may have been about our data

    async def _free(self, io: Io, offset: int) -> None:
        """DISCARD and WRITE_ZEROES."""
        if io.flags & FUA:
            self._check_latch("flush", offset)
        self._lock_holders += 1
        try:
            if io.op == DISCARD:
                await self._in_thread("discard", offset, self._discard_now, offset, io.length)
            else:
                await self._in_thread("zeroing", offset, self._zero_now, offset, io.length, io.flags)
        finally:
            self._lock_holders -= 1
            self._changes += 1
            self._known_data.remove(offset, offset + io.length)
        if io.flags & FUA:
            await self._flush()

    def _flush(self) -> Pending:
        """Ends when every change that ended before now is durable."""
        if self._durable >= self._changes and self._sync_failure is None:
            return DONE
        return self._sync(self._changes)

    async def _sync(self, wanted: int) -> None:
        while True:
            self._check_latch("flush", 0)
            if self._durable >= wanted:
                return
            if self._sync_ended is not None:  # it may have begun before the last of our changes ended
                await self._sync_ended.wait()
                continue
            ended = self._sync_ended = asyncio.Event()
            try:
                await self._in_thread("flush", 0, self._sync_now, self._changes)
            finally:
                self._sync_ended = None
                ended.set()

    def _check_latch(self, what: str, offset: int) -> None:
        if self._sync_failure is not None:
            raise IoFailed(f"{self._what(what, offset)} is refused: {self._sync_failure}")

    def _latch(self, what: str, error: OSError) -> None:
        if self._sync_failure is None:
            moment = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="seconds")
            self._sync_failure = f"{what} failed at {moment}: {error.strerror}; data may be lost"
            _log.error("%s: %s", self.name, self._sync_failure)

    def _what(self, what: str, offset: int) -> str:
        return f"{what} of {self.path} at byte {offset}" if what != "flush" else f"flush of {self.path}"

    async def _in_thread(
        self, what: str, offset: int, job: Callable[[*_Arguments], _Result], *arguments: *_Arguments
    ) -> _Result:
        try:
            return await self._threads.run(job, *arguments)
        except OSError as error:
            raise from_os_error(error, self._what(what, offset)) from error

    def _open_now(self, create: bool, size: int | None) -> None:
        opened = open_file(
            self.path, read_only=self.read_only, direct=self._bounce is not None, create=create, size=size
        )
        self._fd = opened.fd
        self.size = opened.size
        self.limits = opened.limits
        self._is_block_device = opened.is_block_device
        if opened.inline_read_flags is not None:
            self._inline_read = INLINE_READ
            self._inline_read_flags = opened.inline_read_flags

    def _read_now(self, data: memoryview, offset: int) -> None:
        while data:
            if self._bounce is None:
                done = os.preadv(self._fd, (data,), offset)
            else:
                done = self._bounce.read(self._fd, data, offset)
                done -= done % self.limits.logical_block
            if done == 0:
                raise IoFailed(f"{self._what('read', offset)}: the file has become shorter, {self.size} bytes expected")
            data, offset = data[done:], offset + done

    def _write_some_now(self, data: memoryview, offset: int) -> int:
        """One pwritev; notices when a small one is slow."""
        begun = perf_counter_ns()
        bounce = self._bounce
        done = os.pwritev(self._fd, (data,), offset) if bounce is None else bounce.write(self._fd, data, offset)
        if len(data) <= INLINE_WRITE and perf_counter_ns() - begun > SLOW_WRITE_NS:
            self._pooled_writes = POOLED_WRITES
        return done

    def _write_now(self, data: memoryview, offset: int) -> None:
        while data:
            done = self._write_some_now(data, offset)
            data, offset = data[done:], offset + done

    def _write_durably_now(self, data: memoryview, offset: int) -> None:
        """FUA. First a plain write: if the disk is full it fails there, where nothing is lost and nothing is latched.

        Commit point: then the range is written out, and it only (fdatasync would write all that is dirty). The bytes are not
        written again, as with RWF_DSYNC: somebody may have read them since, and written others over them.
        """
        self._write_now(data, offset)
        try:
            if self._bounce is not None:
                os.fdatasync(self._fd)  # past the page cache it has nothing else to write
            else:
                syscalls.sync_range(self._fd, offset, len(data))
        except OSError as error:
            self._latch(self._what("synchronous write", offset), error)
            raise

    def _sync_now(self, changes: int) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._latch(self._what("flush", 0), error)
            raise
        self._durable = changes

    def _discard_now(self, offset: int, length: int) -> None:
        try:
            if self._is_block_device:
                syscalls.discard_blocks(self._fd, offset, length)
            else:
                syscalls.fallocate(self._fd, syscalls.PUNCH_HOLE | syscalls.KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                raise Unsupported(f"{self.path} cannot discard") from error
            raise

    def _zero_now(self, offset: int, length: int, flags: int) -> None:
        """The cheapest way there is: a hole, then the file system's own zeroing, then writing zeroes."""
        fast = flags & FAST_ZERO
        if not fast or self.limits.fast_zero:
            for mode in (syscalls.ZERO_RANGE,) if flags & NO_HOLE else (syscalls.PUNCH_HOLE, syscalls.ZERO_RANGE):
                try:
                    syscalls.fallocate(self._fd, mode | syscalls.KEEP_SIZE, offset, length)
                except OSError as error:
                    if error.errno != errno.EOPNOTSUPP:
                        raise
                else:
                    return
        if fast:
            raise Unsupported(f"{self.path} cannot zero faster than by writing")
        end = offset + length
        while offset < end:
            offset += self._write_some_now(_ZEROES[: end - offset], offset)

    def _cache_now(self, offset: int, length: int) -> None:
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def _extents_now(self, offset: int, end: int) -> tuple[list[Extent], list[Run]]:
        return find_extents(self._fd, offset, end, self.limits.logical_block)

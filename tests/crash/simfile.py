"""The real FileDisk on a simulated file: its system calls go to a page cache whose write-out is in the log.

All of FileDisk's code runs but `open`: the inline path, its threads (real ones, but only one of them runs at a time, and each
system call is a place where it stops and lets the seeded schedule go on), the group commit and the latch. `fdatasync` and
`sync_range` make durable what had been written when they began; a failed one forgets what it could not write, as Linux does.

    kernel = SimKernel(log, weather, images)
    with kernel.installed():
        disk = kernel.disk(0)
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, cast

from nbdmap.block import file as file_module
from nbdmap.block import syscalls
from nbdmap.block.device import Extent, Limits
from nbdmap.block.file import INLINE_READ, SLOW_WRITE_NS, FileDisk
from nbdmap.block.file_extents import Run
from tests.crash.disks import Fault, Weather
from tests.crash.log import Entry, WriteLog
from tests.support.disks import holes

LIMITS: Final = Limits(discard=True, zero=True, fast_zero=True, cache=True, sparse=True)
GOOD: Final = Fault()
FIRST_FD: Final = 1 << 20
"""No real descriptor is as high, so a call that escapes the simulation fails with EBADF."""


class Worker:
    """A thread that runs one job at a time, and only while somebody is inside `advance`."""

    def __init__(self) -> None:
        self.stall = 0.0
        """How long the job is held up at the system call at which it has stopped."""
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._job: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def start(self, job: Callable[[], None] | None) -> None:
        """The next job; None ends the thread."""
        self._job = job

    def advance(self) -> bool:
        """Lets the job run to its next system call, or its end: then True."""
        self._go.release()
        self._stopped.acquire()
        return self._job is None

    def park(self) -> None:
        """Called by the job at a system call: stops until it is advanced."""
        self._stopped.release()
        self._go.acquire()

    def end(self) -> None:
        """Ends the thread, which has no job."""
        self._go.release()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._go.acquire()
            if self._job is None:
                return
            _current.worker = self
            self._job()
            self._job = None
            self._stopped.release()


_current = threading.local()


class SimThreads:
    """Stands in for the Threads of a FileDisk: the jobs run in Workers, by the schedule."""

    def __init__(self, kernel: "SimKernel") -> None:
        self._kernel = kernel

    async def run(self, job: Callable[..., Any], *arguments: Any) -> Any:
        """As Threads.run."""
        if self._kernel.weather.rng is None:
            return job(*arguments)
        result: list[Any] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                result.append(job(*arguments))
            except BaseException as error:
                failure.append(error)

        worker = self._kernel.idle.pop() if self._kernel.idle else Worker()
        worker.start(work)
        cancelled = None
        while True:
            try:
                stall, worker.stall = worker.stall, 0.0
                await (self._kernel.weather.hold_up(stall) if stall else self._kernel.weather.pause())
            except asyncio.CancelledError as error:
                cancelled = error  # as with the real threads the job goes on to its end
                worker.stall = stall
                continue
            if worker.advance():
                break
        self._kernel.idle.append(worker)
        if cancelled:
            raise cancelled
        await self._kernel.weather.pause()  # the answer comes back to the loop
        if failure:
            raise failure[0]
        return result[0]

    async def close(self) -> None:
        """Nothing is under way: who began a job waits for its end."""


class SimKernel:
    """The files of one run and the system calls on them; stands in for `os` and `syscalls` in FileDisk's module."""

    POSIX_FADV_WILLNEED: Final = os.POSIX_FADV_WILLNEED
    PUNCH_HOLE: Final = syscalls.PUNCH_HOLE
    ZERO_RANGE: Final = syscalls.ZERO_RANGE
    KEEP_SIZE: Final = syscalls.KEEP_SIZE
    fspath = staticmethod(os.fspath)

    def __init__(self, log: WriteLog, weather: Weather, images: Sequence[bytes]) -> None:
        self.log = log
        self.weather = weather
        self.files = [bytearray(image) for image in images]
        self.idle: list[Worker] = []
        self._clock = 0

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """FileDisk's module calls this kernel."""
        module = cast("Any", file_module)
        before = module.os, module.syscalls, module.perf_counter_ns
        module.os, module.syscalls, module.perf_counter_ns = self, self, self._perf_counter_ns
        try:
            yield
        finally:
            module.os, module.syscalls, module.perf_counter_ns = before
            for worker in self.idle:
                worker.end()

    def disk(self, index: int, kind: type[FileDisk] = FileDisk) -> FileDisk:
        """A FileDisk on file `index`, as `FileDisk.open` would leave it."""
        disk = cast("Any", kind(f"/sim/{index}", f"disk{index}", f"7:{index}", read_only=False, direct=False, clock=lambda: 0.0))
        disk._threads = SimThreads(self)
        disk._extents_now = partial(self._extents, index)
        disk._fd = FIRST_FD + index
        disk.size = len(self.files[index])
        disk.limits = LIMITS
        disk._inline_read = INLINE_READ
        return cast("FileDisk", disk)

    def _extents(self, index: int, offset: int, end: int) -> tuple[list[Extent], list[Run]]:
        """As FileDisk's, of a file of which zeroes are holes."""
        self._park()
        return holes(self.files[index], offset, end - offset), []

    def _perf_counter_ns(self) -> int:
        """A clock by which one call in eight is slow."""
        slow = self.weather.rng is not None and self.weather.rng.random() < 0.125
        self._clock += 2 * SLOW_WRITE_NS if slow else 1
        return self._clock

    def _park(self, stall: float = 0.0) -> None:
        worker = getattr(_current, "worker", None)
        if worker is not None:
            worker.stall = stall
            worker.park()

    def _meet(self, kind: str) -> Fault:
        """Stops, perhaps for long; what happens then."""
        self._park()
        fault = self.weather.fault(kind, waits=hasattr(_current, "worker")) or GOOD
        if fault.stall:
            self._park(fault.stall)
        return fault

    # --- system calls ------------------------------------------------------------------------------------------------

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        """preadv2(2)"""
        (data,) = buffers
        fault = self._meet("read")
        fault.strike()
        done = fault.bytes_of(len(data))
        data[:done] = self.files[fd - FIRST_FD][offset : offset + done]
        return done

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """pwritev(2)"""
        (data,) = buffers
        entry = self.log.submit(fd - FIRST_FD, "write", offset, len(data), bytes(data))
        fault = self._meet("write")
        done = fault.bytes_of(entry.length)
        self.files[fd - FIRST_FD][offset : offset + done] = data[:done]
        self._end(entry, fault, done)
        return done

    def fdatasync(self, fd: int) -> None:
        """fdatasync(2)"""
        entry = self.log.submit(fd - FIRST_FD, "flush", 0, 0)
        self._end(entry, self._meet("flush"), 0, forget=True)

    def sync_range(self, fd: int, offset: int, length: int) -> None:
        """syscalls.sync_range"""
        entry = self.log.submit(fd - FIRST_FD, "flush", offset, length)
        self._end(entry, self._meet("range"), length, forget=True)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """fallocate(2): holes and zeroed ranges read as zeroes."""
        assert mode & self.KEEP_SIZE
        assert mode & (self.PUNCH_HOLE | self.ZERO_RANGE)
        entry = self.log.submit(fd - FIRST_FD, "zero", offset, length)
        fault = self._meet("zero")
        done = fault.bytes_of(length) if fault.errno else length
        self.files[fd - FIRST_FD][offset : offset + done] = bytes(done)
        self._end(entry, fault, done)

    def _end(self, entry: Entry, fault: Fault, done: int, *, forget: bool = False) -> None:
        """The call ends after `done` bytes."""
        if fault.errno:
            self.log.fail(entry, done, forget=forget)
        else:
            self.log.complete(entry, done)
        fault.strike()
        self._park()

    def posix_fadvise(self, fd: int, offset: int, length: int, advice: int) -> None:
        """posix_fadvise(2)"""

    def close(self, fd: int) -> None:
        """close(2)"""

"""The threads of one device, for system calls that may block.

Each device has its own, so that one that hangs holds up no other. Invariant: when `run` has ended, in whatever way, its
job is not running, so that a buffer lent to the job is the caller's again. A job that has begun cannot be stopped:
cancelling `run` drops a job that still waits for a thread, and else waits for its end.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, TypeVar, TypeVarTuple

MAX_THREADS: Final = 8

_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")


class Threads:
    """At most MAX_THREADS threads named after the device, each started when it is first needed."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix=f"nbdmap {name}")
        self._under_way: set[Future[Any]] = set()

    async def run(self, job: Callable[[*_Arguments], _Result], *arguments: *_Arguments) -> _Result:
        """Runs `job(*arguments)` in a thread and returns what it returns, or raises what it raises."""
        future = self._pool.submit(job, *arguments)
        self._under_way.add(future)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not future.cancel():
                await _end_of(future)
            raise
        finally:
            self._under_way.discard(future)

    async def close(self) -> None:
        """Waits for the jobs under way and ends the threads."""
        for future in list(self._under_way):
            await _end_of(future)
        self._pool.shutdown()


async def _end_of(future: Future[Any]) -> None:
    """Waits until the job has ended, cancelled or not; a cancellation met meanwhile is raised at the end."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    future.add_done_callback(lambda _: loop.call_soon_threadsafe(ended.set))
    cancelled: asyncio.CancelledError | None = None
    while not ended.is_set():
        try:
            await ended.wait()
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled

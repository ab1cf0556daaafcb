"""An asyncio loop whose time is virtual: it jumps to the next timer, so nothing sleeps and every run is the same.

There are no descriptors on it and no other thread may wake it. When nothing is ready and no timer is set, nothing can ever
happen again: that is a `Deadlock`, raised where the loop was started.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class Deadlock(AssertionError):
    """Somebody waits, and nothing that could wake them is under way."""


class _NoDescriptors:
    """What BaseEventLoop asks for events: there are none, but time passes."""

    def __init__(self) -> None:
        self.now = 0.0

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Deadlock("nothing is ready and no timer is set")
        self.now += timeout
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """Begins at time 0."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = _NoDescriptors()
        self.failures: list[dict[str, Any]] = []
        """What asyncio would have logged: exceptions that nobody saw, tasks that were dropped."""
        self.set_exception_handler(lambda loop, context: self.failures.append(context))

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._selector.now

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody else is there to wake it."""


def run(main: Coroutine[Any, Any, _Result], make: Callable[[], VirtualLoop] = VirtualLoop) -> _Result:
    """Runs `main` to its end. Raises Deadlock, and AssertionError when `main` leaves tasks or unseen failures behind."""
    loop = make()
    try:
        result = loop.run_until_complete(main)
        left = asyncio.all_tasks(loop)
        assert not left, f"tasks left behind: {left}"
        assert not loop.failures, loop.failures
        return result
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            try:
                loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            except Deadlock:
                pass
        loop.close()

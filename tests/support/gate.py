"""A function that stops, in the thread that calls it, until the test lets it go on: no sleeps, no races."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any


class Gate:
    """Stands in for `function`. `entered` is set, on the loop that made the gate, when a thread has come to it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.calls = 0
        self.entered = asyncio.Event()
        self._function = function
        self._loop = asyncio.get_running_loop()
        self._open = threading.Event()

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        self._loop.call_soon_threadsafe(self.entered.set)
        assert self._open.wait(30), "nobody opened the gate"
        return self._function(*arguments)

    def open(self) -> None:
        """Lets everybody through, now and later."""
        self._open.set()

"""Looking again instead of sleeping, while requests come quickly one after another.

To wake a process that sleeps on another core takes the kernel some 10 us, in a virtual machine more: a third of what a client
with one request in flight waits for. So when two wake-ups were less than `seconds` apart, the event loop does not sleep for
so long after the second; it asks the kernel, again and again, whether there is more. That costs no more CPU time for each
request than sleeping and waking did (bench/README.md), and nothing while no client is busy.
"""

import asyncio
import os
from collections.abc import Callable
from time import perf_counter


class BusyPoll:
    """For all clients of one event loop. `seconds` 0 is never; so is a single core, which the client needs more."""

    def __init__(self, seconds: float = 0.0, clock: Callable[[], float] = perf_counter, cores: int | None = None) -> None:
        self.seconds = seconds
        self._clock = clock
        self._alone = (cores or len(os.sched_getaffinity(0))) == 1
        self._last = 0.0
        self._until = 0.0
        self.active = False

    def served(self, waiting: int) -> None:
        """Requests of a client have come and were started; `waiting` of its requests are not done. While there are such
        nobody polls: they may wait for a thread that needs the interpreter."""
        now = self._clock()
        if waiting:
            self._until = 0.0
        elif now - self._last < self.seconds and not self._alone:
            self._until = now + self.seconds
            if not self.active:
                self.active = True
                asyncio.get_running_loop().call_soon(self._again)
        self._last = now

    def _again(self) -> None:
        if self._clock() < self._until:
            asyncio.get_running_loop().call_soon(self._again)  # what is due soon keeps the loop from sleeping
        else:
            self.active = False

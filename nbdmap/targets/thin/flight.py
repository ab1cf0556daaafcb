"""Requests on the data device that are under way, so that a block is not given to another volume under them.

A read or write that was mapped to a block may still be running, in a thread, when that block is unmapped. `Flights.drain`
ends when all that had been started before it are over; a block is freed only after that.
"""

import asyncio
from functools import partial

from nbdmap.block.io import DONE, Deferred, Failed, Pending


class _Epoch:
    """What was started between two drains."""

    __slots__ = ("count", "over")

    def __init__(self) -> None:
        self.count = 0
        self.over: asyncio.Future[None] | None = None

    def ended(self, error: BaseException | None = None) -> None:
        """One less."""
        self.count -= 1
        if not self.count and self.over is not None and not self.over.done():
            self.over.set_result(None)


class Flights:
    """Counts requests; those that are done at once cost nothing."""

    def __init__(self) -> None:
        self._now = _Epoch()
        self._before: list[_Epoch] = []

    def track(self, pending: Pending) -> Pending:
        """`pending`, counted until it is over."""
        if pending is DONE or isinstance(pending, Failed):
            return pending
        epoch = self._now
        epoch.count += 1
        if isinstance(pending, Deferred):
            pending.then(partial(epoch.ended))
            return pending
        return _until_over(epoch, pending)

    async def drain(self) -> None:
        """Ends when everything that is under way now is over."""
        if self._now.count:
            self._before.append(self._now)
            self._now = _Epoch()
        for epoch in list(self._before):
            if epoch.count:
                if epoch.over is None:
                    epoch.over = asyncio.get_running_loop().create_future()
                await asyncio.shield(epoch.over)
        self._before = [epoch for epoch in self._before if epoch.count]


async def _until_over(epoch: _Epoch, pending: Pending) -> None:
    try:
        await pending
    finally:
        epoch.ended()

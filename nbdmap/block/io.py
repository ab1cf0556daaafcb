"""One I/O request and how it is run.

An `Io` never changes on its way down a stack of devices: only the byte offset passed beside it does, so that a split, a
retry or a mirror write needs no copies. `submit(io, offset)` of every device and target is a coroutine (or hands on the
coroutine of the device below); a failure is an exception with an errno.

Coroutines are run *eagerly*: whoever needs one drives it with `send(None)` and most requests are done at once, without a
task or a future. Only one that really waits is handed to a task. Two rules follow for code that may run eagerly: it has no
task of its own until it has waited once, and `asyncio.timeout` or a `TaskGroup` must not be entered before that.
"""

import asyncio
from collections.abc import Coroutine, Iterable
from enum import IntEnum
from typing import Any, Final


class Op(IntEnum):
    """What is asked of a device."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    WRITE_ZEROES = 4
    CACHE = 5


READ: Final = Op.READ
WRITE: Final = Op.WRITE
FLUSH: Final = Op.FLUSH
DISCARD: Final = Op.DISCARD
WRITE_ZEROES: Final = Op.WRITE_ZEROES
CACHE: Final = Op.CACHE

FUA: Final = 1
"""Durable before it is answered; on WRITE, DISCARD and WRITE_ZEROES."""
NO_HOLE: Final = 2
"""WRITE_ZEROES must leave the range provisioned."""
FAST_ZERO: Final = 16
"""WRITE_ZEROES must fail with EOPNOTSUPP, changing nothing, unless it is faster than writing."""

Pending = Coroutine[Any, Any, None]
"""What `submit` returns: to be awaited, or run eagerly, exactly once."""

_EMPTY: Final = memoryview(b"")


class Io:
    """One request: `op`, `length` in bytes, `data` (READ: the buffer to fill; WRITE: the payload; else empty) and `flags`.

    `data` belongs to the caller and may be used only until `submit` has ended; who keeps it longer copies it.
    """

    __slots__ = ("data", "flags", "length", "op")

    def __init__(self, op: Op, length: int, data: memoryview = _EMPTY, flags: int = 0) -> None:
        self.op = op
        self.length = length
        self.data = data
        self.flags = flags

    def part(self, start: int, length: int) -> "Io":
        """The request for `length` bytes from byte `start` of this one; it shares the buffer."""
        return Io(self.op, length, self.data[start : start + length], self.flags)

    def __repr__(self) -> str:
        return f"Io({self.op.name}, {self.length}, flags={self.flags:#x})"


class Continued(Coroutine[Any, Any, None]):
    """The rest of a coroutine that was started eagerly and has yielded once: to be made a task, or awaited.

    A coroutine itself, so that a cancellation that comes before its task has run once reaches the request all the same.
    """

    __slots__ = ("_coroutine", "_started", "_yielded")

    def __init__(self, coroutine: Pending, yielded: object) -> None:
        self._coroutine = coroutine
        self._yielded = yielded
        self._started = False

    def send(self, value: Any) -> Any:
        """First what was yielded, then what the coroutine yields next."""
        if self._started:
            return self._coroutine.send(value)
        self._started = True
        return self._yielded

    def throw(self, *error: Any) -> Any:
        """Throws into the coroutine, started or not."""
        self._started = True
        return self._coroutine.throw(*error)

    def close(self) -> None:
        """Ends the coroutine."""
        self._coroutine.close()

    def __await__(self) -> "Continued":
        return self

    def __iter__(self) -> "Continued":
        return self

    def __next__(self) -> Any:
        return self.send(None)


async def run_all(requests: Iterable[Pending]) -> None:
    """Runs requests side by side and ends when all of them have; then raises the first error, if any.

    Each is started eagerly, in order. Cancelling it cancels those that still wait, and waits for them.
    """
    waiting: list[asyncio.Task[None]] = []
    first: BaseException | None = None
    for request in requests:
        try:
            yielded = request.send(None)
        except StopIteration:
            continue
        except Exception as error:
            first = first or error
            continue
        waiting.append(asyncio.get_running_loop().create_task(Continued(request, yielded)))
    try:
        for task in waiting:
            try:
                await task
            except Exception as error:
                first = first or error
    except asyncio.CancelledError:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        raise
    if first is not None:
        raise first


async def to_the_end(work: Pending) -> None:
    """Awaits `work`, such as closing a device, that must not stop half-way: a cancellation is raised when it has ended."""
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        if not task.cancelled():
            task.exception()  # it was seen
        raise asyncio.CancelledError
    task.result()

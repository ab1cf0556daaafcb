"""One I/O request and how it is run.

An `Io` never changes on its way down a stack of devices: only the byte offset passed beside it does, so that a split, a
retry or a mirror write needs no copies. `submit(io, offset)` of every device and target starts it and returns something
to await, a `Pending`. It never raises: a failure, an exception with an errno, is raised by what it returns, which is

- `DONE`: done already; what a fast path returns, a plain function that costs 0.1 us a layer;
- `Failed(error)`: over, and badly;
- a `Deferred`: some later call ends it; no coroutine, no task;
- or a coroutine, for whatever has to wait in the middle.

Coroutines are run *eagerly*: whoever needs one drives it with `send(None)`, and only one that really waits is handed to a
task. Two rules follow for code that may run eagerly: it has no task of its own until it has waited once, and
`asyncio.timeout` or a `TaskGroup` must not be entered before that.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Final

from nbdmap.block.pending import DONE as DONE
from nbdmap.block.pending import Continued as Continued
from nbdmap.block.pending import Deferred as Deferred
from nbdmap.block.pending import Failed as Failed
from nbdmap.block.pending import Pending as Pending
from nbdmap.block.pending import run_all as run_all
from nbdmap.block.pending import to_the_end as to_the_end


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

_EMPTY: Final = memoryview(b"")


class Plug:
    """The requests of one wake-up of a connection, for targets that are cheaper in batches (as the kernel's blk_plug).

    While it is `active`, a target may put off part of its work and `add` what will do it for all requests together; that is
    called, once, when the connection has taken everything that had arrived, before it answers any. Alone, a request is not held
    back. What is put off is one of two: a request, which is parked as a Deferred; or no more than what becomes of bytes that
    have been read, and then the READ is DONE already. So who looks at what was read passes on a READ that is `unplugged`.
    """

    __slots__ = ("_runs", "active")

    def __init__(self) -> None:
        self.active = False
        self._runs: list[Callable[[], None]] = []

    def add(self, run: Callable[[], None]) -> None:
        """Calls `run` at the end of the wake-up."""
        self._runs.append(run)

    def pull(self) -> None:
        """The end of the wake-up: does what was put off, and what that puts off on its way down.

        Raises the last failure, when all is done; what was read must not be answered then.
        """
        failure: Exception | None = None
        while self._runs:
            runs, self._runs = self._runs, []
            for run in runs:
                try:
                    run()
                except Exception as error:
                    failure = error
        self.active = False
        if failure is not None:
            raise failure


NO_PLUG: Final = Plug()
"""Never active: of requests that come alone."""


class Io:
    """One request: `op`, `length` in bytes, `data` (READ: the buffer to fill; WRITE: the payload; else empty) and `flags`.

    `data` belongs to the caller and may be used only until `submit` has ended; who keeps it longer copies it.
    """

    __slots__ = ("data", "flags", "length", "op", "plug")

    def __init__(self, op: Op, length: int, data: memoryview = _EMPTY, flags: int = 0, plug: Plug = NO_PLUG) -> None:
        self.op = op
        self.length = length
        self.data = data
        self.flags = flags
        self.plug = plug

    def part(self, start: int, length: int) -> "Io":
        """The request for `length` bytes from byte `start` of this one; it shares the buffer."""
        return Io(self.op, length, self.data[start : start + length], self.flags, self.plug)

    def unplugged(self) -> "Io":
        """The same request by itself: when it is done its data are there."""
        return Io(self.op, self.length, self.data, self.flags)

    def __repr__(self) -> str:
        return f"Io({self.op.name}, {self.length}, flags={self.flags:#x})"

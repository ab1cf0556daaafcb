"""How exact the delay target is: python -m bench.delay [delay in ms] [requests in flight]

Requests arrive evenly, so many that the given number is in flight all the time; printed is how late each was issued, and what
one costs. Negative would be too early.
"""

import asyncio
import gc
import resource
import statistics
import sys
import time

import uvloop

from nbdmap.block.io import DONE, READ, Deferred, Io, Pending
from nbdmap.dm.table import Table, parse_table
from nbdmap.targets import TARGETS
from tests.support.disks import FakeDisk, FakeOpener

SECONDS = 4.0
"""Measured after the first requests have ended."""


async def measure(delay_ms: int, in_flight: int) -> str:
    """One line."""
    late: list[float] = []
    arrivals: dict[int, float] = {}

    class Disk(FakeDisk):
        def submit(self, io: Io, offset: int) -> Pending:
            late.append(time.monotonic() - arrivals.pop(id(io)) - delay_ms / 1000)
            return DONE

    table = await Table.build(
        parse_table(f"0 8 delay 7:0 0 {delay_ms}"), TARGETS, FakeOpener(Disk("7:0")), read_only=False, raise_event=lambda: None
    )
    rate = in_flight / delay_ms * 1000
    buffer = memoryview(bytearray(512))
    begun, sent, most = time.monotonic(), 0, 0
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    while (elapsed := time.monotonic() - begun) < delay_ms / 1000 + SECONDS:
        while sent < elapsed * rate:
            io = Io(READ, 512, buffer)
            arrivals[id(io)] = time.monotonic()
            assert isinstance(table.submit(io, 0), Deferred)
            sent += 1
        most = max(most, len(arrivals))
        await asyncio.sleep(0.001)
    used = resource.getrusage(resource.RUSAGE_SELF)
    cost = (used.ru_utime + used.ru_stime - cpu.ru_utime - cpu.ru_stime) / sent * 1e6
    await asyncio.sleep(delay_ms / 1000 + 0.1)
    cuts = statistics.quantiles(late, n=1000)
    named = {"min": min(late), "median": cuts[499], "99 %": cuts[989], "99.9 %": cuts[998], "max": max(late)}
    figures = ", ".join(f"{name} {value * 1e3:.2f}" for name, value in named.items())
    return f"{delay_ms} ms, {most} in flight, {rate:.0f}/s: late by ms: {figures}; {cost:.1f} us of CPU each"


def main() -> None:
    delay_ms = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    in_flight = int(sys.argv[2]) if len(sys.argv) > 2 else 10_000
    gc.freeze()  # as the server does
    print(uvloop.run(measure(delay_ms, in_flight)))


if __name__ == "__main__":
    main()

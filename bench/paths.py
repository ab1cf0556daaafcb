"""`python -m bench.paths`: what each path selector makes of one slow path, and what multipath costs.

    python -m bench.paths --seconds 2 --depth 16

Two paths to the same memory, by the delay target: one answers after 1 ms, the other after 10 ms. So many reads of 4 KiB are
kept in flight. The time is nearly all waiting, so the figures do not depend on the machine; the costs are CPU time of this
process.
"""

import argparse
import asyncio
import time
from typing import Final

import uvloop

from nbdmap.block.io import READ, Io
from nbdmap.block.memory import MemoryDisk
from nbdmap.control.events import Events
from nbdmap.control.mapper import Mapper
from nbdmap.dm.device import MappedDevice
from nbdmap.targets import TARGETS
from nbdmap.units import KIB, MIB

SIZE: Final = 4 * KIB
SECTORS: Final = 16 * MIB // 512
TABLES: Final = {
    "round-robin": "round-robin 0 2 1 fast 1 slow 1",
    "queue-length": "queue-length 0 2 1 fast 1 slow 1",
    "service-time": "service-time 0 2 2 fast 1 1 slow 1 1",
    "service-time 10:1": "service-time 0 2 2 fast 1 10 slow 1 1",
    "historical-service-time": "historical-service-time 0 2 1 fast 1 slow 1",
}
FAST_MS: Final = 1
SLOW_MS: Final = 10


async def load(device: MappedDevice, depth: int, seconds: float) -> int:
    """Keeps `depth` reads in flight for so long; how many were done."""
    end = time.monotonic() + seconds
    done = 0

    async def client() -> None:
        nonlocal done
        buffer = memoryview(bytearray(SIZE))
        while time.monotonic() < end:
            await device.submit(Io(READ, SIZE, buffer), 0)
            done += 1

    await asyncio.gather(*(client() for _ in range(depth)))
    return done


async def one_slow_path(seconds: float, depth: int) -> dict[str, tuple[float, float]]:
    """Requests a second, and the share of the slow path, by selector."""
    mapper = Mapper(TARGETS, Events(time.time))
    mapper.disks["memory"] = MemoryDisk("memory", "1:0", SECTORS * 512)
    fast = await mapper.create("fast", table=f"0 {SECTORS} delay memory 0 {FAST_MS}")
    slow = await mapper.create("slow", table=f"0 {SECTORS} delay memory 0 {SLOW_MS}")
    found: dict[str, tuple[float, float]] = {}
    for name, words in TABLES.items():
        device = await mapper.create("mp", table=f"0 {SECTORS} multipath 0 0 1 1 {words}")
        before = [one.requests[READ] for one in (fast, slow)]
        done = await load(device, depth, seconds)
        went = [one.requests[READ] - earlier for one, earlier in zip((fast, slow), before, strict=True)]
        found[name] = (done / seconds, went[1] / sum(went))
        await mapper.remove(device)
    await mapper.close()
    return found


async def cost(requests: int) -> dict[str, float]:
    """CPU microseconds of a read that is done at once, by what it goes through."""
    mapper = Mapper(TARGETS, Events(time.time))
    for number, name in enumerate("ab"):
        mapper.disks[name] = MemoryDisk(name, f"1:{number}", SECTORS * 512)
    found: dict[str, float] = {}
    tables = {"linear": f"0 {SECTORS} linear a 0"} | {
        name: f"0 {SECTORS} multipath 0 0 1 1 {words.replace('fast', 'a').replace('slow', 'b')}" for name, words in TABLES.items()
    }
    io = Io(READ, SIZE, memoryview(bytearray(SIZE)))
    for name, table in tables.items():
        device = await mapper.create("d", table=table)
        began = time.process_time()
        for _ in range(requests):
            await device.submit(io, 0)
        found[name] = (time.process_time() - began) / requests * 1e6
        await mapper.remove(device)
    await mapper.close()
    return found


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.paths", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--depth", type=int, default=16)
    words = parser.parse_args()
    found = uvloop.run(one_slow_path(words.seconds, words.depth))
    base = found["round-robin"][0]
    for name, (rate, share) in found.items():
        print(f"{name:26} {rate:8,.0f} reads a second {rate / base:6.2f} times round-robin {share:7.1%} by the slow path")
    for name, microseconds in uvloop.run(cost(100_000)).items():
        print(f"{name:26} {microseconds:8.2f} us of CPU a read of 4 KiB from memory")


if __name__ == "__main__":
    main()

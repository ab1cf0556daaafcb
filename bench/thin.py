"""`python -m bench.thin`: a large pool, over sparse files: 1,000 volumes, 1,000,000 mapped blocks, 1,000 snapshots of one volume.

    python -m bench.thin --mappings 1000000 --directory /var/tmp

The mappings are put into the metadata as a commit of the pool does; no data is written. The pool is opened again in a process
of its own, whose memory is told. Reads are of 4 KiB at random places of a volume, of a snapshot of it, and of the last of
a chain of 100, by turns in one process; their data is a hole of the file.
"""

import argparse
import asyncio
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

from nbdmap.block.device import Device
from nbdmap.block.io import READ, Io
from nbdmap.control.events import Events
from nbdmap.control.mapper import Mapper
from nbdmap.dm.device import MappedDevice
from nbdmap.targets import TARGETS
from nbdmap.targets.thin.thin_pool import ThinPool
from nbdmap.units import GIB, KIB, MIB, SECTOR

VOLUMES: Final = 1000
SNAPSHOTS: Final = 1000
DEPTH: Final = 100
CHAIN: Final = 5000
"""The first number of the chain of snapshots."""
READS: Final = 4000
ROUNDS: Final = 7
BLOCK: Final = 64 * KIB
POOL: Final = "0 2147483648 thin-pool metadata data 128 0 1 skip_block_zeroing"


class Site:
    """The pool over two files, and the volumes that are open."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mapper = Mapper(TARGETS, Events(time.time))

    async def open(self) -> MappedDevice:
        """Makes the pool live."""
        return await self.mapper.create("pool", table=POOL, directory=str(self.directory))

    async def thin(self, number: int, mappings: int) -> MappedDevice:
        """A device of a volume."""
        return await self.mapper.create(f"v{number}", table=f"0 {mappings * BLOCK // SECTOR} thin pool {number}")


def make_files(directory: Path) -> None:
    """Sparse: 1 GiB of metadata, 1 TiB of data."""
    for name, size in (("metadata", GIB), ("data", 1024 * GIB)):
        with (directory / name).open("wb") as file:
            file.truncate(size)


async def timed(what: str, work: Coroutine[Any, Any, object], times: int = 1) -> float:
    """Prints how long it takes; seconds."""
    begun, cpu = time.perf_counter(), time.process_time()
    await work
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    each = f", {seconds / times * 1e3:.2f} ms each" if times > 1 else ""
    print(f"{what:50} {seconds:8.3f} s, CPU {cpu:.3f} s{each}")
    return seconds


async def fill(pool: MappedDevice, mappings: int) -> None:
    """Maps the blocks of volume 0 as a commit does."""
    target = pool.targets[0]
    assert isinstance(target, ThinPool)
    metadata = target.pool.metadata
    for start in range(0, mappings, 1 << 16):
        end = min(start + (1 << 16), mappings)
        await metadata.insert(0, {block: await metadata.data.new_block() << 24 for block in range(start, end)})
        await metadata.commit()
    await metadata.set_details(0, mappings)
    await metadata.commit()


async def messages(pool: MappedDevice, texts: list[str]) -> tuple[float, float]:
    """Sends them one after the other; the seconds of the slowest, and the CPU time of the one that took most."""
    slowest = most = 0.0
    for text in texts:
        begun, cpu = time.perf_counter(), time.process_time()
        await pool.message(0, text.split())
        slowest, most = max(slowest, time.perf_counter() - begun), max(most, time.process_time() - cpu)
    return slowest, most


async def build(directory: Path, mappings: int) -> None:
    """Makes the pool and all that is in it."""
    site = Site(directory)
    pool = await site.open()
    await timed(f"{VOLUMES} times create_thin", messages(pool, [f"create_thin {n}" for n in range(VOLUMES)]), VOLUMES)
    await timed(f"{mappings} mappings", fill(pool, mappings))
    begun = time.perf_counter()
    slowest, most = await messages(pool, [f"create_snap {2000 + n} 0" for n in range(SNAPSHOTS)])
    each = (time.perf_counter() - begun) / SNAPSHOTS
    print(f"{SNAPSHOTS} times create_snap: {each * 1e3:.2f} ms each, {slowest * 1e3:.1f} ms at most, {most * 1e3:.1f} of it CPU")
    await messages(pool, [f"create_snap {CHAIN + n} {CHAIN + n - 1 if n else 0}" for n in range(DEPTH)])
    await site.mapper.close()


async def read_some(device: Device, offsets: list[int]) -> None:
    """4 KiB each."""
    data = memoryview(bytearray(4096))
    for offset in offsets:
        await device.submit(Io(READ, 4096, data), offset)


async def reopen(directory: Path, mappings: int) -> None:
    """Opens the pool and reads."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    site = Site(directory)
    pool = await timed_open(site)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    print(f"memory: {before // MIB} MiB before it was opened, {after // MIB} MiB after")
    for target in pool.targets:
        await target.refresh_status()
    assert pool.live is not None
    print(pool.live.status_lines()[0].params)
    rng = random.Random(1)
    offsets = [rng.randrange(mappings) * BLOCK + rng.randrange(16) * 4096 for _ in range(READS)]
    devices = {name: await site.thin(number, mappings) for name, number in
               (("volume", 0), ("snapshot", CHAIN), (f"snapshot, depth {DEPTH}", CHAIN + DEPTH - 1))}  # fmt: skip
    best = dict.fromkeys(devices, 1e9)
    for _ in range(ROUNDS):
        for name, device in devices.items():
            begun = time.process_time()
            await read_some(device, offsets)
            best[name] = min(best[name], (time.process_time() - begun) / READS)
    for name, seconds in best.items():
        print(f"a read of 4 KiB, {name:24} {seconds * 1e6:6.2f} us of CPU, {seconds / best['snapshot']:.3f} of depth 1")
    await site.mapper.close()
    print(f"memory at the end {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB // MIB} MiB")


async def timed_open(site: Site) -> MappedDevice:
    """Opens the pool, and prints how long it takes."""
    begun, cpu = time.perf_counter(), time.process_time()
    pool = await site.open()
    print(f"opening the pool: {time.perf_counter() - begun:.3f} s, CPU {time.process_time() - cpu:.3f} s")
    return pool


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.thin", description="a pool with a million mappings")
    parser.add_argument("--mappings", type=int, default=1_000_000)
    parser.add_argument("--directory", type=Path, help="where the sparse files are made (/tmp)")
    parser.add_argument("--opened", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.opened:
        asyncio.run(reopen(chosen.opened, chosen.mappings))
        return
    with tempfile.TemporaryDirectory(dir=chosen.directory, prefix="bench-thin-") as name:
        make_files(Path(name))
        asyncio.run(build(Path(name), chosen.mappings))
        sys.stdout.flush()
        subprocess.run([sys.executable, "-m", "bench.thin", "--mappings", str(chosen.mappings), "--opened", name], check=True)


if __name__ == "__main__":
    main()

"""The clients: fio's nbd engine, nbdcopy, and idle connections of our own."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.processes import Failed, Process, running
from bench.servers import EXPORT, Server, Unable
from bench.site import REPOSITORY
from nbdmap.nbd.client import ClientHandshake
from nbdmap.nbd.negotiation import State
from nbdmap.units import KIB

GRACE_SECONDS: Final = 60.0
"""How much longer than it should a client may take."""
CONNECT_AT_ONCE: Final = 50


@dataclass(frozen=True)
class Load:
    """What fio does: `work` is its --rw. `offset` and `size` 0 are the whole export."""

    work: str
    block: int
    depth: int
    jobs: int = 1
    sync: bool = False
    offset: int = 0
    size: int = 0

    @property
    def writes(self) -> bool:
        """Whether it changes the export."""
        return "write" in self.work


@dataclass(frozen=True)
class Job:
    """What one of fio's jobs did."""

    per_second: float
    requests: int
    p99_us: float


def start_fio(server: Server, load: Load, seconds: float) -> "contextlib.AbstractContextManager[Process]":
    """fio, as a process that writes JSON to its log."""
    if server.asks_certificate and os.geteuid() == 0:
        raise Unable("it wants a certificate of the client, which fio's engine cannot show as root")
    site = server.place.site
    command = [
        "fio", "--name=bench", "--ioengine=nbd", f"--uri={server.uri}", f"--rw={load.work}", f"--bs={load.block}",
        f"--offset={load.offset}", f"--size={load.size or site.size_of(server.place.backing)}", f"--iodepth={load.depth}",
        f"--numjobs={load.jobs}", "--group_reporting=0", "--time_based", f"--runtime={int(seconds * 1000)}ms",
        f"--fsync={int(load.sync)}", "--output-format=json",
    ]  # fmt: skip
    return running(command, site.unique("fio.log"), environment=_home(server), stdout=subprocess.PIPE)


def _home(server: Server) -> dict[str, str]:
    """Where libnbd looks for certificates: not at those of who runs the benchmark."""
    return {"HOME": str(server.place.site.directory)}


def finish_fio(process: Process, seconds: float) -> list[Job]:
    """Waits for fio's end; what each of its jobs did."""
    try:
        output = process.popen.communicate(timeout=seconds + GRACE_SECONDS)[0].decode()
    except subprocess.TimeoutExpired:
        raise Failed(f"it does not end: {process.said()}") from None
    if process.popen.returncode or "{" not in output:
        raise Failed(f"exit status {process.popen.returncode}: {process.said()} {output[:1000]}")
    report: dict[str, Any] = json.loads(output[output.index("{") :])  # the engine talks before it
    return [_job(job) for job in report["jobs"]]


def _job(job: dict[str, Any]) -> Job:
    if job["error"]:
        raise Failed(f"fio: error {job['error']}")
    done = max((job["read"], job["write"]), key=lambda side: int(side["total_ios"]))
    p99_ns = done["clat_ns"].get("percentile", {}).get("99.000000", 0)
    return Job(done["total_ios"] * 1000 / max(1, done["runtime"]), done["total_ios"], p99_ns / 1000)


def fio(server: Server, load: Load, seconds: float) -> list[Job]:
    """Runs fio to its end."""
    with start_fio(server, load, seconds) as process:
        return finish_fio(process, seconds)


def lean(server: Server, way: str, block: int, depth: int, seconds: float) -> tuple[float, int]:
    """Runs the client of bench.pump; requests a second, and their number. Over a Unix socket only."""
    words = [str(server.place.socket), EXPORT, way, str(block), str(depth), str(seconds)]
    log = server.place.site.unique("pump.log")
    with running([sys.executable, "-m", "bench.pump", *words], log, environment={"PYTHONPATH": str(REPOSITORY)}) as process:
        try:
            status = process.popen.wait(seconds + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            raise Failed(f"the client does not end: {process.said()}") from None
        if status:
            raise Failed(f"exit status {status}: {process.said()}")
        done, rate = process.said().split()[-2:]
    return float(rate), int(done)


def nbdcopy(server: Server, source: str, destination: str) -> float:
    """Copies, and returns how many seconds it took."""
    site = server.place.site
    if server.place.tls:  # as long as its user is not root, libnbd finds them without being told
        source, destination = (
            f"{word}?tls-certificates={site.certificates}" if word == server.uri else word for word in (source, destination)
        )
    start = time.perf_counter()
    with running(["nbdcopy", source, destination], site.unique("nbdcopy.log"), environment=_home(server)) as process:
        try:
            status = process.popen.wait(10 * GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            raise Failed(f"it does not end: {process.said()}") from None
        seconds = time.perf_counter() - start
        if status:
            raise Failed(f"exit status {status}: {process.said()}")
    return seconds


# --- idle connections --------------------------------------------------------------------------------------------------


async def _negotiate(server: Server) -> asyncio.StreamWriter:
    """One client in clear that has chosen the export, and says no more."""
    place = server.place
    if place.unix:
        reader, writer = await asyncio.open_unix_connection(str(place.socket), limit=4 * KIB)
    else:
        reader, writer = await asyncio.open_connection("127.0.0.1", place.port, limit=4 * KIB)
    try:
        handshake = ClientHandshake(EXPORT)
        while handshake.state is State.NEGOTIATING:
            data = await reader.read(4 * KIB)
            if not data:
                handshake.eof()
            handshake.feed(data)
            writer.write(bytes(handshake.output))
            handshake.output.clear()
        if handshake.state is not State.TRANSMISSION:
            raise Failed(f"handshake: {handshake.failure}")
    except BaseException:
        writer.close()
        raise
    return writer


@contextlib.asynccontextmanager
async def idle_clients(server: Server, count: int) -> AsyncIterator[None]:
    """That many connections for the length of a block."""
    writers: list[asyncio.StreamWriter] = []
    try:
        while len(writers) < count:
            more = min(CONNECT_AT_ONCE, count - len(writers))
            writers += await asyncio.gather(*(_negotiate(server) for _ in range(more)))
        yield
    finally:
        for writer in writers:
            writer.close()


def rss_with_idle_clients(server: Server, count: int) -> tuple[int, int]:
    """The server's resident memory before, and with that many idle connections."""

    async def measure() -> tuple[int, int]:
        async with idle_clients(server, 1):  # what the first client makes is the server's own
            pass
        await asyncio.sleep(0.2)
        before = server.process.rss()
        async with idle_clients(server, count):
            await asyncio.sleep(0.2)
            return before, server.process.rss()

    return asyncio.run(measure())


def requests_of(jobs: Sequence[Job]) -> int:
    """Of all jobs."""
    return sum(job.requests for job in jobs)


@contextlib.contextmanager
def background(server: Server, load: Load, seconds: float) -> Iterator[None]:
    """A load that runs while the block does; it has begun when the block is entered, and must not fail."""
    with start_fio(server, load, seconds) as process:
        before = server.process.cpu_seconds()
        deadline = time.monotonic() + GRACE_SECONDS
        while server.process.cpu_seconds() < before + 0.05:  # it has the server do something
            if not process.alive() or time.monotonic() > deadline:
                raise Failed(f"it does not begin: {process.said()}")
            time.sleep(0.02)
        yield
        if not process.alive():
            raise Failed(f"the load ended too early: {process.said()}")

"""`python -m bench.soak SECONDS`: a mixed load in turns with silence, and what the server still holds in each silence.

Each turn: random reads and writes on two connections, 1 MiB writes, nbdcopy, clients that come and go, and a suspend and
resume, through a striped stack. What is sampled in the silence after the first turn is what it needs; growth is counted
from there.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from bench.clients import Load, finish_fio, idle_clients, nbdcopy, start_fio
from bench.processes import Failed, Process, adopt_orphans, ended_by_signals, raise_descriptor_limit, running
from bench.report import figure, markdown_table
from bench.servers import EXPORT, NBDMAP, Server, Transport, nbdmap_config, new_place, wait_until_up
from bench.site import REPOSITORY, Backing, Site, site
from nbdmap.units import KIB, MIB

TURNS: Final = 10
LONGEST_TURN: Final = 30.0
CLIENTS: Final = 50
SILENCE_SECONDS: Final = 0.5
SAMPLE_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Held:
    """What the server holds at one moment; `rss` in bytes, `objects` those that Python's collector knows."""

    rss: int
    descriptors: int
    threads: int
    tasks: int
    objects: int


def ask(process: Process) -> Held:
    """Asks an observed server."""
    assert process.popen.stdin is not None
    assert process.popen.stdout is not None
    process.popen.stdin.write(b"\n")
    process.popen.stdin.flush()
    line = process.popen.stdout.readline()
    if not line:
        raise Failed(f"the server is gone: {process.said()}")
    told = json.loads(line)
    descriptors = len(os.listdir(f"/proc/{process.pid}/fd"))
    return Held(process.rss(), descriptors, told["threads"], told["tasks"], told["objects"])


def _verb(server: Server, *words: str) -> None:
    command = [sys.executable, "-m", "nbdmap", *words]
    environment = {**os.environ, "NBDMAP_SOCKET": str(server.place.admin), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=SAMPLE_SECONDS)
    if done.returncode:
        raise Failed(f"nbdmap {' '.join(words)}: {done.stderr}")


async def _come_and_go(server: Server) -> None:
    async with idle_clients(server, CLIENTS):
        pass


def turn(server: Server, seconds: float) -> None:
    """One turn of load."""
    half = server.place.site.size // 2
    loads = (Load("randrw", 4 * KIB, 32, jobs=2, size=half), Load("write", MIB, 4, offset=half, size=half))
    end = time.monotonic() + seconds
    with ExitStack() as stack:
        started = [stack.enter_context(start_fio(server, load, seconds)) for load in loads]
        while True:
            nbdcopy(server, server.uri, "null:")
            asyncio.run(_come_and_go(server))
            _verb(server, "suspend", EXPORT)
            _verb(server, "resume", EXPORT)
            if time.monotonic() > end:
                break
        for process in started:
            finish_fio(process, seconds)


def soak(where: Site, seconds: float, tell: Callable[[Held], None]) -> list[Held]:
    """Runs turns for so many seconds, at least three; one sample after each."""
    place = new_place(where, Transport.UNIX, Backing.STACK)
    config = where.unique("soak.yaml")
    config.write_text(nbdmap_config(place))
    command = [sys.executable, "-m", "bench.observed", "serve", "-q", str(config)]
    length = min(LONGEST_TURN, seconds / TURNS)
    end = time.monotonic() + seconds
    samples: list[Held] = []
    with running(
        command, where.unique("nbdmap.log"), environment={"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        wait_until_up(place, process)
        server = Server(NBDMAP, process, place)
        while len(samples) < 3 or time.monotonic() < end:
            turn(server, length)
            time.sleep(SILENCE_SECONDS)
            samples.append(ask(process))
            tell(samples[-1])
    return samples


def table(samples: Sequence[Held]) -> str:
    """The first silence, the most, the last, and the growth."""
    rows = []
    for name in asdict(samples[0]):
        values = [getattr(sample, name) for sample in samples]
        scale, unit = (MIB, " MiB") if name == "rss" else (1, "")
        shown = [figure(value / scale) for value in (values[0], max(values), values[-1], values[-1] - values[0])]
        rows.append([name + unit, *shown])
    return markdown_table([f"{len(samples)} turns", "after the first", "most", "after the last", "growth"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description="what a server holds after hours of load")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where the file that is served is made (/tmp)")
    chosen = parser.parse_args(arguments)
    adopt_orphans()
    raise_descriptor_limit()
    with ended_by_signals(), site(chosen.directory, size=64 * MIB) as where:
        samples = soak(where, chosen.seconds, lambda held: print(held, file=sys.stderr))
    print(table(samples))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

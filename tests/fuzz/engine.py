"""Runs a target on inputs and watches: only what is declared is raised, within LIMIT_SECONDS of CPU and LIMIT_BYTES.

Memory is looked at after every batch; a batch that took too much is run again, one by one, to find the input. What a target
returns is what it did, in few words: an input that did something new is kept for further mutation.
"""

import asyncio
import hashlib
import re
import signal
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final, Protocol

import uvloop

from tests.fuzz.mutate import Mutator, Pieces

LIMIT_SECONDS: Final = 1.0
LIMIT_BYTES: Final = 64 << 20
BATCH: Final = 500
MAX_KINDS: Final = 5000
CORPUS: Final = Path(__file__).parent / "corpus"


class Target(Protocol):
    """What is fuzzed. `seeds` are inputs in pieces; `run` raises AssertionError, or anything else, where it finds a bug."""

    name: str
    seeds: Sequence[Pieces]
    words: Sequence[bytes]

    def join(self, pieces: Pieces) -> bytes:
        """The input."""

    def run(self, data: bytes) -> object:
        """Feeds it; what happened, in few words. It may be a coroutine."""


class TooSlow(BaseException):
    """One input took more than LIMIT_SECONDS."""


@dataclass
class Found:
    """What one run of a target gave."""

    name: str
    executions: int = 0
    kinds: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    crashes: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    """Where and what: (the input, the traceback)."""

    def note(self, data: bytes, error: BaseException) -> None:
        """Keeps one input of each kind of crash, the shortest."""
        frames = traceback.extract_tb(error.__traceback__)
        kind = f"{type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno}"
        if kind not in self.crashes or len(data) < len(self.crashes[kind][0]):
            self.crashes[kind] = data, "".join(traceback.format_exception(error))


def _too_slow(_number: int, _frame: FrameType | None) -> None:
    raise TooSlow(f"more than {LIMIT_SECONDS} s")


@contextmanager
def watched() -> Iterator[None]:
    """CPU time of one input is limited in here."""
    before = signal.signal(signal.SIGVTALRM, _too_slow)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def peak(*, reset: bool = False) -> int:
    """The most memory that this process had since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) << 10


async def run_one(target: Target, data: bytes) -> None:
    """One input with all its limits; raises what is wrong with it. To be called on a loop, see `on_loop`."""
    with watched():
        before = peak(reset=True)
        signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_SECONDS)
        outcome = target.run(data)
        if isinstance(outcome, Coroutine):
            await outcome
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        assert peak() - before <= LIMIT_BYTES, f"{peak() - before} bytes for one input"


async def fuzz(target: Target, seed: int, *, seconds: float = 0, executions: int = 0) -> Found:
    """Runs inputs for so long, or so many."""
    mutator = Mutator([*target.seeds, *([data] for data in stored(target.name))], target.words, seed)
    found = Found(target.name)
    seen: set[object] = set()
    begun = time.perf_counter()
    with watched():
        while (not seconds or time.perf_counter() - begun < seconds) and (not executions or found.executions < executions):
            before = peak(reset=True)
            batch = [mutator.next() for _ in range(BATCH)]
            await _batch(target, mutator, batch, found, seen)
            if peak() - before > LIMIT_BYTES:
                await _find_the_large_one(target, batch, found)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
    found.seconds = time.perf_counter() - begun
    found.kinds = len(seen)
    return found


async def _batch(target: Target, mutator: Mutator, batch: list[Pieces], found: Found, seen: set[object]) -> None:
    clock, run, join, timer = time.thread_time, target.run, target.join, signal.setitimer
    armed = last = clock()
    timer(signal.ITIMER_VIRTUAL, LIMIT_SECONDS)
    for pieces in batch:
        data = join(pieces)
        try:
            outcome = run(data)
            if isinstance(outcome, Coroutine):
                outcome = await outcome
        except (Exception, TooSlow) as error:
            found.note(data, error)
        else:
            if outcome not in seen and len(seen) < MAX_KINDS:
                seen.add(outcome)
                mutator.keep(pieces)
        now = clock()
        if now - armed > LIMIT_SECONDS / 10:  # seldom, so that it costs nothing
            timer(signal.ITIMER_VIRTUAL, LIMIT_SECONDS)
            armed = now
        if now - last > found.slowest:
            found.slowest = now - last
        last = now
    timer(signal.ITIMER_VIRTUAL, 0)
    found.executions += len(batch)


async def _find_the_large_one(target: Target, batch: list[Pieces], found: Found) -> None:
    for pieces in batch:
        try:
            await run_one(target, target.join(pieces))
        except (Exception, TooSlow) as error:
            found.note(target.join(pieces), error)


# --- the corpus ------------------------------------------------------------------------------------------------------------


def stored(name: str) -> list[bytes]:
    """The inputs that were kept: regressions, which tests replay."""
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*")) if path.is_file()]


def store(name: str, data: bytes) -> Path:
    """Keeps an input that has found something."""
    directory = CORPUS / name
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"crash-{hashlib.sha1(data, usedforsecurity=False).hexdigest()[:12]}"
    path.write_bytes(data)
    return path


def on_loop(make: Callable[[], Target], seed: int, *, seconds: float = 0, executions: int = 0) -> Found:
    """A run on a new loop."""

    async def run() -> Found:
        return await fuzz(make(), seed, seconds=seconds, executions=executions)

    return uvloop.run(run())

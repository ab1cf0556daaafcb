"""How the path for a request is chosen: round-robin, queue-length, service-time, historical-service-time.

    round-robin 0 2 1 8:0 1 8:16 1
    queue-length 0 2 1 8:0 128 8:16 128
    service-time 0 2 2 8:0 128 1 8:16 128 4
    historical-service-time 2 972 0 2 1 8:0 1 8:16 1

The first word of a path is its repeat count, as the kernel's documents queue-length.txt and service-time.txt describe it.
Linux has given repeat counts up: there, and here with `queue_mode bio`, one above 1 is taken as 1. The last selector is that
of Linux's dm-ps-historical-service-time.c: it measures how long requests take.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from types import MappingProxyType
from typing import ClassVar, Final

from nbdmap.dm.args import Args, parse_number
from nbdmap.errors import InvalidArgument
from nbdmap.targets.multipath.paths import Path

MAX_COUNT: Final = (1 << 32) - 1
MAX_THROUGHPUT: Final = 100

_log: Final = logging.getLogger(__name__)
_IN_FLIGHT: Final = attrgetter("in_flight")


class Selector:
    """The base. `words` are the arguments of its own; with `one_each` repeat counts above 1 are taken as 1."""

    name: ClassVar[str]
    table_words: ClassVar[int] = 1
    """Words of each path in a table line."""
    info_words: ClassVar[int] = 0
    """Words of each path in a status line."""
    most_words: ClassVar[int] = 1
    """Words of each path that are understood."""
    timed: ClassVar[bool] = False
    """Whether `ended` wants to be called."""

    def __init__(self, words: Sequence[str], one_each: bool) -> None:
        self._one_each = one_each

    def add(self, path: Path, args: Args) -> None:
        """Reads the words of one path."""
        if len(args) > self.most_words:
            raise InvalidArgument(f"{self.name}: {len(args)} words for {path.reference}, at most {self.most_words} are known")
        if args:
            path.repeat = args.number(f"repeat count of {path.reference}", 0, MAX_COUNT)
        if path.repeat > 1 and self._one_each:
            _log.warning("%s: a repeat count above 1 is taken as 1 with queue_mode bio", self.name)
            path.repeat = 1

    def choose(self, usable: Sequence[Path], size: int) -> Path:
        """The best of two or more paths for a request of `size` bytes; of equals the first."""
        raise NotImplementedError

    def ended(self, path: Path, began_ns: int) -> None:
        """A request on `path` that was sent at `began_ns` has ended."""

    def table(self, path: Path) -> str:
        """The words of one path in a table line."""
        return f"{path.repeat}"

    def info(self, path: Path) -> str:
        """The words of one path in a status line."""
        return ""

    def own_words(self) -> str:
        """Its own words, with their number in front."""
        return "0"


class RoundRobin(Selector):
    """Each in turn."""

    name = "round-robin"

    def choose(self, usable: Sequence[Path], size: int) -> Path:
        """The one that was not used for longest."""
        return usable[0]


class QueueLength(Selector):
    """The path with the fewest requests in flight."""

    name = "queue-length"
    info_words = 1

    def choose(self, usable: Sequence[Path], size: int) -> Path:
        """The shortest queue."""
        return min(usable, key=_IN_FLIGHT)

    def info(self, path: Path) -> str:
        """`<requests in flight>`"""
        return f"{path.in_flight}"


class ServiceTime(Selector):
    """The path that would be done first: (bytes in flight + bytes of this request) / relative throughput."""

    name = "service-time"
    table_words = most_words = info_words = 2

    def add(self, path: Path, args: Args) -> None:
        """`[<repeat count> [<relative throughput>]]`"""
        super().add(path, args)
        if args:
            path.throughput = args.number(f"relative throughput of {path.reference}", 0, MAX_THROUGHPUT)

    def choose(self, usable: Sequence[Path], size: int) -> Path:
        """The shortest service time."""
        best = usable[0]
        for path in usable[1:]:
            if _sooner(path, best, size):
                best = path
        return best

    def table(self, path: Path) -> str:
        """`<repeat count> <relative throughput>`"""
        return f"{path.repeat} {path.throughput}"

    def info(self, path: Path) -> str:
        """`<bytes in flight> <relative throughput>`"""
        return f"{path.in_flight_bytes} {path.throughput}"


def _sooner(one: Path, other: Path, size: int) -> bool:
    """Whether `one` is estimated to serve `size` bytes sooner, with the shortcuts of service-time.txt, by their numbers."""
    if one.throughput == other.throughput:  # 1
        return one.in_flight_bytes < other.in_flight_bytes
    if one.in_flight_bytes == other.in_flight_bytes or not one.throughput or not other.throughput:  # 2 and 3
        return one.throughput > other.throughput
    time_of_one = (one.in_flight_bytes + size) * other.throughput
    time_of_other = (other.in_flight_bytes + size) * one.throughput
    return time_of_one < time_of_other or (time_of_one == time_of_other and one.throughput > other.throughput)


FIXED_BITS: Final = 10
"""Averages and weights have so many binary places."""
ONE: Final = 1 << FIXED_BITS
DEFAULT_WEIGHT: Final = 972
WEIGHTS: Final = 64
BUCKET_BITS: Final = 24
"""A weight stands for service times of 2^24 ns (17 ms) more than the one before."""


class HistoricalServiceTime(Selector):
    """The shortest average service time, times the requests in flight.

    The average is exponential: the longer a request took, the less the past counts. A path from which nothing was heard for
    as long as all paths take is stale: idle, it is tried; busy, it gets no more requests than the others.
    """

    name = "historical-service-time"
    info_words = 3
    timed = True

    def __init__(self, words: Sequence[str], one_each: bool, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        super().__init__(words, one_each)
        if len(words) > 2:
            raise InvalidArgument(f"{self.name}: {len(words)} arguments, at most <base weight> <threshold> are understood")
        self._base = parse_number(words[0], "base weight", 0, ONE - 1) if words else DEFAULT_WEIGHT
        self._threshold = parse_number(words[1], "threshold", 0, MAX_COUNT) if len(words) > 1 else 0
        self._weights = [_power(self._base, number + 1) for number in range(WEIGHTS - 1)] + [0]
        self._clock_ns = clock_ns

    def choose(self, usable: Sequence[Path], size: int) -> Path:
        """The shortest estimate."""
        now_ns = self._clock_ns()
        best = usable[0]
        for path in usable[1:]:
            if self._compare(path, best, now_ns) < 0:
                best = path
        return best

    def _compare(self, one: Path, other: Path, now_ns: int) -> int:
        """Less than 0 when `one` is better."""
        mine, its = one.history, other.history
        fewer = one.in_flight - other.in_flight
        low, high = sorted((mine.average, its.average))
        if high <= self._threshold * low:
            return fewer
        one_idle, other_idle = not one.in_flight, not other.in_flight
        stale, other_stale = mine.stale_after_ns < now_ns, its.stale_after_ns < now_ns
        if (one_idle and stale) or (other_idle and other_stale) or (one_idle and other_idle):
            return (mine.stale_after_ns if other_idle else 0) - (its.stale_after_ns if one_idle else 0)
        if (1 + one.in_flight) * mine.average > (1 + other.in_flight) * its.average:
            return fewer if other_stale else 1
        return fewer if stale else -1

    def ended(self, path: Path, began_ns: int) -> None:
        """Takes the request into the average; of requests side by side each begins when the one before has ended."""
        history, now_ns = path.history, self._clock_ns()
        took_ns = max(0, now_ns - max(began_ns, history.last_finish_ns))
        history.last_finish_ns = now_ns
        weight = self._weights[min(took_ns >> BUCKET_BITS, WEIGHTS - 1)]
        history.average = (history.average * weight + (took_ns << FIXED_BITS) * (ONE - weight) + ONE // 2) >> FIXED_BITS
        history.stale_after_ns = now_ns + len(path.group.usable) * (history.average >> FIXED_BITS)

    def table(self, path: Path) -> str:
        """Linux prints 0 here, whatever was given."""
        return "0"

    def info(self, path: Path) -> str:
        """`<average service time, in 1/1024 ns> <requests in flight> <stale after, in ns>`"""
        return f"{path.history.average} {path.in_flight} {path.history.stale_after_ns}"

    def own_words(self) -> str:
        """`2 <base weight> <threshold>`"""
        return f"2 {self._weights[0]} {self._threshold}"


def _power(base: int, exponent: int) -> int:
    """`base` to a positive power, both with FIXED_BITS places, each product rounded, by repeated squaring."""
    result = ONE
    while exponent:
        if exponent & 1:
            result = (result * base + ONE // 2) >> FIXED_BITS
        base = (base * base + ONE // 2) >> FIXED_BITS
        exponent >>= 1
    return result


SELECTORS: Final[Mapping[str, type[Selector]]] = MappingProxyType(
    {selector.name: selector for selector in (RoundRobin, QueueLength, ServiceTime, HistoricalServiceTime)}
)

"""nbdmap.targets.multipath.selectors: whom each chooses, and how the load is shared out."""

import heapq
import itertools
from collections import Counter
from collections.abc import Sequence

import pytest

from nbdmap.dm.args import Args
from nbdmap.errors import InvalidArgument
from nbdmap.targets.multipath.paths import Group, Path
from nbdmap.targets.multipath.selectors import (
    ONE,
    SELECTORS,
    HistoricalServiceTime,
    QueueLength,
    RoundRobin,
    Selector,
    ServiceTime,
    _sooner,
)
from tests.support.disks import FakeDisk


def group_of(selector: Selector, *words: str) -> Group:
    group = Group(1, selector)
    for number, each in enumerate(words):
        path = Path(FakeDisk(f"8:{16 * number}"), f"path{number}", group)
        selector.add(path, Args(each.split()))
        group.add(path)
    return group


def numbers(group: Group, paths: Sequence[Path]) -> list[int]:
    return [group.paths.index(path) for path in paths]


def test_round_robin_takes_turns() -> None:
    group = group_of(RoundRobin([], True), "", "", "")
    assert numbers(group, [group.choose(512) for _ in range(7)]) == [0, 1, 2, 0, 1, 2, 0]


def test_queue_length_takes_the_shortest_and_turns_among_equals() -> None:
    group = group_of(QueueLength([], True), "", "", "")
    first, second, third = group.paths
    first.in_flight, second.in_flight, third.in_flight = 2, 1, 1
    assert numbers(group, [group.choose(512) for _ in range(4)]) == [1, 2, 1, 2]
    first.in_flight = 0
    assert group.choose(512) is first


@pytest.mark.parametrize(
    ("one", "other", "size", "sooner"),
    [
        ((100, 3), (101, 3), 10, True),  # 1: equal throughput, compare what is in flight
        ((101, 3), (100, 3), 10, False),
        ((0, 0), (4096, 0), 10, True),
        ((500, 4), (500, 1), 10, True),  # 2: equally much in flight, compare throughput
        ((500, 1), (500, 4), 10, False),
        ((10**9, 1), (0, 0), 10, True),  # 3: no throughput is not chosen while others have some
        ((0, 0), (10**9, 1), 10, False),
        ((300, 4), (0, 1), 100, False),  # (300 + 100) / 4 = (0 + 100) / 1: then throughput decides
        ((0, 1), (300, 4), 100, False),
        ((299, 4), (0, 1), 100, True),
        ((301, 4), (0, 1), 100, False),
    ],
)
def test_service_time_compares_as_the_document_says(
    one: tuple[int, int], other: tuple[int, int], size: int, sooner: bool
) -> None:
    group = group_of(ServiceTime([], True), f"1 {one[1]}", f"1 {other[1]}")
    group.paths[0].in_flight_bytes, group.paths[1].in_flight_bytes = one[0], other[0]
    equal = (300, 4) in (one, other) and size == 100
    assert _sooner(group.paths[0], group.paths[1], size) is (sooner or (equal and one[1] == 4))


class Simulation:
    """Clients that keep `depth` requests in flight over paths that serve one at a time, each so many bytes a second."""

    def __init__(self, group: Group, speeds: Sequence[float], clock: list[int] | None = None) -> None:
        self._group = group
        self._speeds = speeds
        self._now = clock if clock is not None else [0]
        self._free_at = [0.0] * len(speeds)
        self.served: Counter[int] = Counter()

    def run(self, requests: int, depth: int, size: int) -> float:
        """The seconds that it takes."""
        under_way: list[tuple[float, int, Path, int]] = []
        now = 0.0
        for sequence in itertools.count():
            while under_way and (len(under_way) == depth or sequence >= requests):
                now, _, path, began_ns = heapq.heappop(under_way)
                self._now[0] = int(now * 1e9)
                path.in_flight -= 1
                path.in_flight_bytes -= size
                path.group.selector.ended(path, began_ns)
            if sequence >= requests:
                return now
            path = self._group.choose(size)
            number = self._group.paths.index(path)
            self.served[number] += 1
            path.in_flight += 1
            path.in_flight_bytes += size
            self._free_at[number] = max(now, self._free_at[number]) + size / self._speeds[number]
            heapq.heappush(under_way, (self._free_at[number], sequence, path, int(now * 1e9)))
        raise AssertionError


def test_service_time_shares_out_1_to_4() -> None:
    """The document's example: 1 GB/s and 4 GB/s, throughputs 1 and 4 (or 2 and 8)."""
    for words in (("128 1", "128 4"), ("128 2", "128 8")):
        simulation = Simulation(group_of(ServiceTime([], True), *words), [1e9, 4e9])
        seconds = simulation.run(10000, 40, 4096)
        assert simulation.served[1] / simulation.served[0] == pytest.approx(4, rel=0.02)
        assert seconds == pytest.approx(10000 * 4096 / 5e9, rel=0.02)  # both are busy all the time


def test_one_slow_path_holds_round_robin_up_and_not_the_others() -> None:
    speeds = [1e8, 1e7]
    seconds = {}
    for name in ("round-robin", "queue-length", "service-time", "historical-service-time"):
        clock = [1]
        selector = SELECTORS[name]([], True)
        if isinstance(selector, HistoricalServiceTime):
            selector._clock_ns = lambda clock=clock: clock[0]  # type: ignore[misc]
        seconds[name] = Simulation(group_of(selector, "", ""), speeds, clock).run(5000, 16, 4096)
    best = 5000 * 4096 / sum(speeds)
    assert seconds["round-robin"] == pytest.approx(2500 * 4096 / 1e7, rel=0.01)  # as long as the slow one takes for its half
    for name in ("queue-length", "service-time", "historical-service-time"):
        assert seconds[name] < 1.3 * best, (name, seconds[name] / best)


def test_historical_service_time_averages_and_grows_stale() -> None:
    clock = [1_000]
    selector = HistoricalServiceTime(["512"], True, lambda: clock[0])
    assert selector.own_words() == "2 512 0"
    group = group_of(selector, "", "1")
    fast, slow = group.paths
    assert selector.info(fast) == f"{ONE} 0 0"
    clock[0] = 5_000
    selector.ended(slow, 1_000)
    assert slow.history.average == (ONE * 512 + 4_000 * ONE * 512 + 512) >> 10  # half the past, half 4 us
    assert slow.history.stale_after_ns == 5_000 + 2 * (slow.history.average >> 10)
    selector.ended(fast, 4_999)
    clock[0] = 5_001
    slow.in_flight = fast.in_flight = 1
    assert group.choose(512) is fast
    fast.in_flight = 10_000
    assert group.choose(512) is slow
    slow.in_flight = 0  # idle and stale: it is tried, to see whether it has become better
    fast.in_flight = 1
    clock[0] = slow.history.stale_after_ns + 1
    assert group.choose(512) is slow


def test_historical_service_time_counts_requests_side_by_side_one_after_another() -> None:
    clock = [10_000]
    selector = HistoricalServiceTime(["0"], True, lambda: clock[0])
    (path,) = group_of(selector, "").paths
    selector.ended(path, 0)
    assert path.history.average >> 10 == 10_000
    clock[0] = 12_000
    selector.ended(path, 0)  # was sent at 0 as well: it took the 2 us since the one before
    assert path.history.average >> 10 == 2_000


def test_a_threshold_makes_paths_equal() -> None:
    selector = HistoricalServiceTime(["972", "4"], True, lambda: 0)
    group = group_of(selector, "", "")
    slow, fast = group.paths
    slow.history.average, fast.history.average = 4000, 1000
    slow.in_flight, fast.in_flight = 2, 3
    assert group.choose(512) is slow
    slow.history.average = 4001
    slow.in_flight, fast.in_flight = 3, 2
    assert group.choose(512) is fast


@pytest.mark.parametrize(
    ("name", "own", "words", "reason"),
    [
        ("round-robin", [], "1 2", "2 words for path0, at most 1"),
        ("queue-length", [], "x", "repeat count of path0: 'x'"),
        ("service-time", [], "1 1 1", "3 words for path0, at most 2"),
        ("service-time", [], "1 101", "relative throughput of path0: 101 is not in the range 0 to 100"),
        ("historical-service-time", ["1", "2", "3"], "", "3 arguments, at most"),
        ("historical-service-time", ["1024"], "", "base weight: 1024 is not in the range 0 to 1023"),
        ("historical-service-time", ["1", "x"], "", "threshold: 'x'"),
    ],
)
def test_what_is_refused(name: str, own: list[str], words: str, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason):
        group_of(SELECTORS[name](own, True), words)

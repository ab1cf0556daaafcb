"""Is the history of one register linearizable? Fast, as every write writes another value (Gibbons and Korach, 1997).

A sector is a register: its reads and writes take effect at once, at some moment between the request and the reply. With unique
values it is known which write a read has seen. All requests about one value form a *cluster*; let f be the earliest end and
s the latest beginning in it. If f < s the register held the value all the time from f to s (a *forward zone*); else the
cluster fits into one moment between s and f (a *backward zone*). The history is linearizable exactly when

- no read has seen a value that nobody wrote, or ended before its write began;
- no two forward zones overlap;
- no backward zone lies inside a forward zone.

A request without a reply may take effect at any time after it was sent, or never.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple


class Act(NamedTuple):
    """A read or a write of `value` between the moments `sent` and `answered`; None: there was no (good) reply."""

    writes: bool
    value: int
    sent: int
    answered: int | None


class _Zone(NamedTuple):
    begin: float
    end: float
    value: int


def fault(acts: Iterable[Act], initial: int) -> str:
    """Why the history is not linearizable; "" if it is. The register holds `initial` before moment 0."""
    writes = {initial: Act(True, initial, -2, -1)}
    reads: dict[int, list[Act]] = {}
    for act in acts:
        if not act.writes:
            if act.answered is not None:
                reads.setdefault(act.value, []).append(act)
        elif act.value in writes:
            return f"{act.value} was written twice: the history cannot be checked"
        else:
            writes[act.value] = act
    forward: list[_Zone] = []
    backward: list[_Zone] = []
    for value, seen in reads.items():
        write = writes.get(value)
        if write is None:
            return f"a read gave {value}, which nobody wrote"
        early = min(seen, key=_end)
        if _end(early) < write.sent:
            return f"a read gave {value} at {early.answered}, before it was written at {write.sent}"
    for value, write in writes.items():
        cluster = [write, *reads.get(value, ())]
        first, last = min(map(_end, cluster)), max(act.sent for act in cluster)
        if first < last:
            forward.append(_Zone(first, last, value))
        elif first < math.inf:
            backward.append(_Zone(last, first, value))
    return _zones_clash(sorted(forward), backward)


def _end(act: Act) -> float:
    return math.inf if act.answered is None else act.answered


def _zones_clash(forward: list[_Zone], backward: list[_Zone]) -> str:
    for one, two in pairwise(forward):
        if two.begin < one.end:
            return f"{one.value} was there from {one.begin} to {one.end}, and {two.value} from {two.begin} to {two.end}"
    begins = [zone.begin for zone in forward]
    for zone in backward:
        index = bisect_right(begins, zone.begin) - 1
        if index >= 0 and zone.end < forward[index].end:
            around = forward[index]
            return (
                f"{zone.value} was there at some moment from {zone.begin} to {zone.end}, "
                f"but {around.value} all the time from {around.begin} to {around.end}"
            )
    return ""

"""Runs rows: the servers of a row are started, idle but for the one whose turn it is, and measured A B C D, A B C D, ..."""

import contextlib
import sys
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Self

from bench.processes import Failed
from bench.rows import Row
from bench.sample import Sample
from bench.servers import Server, Unable, serving
from bench.site import Site


@dataclass
class Outcome:
    """What one server did in one row: every round's value, medians, and the median of each detail."""

    values: list[float]
    value: float
    cpu_us: float | None
    """The server's CPU time for one request (or whatever the row counts)."""
    extra: dict[str, float]


@dataclass
class Result:
    """One row's outcomes by server. `notes` says why a server has none."""

    name: str
    transport: str
    text: str
    unit: str
    per: str
    speed: bool
    subject: str
    baseline: str | None
    at_least: float | None
    at_most: float | None
    servers: list[str]
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    failed: bool = False
    """A server did not do what was asked, other than by being unable."""

    def ratio(self, server: str) -> float | None:
        """The subject's median by that of `server`."""
        ours, theirs = self.outcomes.get(self.subject), self.outcomes.get(server)
        if ours is None or theirs is None or not theirs.value or not self.speed:
            return None
        return ours.value / theirs.value

    @property
    def baseline_ratio(self) -> float | None:
        """The subject's median by the baseline's, or by the best one's of all others."""
        names = [self.baseline] if self.baseline else [name for name in self.servers if name != self.subject]
        return min((ratio for name in names if (ratio := self.ratio(name)) is not None), default=None)

    @property
    def reached(self) -> bool | None:
        """Whether what issue 3 asks for is reached; None where nothing is asked for, or was measured."""
        ours, ratio = self.outcomes.get(self.subject), self.baseline_ratio
        if self.at_most is not None and ours is not None:
            return ours.value <= self.at_most
        if self.at_least is not None and ratio is not None:
            return ratio >= self.at_least
        return None

    def to_json(self) -> dict[str, Any]:
        """As plain data, with what follows from it."""
        return asdict(self) | {"ratios": {name: self.ratio(name) for name in self.servers}, "reached": self.reached}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The reverse."""
        kept = {key: value for key, value in data.items() if key not in ("ratios", "reached", "outcomes")}
        return cls(**kept, outcomes={name: Outcome(**one) for name, one in data["outcomes"].items()})


def measure(site: Site, row: Row, rounds: int, seconds: float) -> Result:
    """Runs one row."""
    names = [one.name for one in row.contestants]
    result = Result(
        row.name, row.transport.value, row.text, row.unit, row.per, row.speed, row.subject, row.baseline, row.at_least,
        row.at_most, names,
    )  # fmt: skip
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        servers: list[Server] = []
        for contestant in row.contestants:
            try:
                servers.append(stack.enter_context(serving(site, contestant, row.transport, row.backing)))
                if row.prepare is not None:
                    row.prepare(servers[-1], seconds)
            except Unable as error:
                result.notes[contestant.name] = str(error)
            except Failed as error:
                _fail(result, contestant.name, error)
        for _ in range(row.rounds or rounds):
            for server in servers:
                if server.name in result.notes:
                    continue
                try:
                    if row.dirties:
                        site.settle(row.backing)
                    site.warm(row.backing)
                    samples[server.name].append(row.run(server, seconds))
                except Unable as error:
                    result.notes[server.name] = str(error)
                except Failed as error:
                    _fail(result, server.name, error)
    for name, found in samples.items():
        if found and name not in result.notes:
            result.outcomes[name] = _outcome(found)
    return result


def _fail(result: Result, server: str, error: Failed) -> None:
    """A server that failed once is left out of the row."""
    result.failed = True
    result.notes[server] = f"failed: {error}"
    print(f"{result.name}: {server} failed: {error}", file=sys.stderr)


def _outcome(samples: list[Sample]) -> Outcome:
    values = [sample.value for sample in samples]
    costs = [sample.cpu_seconds / sample.count * 1e6 for sample in samples if sample.count]
    extra = {key: median(sample.extra[key] for sample in samples) for key in samples[0].extra}
    return Outcome(values, median(values), median(costs) if costs else None, extra)

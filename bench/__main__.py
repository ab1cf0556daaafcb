"""`python -m bench`: measures nbdmap beside the established NBD servers and prints the tables.

    python -m bench --rows 'unix/read-*,unix/mixed' --rounds 3 --seconds 2 --json /tmp/r.json

A whole run is kept in bench/results.json and bench/results.svg; a partial or quick one only where --json says. Exit status
1 when a server failed at what it should be able to do. An interrupted run prints what it has, and keeps nothing.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from bench import machine, report
from bench.measure import Result, measure
from bench.processes import adopt_orphans, ended_by_signals, raise_descriptor_limit
from bench.rows import Row, all_rows
from bench.site import site
from nbdmap.units import GIB, MIB

RESULTS: Final = Path(__file__).resolve().parent / "results.json"
ROUNDS: Final = 3
SECONDS: Final = 2.0
QUICK_SECONDS: Final = 0.3
NOISY: Final = 0.3
"""A load average, for each core, above which figures are worth little."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="nbdmap beside nbdkit, qemu-nbd and nbd-server")
    parser.add_argument("--rows", default="", metavar="NAME,...", help="only these; shell patterns; `all` is every one")
    parser.add_argument("--list", action="store_true", help="name the rows, those that are not usual in brackets")
    parser.add_argument("--rounds", type=int, help=f"how often each is measured ({ROUNDS})")
    parser.add_argument("--seconds", type=float, help=f"how long each time ({SECONDS:g})")
    parser.add_argument("--quick", action="store_true", help="one short round on small files: shows that it works")
    parser.add_argument("--json", type=Path, metavar="PATH", help="keep the results here, and the picture beside it as .svg")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where the files that are served are made (/tmp)")
    parser.add_argument("--show", type=Path, metavar="PATH", help="print the tables of a run that was kept, and draw it again")
    return parser


def choose(patterns: str) -> list[Row]:
    """The rows that are asked for, in the order of the report. SystemExit for a name that is none."""
    rows = all_rows()
    if not patterns:
        return [row for row in rows if row.usual]
    wanted = ["*" if pattern == "all" else pattern for pattern in patterns.split(",")]
    for pattern in wanted:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            raise SystemExit(f"python -m bench: no row is called {pattern!r}; --list names them")
    return [row for row in rows if any(fnmatchcase(row.name, pattern) for pattern in wanted)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    chosen = _parser().parse_args(arguments)
    if chosen.list:
        print("\n".join(row.name if row.usual else f"({row.name})" for row in all_rows()))
        return 0
    if chosen.show:
        kept = report.load(chosen.show)
        print(report.full(*kept), end="")
        report.save(chosen.show, *kept)
        return 0
    rows = choose(chosen.rows)
    rounds = chosen.rounds or (1 if chosen.quick else ROUNDS)
    seconds = chosen.seconds or (QUICK_SECONDS if chosen.quick else SECONDS)
    facts = machine.facts()
    options: dict[str, Any] = {"rounds": rounds, "seconds": seconds, "quick": chosen.quick}
    if facts["load_before"][0] > NOISY * facts["cores"]:
        print(f"the machine is not quiet: load {facts['load_before'][0]:.2f}", file=sys.stderr)
    adopt_orphans()
    raise_descriptor_limit()
    results: list[Result] = []
    sizes = {"size": 64 * MIB, "sparse_size": 256 * MIB} if chosen.quick else {"size": 256 * MIB, "sparse_size": 4 * GIB}
    try:
        with ended_by_signals(), site(chosen.directory, **sizes) as where:
            for number, row in enumerate(rows, 1):
                results.append(measure(where, row, rounds, seconds))
                print(f"[{number}/{len(rows)}] {report.short(results[-1])}", file=sys.stderr)
    except BaseException:  # an interruption, or what a row needs and cannot be made
        print(report.full(facts, options, results), end="")
        raise
    facts["load_after"] = list(os.getloadavg())
    print(report.full(facts, options, results), end="")
    path = chosen.json or (None if chosen.quick or chosen.rows else RESULTS)
    if path is not None:
        report.save(path, facts, options, results)
    return 1 if any(result.failed for result in results) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

"""The crash harness from the command line.

    python -m tests.crash.main run --states 1000000 --jobs 2        explore until so many states are done
    python -m tests.crash.main plants                               how soon each planted bug is caught
    python -m tests.crash.main replay striped 17 '53/3,7:5'         the one state that a violation names
    python -m tests.crash.main log linear 17 /tmp/linear            the write log of each disk in dm-log-writes' format
"""

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Final

from tests.crash.clock import run
from tests.crash.cut import LONG
from tests.crash.explore import Explorer, Where, record
from tests.crash.logwrites import dump
from tests.crash.oracle import Violation
from tests.crash.plants import PLANTS, plant
from tests.crash.scenario import Scenario
from tests.crash.stacks import SCENARIOS

PLANT_SEEDS: Final = 40
"""A planted bug that so many runs do not show is not caught."""
_MANY_SEEDS: Final = 1 << 30


def scenario(name: str, bug: str = "") -> Scenario:
    """A scenario, perhaps with a planted bug."""
    return plant(bug) if bug else SCENARIOS[name]()


def hunt(name: str, seeds: int = PLANT_SEEDS) -> tuple[Explorer, str]:
    """Looks for a planted bug: the explorer, and the violation that it met, "" if none."""
    explorer = Explorer(plant(name), nest=400, bug=name)
    try:
        for seed in range(seeds):
            explorer.explore(seed)
    except Violation as error:
        return explorer, str(error)
    return explorer, ""


def explore_seeds(name: str, first: int, states: int) -> tuple[int, dict[str, int]]:
    """Explores from seed `first` on until `states` are done: the next seed, and the tally. Raises Violation."""
    logging.disable(logging.CRITICAL)
    explorer = Explorer(scenario(name), LONG, cuts=60, nest=2000, nested_cuts=5)
    seed = first
    while explorer.tally.states < states:
        explorer.explore(seed)
        seed += 1
    return seed, asdict(explorer.tally)


def _run(options: argparse.Namespace) -> int:
    names = options.scenario or list(SCENARIOS)
    begun = time.monotonic()
    share = -(-options.states // len(names) // options.jobs)
    total: Counter[str] = Counter()
    with ProcessPoolExecutor(options.jobs) as pool:
        work = [
            (name, part, pool.submit(explore_seeds, name, options.seed + part * (_MANY_SEEDS // options.jobs), share))
            for name in names
            for part in range(options.jobs)
        ]
        for name, part, future in work:
            try:
                last, tally = future.result()
            except Violation as error:
                print(f"{name}: VIOLATION\n  {error}")
                total["violations"] += 1
                continue
            total.update(tally)
            print(f"{name} {part}: {tally['runs']} runs (last seed {last - 1}), {tally['cuts']} cuts, {tally['states']} states, "
                  f"{tally['nested']} of them of crashed recoveries")  # fmt: skip
    seconds = time.monotonic() - begun
    states = total["states"]
    print(f"{states} states, {total['violations']} violations, {seconds:.0f} s, {states / seconds:.0f} a second")
    return 1 if total["violations"] else 0


def _plants(options: argparse.Namespace) -> int:
    missed = 0
    for name in PLANTS:
        explorer, found = hunt(name)
        missed += not found
        first = found.split("\n")[0] if found else "NOT CAUGHT"
        print(f"{name:30} {PLANTS[name].scenario:14} {explorer.tally.states:6} states: {first}")
    print(f"caught/planted: {len(PLANTS) - missed}/{len(PLANTS)}")
    return 1 if missed else 0


def _replay(options: argparse.Namespace) -> int:
    try:
        Explorer(scenario(options.name, options.bug), bug=options.bug).replay(options.seed, options.path)
    except Violation as error:
        print(error)
        return 1
    print("no violation")
    return 0


def _log(options: argparse.Namespace) -> int:
    one = scenario(options.name)
    where = Where(one.name, options.seed, "", Explorer(one))
    recording = run(record(one, one.first_images(where.rng()), where.rng("record"), fresh=True))
    for disk, image in enumerate(recording.images):
        Path(f"{options.prefix}-{disk}.before").write_bytes(image)
        Path(f"{options.prefix}-{disk}.log").write_bytes(dump(recording.log, disk))
        print(f"replay-log --log {options.prefix}-{disk}.log --replay {options.prefix}-{disk}.before")
    return 0


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 1 for a violation, or a planted bug that was not caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash.main")
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("run")
    verb.add_argument("--states", type=int, default=1_000_000)
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--jobs", type=int, default=2)
    verb.add_argument("--scenario", action="append", choices=list(SCENARIOS))
    verb.set_defaults(do=_run)
    verb = verbs.add_parser("plants")
    verb.set_defaults(do=_plants)
    verb = verbs.add_parser("replay")
    verb.add_argument("name", choices=list(SCENARIOS))
    verb.add_argument("seed", type=int)
    verb.add_argument("path", nargs="?", default="")
    verb.add_argument("--bug", default="", choices=["", *PLANTS])
    verb.set_defaults(do=_replay)
    verb = verbs.add_parser("log")
    verb.add_argument("name", choices=list(SCENARIOS))
    verb.add_argument("seed", type=int)
    verb.add_argument("prefix")
    verb.set_defaults(do=_log)
    options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    return int(options.do(options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m tests.fuzz SECONDS [--seed N] [--target NAME]`: fuzzes all targets for so long, on two cores.

Each target has the same share of the time, on one core, in slices that each begin anew with a seed of their own. What
crashes goes to tests/fuzz/corpus, where tests replay it, and makes the exit status 1.
"""

import argparse
import multiprocessing
import sys
import time
from typing import Final

from tests.fuzz.engine import Found, store
from tests.fuzz.targets import TARGETS, work

CORES: Final = 2


def main() -> int:
    """The exit status: 1 when something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__, allow_abbrev=False)
    parser.add_argument("seconds", type=float, nargs="?", default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    parser.add_argument("--target", action="append", choices=TARGETS, default=[])
    words = parser.parse_args()
    names = words.target or list(TARGETS)
    print(f"seed {words.seed}, {words.seconds:g} s, {CORES} cores", flush=True)
    shares = [names[core::CORES] or names for core in range(CORES)]
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        jobs = [pool.apply_async(work, (share, words.seed + core, words.seconds)) for core, share in enumerate(shares)]
        found = [one for job in jobs for one in job.get()]
    return report(found)


def report(found: list[Found]) -> int:
    total, crashes = 0, 0
    for name in dict.fromkeys(one.name for one in found):
        runs = [one for one in found if one.name == name]
        count, seconds = sum(one.executions for one in runs), sum(one.seconds for one in runs)
        total += count
        slowest, kinds = max(one.slowest for one in runs), max(one.kinds for one in runs)
        print(f"{name:10} {count:10,} executions, {count / seconds:7,.0f}/s, {kinds:5} outcomes, slowest {slowest * 1000:.1f} ms")
        for kind, (data, text) in {kind: what for one in runs for kind, what in one.crashes.items()}.items():
            crashes += 1
            print(f"\n*** {name}: {kind}\ninput kept in {store(name, data)}\n{text}")
    print(f"{'together':10} {total:10,} executions, {crashes} crashes")
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())

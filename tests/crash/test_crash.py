"""Power cuts on linear and striped: no promise is ever broken; and every planted bug is found."""

from collections.abc import Callable
from dataclasses import asdict

import pytest

from tests.crash.explore import Explorer
from tests.crash.main import hunt
from tests.crash.oracle import Violation
from tests.crash.plants import PLANTS, plant
from tests.crash.stacks import SCENARIOS, LinearFiles, StripedFiles

SEEDS = {
    "linear": 8,
    "thin": 6,
    "thin-files": 3,
    "striped": 8,
    "stacked": 4,
    "crypt": 8,
    "linear-files": 20,
    "striped-files": 20,
    "stacked-files": 6,
    "faults": 4,
    "delayed": 4,
    "paths": 12,
    "persist": 5,
}
STATES = 500
"""How many states a run must have on average at least, so that a harness that does nothing is seen."""

LEAST = {"persist": 1_000, "thin": 10_000}
"""How many states all runs together must have, where that is not STATES each."""

pytestmark = pytest.mark.timeout(900)  # thin's states take a minute on a quick machine

Recorder = Callable[[str, object], None]


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_promise_is_broken(name: str, record_property: Recorder) -> None:
    explorer = Explorer(SCENARIOS[name](), cuts=50, nest=400)
    for seed in range(SEEDS[name]):
        explorer.explore(seed)
    for key, value in asdict(explorer.tally).items():
        record_property(key, value)
    print(f"crash {name}: {explorer.tally}, 0 violations")
    assert explorer.tally.states >= LEAST.get(name, STATES * SEEDS[name])
    assert explorer.tally.nested > 100
    assert explorer.tally.failures > 0


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_caught(name: str, record_property: Recorder) -> None:
    explorer, found = hunt(name)
    record_property("states", explorer.tally.states)
    print(f"crash: {name} caught after {explorer.tally.states} states: {found}")
    assert found, f"{name} was not caught in {explorer.tally.states} states"


def test_a_violation_is_replayed_by_the_line_it_prints() -> None:
    _, found = hunt("drop-every-second-flush")
    words = found.split("\n")[-1].split()
    name, seed, path, _, bug = words[words.index("replay") + 1 :]
    explorer = Explorer(plant(bug), bug=bug)
    with pytest.raises(Violation) as told:
        explorer.replay(int(seed), path.strip("'"))
    assert name == "striped-files"
    assert str(told.value).split("\n")[0] == found.split("\n")[0]
    explorer = Explorer(StripedFiles())
    explorer.replay(int(seed), path.strip("'"))  # without the bug there is none


def test_a_crashed_recovery_is_replayed_too() -> None:
    _, found = hunt("acknowledge-flush-early-below")
    words = found.split("\n")[-1].split()
    _, seed, path, _, bug = words[words.index("replay") + 1 :]
    with pytest.raises(Violation):
        Explorer(plant(bug), bug=bug).replay(int(seed), path.strip("'"))


def test_runs_are_the_same_for_the_same_seed() -> None:
    tallies = []
    for _ in range(2):
        explorer = Explorer(LinearFiles(), cuts=10)
        explorer.explore(7)
        tallies.append(explorer.tally)
    assert tallies[0] == tallies[1]


def test_twelve_bugs_at_least() -> None:
    assert len(PLANTS) >= 12

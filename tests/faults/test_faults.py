"""Every I/O of a client's session goes wrong in every way, over linear and striped, over disks and files."""

from collections.abc import Callable

import pytest

from tests.crash.stacks import Linear, LinearFiles, Striped, StripedFiles
from tests.faults.harness import KINDS, Run

SEEDS = (1, 2)
STACKS = {kind.name: kind for kind in (Linear, Striped, LinearFiles, StripedFiles)}


def cases() -> list[tuple[str, str]]:
    return [(stack, kind) for stack in STACKS for kind in KINDS if STACKS[stack].files or not KINDS[kind].files]


@pytest.mark.parametrize(("stack", "kind"), cases())
def test_every_site(stack: str, kind: str, record_property: Callable[[str, object], None]) -> None:
    runs = 0
    for seed in SEEDS:
        for at_once in (False, True):
            for sticky in (False, True):
                site = 0
                while True:
                    one = Run(STACKS[stack](), KINDS[kind], site, sticky, seed, at_once)
                    try:
                        hit = one.go()
                    except AssertionError as error:
                        how = "sticky" if sticky else "once"
                        when = "all at once" if at_once else "one by one"
                        raise AssertionError(f"{stack}, {kind} at site {site}, {how}, {when}, seed {seed}: {error}") from error
                    if not hit:
                        break
                    runs += 1
                    site += 1
    record_property("runs", runs)
    print(f"faults {stack} {kind}: {runs} runs")
    assert runs >= 8

"""A short run of tests.soak.paths with each selector."""

import pytest

from tests.soak.paths import SELECTORS, Result, check_events, paths


@pytest.mark.system
@pytest.mark.parametrize("selector", [SELECTORS[0], SELECTORS[3]], ids=lambda selector: selector.split()[0])
def test_servers_that_are_killed_in_turn_are_not_seen_by_the_client(selector: str) -> None:
    result = paths(9, 1, selector)
    assert result.kills >= 3
    assert result.both >= 1
    assert result.waited > 0
    assert result.ios > 1000
    assert len(result.events) >= 2 * result.kills


def test_events_that_do_not_fit_are_seen() -> None:
    good = ["1 PATH_FAILED 8:0 1", "2 PATH_REINSTATED 8:0 2"]
    check_events(Result(events=good))
    gap = ["4 PATH_FAILED 8:16 1", "5 PATH_REINSTATED 8:16 2"]
    for wrong in (good[:1], good[1:], ["1 PATH_FAILED 8:0 2", good[1]], [*good, *gap]):
        with pytest.raises(AssertionError):
            check_events(Result(events=wrong))

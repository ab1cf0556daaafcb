"""The checker against histories that are known to be good or bad, and against trying out every order."""

import random
from itertools import permutations

import pytest

from tests.linear.checker import Act, fault

A, B, C, NEVER = 1, 2, 3, None


def w(value: int, sent: int, answered: int | None) -> Act:
    return Act(True, value, sent, answered)


def r(value: int, sent: int, answered: int | None) -> Act:
    return Act(False, value, sent, answered)


GOOD = {
    "nothing": [],
    "initial": [r(0, 0, 1)],
    "one after another": [w(A, 0, 1), r(A, 2, 3), w(B, 4, 5), r(B, 6, 7)],
    "a read during a write sees the old": [w(A, 0, 3), r(0, 1, 2)],
    "a read during a write sees the new": [w(A, 0, 3), r(A, 1, 2)],
    "old, then new, within one write": [w(A, 0, 9), r(0, 1, 2), r(A, 3, 4)],
    "two writes at once, either wins": [w(A, 0, 3), w(B, 1, 2), r(A, 4, 5)],
    "two writes at once, the other wins": [w(A, 0, 3), w(B, 1, 2), r(B, 4, 5)],
    "a write without a reply is seen late": [w(A, 0, NEVER), r(0, 1, 2), w(B, 3, 4), r(A, 5, 6)],
    "a write without a reply is never seen": [w(A, 0, NEVER), r(0, 1, 2), w(B, 3, 4), r(B, 5, 6)],
    "a read without a reply says nothing": [w(A, 0, 1), r(0, 2, NEVER)],
    "two readers see one order": [w(A, 0, 9), w(B, 1, 10), r(A, 2, 3), r(B, 4, 5), r(B, 6, 7)],
}
BAD = {
    "stale read": [w(A, 0, 1), r(0, 2, 3)],
    "stale read of an overwritten value": [w(A, 0, 1), w(B, 2, 3), r(A, 4, 5)],
    "a value that nobody wrote": [w(A, 0, 1), r(7, 2, 3)],
    "a read from the future": [r(A, 0, 1), w(A, 2, 3)],
    "new, then old": [w(A, 0, 9), r(A, 1, 2), r(0, 3, 4)],
    "there and back": [w(A, 0, 1), w(B, 2, 9), r(B, 3, 4), r(A, 5, 6)],
    "lost write": [w(A, 0, 1), w(B, 2, 3), r(A, 4, 5), r(A, 6, 7)],
    "two readers, two orders": [w(A, 0, 3), w(B, 1, 2), r(A, 4, 7), r(B, 5, 6), r(A, 8, 9), r(B, 10, 11)],
    "a write without a reply comes and goes": [w(A, 0, NEVER), r(A, 1, 2), r(0, 3, 4)],
    "written twice": [w(A, 0, 1), w(A, 2, 3)],
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_history(name: str) -> None:
    assert fault(GOOD[name], 0) == ""


@pytest.mark.parametrize("name", BAD)
def test_a_bad_history(name: str) -> None:
    assert fault(BAD[name], 0) != ""


def possible(acts: list[Act], initial: int) -> bool:
    """Whether some order of the requests explains the history: the definition, tried out."""
    optional = [act for act in acts if act.answered is None]
    needed = [act for act in acts if act.answered is not None]
    for kept in range(1 << len(optional)):
        chosen = needed + [act for bit, act in enumerate(optional) if kept >> bit & 1]
        if any(_explains(order, initial) for order in permutations(chosen)):
            return True
    return False


def _explains(order: tuple[Act, ...], initial: int) -> bool:
    value = initial
    for index, act in enumerate(order):
        if any(later.answered is not None and later.answered < act.sent for later in order[index + 1 :]):
            return False
        if act.writes:
            value = act.value
        elif act.answered is not None and act.value != value:
            return False
    return True


def random_history(rng: random.Random) -> list[Act]:
    moments = list(range(12))
    rng.shuffle(moments)
    acts: list[Act] = []
    values = iter((A, B, C))
    for _ in range(rng.randint(2, 6)):
        sent, answered = sorted((moments.pop(), moments.pop()))
        writes = rng.random() < 0.5
        value = next(values, None) if writes else rng.choice((0, A, B, C))
        if value is not None:
            acts.append(Act(writes, value, sent, answered if rng.random() < 0.9 else None))
    return acts


def test_it_says_what_trying_out_every_order_says() -> None:
    rng = random.Random(4)
    verdicts = []
    for _ in range(2_500):
        acts = random_history(rng)
        verdicts.append(possible(acts, 0))
        assert (fault(acts, 0) == "") is verdicts[-1], acts
    assert 400 < sum(verdicts) < 2_100, "of both kinds"

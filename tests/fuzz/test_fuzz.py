"""A short, seeded run of each target, the replay of the corpus, and proof that the engine sees what it should."""

import logging
from collections.abc import Iterator, Sequence

import pytest

from tests.fuzz.engine import CORPUS, fuzz, run_one, stored
from tests.fuzz.mutate import Mutator, Pieces
from tests.fuzz.targets import TARGETS

SECONDS = 1.5
LARGEST_CORPUS = 1 << 18


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The server's log lines are not the matter here."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", TARGETS)
async def test_a_short_run_finds_nothing(name: str) -> None:
    found = await fuzz(TARGETS[name](), 1, seconds=SECONDS)
    assert not found.crashes, "".join(f"\n{kind}\n{data!r}\n{text}" for kind, (data, text) in found.crashes.items())
    assert found.executions >= 500
    assert found.kinds > 20


@pytest.mark.parametrize("name", TARGETS)
async def test_the_corpus_is_replayed(name: str) -> None:
    """Each seed, and each input that ever found something, with all its limits."""
    target = TARGETS[name]()
    for data in [target.join(list(pieces)) for pieces in target.seeds] + stored(name):
        await run_one(target, data)


def test_the_corpus_is_small_and_known() -> None:
    assert {path.name for path in CORPUS.iterdir() if path.is_dir()} <= set(TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < LARGEST_CORPUS


def test_the_same_seed_makes_the_same_inputs() -> None:
    target = TARGETS["yaml"]()
    one, two, other = (Mutator(target.seeds, target.words, seed) for seed in (5, 5, 6))
    made = [one.next() for _ in range(200)]
    assert made == [two.next() for _ in range(200)]
    assert made != [other.next() for _ in range(200)]


class Planted:
    """A target with a bug of each kind, behind a byte."""

    name = "planted"
    seeds: Sequence[Pieces] = [[b"a", b"1"], [b"b", b"2"], [b"c", b"3"]]
    words: Sequence[bytes] = [b"raise", b"large", b"slow"]

    def __init__(self, bug: bytes) -> None:
        self._bug = bug
        self._kept: list[bytearray] = []

    def join(self, pieces: Pieces) -> bytes:
        return b"".join(pieces)

    def run(self, data: bytes) -> object:
        if self._bug in data:
            if self._bug == b"raise":
                raise KeyError(data)
            if self._bug == b"large":
                return len(bytearray(b"x") * (70 << 20))
            while True:
                pass
        return data[:1]


@pytest.mark.parametrize(("bug", "kind"), [(b"raise", "KeyError"), (b"large", "AssertionError"), (b"slow", "TooSlow")])
async def test_planted_bugs_are_found(bug: bytes, kind: str) -> None:
    found = await fuzz(Planted(bug), 3, executions=500)
    assert [name.split()[0] for name in found.crashes] == [kind]
    (data, _), = found.crashes.values()
    assert bug in data

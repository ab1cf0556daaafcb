"""The states of a cut, by hand; and the hooks of a scenario."""

import random
from collections.abc import Mapping, Sequence

import pytest

from nbdmap.block.device import Device
from nbdmap.units import SECTOR
from tests.crash.cut import LONG, SHORT, Cut, State, masks_of
from tests.crash.explore import Explorer
from tests.crash.log import ALL, Entry, WriteLog
from tests.crash.oracle import Client, Violation, read_all
from tests.crash.scenario import Stack
from tests.crash.stacks import Linear
from tests.support.disks import write

OLD = b"-" * 4 * SECTOR


class Story:
    """A log of writes to one disk of four sectors, told in order."""

    def __init__(self) -> None:
        self.log = WriteLog()

    def begin(self, text: str, sector: int = 0, *, fua: bool = False) -> Entry:
        data = b"".join(letter.encode() * SECTOR for letter in text)
        return self.log.submit(0, "write", sector * SECTOR, len(data), data, fua=fua)

    def write(self, text: str, sector: int = 0, *, fua: bool = False) -> Entry:
        entry = self.begin(text, sector, fua=fua)
        self.log.complete(entry)
        return entry

    def flush(self, first: int = 0, count: int = 0) -> Entry:
        entry = self.log.submit(0, "flush", first * SECTOR, count * SECTOR)
        self.log.complete(entry)
        return entry

    def outcomes(self) -> set[str]:
        """What the first letters of the four sectors may be in the end, by every subset and mask."""
        cut = Cut(self.log, [OLD], self.log.now)
        found = set()
        for seed in range(40):
            for state in cut.states(random.Random(seed), LONG):
                assert State.parse(str(state)) == state
                (image,) = cut.images(self.log, state)
                found.add(image[::SECTOR].decode())
        return found


def test_what_was_not_flushed_is_there_or_not() -> None:
    story = Story()
    story.write("ab")
    assert story.outcomes() == {"----", "a---", "-b--", "ab--"}


def test_a_flush_makes_durable_what_had_ended_when_it_came() -> None:
    story = Story()
    story.write("a")
    late = story.begin("b", 1)
    flush = story.log.submit(0, "flush", 0, 0)
    assert story.outcomes() == {"----", "a---", "-b--", "ab--"}, "it has not ended"
    story.log.complete(late)
    story.log.complete(flush)
    assert story.outcomes() == {"a---", "ab--"}


def test_a_failed_flush_makes_nothing_durable_and_may_forget_for_good() -> None:
    story = Story()
    story.write("a")
    failed = story.log.submit(0, "flush", 0, 0)
    story.log.fail(failed)
    assert story.outcomes() == {"----", "a---"}
    story.log.fail(story.log.submit(0, "flush", 0, 0), forget=True)
    story.flush()
    assert story.outcomes() == {"----", "a---"}
    story.write("b", 1)
    story.flush()
    assert story.outcomes() == {"-b--", "ab--"}


def test_a_durable_write_is_not_undone_by_an_earlier_one() -> None:
    story = Story()
    story.write("ab")
    story.write("x", fua=True)
    assert story.outcomes() == {"x---", "xb--"}


def test_two_writes_to_a_sector_may_leave_either() -> None:
    story = Story()
    story.write("a")
    story.write("b")
    assert story.outcomes() == {"----", "a---", "b---"}


def test_what_is_in_flight_may_come_after_anything() -> None:
    story = Story()
    story.begin("a")
    story.write("b", fua=True)
    assert story.outcomes() == {"a---", "b---"}


def test_a_flush_of_a_range() -> None:
    story = Story()
    story.write("abc")
    story.flush(1, 1)
    assert story.outcomes() == {"-b--", "ab--", "-bc-", "abc-"}


def test_discards_leave_zeroes_or_garbage() -> None:
    story = Story()
    story.log.complete(story.log.submit(0, "discard", 0, SECTOR))
    story.flush()
    outcomes = {outcome[0] for outcome in _raw_outcomes(story)}
    assert 0 in outcomes
    assert len(outcomes) > 2


def _raw_outcomes(story: Story) -> set[bytes]:
    cut = Cut(story.log, [OLD], story.log.now)
    states = [state for seed in range(40) for state in cut.states(random.Random(seed), SHORT)]
    return {cut.images(story.log, state)[0] for state in states}


@pytest.mark.parametrize("sectors", [1, 2, 8, 9, 40])
def test_masks(sectors: int) -> None:
    masks = list(masks_of(sectors))
    assert all(0 < mask < 1 << sectors for mask in masks if sectors <= 8)
    assert len(set(masks)) >= min((1 << sectors) - 2, 20)


def test_a_state_as_text() -> None:
    state = State(((3, ALL), (7, 5)), 9)
    assert str(state) == "3,7:5~9"
    assert State.parse("3,7:5~9") == state
    assert State.parse("") == State(())


class Hooked(Linear):
    """Counts what is called; its last sector holds a mark that `format` has written and nobody writes again."""

    tables = {"lin": "0 20 linear 7:0 8\n20 24 linear 7:1 4"}  # noqa: RUF012
    calls: list[str]

    async def format(self, disks: Sequence[Device]) -> None:
        self.calls.append("format")
        await write(disks[0], 39 * SECTOR, b"M" * SECTOR)

    async def recover(self, stack: Stack) -> None:
        self.calls.append("recover")

    async def check(self, stack: Stack, clients: Mapping[str, Client], at: int) -> None:
        self.calls.append("check")
        below = next(iter(stack.mapped[0].live.devices)) if stack.mapped[0].live else None
        assert below is not None
        if (await read_all(below))[39 * SECTOR :] != b"M" * SECTOR:
            raise Violation("the mark is gone")


def test_the_hooks() -> None:
    scenario = Hooked()
    scenario.calls = []
    explorer = Explorer(scenario, cuts=5, nest=50)
    explorer.explore(1)
    assert scenario.calls.count("format") == 1
    assert scenario.calls.count("check") == explorer.tally.states
    assert scenario.calls.count("recover") > explorer.tally.states

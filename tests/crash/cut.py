"""The states that the disks may be in after a power cut, given the log of what they were asked.

At a moment k a change is *durable* when it had ended and, on its disk, a flush that was submitted later had ended too; or
when it had ended and was FUA; a flush of a range does it for the sectors there. Every other change that was submitted, ended
or in flight, is *optional*: each of its sectors has reached the medium or not, on its own. Changes that have ended take
effect in the order of their ends, so an optional one cannot undo a durable one that came later; those in flight may come in
any order.

A state is written as `3,7:5,12~9`: the optional entries that reached the media, in this order; `:5` is the mask of the sectors
that did (hexadecimal; else all), and `~9` at the end says that discarded sectors hold garbage made from seed 9, not zeroes.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Final, NamedTuple

from nbdmap.units import SECTOR
from tests.crash.log import ALL, Entry, WriteLog

TORN_EXHAUSTIVE: Final = 8
"""Every mask of a last write of up to so many sectors is tried; above it Dory's masks, sectors modulo 8 and 9."""
MANY: Final = 5
"""All subsets of more optional entries than this, where there is effort for it, are tried at one cut in ten."""
_IN_FLIGHT: Final = 1 << 60


class State(NamedTuple):
    """Which optional entries (number, mask of sectors) reached the media, in order; 0 garbage: discards read as zeroes."""

    applied: tuple[tuple[int, int], ...]
    garbage: int = 0

    def __str__(self) -> str:
        parts = (str(number) if mask == ALL else f"{number}:{mask:x}" for number, mask in self.applied)
        return ",".join(parts) + (f"~{self.garbage}" if self.garbage else "")

    @classmethod
    def parse(cls, text: str) -> "State":
        """The state that `str` wrote."""
        listed, _, garbage = text.partition("~")
        applied = []
        for part in filter(None, listed.split(",")):
            number, _, mask = part.partition(":")
            applied.append((int(number), int(mask, 16) if mask else ALL))
        return cls(tuple(applied), int(garbage or 0))


@dataclass(frozen=True, slots=True)
class Effort:
    """How many states are made of one cut: random ones, all subsets up to so many optional entries, torn last writes."""

    random: int = 6
    subsets: int = 3
    singles: int = 8
    torn: int = 12


SHORT: Final = Effort()
LONG: Final = Effort(random=16, subsets=10, singles=32, torn=48)


@lru_cache(maxsize=64)
def _garbage(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


class Cut:
    """A power cut at moment `at`. `images` is what the disks held when the log began."""

    def __init__(self, log: WriteLog, images: Sequence[bytes], at: int) -> None:
        self.at = at
        self._images = images
        durable: list[tuple[Entry, int]] = []
        ended: list[Entry] = []
        flying: list[Entry] = []
        flushes = _flushes(log, len(images), at)
        for entry in log.entries:
            if entry.submitted > at:
                break
            if entry.kind == "flush" or not entry.length:
                continue
            if entry.completed is None or entry.completed > at:
                flying.append(entry)
                continue
            safe = _safe_sectors(entry, flushes[entry.disk])
            if safe:
                durable.append((entry, safe))
            if safe != _whole(entry):
                ended.append(entry)
        self._durable = sorted(durable, key=lambda one: _end(one[0]))
        self.ended = sorted(ended, key=_end)
        self.flying = flying
        self.optional = [*self.ended, *flying]
        self.discards = any(one.kind == "discard" for one in [*(entry for entry, _ in durable), *self.optional])
        self._allowed = self._not_undone()
        self._floors: dict[int, list[bytes]] = {}

    def _not_undone(self) -> dict[int, int]:
        """For each optional entry the mask of the sectors that are not safe, and that no later safe one holds for good."""
        last: dict[tuple[int, int], int] = {}
        for entry, safe in self._durable:
            for bit, sector in enumerate(entry.sectors):
                if safe >> bit & 1:
                    last[entry.disk, sector] = _end(entry)
        masks: dict[int, int] = {}
        for index, entry in enumerate(self.optional):
            end = _end(entry) if index < len(self.ended) else _IN_FLIGHT
            mask = 0
            for bit, sector in enumerate(entry.sectors):
                if last.get((entry.disk, sector), 0) < end:
                    mask |= 1 << bit
            masks[entry.number] = mask
        return masks

    def images(self, log: WriteLog, state: State) -> list[bytes]:
        """What the disks hold in `state`."""
        made = [bytearray(floor) for floor in self._floor(state.garbage)]
        for number, mask in state.applied:
            entry = log.entries[number]
            _apply(made[entry.disk], entry, mask & self._allowed[number], state.garbage)
        return [bytes(image) for image in made]

    def _floor(self, garbage: int) -> list[bytes]:
        floor = self._floors.get(garbage)
        if floor is None:
            made = [bytearray(image) for image in self._images]
            for entry, safe in self._durable:
                _apply(made[entry.disk], entry, safe, garbage)
            floor = self._floors[garbage] = [bytes(image) for image in made]
        return floor

    # --- generators --------------------------------------------------------------------------------------------------

    def states(self, rng: random.Random, effort: Effort) -> list[State]:
        """The states to try, each once."""
        found: dict[State, None] = {}
        for applied in self._choices(rng, effort):
            found[State(tuple(applied))] = None
            if self.discards:
                found[State(tuple(applied), rng.randrange(1, 8))] = None
        return list(found)

    def _choices(self, rng: random.Random, effort: Effort) -> Iterator[Iterable[tuple[int, int]]]:
        everything = [(entry.number, ALL) for entry in self.optional]
        yield self.in_order()
        yield everything
        yield ()
        picked = everything if len(everything) <= effort.singles else rng.sample(everything, effort.singles)
        for one in picked:
            yield (one,)
            yield [other for other in everything if other != one]
        yield from self._skewed(everything)
        if len(everything) <= min(effort.subsets, MANY) or (len(everything) <= effort.subsets and rng.random() < 0.1):
            for bits in product((False, True), repeat=len(everything)):
                yield [one for one, kept in zip(everything, bits, strict=True) if kept]
        yield from self._torn(rng, effort)
        if everything:
            for _ in range(effort.random):
                yield self._random(rng)

    def in_order(self) -> list[tuple[int, int]]:
        """All that had ended, nothing that was in flight."""
        return [(entry.number, ALL) for entry in self.ended]

    def _skewed(self, everything: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """One disk has everything, another nothing but what is durable."""
        disks = {entry.disk for entry in self.optional}
        if len(disks) > 1:
            for disk in disks:
                mine = {entry.number for entry in self.optional if entry.disk == disk}
                yield [one for one in everything if one[0] in mine]
                yield [one for one in everything if one[0] not in mine]

    def _torn(self, rng: random.Random, effort: Effort) -> Iterator[list[tuple[int, int]]]:
        """The last write that was submitted reached the medium in part; the others did in order, or not at all."""
        if not self.optional:
            return
        last = max(self.optional, key=lambda entry: entry.submitted)
        before = [one for one in self.in_order() if one[0] != last.number]
        masks = list(masks_of(len(last.sectors)))
        if len(masks) > effort.torn:
            masks = rng.sample(masks, effort.torn)
        for mask in masks:
            yield [*before, (last.number, mask)]
            if rng.random() < 0.25:
                yield [(last.number, mask)]

    def _random(self, rng: random.Random) -> list[tuple[int, int]]:
        """Any subset, any of it torn; what was in flight in any order."""
        flying = self.flying[:]
        rng.shuffle(flying)
        share = rng.random()
        chosen = [entry for entry in [*self.ended, *flying] if rng.random() < share]
        torn = rng.random() < 0.5
        return [(one.number, rng.getrandbits(len(one.sectors)) if torn and rng.random() < 0.5 else ALL) for one in chosen]


def masks_of(sectors: int) -> Iterator[int]:
    """The masks for a torn write of so many sectors: all of them, or Dory's."""
    full = (1 << sectors) - 1
    if sectors <= TORN_EXHAUSTIVE:
        yield from range(1, full)
        return
    for modulus in (8, 9):
        for kept in range(modulus):
            mask = sum(1 << bit for bit in range(sectors) if bit % modulus == kept)
            yield mask
            yield full & ~mask
    for border in range(1, sectors):
        yield (1 << border) - 1


def _flushes(log: WriteLog, disks: int, at: int) -> list[list[Entry]]:
    """The good flushes of each disk that had ended by `at`."""
    found: list[list[Entry]] = [[] for _ in range(disks)]
    for entry in log.entries:
        if entry.kind == "flush" and not entry.failed and entry.completed is not None and entry.completed <= at:
            found[entry.disk].append(entry)
    return found


def _safe_sectors(entry: Entry, flushes: list[Entry]) -> int:
    """The mask of the sectors of a change that has ended which these flushes, or its FUA, have made durable."""
    whole = _whole(entry)
    if entry.failed:
        return 0
    if entry.fua:
        return whole
    safe = 0
    for flush in flushes:
        if flush.submitted > _end(entry) and (entry.lost is None or _end(flush) <= entry.lost):
            if not flush.length:
                return whole
            for bit, sector in enumerate(entry.sectors):
                if sector in flush.sectors:
                    safe |= 1 << bit
    return safe


def _whole(entry: Entry) -> int:
    return (1 << len(entry.sectors)) - 1


def _end(entry: Entry) -> int:
    assert entry.completed is not None
    return entry.completed


def _apply(image: bytearray, entry: Entry, mask: int, garbage: int) -> None:
    if entry.kind == "write":
        data = entry.data
    elif entry.kind == "discard" and garbage:
        data = _garbage(garbage * 1000 + entry.number, entry.length)
    else:
        data = bytes(entry.length)
    if mask == _whole(entry):
        image[entry.offset : entry.offset + entry.length] = data
        return
    for bit in range(len(entry.sectors)):
        if mask >> bit & 1:
            image[entry.offset + bit * SECTOR : entry.offset + (bit + 1) * SECTOR] = data[bit * SECTOR : (bit + 1) * SECTOR]

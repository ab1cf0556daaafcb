"""Runs a scenario, cuts the power at many moments, makes the states its disks may be in, and opens the stack on each.

A *path* names a state: `53/3,7:5` is the cut at moment 53 with that state (see cut.py); `53/3,7:5/12/4` goes on with a crash
of the recovery from it. Scenario, seed and path are all that a replay needs. A violation is made small before it is told: as
few differences as possible from what the disks would hold if all had happened in order.
"""

import random
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from nbdmap.errors import NbdmapError
from nbdmap.units import SECTOR
from tests.crash.clock import Deadlock, run
from tests.crash.cut import SHORT, Cut, Effort, State
from tests.crash.disks import CALM, Weather
from tests.crash.log import WriteLog
from tests.crash.oracle import Client, Violation, describe, read_all
from tests.crash.scenario import Scenario, Stack


@dataclass(slots=True)
class Recording:
    """What was seen of a run: the log, the images the disks had before it, and the clients with their histories."""

    log: WriteLog
    images: list[bytes]
    clients: dict[str, Client]


@dataclass(slots=True)
class Allowed:
    """What each sector of each device may hold after a cut, and the last contents that were found right."""

    sectors: Mapping[str, Sequence[frozenset[bytes] | None]]
    good: dict[str, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class Tally:
    """What was done."""

    runs: int = 0
    cuts: int = 0
    states: int = 0
    nested: int = 0
    """States of crashed recoveries; counted in `states` as well."""
    failures: int = 0
    """Requests that failed because a disk did."""


@dataclass(slots=True)
class Explorer:
    """Explores one scenario. `cuts` is how many moments of a run are tried (0: all); of every `nest`-th state the recovery
    is crashed, too, at `nested_cuts` moments. `command` begins the line that replays a violation."""

    scenario: Scenario
    effort: Effort = SHORT
    cuts: int = 40
    nest: int = 48
    nested_cuts: int = 4
    command: str = ".venv/bin/python -m tests.crash.main replay"
    bug: str = ""
    tally: Tally = field(default_factory=Tally)

    def explore(self, seed: int) -> None:
        """One run and its states. Raises Violation with the line that replays it."""
        where = Where(self.scenario.name, seed, "", self)
        try:
            run(self._explore(where))
        except Deadlock as error:
            raise Violation(where.told(f"it hangs: {error}")) from error

    def replay(self, seed: int, path: str) -> None:
        """Tries the one state that `path` names; without a path only the run itself."""
        run(self._replay(Where(self.scenario.name, seed, "", self), path))

    async def _explore(self, where: "Where") -> None:
        rng = where.rng()
        recording = await self._record_at(where, self.scenario.first_images(rng), fresh=True)
        self.tally.runs += 1
        await self._cut_all(recording, where, self.cuts, nested=False)

    async def _record_at(self, where: "Where", images: Sequence[bytes], *, fresh: bool) -> Recording:
        try:
            recording = await record(self.scenario, images, where.rng("record"), fresh=fresh)
        except (Exception, BaseExceptionGroup) as error:
            cause = innermost(error)
            name = "" if isinstance(cause, Violation) else f"{type(cause).__name__}: "
            raise Violation(where.told(f"{name}{cause}")) from error
        self.tally.failures += sum(client.failures for client in recording.clients.values())
        return recording

    async def _cut_all(self, recording: Recording, where: "Where", most: int, *, nested: bool) -> None:
        rng = where.rng("cuts")
        moments = range(recording.log.now + 1)
        for at in moments if not most or len(moments) <= most else sorted(rng.sample(moments, most)):
            cut = Cut(recording.log, recording.images, at)
            allowed = Allowed(self.scenario.allowed(recording.clients, at))
            self.tally.cuts += 1
            for state in cut.states(rng, self.effort):
                self.tally.states += 1
                self.tally.nested += nested
                images = cut.images(recording.log, state)
                fault = await self._fault(recording, allowed, at, images)
                if fault:
                    await self._tell(recording, allowed, cut, state, where, fault)
                if not nested and self.tally.states % self.nest == 0:
                    await self._crash_recovery(images, where.at(at, state))

    async def _crash_recovery(self, images: Sequence[bytes], where: "Where") -> None:
        recording = await self._record_at(where, images, fresh=False)
        await self._cut_all(recording, where, self.nested_cuts, nested=True)

    async def _fault(self, recording: Recording, allowed: "Allowed", at: int, images: Sequence[bytes]) -> str:
        """What is wrong with a state; "" if nothing is."""
        try:
            async with opened(self.scenario, WriteLog(), images, CALM) as stack:
                await self.scenario.recover(stack)
                for name, device in stack.devices.items():
                    data = await read_all(device)
                    if found := wrong_sectors(name, data, allowed.sectors[name], allowed.good.get(name, b"")):
                        return found
                    allowed.good[name] = data
                await self.scenario.check(stack, recording.clients, at)
        except Violation as error:
            return str(error)
        except Exception as error:
            return f"opening fails: {type(error).__name__}: {error}"
        return ""

    async def _tell(
        self,
        recording: Recording,
        allowed: "Allowed",
        cut: Cut,
        state: State,
        where: "Where",
        fault: str,
    ) -> None:
        """Makes the state small and raises Violation."""
        for simpler in simplified(cut, state):
            found = await self._fault(recording, allowed, cut.at, cut.images(recording.log, simpler))
            if found:
                state, fault = simpler, found
                break
        lost = [str(entry.number) for entry in cut.ended if entry.number not in {number for number, _ in state.applied}]
        text = f"{fault}\n  after a cut at moment {cut.at} of {recording.log.now}; lost: {','.join(lost) or 'nothing'}"
        raise Violation(where.at(cut.at, state).told(text))

    async def _replay(self, where: "Where", path: str) -> None:
        parts = path.split("/") if path else []
        images: Sequence[bytes] = self.scenario.first_images(where.rng())
        fresh = True
        for index in range(0, len(parts) + 1, 2):
            recording = await self._record_at(where, images, fresh=fresh)
            if index == len(parts):
                return
            at, state = int(parts[index]), State.parse(parts[index + 1])
            images = Cut(recording.log, recording.images, at).images(recording.log, state)
            where = where.at(at, state)
            fault = await self._fault(recording, Allowed(self.scenario.allowed(recording.clients, at)), at, images)
            if fault:
                raise Violation(where.told(fault))
            fresh = False


@dataclass(frozen=True, slots=True)
class Where:
    """Which state this is, and how to come back to it."""

    scenario: str
    seed: int
    path: str
    explorer: Explorer

    def at(self, at: int, state: State) -> "Where":
        """The state of a cut of this run."""
        return Where(self.scenario, self.seed, f"{self.path}/{at}/{state}".lstrip("/"), self.explorer)

    def rng(self, purpose: str = "") -> random.Random:
        """Chances for one purpose at this place, always the same."""
        return random.Random(zlib.crc32(f"{self.scenario} {self.seed} {self.path} {purpose}".encode()))

    def told(self, text: str) -> str:
        """`text` with the command that replays it."""
        bug = f" --bug {self.explorer.bug}" if self.explorer.bug else ""
        path = f" '{self.path}'" if self.path else ""
        return f"{text}\n  replay: {self.explorer.command} {self.scenario} {self.seed}{path}{bug}"


@asynccontextmanager
async def opened(scenario: Scenario, log: WriteLog, images: Sequence[bytes], weather: Weather) -> AsyncIterator[Stack]:
    """The stack of a scenario on disks with these contents; closed at the end, come what may."""
    with scenario.disks(log, images, weather) as disks:
        stack = await scenario.open(disks)
        try:
            yield stack
        finally:
            for device in reversed(stack.mapped):
                await device.close()
            for disk in disks:
                await disk.close()


async def record(scenario: Scenario, images: Sequence[bytes], rng: random.Random, *, fresh: bool) -> Recording:
    """Opens the stack, lets the clients work, checks what they see at the end, and closes it."""
    log = WriteLog()
    start = list(images)
    if fresh:
        with scenario.disks(log, start, CALM) as disks:
            await scenario.format(disks)
        made = Cut(log, start, log.now)
        start = made.images(log, State(tuple(made.in_order())))
        log = WriteLog()
    weather = Weather(rng.getrandbits(64), scenario.faults(rng))
    first: dict[str, bytes] = {}
    async with opened(scenario, WriteLog(), start, CALM) as stack:
        await scenario.recover(stack)
        for name, device in stack.devices.items():
            first[name] = await read_all(device)
    async with opened(scenario, log, start, weather) as stack:
        clients = {
            name: Client(name, device, log, first[name], discard_zeroes=scenario.files or scenario.discard_zeroes)
            for name, device in stack.devices.items()
        }
        await scenario.recover(stack)
        await scenario.workload(clients, stack, rng)
        for client in clients.values():
            await client.read(0, client.sectors)
        try:
            await stack.close()
        except NbdmapError:
            log.mark("closed with a failure")
        else:
            moment = log.mark("closed")
            for client in clients.values():
                client.closed(moment)
    return Recording(log, start, clients)


def innermost(error: BaseException) -> BaseException:
    """The first error of a group of groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def wrong_sectors(name: str, data: bytes, allowed: Sequence[frozenset[bytes] | None], good: bytes = b"") -> str:
    """Which sectors hold what they may not; "" if none does. `good`: contents that were found right before."""
    wrong: list[str] = []
    for sector in differing(data, good) if len(good) == len(data) else range(len(allowed)):
        values = allowed[sector]
        value = data[sector * SECTOR : (sector + 1) * SECTOR]
        if values is not None and value not in values:
            may = " or ".join(sorted(describe(one) for one in values))
            wrong.append(f"{name} sector {sector} holds {describe(value)}, may hold {may}")
    return "\n  ".join(wrong[:4])


def differing(one: bytes, other: bytes) -> list[int]:
    """The sectors in which two contents of the same length differ."""
    unequal = np.frombuffer(one, np.uint64) != np.frombuffer(other, np.uint64)
    sectors: list[int] = np.flatnonzero(unequal.reshape(-1, SECTOR // 8).any(axis=1)).tolist()
    return sectors


def simplified(cut: Cut, state: State) -> list[State]:
    """Simpler states than `state`, the simplest first: with fewer differences from what happens in order."""
    order = cut.in_order()
    had = dict(state.applied)
    whole = [(number, mask) for number, mask in order if had.get(number) == mask]
    lost = [number for number, _ in order if number not in had]
    simpler = [State(tuple(order), 0), State((), 0)]
    simpler += [State(tuple(one for one in order if one[0] != number), 0) for number in lost]
    simpler += [State(tuple(whole), 0), State(tuple(one for one in state.applied if one[0] in dict(order)), 0)]
    return [*simpler, State(state.applied, 0)]

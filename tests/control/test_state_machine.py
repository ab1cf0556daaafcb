"""The mapper's verbs against a model, by hypothesis: create, load, clear, suspend, resume, rename, remove and I/O.

The model is the specification in small: a device has a live and an inactive list of segments; a segment is zeroes, errors,
or a run of a disk or of another device. It predicts the errno of every verb, every byte that a read gives, what a
write that fails half-way has changed, and which requests wait for a resume.
"""

import asyncio
import errno
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import uvloop
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nbdmap.block.device import Device
from nbdmap.block.io import READ, WRITE, Io
from nbdmap.block.memory import MemoryDisk
from nbdmap.control.events import Events
from nbdmap.control.exports import Exports
from nbdmap.control.mapper import Mapper
from nbdmap.control.verbs import Verbs
from nbdmap.errors import NbdmapError
from nbdmap.targets import TARGETS

DISKS = 3
SECTORS = 32
NAMES = ("a", "b", "c", "d")
STEPS = 50
EXAMPLES = 700
"""Runs have up to STEPS steps; counted over all, there are more than 20,000."""


@dataclass(frozen=True)
class Segment:
    """`length` sectors of `kind`; `below` is a disk's number or a device of the model."""

    length: int
    kind: str
    below: "str | Box | None" = None
    start: int = 0


@dataclass(eq=False)
class Box:
    """A device of the model."""

    name: str
    live: list[Segment] | None = None
    inactive: list[Segment] | None = None
    loaded: bool = False
    suspended: bool = False
    events: int = 0
    uuid: str = ""
    held: list[tuple[int, bytes]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(segment.length for segment in self.live or [])


picks = st.integers(0, 15)
"""Which device a rule is about: mostly one that exists, see `MapperMachine.pick`."""
segments = st.lists(
    st.tuples(
        st.integers(1, 12),
        st.sampled_from(("disk", "disk", "device", "zero", "error")),
        st.integers(0, DISKS - 1),
        picks,
        st.sampled_from((0, 0, 0, 1, 4, 7, 20, SECTORS)),
    ),
    min_size=1,
    max_size=3,
)


class Refused(Exception):
    """The model expects a verb to fail with this errno."""


class MapperMachine(RuleBasedStateMachine):
    """Rules run a verb on both sides and compare."""

    @initialize()
    def begin(self) -> None:
        self.loop = uvloop.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self.mapper = Mapper(TARGETS, Events(lambda: 0.0))
        self.verbs = Verbs(self.mapper, Exports(self.mapper))
        self.disks: dict[str, bytearray] = {}
        for number in range(DISKS):
            disk = MemoryDisk(f"disk{number}", f"7:{number}", SECTORS * 512)
            self.mapper.disks[disk.name] = disk
            self.disks[disk.name] = bytearray(SECTORS * 512)
        self.model: dict[str, Box] = {}
        self.tasks: list[tuple[Box, asyncio.Task[Any]]] = []
        self.stamp = 0
        self.create(NAMES[0], [(12, "disk", 0, 0, 0), (12, "disk", 1, 0, 4)], "")
        self.create(NAMES[1], [(8, "device", 0, 1, 4), (2, "zero", 0, 0, 0), (8, "disk", 2, 0, 0)], "")

    def pick(self, number: int) -> str:
        """The name that a number stands for: 15 one that nobody has, the others one of the devices in turn."""
        existing = sorted(self.model)
        return existing[number % len(existing)] if number < 15 and existing else "nobody"

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            for _, task in self.tasks:
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*(task for _, task in self.tasks), return_exceptions=True))
            self.loop.close()
            asyncio.set_event_loop(None)

    # --- both sides ----------------------------------------------------------------------------------------------------

    def run(self, verb: Any, expected: int) -> None:
        """Runs a verb; its errno must be the expected one (0: success)."""

        async def step() -> None:
            await asyncio.wait_for(verb, 5)

        try:
            self.loop.run_until_complete(step())
            got = 0
        except NbdmapError as error:
            got = error.errno
        assert got == expected, f"errno {got}, the model says {expected}"

    def text(self, parts: Any) -> tuple[str, list[Segment], int]:
        """A table for both sides, and the errno that the names in it lead to."""
        lines, found, failure, at = [], [], 0, 0
        for length, kind, number, pick, start in parts:
            name = self.pick(pick)
            if kind == "disk":
                lines.append(f"{at} {length} linear disk{number} {start}")
                found.append(Segment(length, "linear", f"disk{number}", start))
            elif kind == "device":
                lines.append(f"{at} {length} linear /dev/mapper/{name} {start}")
                found.append(Segment(length, "linear", self.model.get(name), start))
                if name not in self.model:
                    failure = failure or errno.ENOENT
                elif not self.model[name].loaded:
                    failure = failure or errno.ENXIO
            else:
                lines.append(f"{at} {length} {kind}")
                found.append(Segment(length, kind))
            at += length
        return "\n".join(lines), found, failure

    def misfit(self, table: list[Segment]) -> bool:
        """Whether a segment reaches beyond what it stands on."""
        for segment in table:
            size = SECTORS if isinstance(segment.below, str) else segment.below.size if segment.below else 0
            if segment.kind == "linear" and size and segment.start + segment.length > size:
                return True
        return False

    def reaches(self, table: list[Segment], wanted: Box) -> bool:
        """Whether a table stands on `wanted`, at any depth."""
        for segment in table:
            if isinstance(segment.below, Box) and (
                segment.below is wanted or self.reaches((segment.below.live or []) + (segment.below.inactive or []), wanted)
            ):
                return True
        return False

    def openers(self, box: Box) -> int:
        tables = [table or [] for other in self.model.values() for table in (other.live, other.inactive)]
        return sum(any(segment.below is box for segment in table) for table in tables)

    def holds(self, box: Box) -> bool:
        """Whether I/O to a device would wait."""
        below = [segment.below for segment in box.live or [] if isinstance(segment.below, Box)]
        return box.suspended or any(self.holds(one) for one in below)

    def stuck(self) -> bool:
        """Whether a write that was let in waits for a device further down: a suspend above that would wait with it."""
        return any(box.held and not box.suspended for box in self.model.values())

    def flush_fails(self, box: Box) -> bool:
        """Whether a flush of what is below meets a device without a table."""
        for segment in box.live or []:
            below = segment.below
            if isinstance(below, Box) and not below.suspended and (below.live is None or self.flush_fails(below)):
                return True
        return False

    # --- verbs ---------------------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), parts=st.none() | segments | segments, uuid=st.sampled_from(("", "", "u1", "u2")))
    def create(self, name: str, parts: Any, uuid: str) -> None:
        text, table, failure = self.text(parts) if parts is not None else (None, None, 0)
        if (uuid and any(box.uuid == uuid for box in self.model.values())) or name in self.model:
            failure = errno.EBUSY
        elif not failure and table is not None and self.misfit(table):
            failure = errno.EINVAL
        self.run(self.verbs.create(name, text, uuid), failure)
        if not failure:
            self.model[name] = Box(name, table, uuid=uuid, loaded=table is not None)

    @rule(pick=picks, parts=segments)
    def load(self, pick: int, parts: Any) -> None:
        name = self.pick(pick)
        text, table, failure = self.text(parts)
        box = self.model.get(name)
        if box is None:
            failure = errno.ENXIO
        elif not failure and (self.misfit(table) or self.reaches(table, box)):
            failure = errno.EINVAL
        self.run(self.verbs.load(name, text), failure)
        if box is not None and not failure:
            box.inactive = table
            box.loaded = True

    @rule(pick=picks)
    def clear(self, pick: int) -> None:
        name = self.pick(pick)
        box = self.model.get(name)
        self.run(self.verbs.clear(name), 0 if box else errno.ENXIO)
        if box:
            box.inactive = None

    @rule(pick=picks, noflush=st.booleans())
    def suspend(self, pick: int, noflush: bool) -> None:
        name = self.pick(pick)
        box = self.model.get(name)
        failure = 0 if box else errno.ENXIO
        if self.stuck():
            return
        if box and not box.suspended and not noflush and self.flush_fails(box):
            failure = errno.EIO
        self.run(self.verbs.suspend(name, noflush=noflush), failure)
        if box and not failure:
            box.suspended = True

    @rule(pick=picks)
    def resume(self, pick: int) -> None:
        name = self.pick(pick)
        box = self.model.get(name)
        failure = 0 if box else errno.ENXIO
        if box and not box.suspended and self.stuck():
            return
        if box and box.inactive is not None:
            if self.misfit(box.inactive):
                failure = errno.EINVAL
            elif not box.suspended and self.flush_fails(box):
                failure = errno.EIO
        elif box and box.suspended and box.live is None:
            failure = errno.EINVAL
        self.run(self.verbs.resume(name), failure)
        if box and not failure:
            if box.inactive is not None:
                box.live, box.inactive = box.inactive, None
            box.suspended = False
            self.let_in()

    @rule(pick=picks, new=st.sampled_from((*NAMES, "", "x/y", ".")))
    def rename(self, pick: int, new: str) -> None:
        name = self.pick(pick)
        box = self.model.get(name)
        failure = errno.ENXIO if box is None else errno.EINVAL if new not in NAMES else errno.EBUSY if new in self.model else 0
        self.run(self.verbs.rename(name, new), failure)
        if box and not failure:
            del self.model[name]
            self.model[new] = box
            box.name = new
            box.events += 1

    @rule(pick=picks, uuid=st.sampled_from(("u1", "u2", "")))
    def set_uuid(self, pick: int, uuid: str) -> None:
        name = self.pick(pick)
        box = self.model.get(name)
        taken = any(other.uuid == uuid for other in self.model.values())
        failure = errno.ENXIO if box is None else errno.EINVAL if not uuid else errno.EBUSY if taken else 0
        failure = failure or (errno.EINVAL if box and box.uuid else 0)
        self.run(self.verbs.set_uuid(name, uuid), failure)
        if box and not failure:
            box.uuid = uuid
            box.events += 1

    @rule(pick=picks)
    def remove(self, pick: int) -> None:
        name = self.pick(pick)
        box = self.model.get(name)
        if box and any(held is box for held, task in self.tasks if not task.done()):
            return  # a real client would have it open
        failure = errno.ENXIO if box is None else errno.EBUSY if self.openers(box) else 0
        self.run(self.verbs.remove(name), failure)
        if box and not failure:
            del self.model[name]

    # --- I/O -----------------------------------------------------------------------------------------------------------

    def walk(self, box: Box, at: int, data: bytearray, write: bool) -> bool:
        """Does a request on the model's disks as the document says; False where part of it fails."""
        length = len(data) // 512
        if box.live is None or at + length > box.size:
            return False
        good, begin, done = True, 0, 0
        for segment in box.live:
            low, high = max(at, begin), min(at + length, begin + segment.length)
            if low < high:
                part = bytearray(data[done * 512 : (done + high - low) * 512])
                good &= self.walk_segment(segment, segment.start + low - begin, part, write)
                data[done * 512 : (done + high - low) * 512] = part
                done += high - low
            begin += segment.length
        return good

    def walk_segment(self, segment: Segment, at: int, part: bytearray, write: bool) -> bool:
        if segment.kind == "error":
            return False
        if isinstance(segment.below, Box):
            return self.walk(segment.below, at, part, write)
        if segment.below is None:
            part[:] = part if write else bytes(len(part))
        elif write:
            self.disks[segment.below][at * 512 : at * 512 + len(part)] = part
        else:
            part[:] = self.disks[segment.below][at * 512 : at * 512 + len(part)]
        return True

    @rule(pick=picks, at=st.integers(0, 20), length=st.integers(1, 12), write=st.booleans())
    def request(self, pick: int, at: int, length: int, write: bool) -> None:
        name = self.pick(pick)
        box = self.model.get(name)
        if box is None or any(self.holds(one) for one in self.model.values()):
            return
        self.stamp += 1
        data = bytearray(self.stamp.to_bytes(4, "big") * (128 * length)) if write else bytearray(512 * length)
        expected = bytearray(data)
        good = self.walk(box, at, expected, write)
        io = Io(WRITE if write else READ, len(data), memoryview(data))
        self.run(self.mapper.devices[name].submit(io, at * 512), 0 if good else errno.EIO)
        if good and not write:
            assert data == expected

    @rule(pick=picks, at=st.integers(0, 20))
    def request_that_waits(self, pick: int, at: int) -> None:
        """A write to a suspended device: nothing happens before its resume."""
        name = self.pick(pick)
        box = self.model.get(name)
        if box is None or not box.suspended or len(box.held) == 3:
            return
        self.stamp += 1
        data = self.stamp.to_bytes(4, "big") * 128
        device = self.mapper.devices[name]
        task = self.loop.create_task(self.write_later(device, at * 512, data))
        self.tasks.append((box, task))
        box.held.append((at, data))
        self.turn()
        assert not task.done()

    @staticmethod
    async def write_later(device: Device, offset: int, data: bytes) -> None:
        try:
            await device.submit(Io(WRITE, len(data), memoryview(data)), offset)
        except NbdmapError:
            pass

    def turn(self) -> None:
        """Lets every task go as far as it can."""

        async def turn() -> None:
            for _ in range(20):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turn())

    def let_in(self) -> None:
        """After a resume the held writes of every device that is free now have been done, in their order."""
        self.turn()
        for box in self.model.values():
            if box.held and not self.holds(box):
                for at, data in box.held:
                    self.walk(box, at, bytearray(data), True)
                box.held.clear()
        self.tasks = [(box, task) for box, task in self.tasks if not task.done()]

    # --- what must always be so ----------------------------------------------------------------------------------------

    @invariant()
    def same_state(self) -> None:
        if not hasattr(self, "model"):
            return
        rows = self.loop.run_until_complete(self.verbs.info())
        assert [row["name"] for row in rows] == sorted(self.model)
        for row in rows:
            box = self.model[row["name"]]
            assert (row["uuid"], row["suspended"], row["event"]) == (box.uuid, box.suspended, box.events)
            assert (row["live"], row["inactive"]) == (box.live is not None, box.inactive is not None)
            assert (row["sectors"], row["targets"], row["open"]) == (box.size, len(box.live or []), self.openers(box))


MapperMachine.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestMapper = MapperMachine.TestCase

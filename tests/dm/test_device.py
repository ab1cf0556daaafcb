"""nbdmap.dm.device: tables in two slots, suspend, resume, events."""

import asyncio
from typing import ClassVar

import pytest

from nbdmap.block.io import READ, WRITE, Io, Pending
from nbdmap.dm.args import Args
from nbdmap.dm.device import MappedDevice
from nbdmap.dm.table import parse_table
from nbdmap.errors import InvalidArgument, IoFailed, NoSuchDevice, Requeue
from nbdmap.targets import TARGETS
from nbdmap.targets.linear import Linear
from tests.support.disks import FakeDisk, FakeOpener, Uevents, eio, mapped, read, write


class Nosy(Linear):
    """A linear target that notes the calls of its life, and fails in those it is told to."""

    type_name = "nosy"
    calls: ClassVar[list[str]]
    fail_in: ClassVar[set[str]]

    async def _note(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fail_in:
            raise IoFailed(f"{name} fails")

    async def presuspend(self, noflush: bool) -> None:
        await self._note("presuspend noflush" if noflush else "presuspend")

    async def postsuspend(self) -> None:
        await self._note("postsuspend")

    async def preresume(self) -> None:
        await self._note("preresume")

    async def resume(self) -> None:
        await self._note("resume")

    async def close(self) -> None:
        self.calls.append("close")

    async def message(self, args: Args) -> str:
        return args.word("word").upper()


@pytest.fixture
def nosy() -> type[Nosy]:
    """A class of its own for each test."""

    return type("Fresh", (Nosy,), {"calls": [], "fail_in": set()})


async def nosy_device(nosy: type[Nosy], disk: FakeDisk) -> MappedDevice:
    device = MappedDevice("d", "", "254:0", {**TARGETS, "nosy": nosy}, Uevents())
    await device.load(parse_table("0 64 nosy 7:0 0"), FakeOpener(disk), False)
    await device.resume()
    return device


async def test_without_a_table() -> None:
    device = await mapped("d")
    assert (device.size, device.live, device.suspended) == (0, None, False)
    for request in (read(device, 0, 512), device.extents(0, 512)):
        with pytest.raises(IoFailed, match="d has no table"):
            await request
    await device.resume()
    await device.clear()
    assert await device.message(0, ["anything"]) == ""
    await device.suspend()
    assert device.suspended
    with pytest.raises(InvalidArgument, match="d has no table to resume"):
        await device.resume()
    assert device.suspended
    await device.close()


async def test_load_resume_clear() -> None:
    disk, sink = FakeDisk("7:0"), Uevents()
    device = await mapped("d", sink=sink)
    opener = FakeOpener(disk)
    await device.load(parse_table("0 8 linear 7:0 0"), opener, True)
    assert device.size == 0
    assert device.inactive is not None
    await device.load(parse_table("0 16 linear 7:0 0"), opener, True)  # in place of the first
    assert disk.openers == 1
    await device.resume()
    assert (device.size, device.read_only, device.inactive) == (16 * 512, True, None)
    assert sink.seen == [("d", "change", {})]
    await device.load(parse_table("0 8 zero"), opener, False)
    await device.clear()
    assert device.inactive is None
    assert device.size == 16 * 512
    await device.resume()  # runs already: nothing
    assert len(sink.seen) == 1
    assert device.event_number == 0
    await device.close()
    assert disk.openers == 0
    assert device.size == 0


async def test_a_refused_load_changes_nothing() -> None:
    disk = FakeDisk("7:0")
    device = await mapped("d", "0 8 linear 7:0 0", disk)
    before = device.live
    with pytest.raises(InvalidArgument):
        await device.load(parse_table("0 8 nosuch"), FakeOpener(disk), False)
    assert device.live is before
    assert device.inactive is None


async def test_a_table_that_no_longer_fits_is_refused_at_resume() -> None:
    disk = FakeDisk("7:0")
    device = await mapped("d", "0 8 linear 7:0 0", disk)
    await device.load(parse_table("0 1024 linear 7:0 0"), FakeOpener(disk), False)
    before, disk.size = device.live, 512 * 8
    with pytest.raises(InvalidArgument, match="beyond the end"):
        await device.resume()
    assert device.live is before
    assert device.inactive is not None
    assert not device.suspended


async def test_counters() -> None:
    disk = FakeDisk("7:0")
    device = await mapped("d", "0 64 linear 7:0 0", disk)
    await write(device, 0, b"x" * 1024)
    await read(device, 0, 512)
    disk.failure = eio
    with pytest.raises(IoFailed):
        await read(device, 0, 512)
    assert (device.requests[READ], device.bytes_done[READ], device.requests[WRITE], device.bytes_done[WRITE]) == (2, 512, 1, 1024)
    assert device.errors == 1


async def test_suspend_holds_and_resume_lets_in_order() -> None:
    disk = FakeDisk("7:0")
    device = await mapped("d", "0 64 linear 7:0 0", disk)
    await device.suspend()
    await device.suspend()  # no effect
    assert disk.log == [("flush", 0, 0, 0)]
    tasks = [asyncio.create_task(write(device, number * 512, bytes(512))) for number in range(4)]
    extents = asyncio.create_task(device.extents(0, 512))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(disk.log) == 1
    await device.resume()
    await asyncio.gather(*tasks)
    assert [entry[1] for entry in disk.log[1:]] == [0, 512, 1024, 1536]
    assert await extents == [(512, 0)]


async def test_suspend_waits_for_requests_in_flight() -> None:
    disk = FakeDisk("7:0")
    device = await mapped("d", "0 64 linear 7:0 0", disk)
    disk.gate = asyncio.Event()
    first, second = (asyncio.create_task(write(device, at, bytes(512))) for at in (0, 512))
    await asyncio.sleep(0)
    suspending = asyncio.create_task(device.suspend())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert device.suspended
    assert not suspending.done()
    assert [entry[0] for entry in disk.log] == ["write", "write"]
    disk.gate.set()
    await suspending
    assert first.done()
    assert second.done()
    assert disk.log[-1][0] == "flush"


async def test_extents_in_flight_hold_a_suspend_up_too(nosy: type[Nosy]) -> None:
    disk, gate = FakeDisk("7:0"), asyncio.Event()

    async def slow(offset: int, length: int) -> list[tuple[int, int]]:
        await gate.wait()
        return [(length, 0)]

    device = await mapped("d", "0 64 linear 7:0 0", disk)
    disk.extents = slow  # type: ignore[method-assign]
    asking = asyncio.create_task(device.extents(0, 512))
    await asyncio.sleep(0)
    suspending = asyncio.create_task(device.suspend())
    await asyncio.sleep(0)
    assert not suspending.done()
    gate.set()
    await suspending
    assert await asking == [(512, 0)]


async def test_live_swap_runs_held_requests_on_the_new_table() -> None:
    old, new = FakeDisk("7:0"), FakeDisk("7:1")
    device = await mapped("d", "0 64 linear 7:0 0", old)
    opener = FakeOpener(new)
    await device.load(parse_table("0 64 linear 7:1 0"), opener, False)
    old.gate = asyncio.Event()
    running = asyncio.create_task(write(device, 0, b"a" * 512))
    await asyncio.sleep(0)
    resuming = asyncio.create_task(device.resume())
    await asyncio.sleep(0)
    held = asyncio.create_task(write(device, 0, b"b" * 512))
    await asyncio.sleep(0)
    old.gate.set()
    await asyncio.gather(running, resuming, held)
    assert old.bytes[:512] == b"a" * 512
    assert new.bytes[:512] == b"b" * 512
    assert old.openers == -1 + 1
    assert new.openers == 1


async def test_life_of_targets(nosy: type[Nosy]) -> None:
    disk = FakeDisk("7:0")
    device = await nosy_device(nosy, disk)
    assert nosy.calls == ["preresume", "resume"]
    await device.suspend()
    await device.resume()
    await device.suspend(noflush=True)
    await device.close()
    assert nosy.calls[2:] == [
        "presuspend", "postsuspend", "preresume", "resume", "presuspend noflush", "postsuspend", "close",
    ]  # fmt: skip
    assert [entry[0] for entry in disk.log] == ["flush"]


async def test_a_failed_suspend_lets_the_device_run_on(nosy: type[Nosy]) -> None:
    disk = FakeDisk("7:0")
    device = await nosy_device(nosy, disk)
    disk.failure = eio
    with pytest.raises(IoFailed):
        await device.suspend()
    assert not device.suspended
    assert nosy.calls[-1] == "resume"
    disk.failure = lambda io, offset: None
    await write(device, 0, bytes(512))
    nosy.fail_in.add("postsuspend")
    with pytest.raises(IoFailed, match="postsuspend fails"):
        await device.suspend()
    assert not device.suspended


async def test_a_cancelled_suspend_lets_the_device_run_on() -> None:
    disk = FakeDisk("7:0")
    device = await mapped("d", "0 64 linear 7:0 0", disk)
    disk.gate = asyncio.Event()
    running = asyncio.create_task(write(device, 0, bytes(512)))
    await asyncio.sleep(0)
    suspending = asyncio.create_task(device.suspend())
    await asyncio.sleep(0)
    held = asyncio.create_task(write(device, 512, bytes(512)))
    await asyncio.sleep(0)
    suspending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await suspending
    assert not device.suspended
    disk.gate.set()
    await asyncio.gather(running, held)
    await device.suspend()


async def test_a_failing_preresume_leaves_the_new_table_suspended(nosy: type[Nosy]) -> None:
    disk = FakeDisk("7:0")
    device = await nosy_device(nosy, disk)
    await device.load(parse_table("0 32 nosy 7:0 0"), FakeOpener(disk), False)
    nosy.fail_in.add("preresume")
    with pytest.raises(IoFailed, match="preresume fails"):
        await device.resume()
    assert device.suspended
    assert device.size == 32 * 512
    assert device.inactive is None
    nosy.fail_in.clear()
    await device.resume()
    assert not device.suspended


async def test_loops_are_refused() -> None:
    disk = FakeDisk("7:0", 4096)
    lower = await mapped("lower", "0 64 linear 7:0 0", disk, minor=1)
    middle = await mapped("middle", "0 64 striped 2 8 254:1 0 7:0 64", disk, lower, minor=2)
    upper = await mapped("upper", "0 64 linear 254:2 0", middle, minor=3)
    twice = await mapped("twice", "0 64 linear 254:3 0\n64 64 linear 254:3 0", upper, minor=4)
    other = await mapped("other", "0 64 striped 2 8 254:4 0 254:1 0", twice, lower, minor=5)
    for reference, device, path in (
        ("254:1", lower, "lower on lower"),
        ("254:3", upper, "lower on upper on middle on lower"),
        ("254:5", other, "lower on other on twice on upper on middle on lower"),
    ):
        opener = FakeOpener(device)
        before = device.openers
        with pytest.raises(InvalidArgument, match=f"would make lower stand on itself: {path}"):
            await lower.load(parse_table(f"0 64 linear {reference} 0"), opener, False)
        assert device.openers == before
    free = await mapped("free", minor=6)
    await free.load(parse_table("0 32 linear 254:5 0\n32 8 linear 254:3 0"), FakeOpener(other, upper), False)


async def test_messages(nosy: type[Nosy]) -> None:
    device = await nosy_device(nosy, FakeDisk("7:0"))
    assert await device.message(0, ["hello"]) == "HELLO"
    with pytest.raises(InvalidArgument, match="an empty message"):
        await device.message(0, [])
    with pytest.raises(InvalidArgument, match="sector 64 is beyond the end"):
        await device.message(64, ["hello"])


async def test_events_and_wait() -> None:
    sink = Uevents()
    device = await mapped("d", sink=sink)
    waiting = [asyncio.create_task(device.wait()), asyncio.create_task(device.wait(0))]
    await asyncio.sleep(0)
    device.event({"DM_ACTION": "PATH_FAILED"})
    assert await asyncio.gather(*waiting) == [1, 1]
    assert await device.wait(0) == 1
    assert sink.seen == [("d", "change", {"DM_ACTION": "PATH_FAILED", "DM_SEQNUM": "1"})]
    abandoned = asyncio.create_task(device.wait())
    other = asyncio.create_task(device.wait())
    await asyncio.sleep(0)
    abandoned.cancel()
    device.event()
    assert await other == 2


async def test_closing_releases_who_waits_for_events() -> None:
    device = await mapped("d")
    waiting = asyncio.create_task(device.wait())
    await asyncio.sleep(0)
    await device.close()
    assert await waiting == 1


async def test_a_read_only_device_is_not_flushed_at_suspend() -> None:
    disk = FakeDisk("7:0")
    device = MappedDevice("d", "", "254:0", TARGETS, Uevents())
    await device.load(parse_table("0 8 linear 7:0 0"), FakeOpener(disk), True)
    await device.resume()
    await device.suspend()
    assert disk.log == []
    assert device.submit(Io(READ, 0), 0).close() is None



async def test_suspend_over_a_suspended_device_does_not_hang() -> None:
    first, second = FakeDisk("7:0"), FakeDisk("7:1")
    lower = await mapped("lower", "0 64 linear 7:0 0", first, minor=1)
    middle = await mapped("middle", "0 64 linear 254:1 0\n64 64 linear 7:1 0", lower, second, minor=2)
    empty = await mapped("empty", minor=4)
    upper = await mapped("upper", "0 128 linear 254:2 0\n128 8 linear 254:4 0", middle, empty, minor=3)
    await lower.suspend()
    for log in (first.log, second.log):
        log.clear()
    with pytest.raises(IoFailed, match="empty has no table"):
        await upper.suspend()
    assert not upper.suspended
    await empty.suspend()
    await upper.suspend()
    assert first.log == []
    assert [entry[0] for entry in second.log] == ["flush", "flush"]


async def test_what_waited_for_a_removed_device_comes_too_late() -> None:
    disk = FakeDisk("7:0")
    device = await mapped("d", "0 8 linear 7:0 0", disk)
    await device.close()
    opener = FakeOpener(disk)
    for late in (device.load(parse_table("0 8 linear 7:0 0"), opener, False), device.suspend(), device.resume()):
        with pytest.raises(NoSuchDevice, match="d was removed"):
            await late
    assert disk.openers == 0


async def test_held_by_a_device_below() -> None:
    """As the kernel's internal suspend: requests and suspends wait, the state that is shown stays ACTIVE."""
    disk = FakeDisk("7:0")
    device = await mapped("d", "0 64 linear 7:0 0", disk)
    await device.hold()
    assert (device.held, device.suspended) == (True, False)
    request = asyncio.ensure_future(write(device, 0, b"a" * 512))
    suspend = asyncio.ensure_future(device.suspend())
    await asyncio.sleep(0)
    assert disk.log == []
    assert not suspend.done()
    device.let_go()
    await suspend
    assert device.suspended
    await device.resume()
    await request
    await device.suspend()
    await device.hold()
    device.let_go()
    assert device.suspended
    await device.hold()
    await device.close()  # does not wait for who holds it
    device.let_go()


async def test_what_a_held_device_hands_back_runs_later() -> None:
    class Parked(Linear):
        type_name = "parked"
        held = asyncio.Event()
        handed_back = 0

        def submit(self, io: Io, offset: int) -> Pending:
            return super().submit(io, offset) if self.handed_back else self._park()

        async def _park(self) -> None:
            await self.held.wait()
            Parked.handed_back += 1
            raise Requeue("d is held")

        async def presuspend(self, noflush: bool) -> None:
            assert noflush
            self.held.set()

    disk = FakeDisk("7:0")
    device = MappedDevice("d", "", "254:0", {"parked": Parked}, Uevents())
    await device.load(parse_table("0 64 parked 7:0 0"), FakeOpener(disk), False)
    await device.resume()
    request = asyncio.ensure_future(write(device, 0, b"a" * 512))
    await asyncio.sleep(0)
    await device.hold()
    assert (Parked.handed_back, disk.log) == (1, [])
    device.let_go()
    await request
    assert disk.bytes[:512] == b"a" * 512
    assert device.requests[WRITE] == 1


async def test_an_immutable_type_stays() -> None:
    class Fixed(Linear):
        type_name = "fixed"
        singleton = True
        immutable = True

    device = MappedDevice("d", "", "254:0", {**TARGETS, "fixed": Fixed}, Uevents())
    opener = FakeOpener(FakeDisk("7:0"))
    for table, read_only, complaint in (
        ("0 8 fixed 7:0 0\n8 8 zero", False, "line 1: fixed must be the only target of a table"),
        ("0 8 zero\n8 8 fixed 7:0 0", False, "line 2: fixed must be the only target of a table"),
        ("0 8 fixed 7:0 0", True, "fixed needs a table that is not read-only"),
    ):
        with pytest.raises(InvalidArgument, match=complaint):
            await device.load(parse_table(table), opener, read_only)
    await device.load(parse_table("0 8 fixed 7:0 0"), opener, False)
    await device.resume()
    with pytest.raises(InvalidArgument, match="d is a fixed and stays one"):
        await device.load(parse_table("0 8 zero"), opener, False)
    await device.load(parse_table("0 8 fixed 7:0 0"), opener, False)
    await device.load(parse_table("0 8 error"), opener, False)
    await device.resume()
    await device.load(parse_table("0 8 zero"), opener, False)  # as in tests/golden/dmsetup/multipath.txt

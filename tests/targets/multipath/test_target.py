"""nbdmap.targets.multipath.target: paths that fail and come back, what waits meanwhile, and what is said about it."""

import asyncio
import errno
import random
from collections.abc import Awaitable, Callable

import pytest

from nbdmap.block.device import HOLE, Limits
from nbdmap.block.io import DISCARD, FLUSH, FUA, READ, WRITE, WRITE_ZEROES, Io
from nbdmap.dm.device import MappedDevice
from nbdmap.dm.table import parse_table
from nbdmap.dm.target import Target
from nbdmap.errors import Busy, InvalidArgument, IoFailed, NotFound, Unsupported
from nbdmap.targets.multipath import Multipath
from nbdmap.targets.multipath.target import CALLERS, PROBE_SECONDS
from tests.support.disks import FakeDisk, FakeOpener, Uevents, build, eio, mapped, read, write

SECTORS = 64


class Ways:
    """Disks that are ways to the same bytes, and a multipath device on them."""

    def __init__(self, disks: list[FakeDisk], device: MappedDevice, sink: Uevents) -> None:
        self.disks = disks
        self.device = device
        self.sink = sink

    @property
    def target(self) -> Target:
        assert self.device.live
        return self.device.live.targets[0]

    @property
    def status(self) -> str:
        return self.target.status()

    @property
    def actions(self) -> list[tuple[str, str, str]]:
        """DM_ACTION, DM_PATH and DM_NR_VALID_PATHS of the uevents that have them."""
        keys = [keys for _, _, keys in self.sink.seen if "DM_ACTION" in keys]
        assert [one["DM_SEQNUM"] for one in keys] == [str(number + 1) for number in range(len(keys))]
        assert all(one["DM_TARGET"] == "multipath" for one in keys)
        return [(one["DM_ACTION"], one["DM_PATH"], one["DM_NR_VALID_PATHS"]) for one in keys]

    async def say(self, *words: str) -> None:
        assert await self.device.message(0, words) == ""

    async def checked(self, now: float = 0.0) -> None:
        """A round of checks, until they have ended."""
        assert isinstance(self.target, Multipath)
        self.target.check_paths(now)
        await turns()

    def order(self) -> list[int]:
        """By which disk the requests went, from the bytes read."""
        return [number for number, disk in enumerate(self.disks) for _ in disk.log]


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def begin(request: Awaitable[None]) -> "asyncio.Future[None]":
    return asyncio.ensure_future(request)


def ways_of(count: int) -> list[FakeDisk]:
    disks = [FakeDisk(f"8:{16 * number}", SECTORS) for number in range(count)]
    for disk in disks[1:]:
        disk.bytes = disks[0].bytes
    return disks


async def ways(groups: str, count: int = 2, features: str = "2 queue_mode bio", disks: list[FakeDisk] | None = None) -> Ways:
    disks = disks or ways_of(count)
    sink = Uevents()
    device = await mapped("mp", f"0 {SECTORS} multipath {features} 0 {groups}", *disks, sink=sink)
    return Ways(disks, device, sink)


TWO = "1 1 round-robin 0 2 0 8:0 8:16"
QUEUE = "3 queue_mode bio queue_if_no_path"


async def test_a_request_that_fails_goes_by_another_path() -> None:
    made = await ways(TWO)
    await write(made.device, 512, b"a" * 512)
    made.disks[1].failure = eio
    for _ in range(3):
        assert await read(made.device, 512, 512) == b"a" * 512
    assert made.actions == [("PATH_FAILED", "8:16", "1")]
    assert made.device.event_number == 1
    assert made.status == "2 0 0 0 1 1 A 0 2 0 8:0 A 0 8:16 F 1 "
    assert [len(disk.log) for disk in made.disks] == [4, 1]
    await made.device.close()


@pytest.mark.parametrize("number", sorted(CALLERS))
async def test_errors_of_the_request_go_to_the_caller(number: int) -> None:
    made = await ways(TWO)
    for disk in made.disks:
        disk.failure = lambda io, offset: IoFailed("no", number)
    with pytest.raises(IoFailed) as caught:
        await write(made.device, 0, bytes(512))
    assert caught.value.errno == number
    assert made.actions == []
    assert sum(len(disk.log) for disk in made.disks) == 1


async def test_unsupported_goes_to_the_caller() -> None:
    made = await ways(TWO)
    made.disks[0].failure = lambda io, offset: Unsupported("cannot")
    with pytest.raises(Unsupported):
        await made.device.submit(Io(DISCARD, 512), 0)
    assert made.actions == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM, errno.EPERM, errno.ESHUTDOWN, errno.ETIMEDOUT])
async def test_other_errors_fail_the_path(number: int) -> None:
    made = await ways(TWO)
    made.disks[0].failure = lambda io, offset: IoFailed("broken", number)
    await write(made.device, 0, bytes(512))
    assert made.actions == [("PATH_FAILED", "8:0", "1")]


async def test_without_a_path_and_without_queueing_it_is_eio() -> None:
    made = await ways(TWO)
    for disk in made.disks:
        disk.failure = lambda io, offset: IoFailed("gone", errno.ENXIO)
    with pytest.raises(IoFailed, match="no usable path: gone") as caught:
        await read(made.device, 0, 512)
    assert caught.value.errno == errno.EIO
    assert made.actions == [("PATH_FAILED", "8:0", "1"), ("PATH_FAILED", "8:16", "0")]
    with pytest.raises(IoFailed, match=r"no usable path$"):
        await read(made.device, 0, 512)


async def test_what_waits_goes_on_in_order_when_a_path_is_back() -> None:
    made = await ways(TWO, features="1 queue_if_no_path")
    for disk in made.disks:
        disk.failure = eio
    requests = [begin(write(made.device, number * 512, bytes([number]) * 512)) for number in range(5)]
    await turns()
    assert made.status.startswith("2 5 0 0 1 1 E ")  # five wait
    assert made.device.live
    assert made.device.live.in_flight == 5
    for disk in made.disks:
        disk.failure = lambda io, offset: None
        disk.log.clear()
    await made.say("reinstate_path", "8:16")
    await asyncio.gather(*requests)
    assert [entry[1] // 512 for entry in made.disks[1].log] == [0, 1, 2, 3, 4]
    assert made.disks[0].log == []
    assert made.actions[-1] == ("PATH_REINSTATED", "8:16", "1")


async def test_fail_if_no_path_fails_what_waits() -> None:
    made = await ways(TWO, features=QUEUE)
    await made.say("fail_path", "8:0")
    await made.say("fail_path", "8:16")
    request = begin(read(made.device, 0, 512))  # type: ignore[arg-type]
    await turns()
    assert not request.done()
    await made.say("fail_if_no_path")
    with pytest.raises(IoFailed, match="no usable path"):
        await request
    await made.say("queue_if_no_path")
    request = begin(read(made.device, 0, 512))  # type: ignore[arg-type]
    await turns()
    assert not request.done()
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    assert made.status.startswith("2 0 ")
    assert made.device.live
    assert made.device.live.in_flight == 0


@pytest.mark.parametrize("features", [QUEUE, "1 queue_if_no_path"])
async def test_a_suspend_fails_what_waits(features: str) -> None:
    made = await ways(TWO, features=features)
    for number in ("8:0", "8:16"):
        await made.say("fail_path", number)
    request = begin(read(made.device, 0, 512))  # type: ignore[arg-type]
    await turns()
    await made.device.suspend()
    with pytest.raises(IoFailed, match="no usable path"):
        await request
    with pytest.raises(Busy):
        await made.say("reinstate_path", "8:0")
    assert "queue_if_no_path" not in made.target.table()
    await made.device.resume()
    assert "queue_if_no_path" in made.target.table()


@pytest.mark.parametrize("features", [QUEUE, "1 queue_if_no_path", "0", "2 queue_mode bio"])
async def test_a_suspend_without_a_flush_keeps_what_waits_for_the_next_table(features: str) -> None:
    """Also without queue_if_no_path: a request whose path fails while the device is being suspended is not lost."""
    made = await ways(TWO, features=features)
    made.disks[0].gate = asyncio.Event()
    for disk in made.disks:
        disk.failure = eio
    request = begin(write(made.device, 0, b"x" * 512))
    await turns()
    suspending = asyncio.ensure_future(made.device.suspend(noflush=True))
    await turns()
    assert not suspending.done()
    made.disks[0].gate.set()
    await suspending
    assert not request.done()
    spare = FakeDisk("8:32", SECTORS)
    table = f"0 {SECTORS} multipath {features} 0 1 1 round-robin 0 1 0 8:32"
    await made.device.load(parse_table(table), FakeOpener(spare), False)
    await made.device.resume()
    await request
    assert spare.bytes[:512] == b"x" * 512
    assert made.device.requests[WRITE] == 1
    assert made.device.bytes_done[WRITE] == 512
    assert made.device.errors == 0


async def test_what_was_pushed_back_waits_again_in_the_same_table() -> None:
    made = await ways(TWO, features=QUEUE)
    for number in ("8:0", "8:16"):
        await made.say("fail_path", number)
    request = begin(write(made.device, 0, b"y" * 512))
    await turns()
    await made.device.suspend(noflush=True)
    await made.device.resume()
    await turns()
    assert not request.done()
    await made.say("reinstate_path", "8:0")
    await request


async def test_a_flush_goes_one_way_and_is_tried_again() -> None:
    made = await ways(TWO)
    made.disks[0].failure = eio
    await made.device.submit(Io(FLUSH, 0), 0)
    assert [entry[0] for disk in made.disks for entry in disk.log] == ["flush", "flush"]
    await made.device.submit(Io(WRITE, 512, memoryview(bytes(512)), FUA), 0)
    assert made.disks[1].log[-1] == ("write", 0, 512, FUA)
    await made.device.submit(Io(WRITE_ZEROES, 1024), 512)
    await made.device.submit(Io(DISCARD, 1024), 512)
    assert [entry[0] for entry in made.disks[1].log[-2:]] == ["write_zeroes", "discard"]
    made.disks[1].failure = eio
    with pytest.raises(IoFailed):
        await made.device.submit(Io(FLUSH, 0), 0)


async def test_a_suspend_flushes_one_way_if_there_is_one() -> None:
    made = await ways(TWO)
    await made.device.suspend()
    await made.device.resume()
    assert [disk.log for disk in made.disks] == [[], []]  # nothing was written
    await write(made.device, 0, bytes(512))
    await made.device.suspend()
    assert [[entry[0] for entry in disk.log] for disk in made.disks] == [["write"], ["flush"]]
    await made.device.resume()
    await made.device.suspend(noflush=True)
    await made.device.resume()
    for disk in made.disks:
        disk.failure = eio
    with pytest.raises(IoFailed, match="no usable path"):
        await made.device.suspend()  # both fail while it flushes: that is told
    assert not made.device.suspended
    assert [len(disk.log) for disk in made.disks] == [2, 2]
    await made.device.suspend()  # but it does not keep anybody from loading another table
    assert [len(disk.log) for disk in made.disks] == [2, 2]


async def test_repeat_counts_are_obeyed_where_the_documents_speak() -> None:
    made = await ways("1 1 round-robin 0 2 1 8:0 3 8:16 2", features="0")
    went: list[int] = []
    for _ in range(10):
        before = [len(disk.log) for disk in made.disks]
        await read(made.device, 0, 512)
        went.append([len(disk.log) for disk in made.disks].index(before[0] + 1) if before[0] + 1 == len(made.disks[0].log) else 1)
    assert went == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1]
    assert made.target.table() == "0 0 1 1 round-robin 0 2 1 8:0 3 8:16 2 "
    made.disks[0].failure = eio
    await read(made.device, 0, 512)
    made.disks[0].failure = lambda io, offset: None
    await made.say("reinstate_path", "8:0")
    await read(made.device, 0, 512)
    assert len(made.disks[0].log) == 7  # six reads and the one that failed: 8:16 still has one of its two


async def test_a_repeat_count_of_0_stays() -> None:
    made = await ways("1 1 round-robin 0 2 1 8:0 0 8:16 0", features="0")
    for _ in range(5):
        await read(made.device, 0, 512)
    assert [len(disk.log) for disk in made.disks] == [5, 0]


async def test_groups_are_used_in_order_and_kept() -> None:
    made = await ways("3 2 round-robin 0 1 0 8:0 round-robin 0 1 0 8:16 round-robin 0 1 0 8:32", 3)

    async def goes() -> int:
        before = [len(disk.log) for disk in made.disks]
        await read(made.device, 0, 512)
        return next(number for number, disk in enumerate(made.disks) if len(disk.log) > before[number])

    assert await goes() == 1  # the initial group
    await made.say("fail_path", "8:16")
    assert await goes() == 0
    await made.say("reinstate_path", "8:16")
    assert await goes() == 0  # a group is only left with its last path
    await made.say("switch_group", "3")
    assert await goes() == 2
    await made.say("disable_group", "1")
    assert await goes() == 1
    await made.say("fail_path", "8:16")
    await made.say("fail_path", "8:32")
    assert await goes() == 0  # disabled, but the last one
    assert made.status == "2 0 0 0 3 1 D 0 1 0 8:0 A 0 E 0 1 0 8:16 F 2 E 0 1 0 8:32 F 1 "
    await made.say("switch_group", "2")
    assert await goes() == 0
    assert "D" not in made.status


async def test_in_flight_is_counted_and_the_caller_s_error_ends_it_too() -> None:
    made = await ways("1 1 service-time 0 2 2 8:0 1 1 8:16 1 4")
    for disk in made.disks:
        disk.gate = asyncio.Event()
        disk.failure = lambda io, offset: IoFailed("full", errno.ENOSPC) if io.op is WRITE else None
    reading = made.device.submit(Io(READ, 512, memoryview(bytearray(512))), 0)
    requests = [begin(write(made.device, 0, bytes(1024))), begin(reading)]
    await turns()
    assert made.status == "2 0 0 0 1 1 A 0 2 2 8:0 A 0 0 1 8:16 A 0 1536 4 "
    for disk in made.disks:
        assert disk.gate
        disk.gate.set()
    results = await asyncio.gather(*requests, return_exceptions=True)
    assert [type(one) for one in results] == [IoFailed, type(None)]
    assert made.status == "2 0 0 0 1 1 A 0 2 2 8:0 A 0 0 1 8:16 A 0 0 4 "


async def test_historical_service_time_is_measured() -> None:
    made = await ways("1 1 historical-service-time 0 2 1 8:0 1 8:16 1")
    assert made.target.table() == (
        "3 retain_attached_hw_handler queue_mode bio 0 1 1 historical-service-time 2 972 0 2 1 8:0 0 8:16 0 "
    )
    for _ in range(4):
        await read(made.device, 0, 512)
    words = made.status.split()
    assert words[:12] == ["2", "0", "0", "0", "1", "1", "A", "2", "972", "0", "2", "3"]
    assert words[12:15] == ["8:0", "A", "0"]
    assert int(words[15]) > 1024  # not what it began with
    assert int(words[17]) > 0


async def test_messages_that_are_refused() -> None:
    made = await ways(TWO)
    for words, kind in (
        (["fail_path"], InvalidArgument), (["fail_path", "8:0", "8:16"], InvalidArgument), (["nonsense"], InvalidArgument),
        (["nonsense", "8:0"], InvalidArgument), (["queue_if_no_path", "1"], InvalidArgument),
        (["switch_group", "0"], InvalidArgument), (["switch_group", "2"], InvalidArgument),
        (["disable_group", "x"], InvalidArgument), (["fail_path", "/dev/none"], NotFound),
    ):  # fmt: skip
        with pytest.raises(kind):
            await made.device.message(0, words)
    assert made.actions == []
    assert made.device.event_number == 0


async def test_a_path_is_named_by_number_name_or_as_in_the_table() -> None:
    made = await ways("1 1 round-robin 0 2 0 disk8:0 8:16")
    for word in ("8:0", "disk8:0"):
        await made.say("fail_path", word)
        await made.say("reinstate_path", word)
    assert [action for action, _, _ in made.actions] == ["PATH_FAILED", "PATH_REINSTATED"] * 2


# --- the checker -----------------------------------------------------------------------------------------------------------


async def test_a_check_finds_what_is_dead_and_what_is_back() -> None:
    made = await ways(TWO)
    made.disks[1].failure = eio
    await made.checked()
    assert made.actions == [("PATH_FAILED", "8:16", "1")]
    await made.checked()
    made.disks[1].failure = lambda io, offset: None
    await made.checked()
    assert made.actions[1:] == [("PATH_REINSTATED", "8:16", "2")]
    assert made.disks[0].log == [("read", 0, 512, 0)] * 3


async def test_what_a_message_has_failed_stays_so() -> None:
    made = await ways(TWO)
    await made.say("fail_path", "8:0")
    await made.checked()
    assert made.actions == [("PATH_FAILED", "8:0", "1")]
    assert made.disks[0].log == []
    await made.say("reinstate_path", "8:0")
    made.disks[0].failure = eio
    await made.checked()
    made.disks[0].failure = lambda io, offset: None
    await made.checked()
    assert made.status.count("F") == 0


async def test_a_path_that_does_not_answer_fails_after_a_while() -> None:
    made = await ways(TWO)
    gate = made.disks[0].gate = asyncio.Event()
    await made.checked(100)
    await made.checked(100 + PROBE_SECONDS - 1)
    assert made.actions == []
    await made.checked(100 + PROBE_SECONDS)
    assert made.actions == [("PATH_FAILED", "8:0", "1")]
    assert len(made.disks[0].log) == 1  # one question at a time
    gate.set()
    await turns()
    assert made.actions[1:] == [("PATH_REINSTATED", "8:0", "2")]


async def test_a_check_that_is_refused_as_a_request_is_an_answer() -> None:
    made = await ways(TWO)
    made.disks[0].failure = lambda io, offset: IoFailed("medium", errno.ENODATA)
    await made.checked()
    assert made.actions == []


async def test_nothing_is_checked_while_suspended_and_a_check_ends_with_its_table() -> None:
    made = await ways(TWO)
    made.disks[0].gate = asyncio.Event()
    await made.checked()
    await made.device.suspend(noflush=True)
    await made.checked(PROBE_SECONDS)
    assert made.actions == []
    await made.device.close()
    assert len(made.disks[0].log) == 1


# --- paths that are away, sizes, limits ------------------------------------------------------------------------------------


async def test_a_path_whose_server_is_away_fails_at_resume_and_is_taken_when_it_fits() -> None:
    disks = ways_of(2)
    there = disks[1].size
    disks[1].absent, disks[1].size, disks[1].limits = True, 0, Limits()
    disks[1].failure = eio
    made = await ways(TWO, disks=disks)
    assert made.actions == [("PATH_FAILED", "8:16", "1")]
    assert made.device.limits == disks[0].limits
    disks[1].absent, disks[1].failure = False, lambda io, offset: None
    for size, limits, read_only in (
        (there - 512, disks[0].limits, False), (there, disks[0].limits, True), (there, Limits(logical_block=4096), False),
        (there, Limits(), False),
    ):  # fmt: skip
        disks[1].size, disks[1].limits, disks[1].read_only = size, limits, read_only
        await made.checked()
    assert made.actions[1:] == []
    disks[1].limits = disks[0].limits
    await made.checked()
    assert made.actions[1:] == [("PATH_REINSTATED", "8:16", "2")]


async def test_the_ways_of_a_device_are_counted_while_a_table_has_them() -> None:
    lower = ways_of(2)
    middle = await mapped("middle", f"0 {SECTORS} linear 8:0 0", lower[0], minor=1)
    device = await mapped("mp", f"0 {SECTORS} multipath 0 0 1 1 round-robin 0 2 0 254:1 8:16", middle, lower[1])
    assert [disk.ways for disk in (middle, *lower)] == [1, 1, 1]
    other = FakeDisk("8:32", SECTORS)
    await middle.load(parse_table(f"0 {SECTORS} linear 8:32 0"), FakeOpener(other), False)
    await middle.resume()
    assert [disk.ways for disk in (middle, *lower, other)] == [1, 0, 1, 1]
    await device.load(parse_table(f"0 {SECTORS} multipath 0 0 1 1 round-robin 0 1 0 8:16"), FakeOpener(lower[1]), False)
    assert lower[1].ways == 2
    await device.resume()
    assert [disk.ways for disk in (middle, *lower, other)] == [0, 0, 1, 0]
    await device.close()
    assert lower[1].ways == 0


async def test_extents_come_from_a_path_that_works() -> None:
    made = await ways(TWO)
    made.disks[0].runs = made.disks[1].runs = [(8 * 512, 0), ((SECTORS - 8) * 512, HOLE)]
    assert await made.device.extents(0, 16 * 512) == [(8 * 512, 0), (8 * 512, HOLE)]

    async def broken(offset: int, length: int) -> list[tuple[int, int]]:
        raise IoFailed("gone")

    made.disks[0].extents = broken  # type: ignore[method-assign]
    assert await made.device.extents(0, 16 * 512) == [(16 * 512, 0)]
    assert made.actions == [("PATH_FAILED", "8:0", "1")]
    assert await made.device.extents(0, 16 * 512) == [(8 * 512, 0), (8 * 512, HOLE)]


async def test_alone_in_its_table() -> None:
    disks = ways_of(2)
    with pytest.raises(InvalidArgument, match="line 2: multipath must be the only target"):
        await build(f"0 8 zero\n8 8 multipath 0 0 {TWO}", *disks)
    assert [disk.openers for disk in disks] == [0, 0]


@pytest.mark.parametrize("kind", ["round-robin", "queue-length", "service-time", "historical-service-time"])
@pytest.mark.parametrize("seed", range(4))
async def test_any_order_of_failures_loses_nothing_while_a_path_works(kind: str, seed: int) -> None:
    """Requests, failures, messages and checks at random against a model of the bytes; disk 2 always works."""
    rng = random.Random(seed)
    made = await ways(f"2 1 {kind} 0 2 0 8:0 8:16 {kind} 0 1 0 8:32", 3)
    model = bytearray(SECTORS * 512)
    broken: Callable[[Io, int], Exception | None] = lambda io, offset: IoFailed("x") if rng.random() < 0.5 else None  # noqa: E731
    for step in range(200):
        for disk in made.disks[:2]:
            if rng.random() < 0.1:
                disk.failure = rng.choice([eio, broken, lambda io, offset: None])
        if rng.random() < 0.2:
            await made.say(rng.choice(["fail_path", "reinstate_path"]), rng.choice(["8:0", "8:16"]))
        if rng.random() < 0.1:
            await made.say(rng.choice(["switch_group", "disable_group", "enable_group"]), rng.choice("12"))
        if rng.random() < 0.1:
            await made.checked(step)
        sectors = rng.sample(range(SECTORS), 4)
        data = [rng.randbytes(512) for _ in sectors]
        await asyncio.gather(*(write(made.device, at * 512, one) for at, one in zip(sectors, data, strict=True)))
        for at, one in zip(sectors, data, strict=True):
            model[at * 512 : at * 512 + 512] = one
        at = rng.randrange(SECTORS)
        assert await read(made.device, at * 512, 512) == model[at * 512 : at * 512 + 512]
        states = made.status.split()
        assert states.count("F") == sum(path.active is False for path in made.target._paths)  # type: ignore[attr-defined]
    assert made.disks[0].bytes == model
    failed = sum(action == "PATH_FAILED" for action, _, _ in made.actions)
    assert failed == sum(path.failures for path in made.target._paths)  # type: ignore[attr-defined]
    assert failed > 3
    assert all(not path.in_flight and not path.in_flight_bytes for path in made.target._paths)  # type: ignore[attr-defined]
    await made.device.close()


async def test_table_reads_back_as_itself() -> None:
    disks = ways_of(3)
    for text in (
        f"{QUEUE} 0 2 2 round-robin 0 1 0 8:0 service-time 0 2 2 8:16 5 7 8:32 1 0",
        "5 pg_init_retries 3 pg_init_delay_msecs 0 queue_if_no_path 1 alua 1 1 queue-length 0 1 1 8:0 9",
        "0 0 0 0", "0 0 1 1 historical-service-time 2 1 2 2 1 8:0 1 8:16 1",
    ):  # fmt: skip
        first = await build(f"0 {SECTORS} multipath {text}", *disks)
        line = first.table_lines()[0].params
        second = await build(f"0 {SECTORS} multipath {line}", *disks)
        assert second.table_lines()[0].params == line
        for table in (first, second):
            await table.close()


# --- storage that restarts -------------------------------------------------------------------------------------------------


class Storage:
    """Storage behind two servers, with a cache that a restart empties."""

    def __init__(self) -> None:
        self.cached = bytearray(SECTORS * 512)
        self.durable = bytes(self.cached)
        self.disks = [ServerDisk(f"8:{16 * number}", SECTORS, storage=self) for number in range(2)]

    def restart(self) -> None:
        """The power fails: no path works, and the cache is lost."""
        self.cached[:] = self.durable
        for disk in self.disks:
            disk.failure = eio


class ServerDisk(FakeDisk):
    """A server of such storage."""

    def __init__(self, number: str, sectors: int, *, storage: Storage) -> None:
        super().__init__(number, sectors)
        self.storage = storage
        self.bytes = storage.cached

    def restarts(self) -> bool:
        return True

    async def submit(self, io: Io, offset: int) -> None:
        await super().submit(io, offset)
        if io.op is FLUSH or io.flags & FUA:
            self.storage.durable = bytes(self.storage.cached)

    def back(self) -> None:
        self.failure = lambda io, offset: None


async def test_what_the_storage_forgot_is_written_again_in_order() -> None:
    storage = Storage()
    made = await ways(TWO, features="1 queue_if_no_path", disks=list(storage.disks))
    await write(made.device, 0, b"1" * 1024)
    await made.device.submit(Io(FLUSH, 0), 0)
    await write(made.device, 0, b"2" * 512)
    await write(made.device, 256 * 2, b"3" * 512)
    await write(made.device, 0, b"4" * 512)
    await made.device.submit(Io(WRITE_ZEROES, 512), 1024)
    seen = bytes(storage.cached)
    storage.restart()
    assert storage.cached != seen
    reading, writing = begin(read(made.device, 0, 512)), begin(write(made.device, 2048, b"5" * 512))  # type: ignore[arg-type]
    await turns()
    for disk in storage.disks:
        disk.log.clear()
    storage.disks[1].back()
    await made.checked()
    assert await reading == b"4" * 512  # type: ignore[func-returns-value]
    await writing
    assert storage.cached[:2048] == seen[:2048]
    assert [(entry[0], entry[1]) for entry in storage.disks[1].log if entry[2:] != (512, 0) or entry[0] != "read"] == [
        ("write", 0), ("write", 512), ("write", 0), ("write_zeroes", 1024), ("write", 2048),
    ]  # fmt: skip
    await made.device.submit(Io(FLUSH, 0), 0)
    storage.restart()
    storage.disks[0].back()
    storage.disks[0].log.clear()
    request = begin(write(made.device, 0, b"6" * 512))
    await turns()
    await made.checked()
    await made.checked()
    await request
    assert [entry[0] for entry in storage.disks[0].log if entry[0] != "read"] == ["write"]  # all had been flushed


async def test_nothing_is_repeated_while_a_path_holds() -> None:
    storage = Storage()
    made = await ways(TWO, disks=list(storage.disks))
    await write(made.device, 0, b"1" * 512)
    storage.disks[1].failure = eio
    for number in range(4):
        await write(made.device, 512 * number, b"2" * 512)
    assert len(storage.disks[0].log) + len(storage.disks[1].log) == 6  # one of the four was tried twice


async def test_paths_that_are_lost_one_after_the_other_count_as_well() -> None:
    """By the time that the second is seen to be dead the first may be back: the storage has restarted in between."""
    storage = Storage()
    made = await ways(TWO, disks=list(storage.disks))
    await write(made.device, 0, b"1" * 512)
    await write(made.device, 512, b"2" * 512)
    seen = bytes(storage.cached)
    storage.restart()
    storage.disks[0].back()
    await made.say("fail_path", "8:0")
    await made.say("reinstate_path", "8:0")
    await made.checked()  # finds 8:16 dead
    assert await read(made.device, 0, 1024) == seen[:1024]
    assert storage.cached == seen


async def test_repeating_waits_for_what_is_under_way_and_goes_on_by_another_path() -> None:
    storage = Storage()
    made = await ways(TWO, features="1 queue_if_no_path", disks=list(storage.disks))
    for number in range(3):
        await write(made.device, 512 * number, bytes([number + 1]) * 512)
    seen = bytes(storage.cached)
    hung = storage.disks[1].gate = asyncio.Event()
    slow = begin(read(made.device, 0, 512))  # type: ignore[arg-type]
    await turns()
    storage.restart()
    await made.say("fail_path", "8:16")
    waiting = begin(write(made.device, 0, b"9" * 512))
    await turns()  # by 8:0, which fails
    storage.disks[0].back()
    await made.say("reinstate_path", "8:0")
    await turns()
    assert not waiting.done()  # a request is still with 8:16
    broken = iter([None, IoFailed("again")])
    storage.disks[0].failure = lambda io, offset: next(broken, None) if io.op is WRITE else None
    hung.set()
    storage.disks[1].back()
    await turns()
    await made.say("reinstate_path", "8:0")
    await waiting
    await slow
    assert storage.cached[512:] == seen[512:]
    assert storage.cached[:512] == b"9" * 512


async def test_what_cannot_be_written_again_is_told_by_the_next_flush() -> None:
    storage = Storage()
    made = await ways("1 1 round-robin 0 1 0 8:0", features="1 queue_if_no_path", disks=[storage.disks[0]])
    await write(made.device, 0, b"1" * 512)
    storage.restart()
    waiting = begin(write(made.device, 512, b"2" * 512))
    await turns()
    storage.disks[0].failure = lambda io, offset: IoFailed("full", errno.ENOSPC) if (io.op, offset) == (WRITE, 0) else None
    await made.checked()
    await waiting
    with pytest.raises(IoFailed, match="forgot writes"):
        await made.device.submit(Io(FLUSH, 0), 0)
    await made.device.submit(Io(FLUSH, 0), 0)


async def test_what_is_kept_is_limited_by_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdmap.targets.multipath.memory.MAX_SIZE", 4096)
    storage = Storage()
    made = await ways(TWO, disks=list(storage.disks))
    await asyncio.gather(*(write(made.device, 512 * number, b"x" * 512) for number in range(16)))
    flushes = [entry for disk in storage.disks for entry in disk.log if entry[0] == "flush"]
    assert 1 <= len(flushes) <= 4
    target = made.target
    assert isinstance(target, Multipath)
    assert not target._memory.full


async def test_a_flush_does_not_cover_what_was_acknowledged_while_it_was_under_way() -> None:
    storage = Storage()
    made = await ways(TWO, disks=list(storage.disks))
    gate = storage.disks[0].gate = asyncio.Event()
    flushing = begin(made.device.submit(Io(FLUSH, 0), 0))
    await turns()
    await write(made.device, 0, b"1" * 512)  # by 8:16
    await made.say("fail_path", "8:16")
    await made.say("reinstate_path", "8:16")
    gate.set()
    await flushing
    storage.durable = bytes(SECTORS * 512)  # it had begun before the write
    storage.restart()
    storage.disks[1].back()
    await made.checked()  # finds 8:0 dead: both were lost since the write
    assert await read(made.device, 0, 512) == b"1" * 512


async def test_flushes_that_no_client_asked_for_do_not_hide_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage()
    made = await ways("1 1 round-robin 0 1 0 8:0", features="1 queue_if_no_path", disks=[storage.disks[0]])
    await write(made.device, 0, b"1" * 512)
    storage.restart()
    waiting = begin(write(made.device, 512, b"2" * 512))
    await turns()
    storage.disks[0].failure = lambda io, offset: IoFailed("full", errno.ENOSPC) if (io.op, offset) == (WRITE, 0) else None
    await made.checked()
    await waiting
    monkeypatch.setattr("nbdmap.targets.multipath.memory.MAX_SIZE", 512)
    await write(made.device, 1024, b"3" * 512)
    await made.device.suspend()
    await made.device.resume()
    assert [entry[0] for entry in storage.disks[0].log].count("flush") >= 2
    with pytest.raises(IoFailed, match="forgot writes"):
        await made.device.submit(Io(FLUSH, 0), 0)


async def test_a_suspend_waits_until_all_is_written_again() -> None:
    storage = Storage()
    made = await ways("1 1 round-robin 0 1 0 8:0", features="1 queue_if_no_path", disks=[storage.disks[0]])
    await write(made.device, 0, b"1" * 512)
    storage.restart()
    waiting = begin(write(made.device, 512, b"2" * 512))
    await turns()
    storage.disks[0].back()
    await made.say("reinstate_path", "8:0")
    gate = storage.disks[0].gate = asyncio.Event()
    await turns()
    suspending = asyncio.ensure_future(made.device.suspend(noflush=True))
    await turns()
    assert not suspending.done()
    gate.set()
    await suspending
    assert storage.cached[:1024] == b"1" * 512 + bytes(512)
    await made.device.resume()
    await waiting
    assert storage.cached[512:1024] == b"2" * 512

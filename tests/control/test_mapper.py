"""nbdmap.control.mapper: what names mean, who shares what, and that nothing stays behind."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nbdmap.block.device import Device
from nbdmap.block.file import FileDisk
from nbdmap.block.memory import MemoryDisk
from nbdmap.block.reconnect import Reconnect
from nbdmap.block.remote import RemoteDisk
from nbdmap.control import mapper as module
from nbdmap.control.events import Events
from nbdmap.control.mapper import Mapper, check_name
from nbdmap.dm.device import MappedDevice
from nbdmap.dm.table import parse_table
from nbdmap.errors import AccessRefused, Busy, InvalidArgument, IoFailed, NbdmapError, NoSuchDevice, NotFound
from nbdmap.nbd.uri import parse_uri
from tests.support.disks import FakeDisk, eio, read, write
from tests.support.types import Slow, Stop, fresh, types


@pytest.fixture
def slow() -> type[Slow]:
    return fresh()


@pytest.fixture
async def mapper(slow: type[Slow]) -> AsyncIterator[Mapper]:
    """A mapper with the disks d0 and d1; at the end everything can be closed and nothing is open."""
    made = Mapper(types(slow), Events(lambda: 0.0))
    made.disks |= {f"d{number}": FakeDisk(f"7:{number}", 64) for number in range(2)}
    before = len(os.listdir("/proc/self/fd"))
    disks = dict(made.disks)
    yield made
    slow.stops.clear()
    slow.failing.clear()
    await made.close()
    assert not made._opened
    assert not made._made
    assert all(disk.openers == 0 and disk.closed for disk in disks.values() if isinstance(disk, FakeDisk))
    assert len(os.listdir("/proc/self/fd")) == before


def image(directory: Path, name: str = "a.img") -> Path:
    path = directory / name
    path.write_bytes(bytes(8 * 512))
    return path


def actions(mapper: Mapper) -> list[tuple[str, str]]:
    """(name, action) of every uevent from now on."""
    seen: list[tuple[str, str]] = []
    mapper.events.publish = lambda device, action, keys: seen.append((device.name, action))  # type: ignore[method-assign]
    return seen


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# --- names -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "x" * 127, "ä b\\", "254:0", "é" * 63])
def test_names_that_may_be(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "x" * 128, "é" * 64, "a/b", "a\0", ".", "..", "control"])
async def test_names_that_may_not_be(mapper: Mapper, name: str) -> None:
    with pytest.raises(InvalidArgument, match="device"):
        await mapper.create(name)
    device = await mapper.create("good")
    with pytest.raises(InvalidArgument, match="device"):
        mapper.rename(device, name)


async def test_a_device_is_found_by_name_path_number_and_uuid(mapper: Mapper) -> None:
    device = await mapper.create("a", uuid="LVM-x", minor=7)
    for reference in ("a", "/dev/mapper/a", "254:7"):
        assert mapper.find(reference) is device
    assert mapper.find_uuid("LVM-x") is device
    for reference in ("b", "/dev/mapper/b", "254:8", "/dev/a", ""):
        with pytest.raises(NoSuchDevice, match=f"no device '{reference}'"):
            mapper.find(reference)
    with pytest.raises(NoSuchDevice, match="no device with uuid ''"):
        mapper.find_uuid("")


async def test_numbers_are_the_lowest_free_ones(mapper: Mapper) -> None:
    mapper.reserved = frozenset({"254:1"})
    numbers = [(await mapper.create(name)).number for name in "abc"]
    assert numbers == ["254:0", "254:2", "254:3"]
    await mapper.remove(mapper.find("a"))
    assert (await mapper.create("d")).number == "254:0"
    assert (await mapper.create("e", minor=1)).number == "254:1"  # who asks for it gets it
    with pytest.raises(Busy, match="minor number 3 is in use"):
        await mapper.create("f", minor=3)
    for minor in (-1, module.MINORS):
        with pytest.raises(InvalidArgument, match=f"minor number {minor} is not in the range"):
            await mapper.create("f", minor=minor)


async def test_names_and_uuids_are_unique(mapper: Mapper) -> None:
    first = await mapper.create("a", uuid="u")
    second = await mapper.create("b")
    with pytest.raises(Busy, match="the name 'a' is in use"):
        await mapper.create("a")
    with pytest.raises(Busy, match="the uuid 'u' is in use"):
        await mapper.create("c", uuid="u")
    with pytest.raises(InvalidArgument, match="at most 128 bytes"):
        await mapper.create("c", uuid="x" * 129)
    with pytest.raises(Busy, match="the uuid 'u' is in use"):
        mapper.set_uuid(second, "u")
    with pytest.raises(InvalidArgument, match="is empty"):
        mapper.set_uuid(second, "")
    with pytest.raises(InvalidArgument, match="a already has the uuid 'u'"):
        mapper.set_uuid(first, "v")
    mapper.set_uuid(second, "v")
    assert mapper.find_uuid("v") is second
    for name in ("a", "b"):
        with pytest.raises(Busy):
            mapper.rename(first, name)
    mapper.rename(first, "c")
    assert (mapper.find("c"), first.name, "a" in mapper.devices) == (first, "c", False)


# --- what a reference means ------------------------------------------------------------------------------------------------


async def test_the_order_in_which_references_are_looked_up(mapper: Mapper, tmp_path: Path) -> None:
    """A mapped device before a disk before a path; with nothing else of that name, the path."""
    opener = mapper.opener(str(tmp_path))
    image(tmp_path, "x")
    found = await opener.open("x", False)
    assert isinstance(found, FileDisk)
    mapper.disks["x"] = disk = FakeDisk("7:9")
    assert await opener.open("x", False) is disk
    device = await mapper.create("x", table="0 8 zero")
    assert await opener.open("x", False) is device
    assert await opener.open("/dev/mapper/x", False) is device
    assert await opener.open(device.number, False) is device
    assert await opener.open("7:9", False) is disk
    assert await opener.open(found.number, False) is found
    assert await opener.open("./x", False) is found
    assert (found.openers, disk.openers, device.openers) == (3, 2, 3)
    for one in (found, disk, device):
        while one.openers:
            await opener.release(one)
    assert mapper._opened == {}


async def test_references_that_name_nothing(mapper: Mapper, tmp_path: Path) -> None:
    opener = mapper.opener(str(tmp_path))
    for reference, kind, complaint in [
        ("nothing", NotFound, "no mapped device, disk or file has this name"),
        ("nul\0", NotFound, "no mapped device, disk or file has this name"),
        ("9:9", NoSuchDevice, "no device has the number 9:9"),
        ("x" * 300, IoFailed, "File name too long"),
        (".", InvalidArgument, "is a directory"),
        ("nbd://[", InvalidArgument, "is not HOST"),
    ]:
        with pytest.raises(kind, match=complaint):
            await opener.open(reference, False)
    await mapper.create("bare")
    with pytest.raises(NoSuchDevice, match="bare never had a table"):
        await opener.open("bare", False)
    assert mapper.find("bare").openers == 0


async def test_what_cannot_be_written_is_opened_read_only_alone(mapper: Mapper) -> None:
    mapper.disks["cd"] = FakeDisk("11:0", read_only=True)
    with pytest.raises(AccessRefused, match="cd is read-only; load the table read-only"):
        await mapper.create("a", table="0 8 linear cd 0")
    device = await mapper.create("a", table="0 8 linear cd 0", read_only=True)
    assert device.read_only
    assert mapper.disks["cd"].openers == 1


async def test_files_are_shared_by_inode_and_mode(mapper: Mapper, tmp_path: Path) -> None:
    path = image(tmp_path)
    (tmp_path / "link").symlink_to(path)
    os.link(path, tmp_path / "hard")
    one = await mapper.open("a.img", False, str(tmp_path))
    for reference in (str(path), str(tmp_path / "link"), str(tmp_path / "hard")):
        assert await mapper.open(reference, False, "/") is one
    other = await mapper.open(str(path), True, "/")
    assert other is not one
    assert (one.number, one.openers, one.read_only, other.openers, other.read_only) == ("240:0", 4, False, 1, True)
    assert other.number == "240:0"  # one disk, whatever the mode
    second = await mapper.open(str(image(tmp_path, "b.img")), False, "/")
    assert second.number == "240:1"
    assert [mapper.knows_number(number) for number in ("240:0", "240:1", "240:2", "7:1")] == [True, True, False, True]
    for device, count in ((one, 4), (other, 1), (second, 1)):
        for _ in range(count):
            await mapper.release(device)
    assert mapper._opened == {}
    again = await mapper.open(str(path), False, "/")
    assert (again.number, again is one) == ("240:0", False)  # it keeps its number
    await mapper.release(again)


@pytest.mark.parametrize("first", [True, False])
async def test_a_number_means_what_is_open_in_the_mode_that_is_wanted(mapper: Mapper, tmp_path: Path, first: bool) -> None:
    path = str(image(tmp_path))
    opened = {mode: await mapper.open(path, mode, "/") for mode in (first, not first)}
    for mode in (True, False):
        assert await mapper.open("240:0", mode, "/") is opened[mode]
    await mapper.release(opened[True])
    await mapper.release(opened[True])
    assert await mapper.open("240:0", True, "/") is opened[False]  # what can be written can be read
    for _ in range(3):
        await mapper.release(opened[False])


async def test_files_that_are_opened_at_once_get_different_numbers(mapper: Mapper, tmp_path: Path) -> None:
    paths = [str(image(tmp_path, f"{number}.img")) for number in range(4)]
    opened = await asyncio.gather(*(mapper.open(path, False, "/") for path in paths))
    assert sorted(device.number for device in opened) == [f"240:{number}" for number in range(4)]
    for device in opened:
        await mapper.release(device)


async def test_a_file_that_is_opened_twice_at_once_is_shared(mapper: Mapper, tmp_path: Path) -> None:
    path = str(image(tmp_path))
    opened = await asyncio.gather(*(mapper.open(path, read_only, "/") for read_only in (False, True, False, False)))
    assert opened[0] is opened[2] is opened[3] is not opened[1]
    assert {device.number for device in opened} == {"240:0"}
    assert (opened[0].openers, opened[1].openers) == (3, 1)
    for device in opened:
        await mapper.release(device)


class Made(FakeDisk):
    """A disk that takes its time to close."""

    def __init__(self, number: str, closing: Stop) -> None:
        super().__init__(number)
        self._closing = closing

    async def close(self) -> None:
        await self._closing.wait()
        await super().close()


async def test_a_disk_that_is_closed_by_its_last_user_meanwhile_is_not_handed_out(
    mapper: Mapper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two open one file; the slower one closes its own to share the other's, which is given back before that has ended."""
    path = str(image(tmp_path))
    waits = [Stop() for _ in range(3)]
    waits[2].go_on.set()
    closings = [Stop() for _ in range(3)]
    closings[0].go_on.set()
    closings[2].go_on.set()
    made: list[Made] = []

    async def open_slowly(*_: Any, number: str, **__: Any) -> Device:
        turn = len(made)
        made.append(Made(number, closings[turn]))
        await waits[turn].wait()
        return made[turn]

    monkeypatch.setattr(FileDisk, "open", open_slowly)
    first = asyncio.ensure_future(mapper.open(path, False, "/"))
    second = asyncio.ensure_future(mapper.open(path, False, "/"))
    await waits[0].reached.wait()
    await waits[1].reached.wait()
    waits[0].go_on.set()
    assert await first is made[0]
    waits[1].go_on.set()
    await closings[1].reached.wait()  # the second closes what it does not need
    await mapper.release(made[0])
    assert made[0].closed
    closings[1].go_on.set()
    assert await second is made[2]
    assert not made[2].closed
    await mapper.release(made[2])


async def test_block_devices_have_their_own_numbers(mapper: Mapper, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.stat

    def stat(path: Any, **keywords: Any) -> os.stat_result:
        if str(path) != "/dev/sdz":
            return real(path, **keywords)
        fields = list(real("/dev/null"))
        fields[0] = 0o060660
        return os.stat_result(fields, {"st_rdev": os.makedev(8, 400)})

    async def opened(path: str, *, name: str, number: str, read_only: bool) -> Device:
        return FakeDisk(number, read_only=read_only)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        patch.setattr(FileDisk, "open", opened)
        device = await mapper.open("/dev/sdz", False, "/")
        assert device.number == "8:400"
        assert await mapper.open("8:400", False, "/") is device
    await mapper.release(device)
    await mapper.release(device)


async def test_remote_disks_are_shared_by_uri_and_closed(mapper: Mapper, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FakeDisk] = []

    async def connect(uri: object, *, name: str, number: str, read_only: bool, may_be_absent: bool) -> Device:
        made.append(FakeDisk(number, read_only=read_only or "cd" in str(uri)))
        return made[-1]

    monkeypatch.setattr(RemoteDisk, "connect", connect)
    one = await mapper.open("nbd://far/x", False, "/")
    assert await mapper.open("nbd://far:10809/x", False, "/") is one
    assert one.number == "43:0"
    await mapper.release(one)
    await mapper.release(one)
    with pytest.raises(AccessRefused, match="is read-only"):
        await mapper.open("nbds+unix:///cd?socket=/s", False, "/")
    assert [disk.closed for disk in made] == [True, True]  # a refused one, too
    assert mapper._opened == {}


async def test_numbers_of_real_devices_are_not_given_to_files(mapper: Mapper, monkeypatch: pytest.MonkeyPatch) -> None:
    mapper.reserved = frozenset({"240:1"})
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/sys/dev/block/240:0")
    assert mapper.free_number(module.FILE_MAJOR) == "240:2"


async def test_disks_are_described_as_a_configuration_has_them(
    mapper: Mapper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = {
        "ram": MemoryDisk("ram", "1:0", 4096),
        "disk0": MemoryDisk("disk0", "1:1", 8192, limit=4096, read_only=True),
    }
    mapper.disks |= real
    await mapper.create("disk1")
    path = str(image(tmp_path))
    opened = [await mapper.open(path, read_only, "/") for read_only in (True, False)]
    direct = FileDisk(str(tmp_path / "b.img"), "b", "240:9", read_only=True, direct=True, clock=lambda: 0.0)
    mapper.disks["direct"] = direct
    far = RemoteDisk.__new__(RemoteDisk)
    far.uri, far.number, far.read_only, far.openers = parse_uri("nbd://far/x"), "43:0", False, 0
    far._policy = Reconnect(silence_s=1.5)
    with monkeypatch.context() as patch:
        patch.setitem(mapper._opened, ("far", False), far)
        described = mapper.describe_disks()
    assert described == {
        "d0": {"number": "7:0"},
        "d1": {"number": "7:1"},
        "ram": {"memory": 4096, "number": "1:0"},
        "disk0": {"memory": 8192, "limit": 4096, "number": "1:1", "read_only": True},
        "direct": {"file": str(tmp_path / "b.img"), "direct": True, "number": "240:9", "read_only": True},
        "disk2": {"file": path, "number": "240:0"},  # one disk, in the mode that can do more
        "disk3": {"nbd": "nbd://far/x", "timeout": "1500ms", "number": "43:0"},
    }
    for device in opened:
        await mapper.release(device)


# --- create ----------------------------------------------------------------------------------------------------------------


async def test_a_half_built_device_is_seen_by_nobody_and_keeps_its_names(mapper: Mapper, slow: type[Slow]) -> None:
    slow.stops["construct"] = stop = Stop()
    seen = actions(mapper)
    creating = asyncio.ensure_future(mapper.create("a", "u", table="0 8 slow d0 0"))
    await stop.reached.wait()
    assert mapper.devices == {}
    for reference in ("a", "254:0"):
        with pytest.raises(NoSuchDevice):
            mapper.find(reference)
        with pytest.raises((NoSuchDevice, NotFound)):
            await mapper.open(reference, False, "/nowhere")
    with pytest.raises(NoSuchDevice):
        mapper.find_uuid("u")
    with pytest.raises(Busy, match="name 'a'"):
        await mapper.create("a")
    with pytest.raises(Busy, match="uuid 'u'"):
        await mapper.create("b", "u")
    with pytest.raises(Busy, match="minor number 0"):
        await mapper.create("b", minor=0)
    other = await mapper.create("b")
    assert other.number == "254:1"
    with pytest.raises(Busy):
        mapper.rename(other, "a")
    with pytest.raises(Busy):
        mapper.set_uuid(other, "u")
    assert seen == [("b", "add")]
    stop.go_on.set()
    device = await creating
    assert mapper.find("a") is device
    assert seen == [("b", "add"), ("a", "add"), ("a", "change")]


@pytest.mark.parametrize(
    ("place", "stage"), [("construct", "reload"), ("preresume", "resume"), ("words", "reload"), ("later line", "reload")]
)
async def test_a_create_that_fails_leaves_nothing(
    mapper: Mapper, slow: type[Slow], tmp_path: Path, place: str, stage: str
) -> None:
    image(tmp_path)
    slow.failing.add(place)
    table = "0 8 slow a.img 0" + {"words": " more", "later line": "\n8 8 linear nowhere 0"}.get(place, "")
    seen = actions(mapper)
    with pytest.raises(NbdmapError) as caught:
        await mapper.create("a", "u", table=table, directory=str(tmp_path))
    assert (caught.value.stage, caught.value.number) == (stage, "254:0" if stage == "reload" else "")
    assert (mapper.devices, mapper._made, mapper._opened) == ({}, {}, {})
    assert ("a", "add") not in seen
    slow.failing.clear()
    device = await mapper.create("a", "u", table="0 8 slow a.img 0", directory=str(tmp_path))  # its names are free
    assert device.number == "254:0"


@pytest.mark.parametrize("place", ["construct", "preresume"])
async def test_a_create_that_is_cancelled_leaves_nothing(
    mapper: Mapper, slow: type[Slow], tmp_path: Path, place: str
) -> None:
    image(tmp_path)
    slow.stops[place] = stop = Stop()
    creating = asyncio.ensure_future(mapper.create("a", table="0 8 slow a.img 0", directory=str(tmp_path)))
    await stop.reached.wait()
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    assert (mapper.devices, mapper._made, mapper._opened) == ({}, {}, {})


async def test_a_create_that_can_neither_be_done_nor_undone_tells_the_first_failure(
    mapper: Mapper, slow: type[Slow], caplog: pytest.LogCaptureFixture
) -> None:
    slow.failing |= {"preresume", "close"}
    with pytest.raises(IoFailed, match="preresume fails"):
        await mapper.create("a", table="0 8 slow d0 0")
    assert "close fails" in caplog.text
    assert mapper._made == {}
    mapper.disks["d0"].openers = 0  # a target that cannot be closed keeps what it stands on


async def test_two_creates_of_one_name(mapper: Mapper, slow: type[Slow]) -> None:
    slow.stops["construct"] = stop = Stop()
    creating = [asyncio.ensure_future(mapper.create("a", table=f"0 8 slow d{number} 0")) for number in range(2)]
    await stop.reached.wait()
    await turns()
    stop.go_on.set()
    device, refused = await asyncio.gather(*creating, return_exceptions=True)
    assert isinstance(device, MappedDevice)
    assert isinstance(refused, Busy)
    assert mapper.disks["d1"].openers == 0


# --- remove ----------------------------------------------------------------------------------------------------------------


async def test_an_open_device_is_busy_or_goes_at_its_last_close(mapper: Mapper) -> None:
    seen = actions(mapper)
    lower = await mapper.create("lower", table="0 8 linear d0 0")
    upper = await mapper.create("upper", table="0 8 linear lower 0")
    with pytest.raises(Busy, match=r"lower is open \(1 times\)"):
        await mapper.remove(lower)
    assert not await mapper.remove(lower, deferred=True)
    assert lower.deferred_remove
    await mapper.open("lower", False, "/")  # it is still there
    assert await mapper.remove(upper)
    assert mapper.find("lower") is lower
    await mapper.release(lower)
    assert mapper.devices == {}
    assert [name for name, action in seen if action == "remove"] == ["upper", "lower"]
    assert mapper.disks["d0"].openers == 0


async def test_an_unused_device_is_removed_at_once_even_if_deferred(mapper: Mapper) -> None:
    assert await mapper.remove(await mapper.create("a"), deferred=True)


async def test_a_device_is_removed_once(mapper: Mapper, slow: type[Slow]) -> None:
    device = await mapper.create("a", table="0 8 slow d0 0")
    slow.stops["close"] = stop = Stop()
    removing = asyncio.ensure_future(mapper.remove(device))
    await stop.reached.wait()
    with pytest.raises(NoSuchDevice):
        await mapper.remove(device)
    successor = await mapper.create("a", table="0 8 zero")  # the name is free already
    with pytest.raises(NoSuchDevice):
        await mapper.remove(device)
    stop.go_on.set()
    assert await removing
    assert mapper.find("a") is successor


async def test_a_remove_that_is_cancelled_is_done_all_the_same(
    mapper: Mapper, slow: type[Slow], tmp_path: Path
) -> None:
    """Half of it is done: there is no device to come back to, and what stands below must be given back."""
    image(tmp_path)
    seen = actions(mapper)
    device = await mapper.create("a", table="0 8 slow a.img 0", directory=str(tmp_path))
    await device.load(parse_table("0 8 linear d0 0"), mapper.opener(), False)
    slow.stops["close"] = stop = Stop()
    removing = asyncio.ensure_future(mapper.remove(device))
    await stop.reached.wait()
    removing.cancel()
    await turns()
    removing.cancel()
    await turns()
    stop.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await removing
    assert (mapper._opened, mapper.disks["d0"].openers, slow.closed) == ({}, 0, 1)
    assert seen[-1] == ("a", "remove")


async def test_a_device_that_cannot_be_closed_is_gone_all_the_same(mapper: Mapper, slow: type[Slow]) -> None:
    seen = actions(mapper)
    device = await mapper.create("a", table="0 8 slow d0 0")
    waiting = asyncio.ensure_future(device.wait())
    await turns()
    slow.failing.add("close")
    with pytest.raises(IoFailed, match="close fails"):
        await mapper.remove(device)
    assert mapper.devices == {}
    assert seen[-1] == ("a", "remove")
    await waiting
    mapper.disks["d0"].openers = 0


async def test_remove_waits_for_a_load_and_a_load_that_comes_later_is_refused(mapper: Mapper, slow: type[Slow]) -> None:
    device = await mapper.create("a")
    slow.stops["construct"] = stop = Stop()
    loading = asyncio.ensure_future(device.load(parse_table("0 8 slow d0 0"), mapper.opener(), False))
    await stop.reached.wait()
    removing = asyncio.ensure_future(mapper.remove(device))
    await turns()
    late = [
        asyncio.ensure_future(work)
        for work in (
            device.load(parse_table("0 8 linear d1 0"), mapper.opener(), False), device.resume(), device.suspend(),
        )
    ]  # fmt: skip
    await turns()
    assert not removing.done()
    stop.go_on.set()
    await loading
    assert await removing
    assert [type(error) for error in await asyncio.gather(*late, return_exceptions=True)] == [NoSuchDevice] * 3
    assert [disk.openers for disk in mapper.disks.values()] == [0, 0]


async def test_a_device_cannot_be_opened_while_it_is_removed(mapper: Mapper, slow: type[Slow]) -> None:
    device = await mapper.create("a", table="0 8 slow d0 0")
    slow.stops["close"] = stop = Stop()
    removing = asyncio.ensure_future(mapper.remove(device))
    await stop.reached.wait()
    with pytest.raises(NotFound):
        await mapper.open("a", False, "/nowhere")
    with pytest.raises(NoSuchDevice):
        await mapper.open("254:0", False, "/nowhere")
    stop.go_on.set()
    await removing
    assert device.openers == 0


# --- the whole -------------------------------------------------------------------------------------------------------------


async def test_top_down(mapper: Mapper) -> None:
    await mapper.create("c", table="0 8 zero")
    await mapper.create("a", table="0 8 linear c 0")
    await mapper.create("d", table="0 8 linear a 0\n8 8 linear c 0")
    await mapper.create("b", table="0 8 zero")
    await mapper.find("b").load(parse_table("0 8 linear d 0"), mapper.opener(), False)  # the inactive table counts, too
    order = [device.name for device in mapper.top_down()]
    assert [name for name in order if name != "b"] == ["d", "a", "c"]
    assert order.index("b") < order.index("d")


async def test_close_flushes_from_the_top_and_drops_everything(mapper: Mapper, tmp_path: Path) -> None:
    image(tmp_path)
    lower = await mapper.create("lower", table="0 8 linear d0 0")
    upper = await mapper.create("upper", table="0 8 linear lower 0")
    await mapper.create("file", table="0 8 linear a.img 0", directory=str(tmp_path))
    upper.openers += 1  # a client is lost with it
    lower.deferred_remove = True
    await write(upper, 0, b"w" * 512)
    disk = mapper.disks["d0"]
    assert isinstance(disk, FakeDisk)
    await mapper.close()
    assert disk.log[-1][0] == "flush"
    assert (mapper.devices, mapper.disks, mapper._opened, disk.closed) == ({}, {}, {}, True)


async def test_close_goes_on_after_failures_and_tells_the_first(mapper: Mapper, slow: type[Slow], tmp_path: Path) -> None:
    first, second = mapper.disks["d0"], mapper.disks["d1"]
    assert isinstance(first, FakeDisk)
    assert isinstance(second, FakeDisk)
    image(tmp_path)
    await mapper.create("a", table="0 8 slow d0 0")
    await mapper.create("b", table="0 8 linear d1 0")
    await mapper.create("c", table="0 8 linear a.img 0", directory=str(tmp_path))
    first.failure = eio
    second.failure = lambda io, offset: ZeroDivisionError("a mistake")
    slow.failing.add("close")
    with pytest.raises(IoFailed) as caught:
        await mapper.close()
    assert caught.value.message in ("a: broken on purpose", "b: a mistake")
    assert caught.value.errno == errno.EIO
    assert (mapper.devices, mapper.disks, mapper._opened) == ({}, {}, {})
    assert first.closed
    assert second.closed
    first.openers = 0


async def test_a_suspended_device_is_closed_as_it_is(mapper: Mapper) -> None:
    device = await mapper.create("a", table="0 8 linear d0 0")
    await device.suspend()
    held = asyncio.ensure_future(read(device, 0, 512))
    await turns()
    await mapper.close()
    with pytest.raises(IoFailed, match="a has no table"):
        await held

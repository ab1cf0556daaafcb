"""nbdmap.control.verbs: what each verb does, answers and refuses, and what two of them do to each other."""

import asyncio
import errno
import inspect
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from nbdmap import __version__
from nbdmap.block.memory import MemoryDisk
from nbdmap.control.apply import Applied
from nbdmap.control.config import parse
from nbdmap.control.events import Events
from nbdmap.control.exports import Exports, ExportSettings
from nbdmap.control.mapper import Mapper
from nbdmap.control.verbs import Verbs, line_text
from nbdmap.dm.device import MappedDevice
from nbdmap.dm.table import TargetLine
from nbdmap.errors import Busy, InvalidArgument, IoFailed, NbdmapError, NoSuchDevice
from tests.support.disks import FakeDisk, eio, read, write
from tests.support.types import Slow, Stop, fresh, types


class Rig:
    """Verbs over two disks."""

    def __init__(self, slow: type[Slow]) -> None:
        self.slow = slow
        self.mapper = Mapper(types(slow), Events(lambda: 0.0))
        self.exports = Exports(self.mapper)
        self.verbs = Verbs(self.mapper, self.exports)
        self.disks = [FakeDisk(f"7:{number}", 64) for number in range(2)]
        self.mapper.disks |= {f"d{number}": disk for number, disk in enumerate(self.disks)}

    def device(self, name: str) -> MappedDevice:
        return self.mapper.find(name)

    def names(self) -> list[str]:
        return sorted(self.mapper.devices)

    async def info(self, name: str) -> dict[str, Any]:
        (row,) = await self.verbs.info(name)
        return row


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig(fresh())
    yield made
    made.slow.stops.clear()
    await made.mapper.close()
    assert [disk.openers for disk in made.disks] == [0, 0]


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# --- create, remove, rename ------------------------------------------------------------------------------------------------


async def test_create_answers_with_the_device_s_state(rig: Rig) -> None:
    row = await rig.verbs.create("a", "0 8 linear d0 8\n8 8 zero\n16 8 linear d1 0", uuid="u", minor=5)
    assert row == {
        "name": "a", "uuid": "u", "major": 254, "minor": 5, "suspended": False, "read_only": False,
        "deferred_remove": False, "loaded": True, "live": True, "inactive": False, "open": 0, "event": 0, "targets": 3,
        "target_types": ["linear", "zero"], "sectors": 24,
        "dependencies": [{"major": 7, "minor": 1, "name": "disk7:1"}, {"major": 7, "minor": 0, "name": "disk7:0"}],
        "export": "a", "connections": 0,
    }  # fmt: skip
    assert json.loads(json.dumps(row)) == row


async def test_create_without_a_table_and_without_an_export(rig: Rig) -> None:
    row = await rig.verbs.create("a", export=False)
    assert (row["loaded"], row["live"], row["targets"], row["sectors"], row["export"]) == (False, False, 0, 0, None)
    assert row["dependencies"] == row["target_types"] == []
    assert (await rig.verbs.create("b", "0 8 zero", read_only=True))["read_only"]


async def test_a_create_whose_export_name_is_taken_leaves_nothing(rig: Rig) -> None:
    await rig.verbs.create("a", "0 8 zero")
    await rig.verbs.export("a", "b")
    with pytest.raises(Busy, match="the export name 'b' is in use by a"):
        await rig.verbs.create("b", "0 8 linear d0 0")
    assert rig.names() == ["a"]
    assert rig.disks[0].openers == 0
    await rig.verbs.create("b", "0 8 linear d0 0", export=False)


async def test_two_creates_of_one_name(rig: Rig) -> None:
    rig.slow.stops["construct"] = stop = Stop()
    creating = [asyncio.ensure_future(rig.verbs.create("a", f"0 8 slow d{number} 0")) for number in range(2)]
    await stop.reached.wait()
    await turns()
    stop.go_on.set()
    first, second = await asyncio.gather(*creating, return_exceptions=True)
    assert isinstance(first, dict)
    assert isinstance(second, Busy)
    assert (await rig.info("a"))["dependencies"][0]["minor"] == 0


async def test_paths_of_a_table_start_at_the_directory(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(bytes(8192))
    await rig.verbs.create("a", "0 8 linear a.img 0", directory=str(tmp_path))
    await rig.verbs.create("b")
    await rig.verbs.load("b", "0 8 linear a.img 8", directory=str(tmp_path))
    with pytest.raises(NbdmapError, match=r"a\.img: no mapped device"):
        await rig.verbs.load("b", "0 8 linear a.img 8")


async def test_remove(rig: Rig) -> None:
    await rig.verbs.create("a", "0 8 linear d0 0", uuid="u")
    await rig.verbs.create("b", "0 8 linear a 0")
    with pytest.raises(Busy):
        await rig.verbs.remove("a")
    assert await rig.verbs.remove("a", deferred=True) == {"removed": False}
    assert (await rig.info("a"))["deferred_remove"]
    assert await rig.verbs.message("a", message="@cancel_deferred_remove") == ""
    await rig.verbs.remove("b")
    assert rig.names() == ["a"]
    assert await rig.verbs.remove(uuid="u") == {"removed": True}
    with pytest.raises(NoSuchDevice):
        await rig.verbs.remove("a")


async def test_remove_by_force_fails_what_is_in_use(rig: Rig) -> None:
    await rig.verbs.create("a", "0 8 linear d0 0")
    device = rig.device("a")
    device.openers += 1  # a client
    with pytest.raises(Busy):
        await rig.verbs.remove("a", force=True)
    assert [line["target"] for line in (await rig.verbs.table("a"))[0]["lines"]] == ["error"]
    with pytest.raises(IoFailed):
        await read(device, 0, 512)
    assert rig.disks[0].openers == 0
    device.openers -= 1
    assert await rig.verbs.remove("a", force=True) == {"removed": True}
    await rig.verbs.create("bare")
    assert await rig.verbs.remove("bare", force=True) == {"removed": True}


async def test_two_removes_by_force_and_a_successor_of_the_same_name(rig: Rig) -> None:
    await rig.verbs.create("a", "0 8 slow d0 0")
    rig.slow.stops["presuspend"] = stop = Stop()
    removing = [asyncio.ensure_future(rig.verbs.remove("a", force=True)) for _ in range(2)]
    await stop.reached.wait()
    await turns()
    stop.go_on.set()
    first, second = await asyncio.gather(*removing, return_exceptions=True)
    assert first == {"removed": True}
    assert isinstance(second, NoSuchDevice)
    await rig.verbs.create("a", "0 8 zero")
    assert rig.names() == ["a"]


async def test_remove_all_goes_from_the_top_and_leaves_what_is_open(rig: Rig) -> None:
    await rig.verbs.create("c", "0 8 linear d0 0")
    await rig.verbs.create("a", "0 8 linear c 0")
    await rig.verbs.create("b", "0 8 linear a 0")
    await rig.verbs.create("used", "0 8 linear d1 0")
    rig.device("used").openers += 1
    assert await rig.verbs.remove_all() == {"removed": ["b", "a", "c"]}
    assert rig.names() == ["used"]
    assert await rig.verbs.remove_all(force=True) == {"removed": []}
    assert rig.disks[1].openers == 0  # its table is one of errors now
    assert (await rig.verbs.remove_all(deferred=True))["removed"] == ["used"]
    assert rig.names() == ["used"]
    await rig.mapper.release(rig.device("used"))
    assert rig.names() == []


async def test_remove_all_beside_another_remove(rig: Rig) -> None:
    for name in "abc":
        await rig.verbs.create(name, "0 8 slow d0 0")
    rig.slow.stops["presuspend"] = stop = Stop()
    all_of_them = asyncio.ensure_future(rig.verbs.remove_all(force=True))
    await stop.reached.wait()
    others = [asyncio.ensure_future(rig.verbs.remove(name)) for name in "abc"]
    await turns()
    stop.go_on.set()
    removed = (await all_of_them)["removed"]
    done = [result for result in await asyncio.gather(*others, return_exceptions=True) if result == {"removed": True}]
    assert len(removed) + len(done) == 3
    assert rig.names() == []


async def test_rename_takes_the_export_along(rig: Rig) -> None:
    await rig.verbs.create("a", "0 8 zero", uuid="u")
    assert (await rig.verbs.rename("a", "b"))["export"] == "b"
    assert (await rig.verbs.rename(uuid="u", new_name="c"))["name"] == "c"
    await rig.verbs.export("c", "own")
    assert (await rig.verbs.rename("c", "d"))["export"] == "own"
    assert [name for name, _ in rig.exports.list()] == ["own"]
    await rig.verbs.create("e", "0 8 zero")
    for wrong, kind in [("d", Busy), ("e", Busy), ("own", Busy), ("", InvalidArgument), ("x/y", InvalidArgument)]:
        with pytest.raises(kind):
            await rig.verbs.rename("e", wrong)
    assert rig.names() == ["d", "e"]


async def test_set_uuid(rig: Rig) -> None:
    await rig.verbs.create("a")
    assert (await rig.verbs.set_uuid("a", "u"))["uuid"] == "u"
    assert (await rig.verbs.info(uuid="u"))[0]["name"] == "a"
    with pytest.raises(InvalidArgument):
        await rig.verbs.set_uuid("a", "v")


# --- tables ----------------------------------------------------------------------------------------------------------------


async def test_the_way_of_a_table(rig: Rig) -> None:
    verbs = rig.verbs
    await verbs.create("a")
    row = await verbs.load("a", "0 8 linear d0 0", read_only=True)
    assert (row["live"], row["inactive"], row["sectors"]) == (False, True, 0)
    (inactive,) = await verbs.info("a", inactive=True)
    assert (inactive["targets"], inactive["read_only"], len(inactive["dependencies"])) == (1, True, 1)
    row = await verbs.resume("a")
    assert (row["live"], row["inactive"], row["read_only"], row["sectors"]) == (True, False, True, 8)
    await verbs.load("a", "0 16 zero")
    assert not (await verbs.clear("a"))["inactive"]
    assert (await verbs.suspend("a"))["suspended"]
    assert not (await verbs.resume("a"))["suspended"]
    (inactive,) = await verbs.info("a", inactive=True)
    assert (inactive["targets"], inactive["read_only"]) == (0, False)


async def test_noflush_is_handed_on(rig: Rig) -> None:
    await rig.verbs.create("a", "0 8 linear d0 0")
    await rig.verbs.suspend("a", noflush=True)
    await rig.verbs.resume("a")
    await rig.verbs.load("a", "0 8 linear d0 8")
    await rig.verbs.resume("a", noflush=True)
    assert rig.disks[0].log == []
    await rig.verbs.suspend("a")
    assert [entry[0] for entry in rig.disks[0].log] == ["flush"]


async def test_wipe_table(rig: Rig) -> None:
    await rig.verbs.create("a", "0 8 linear d0 0")
    row = await rig.verbs.wipe_table("a", noflush=True)
    assert (row["target_types"], row["sectors"], row["dependencies"]) == (["error"], 8, [])
    assert rig.disks[0].log == []
    await rig.verbs.create("b", "0 8 linear d0 0")
    await rig.verbs.wipe_table("b")
    assert [entry[0] for entry in rig.disks[0].log] == ["flush"]
    await rig.verbs.create("bare")
    with pytest.raises(InvalidArgument, match="bare has no table"):
        await rig.verbs.wipe_table("bare")


async def test_table_and_status(rig: Rig) -> None:
    await rig.verbs.create("b", "0 8 linear d0 8\n8 8 error")
    await rig.verbs.create("a")
    both = await rig.verbs.table()
    assert [(row["name"], row["lines"]) for row in both] == [
        ("a", []),
        (
            "b",
            [
                {"start": 0, "length": 8, "target": "linear", "params": "7:0 8"},
                {"start": 8, "length": 8, "target": "error", "params": ""},
            ],
        ),
    ]
    (status,) = await rig.verbs.status("b")
    assert [line["params"] for line in status["lines"]] == ["", ""]
    await rig.verbs.load("b", "0 8 zero")
    (inactive,) = await rig.verbs.table("/dev/mapper/b", inactive=True)
    assert [line["target"] for line in inactive["lines"]] == ["zero"]
    assert line_text(TargetLine(0, 8, "linear", "7:0 8")) == "0 8 linear 7:0 8"


async def test_deps_names_what_was_opened_last_first(rig: Rig) -> None:
    await rig.verbs.create("a", "0 8 linear d0 0\n8 8 linear d1 0")
    await rig.verbs.create("b", "0 8 linear a 0")
    rows = await rig.verbs.deps()
    assert [[one["name"] for one in row["dependencies"]] for row in rows] == [["disk7:1", "disk7:0"], ["a"]]


async def test_messages(rig: Rig) -> None:
    await rig.verbs.create("a", "0 8 linear d0 0")
    with pytest.raises(InvalidArgument, match="linear takes no messages"):
        await rig.verbs.message("a", 0, "hello")
    with pytest.raises(InvalidArgument, match="an empty message"):
        await rig.verbs.message("a", 0, "")
    for text in ("@unknown", "@cancel_deferred_remove now"):
        with pytest.raises(InvalidArgument, match="unknown message '@"):
            await rig.verbs.message("a", 0, text)
    with pytest.raises(InvalidArgument, match="sector 8 is beyond"):
        await rig.verbs.message("a", 8, "hello")


@pytest.mark.parametrize("verb", [name for name, _ in inspect.getmembers(Verbs, inspect.iscoroutinefunction) if name[0] != "_"])
async def test_a_device_that_is_not_there(rig: Rig, verb: str) -> None:
    function = getattr(rig.verbs, verb)
    parameters = inspect.signature(function).parameters
    if "name" not in parameters or verb in ("create", "luks_open"):
        return
    more = {"table": "0 8 zero", "new_name": "x", "new_uuid": "x"}
    arguments = {key: value for key, value in more.items() if key in parameters}
    with pytest.raises(NoSuchDevice, match="no device 'nobody'") as caught:
        await function(name="nobody", **arguments)
    assert caught.value.errno == errno.ENXIO
    if "uuid" in parameters:
        with pytest.raises(NoSuchDevice, match="no device with uuid 'u'"):
            await function(uuid="u", **arguments)


async def test_a_failed_verb_changes_nothing(rig: Rig) -> None:
    await rig.verbs.create("a", "0 8 linear d0 0")
    before = await rig.info("a")
    rig.disks[0].failure = eio
    for verb in (rig.verbs.suspend("a"), rig.verbs.load("a", "0 8 linear d0 60"), rig.verbs.load("a", "nonsense")):
        with pytest.raises(NbdmapError):
            await verb
    assert await rig.info("a") == before
    rig.disks[0].failure = lambda io, offset: None


# --- waiting, events, numbers ----------------------------------------------------------------------------------------------


async def test_wait(rig: Rig) -> None:
    await rig.verbs.create("a", "0 8 zero", uuid="u")
    waiting = [asyncio.ensure_future(rig.verbs.wait("a")), asyncio.ensure_future(rig.verbs.wait(uuid="u", event=0))]
    await turns()
    assert not any(task.done() for task in waiting)
    rig.device("a").event({"DM_ACTION": "TEST"})
    assert [(await task)["event"] for task in waiting] == [1, 1]
    assert (await rig.verbs.wait("a", 0))["event"] == 1  # it has happened already
    cancelled = asyncio.ensure_future(rig.verbs.wait("a"))
    other = asyncio.ensure_future(rig.verbs.wait("a"))
    await turns()
    cancelled.cancel()
    await turns()
    await rig.verbs.rename("a", "b")
    row = await other
    assert (row["name"], row["event"]) == ("b", 2)
    assert cancelled.cancelled()


async def test_a_remove_ends_a_wait(rig: Rig) -> None:
    await rig.verbs.create("a", "0 8 zero")
    waiting = asyncio.ensure_future(rig.verbs.wait("a"))
    await turns()
    await rig.verbs.remove("a")
    assert (await waiting)["event"] == 1


async def test_events(rig: Rig) -> None:
    async with aclosing(rig.verbs.events()) as events:  # type: ignore[type-var]
        first = asyncio.ensure_future(anext(events))
        await turns()
        await rig.verbs.create("a", "0 8 zero", uuid="u")
        await rig.verbs.rename("a", "b")
        await rig.verbs.remove("b")
        seen = [await first] + [await anext(events) for _ in range(3)]
    assert [(event["DM_NAME"], event["ACTION"]) for event in seen] == [
        ("a", "add"), ("a", "change"), ("b", "change"), ("b", "remove"),
    ]  # fmt: skip


async def test_stats(rig: Rig) -> None:
    await rig.verbs.create("a", "0 8 linear d0 0")
    await rig.verbs.create("bare")
    device = rig.device("a")
    await write(device, 0, bytes(1024))
    await read(device, 0, 512)
    rig.disks[0].failure = eio
    with pytest.raises(IoFailed):
        await read(device, 0, 512)
    rig.disks[0].failure = lambda io, offset: None
    rig.disks[0].gate = asyncio.Event()
    under_way = asyncio.ensure_future(read(device, 0, 512))
    await turns()
    rig.exports.open("a")
    a, bare = await rig.verbs.stats()
    assert a["operations"]["write"] == {"requests": 1, "bytes": 1024}
    assert a["operations"]["read"] == {"requests": 3, "bytes": 512}
    assert set(a["operations"]) == {"read", "write", "flush", "discard", "write_zeroes", "cache"}
    assert (a["errors"], a["in_flight"], a["connections"]) == (1, 1, 1)
    assert (bare["errors"], bare["in_flight"], bare["connections"]) == (0, 0, 0)
    rig.disks[0].gate.set()
    await under_way
    assert (await rig.verbs.stats("a"))[0]["in_flight"] == 0
    await rig.exports.release(device)


async def test_stats_have_what_targets_count(rig: Rig) -> None:
    for disk in rig.disks:
        disk.bytes += bytes(1 << 20)
        disk.size = len(disk.bytes)
    await rig.verbs.create("pool", "0 128 thin-pool d0 d1 128 0")
    await rig.verbs.create("plain", "0 8 linear d1 0")
    (one,), (other,) = await rig.verbs.stats("pool"), await rig.verbs.stats("plain")
    assert one["counters"]["cached_mappings"] == 0
    assert one["counters"]["cached_metadata_blocks"] > 0
    assert "counters" not in other



async def test_targets_and_version(rig: Rig) -> None:
    targets = await rig.verbs.targets()
    assert targets[0]["name"] == "slow"  # the newest first
    assert {"name": "linear", "version": "1.4.0"} in targets
    assert (await rig.verbs.version())["version"] == __version__


async def test_export_and_unexport(rig: Rig) -> None:
    await rig.verbs.create("a", "0 8 zero", uuid="u", export=False)
    assert (await rig.verbs.export("a"))["export"] == "a"
    row = await rig.verbs.export(uuid="u", export_name="x", description="d", read_only=True, max_connections=2)
    assert row["export"] == "x"
    assert rig.exports.settings(rig.device("a")) == ExportSettings("x", "d", True, 2)
    await rig.verbs.create("b", "0 8 zero")
    with pytest.raises(Busy):
        await rig.verbs.export("b", "x")
    assert (await rig.info("b"))["export"] == "b"
    assert (await rig.verbs.unexport("a"))["export"] is None
    assert (await rig.verbs.unexport("a"))["export"] is None  # no harm


async def test_what_is_dumped_loads_again(rig: Rig, tmp_path: Path) -> None:
    """The dump of what was made of the dump is the same, by the order of its lines, too."""
    del rig.mapper.disks["d0"], rig.mapper.disks["d1"]
    rig.mapper.disks["ram"] = MemoryDisk("ram", "1:0", 1 << 20)
    (tmp_path / "a.img").write_bytes(bytes(1 << 16))
    await rig.verbs.create("z lower", "0 64 linear ram 0\n64 64 linear a.img 0", uuid="u", directory=str(tmp_path))
    await rig.verbs.create("upper", "0 64 linear z\\ lower 64", minor=9, read_only=True)
    await rig.verbs.create("bare", export=False)
    await rig.verbs.export("upper", "first one", "a description", max_connections=3)
    dump = await rig.verbs.dump_config()
    assert dump["devices"]["upper"] == {
        "minor": 9, "read_only": True, "table": "0 64 linear 254:0 64\n",
        "export": {"name": "first one", "description": "a description", "max_connections": 3},
    }  # fmt: skip
    assert dump["devices"]["bare"] == {"minor": 1, "export": False}
    assert dump["devices"]["z lower"]["export"] is True
    again = Mapper(rig.mapper.types, Events(lambda: 0.0))
    exports = Exports(again)
    config = parse(json.dumps(dump).encode(), str(tmp_path / "again.yaml"), again.types)
    await Applied(again, exports).start(config)
    assert await Verbs(again, exports).dump_config() == dump
    await again.close()

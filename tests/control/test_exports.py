"""nbdmap.control.exports: which devices a client sees, by which name, with which flags, and who still has room."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from nbdmap.block.device import Limits
from nbdmap.control.events import Events
from nbdmap.control.exports import Exports, ExportSettings
from nbdmap.control.mapper import Mapper
from nbdmap.dm.device import MappedDevice
from nbdmap.dm.table import parse_table
from nbdmap.errors import Busy, InvalidArgument, NotFound
from nbdmap.nbd import constants as nbd
from nbdmap.targets import TARGETS
from tests.support.disks import FakeDisk
from tests.support.types import Slow, Stop, fresh, types

ALWAYS = nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.SEND_FUA | nbd.CAN_MULTI_CONN | nbd.BLOCK_STATUS_PAYLOAD


@pytest.fixture
async def mapper() -> AsyncIterator[Mapper]:
    made = Mapper(TARGETS, Events(lambda: 0.0))
    yield made
    await made.close()


@pytest.fixture
def exports(mapper: Mapper) -> Exports:
    return Exports(mapper)


async def zero(mapper: Mapper, name: str) -> MappedDevice:
    return await mapper.create(name, table="0 8 zero")


# --- names -----------------------------------------------------------------------------------------------------------------


async def test_an_export_has_its_device_s_name_or_its_own(mapper: Mapper, exports: Exports) -> None:
    a, b = await zero(mapper, "a"), await zero(mapper, "b")
    exports.add(a, ExportSettings())
    exports.add(b, ExportSettings(name="other", description="the second"))
    assert exports.list() == [("a", ""), ("other", "the second")]
    assert (exports.name_of(a), exports.name_of(b)) == ("a", "other")
    found = exports.find("other")
    assert (found.name, found.description, found.size) == ("other", "the second", 4096)
    for name in ("b", "nothing", "x" * 5000):
        with pytest.raises(NotFound, match="no export") as caught:
            exports.find(name)
        assert len(caught.value.message) < 300
    mapper.rename(a, "renamed")
    mapper.rename(b, "gone on")
    assert exports.list() == [("renamed", ""), ("other", "the second")]


async def test_the_default_export_is_the_first_that_can_be_seen(mapper: Mapper, exports: Exports) -> None:
    with pytest.raises(NotFound, match="nothing is exported"):
        exports.find("")
    first = await mapper.create("first")
    second, third = await zero(mapper, "second"), await zero(mapper, "third")
    for device in (first, second, third):
        exports.add(device, ExportSettings())
    assert exports.find("").name == "second"  # the first has no table yet
    with pytest.raises(NotFound):
        exports.find("first")
    await first.load(parse_table("0 8 zero"), mapper.opener(), False)
    assert exports.find("").name == "second"  # nor has it a live one now
    await first.resume()
    assert exports.find("").name == "first"
    exports.discard(first)
    assert exports.settings(first) is None
    assert exports.find("").name == "second"
    await mapper.remove(second)
    assert exports.list() == [("third", "")]
    assert exports.settings(second) is None


async def test_export_names_are_unique_among_those_that_exist(mapper: Mapper, exports: Exports) -> None:
    a, b = await zero(mapper, "a"), await zero(mapper, "b")
    exports.add(a, ExportSettings(name="b"))
    with pytest.raises(Busy, match="the export name 'b' is in use by a"):
        exports.add(b, ExportSettings())
    assert exports.settings(b) is None
    exports.add(a, ExportSettings(name="b", description="changed"))  # its own
    assert exports.list() == [("b", "changed")]
    await mapper.remove(a)
    exports.add(b, ExportSettings())
    assert exports.list() == [("b", "")]


async def test_a_rename_must_not_make_two_exports_of_one_name(mapper: Mapper, exports: Exports) -> None:
    a, b, c = [await zero(mapper, name) for name in "abc"]
    exports.check_rename(a, "x")  # not exported at all
    exports.add(a, ExportSettings())
    exports.add(b, ExportSettings(name="x"))
    with pytest.raises(Busy, match="the export name 'x' is in use by b"):
        exports.check_rename(a, "x")
    exports.check_rename(a, "y")
    exports.check_rename(b, "a")  # its export stays x
    exports.check_rename(c, "x")


async def test_names_and_descriptions_have_a_largest_size(mapper: Mapper, exports: Exports) -> None:
    device = await zero(mapper, "a")
    for settings in (ExportSettings("é" * 2049), ExportSettings("a\0"), ExportSettings(description="x" * 4097)):
        with pytest.raises(InvalidArgument, match="at most 4096 bytes"):
            exports.add(device, settings)
    assert exports.list() == []
    exports.add(device, ExportSettings("é" * 2048, "x" * 4096))
    assert exports.find("é" * 2048).description == "x" * 4096


# --- what a client is told -------------------------------------------------------------------------------------------------

EVERYTHING = Limits(
    logical_block=4096, discard=True, zero=True, fast_zero=True, cache=True, sparse=True, rotational=True
)


@pytest.mark.parametrize(
    ("limits", "flags"),
    [
        (Limits(), 0),
        (Limits(discard=True), nbd.SEND_TRIM),
        (Limits(zero=True), nbd.SEND_WRITE_ZEROES),
        (Limits(zero=True, fast_zero=True), nbd.SEND_WRITE_ZEROES | nbd.SEND_FAST_ZERO),
        (Limits(fast_zero=True), 0),  # of no use without WRITE_ZEROES
        (Limits(cache=True), nbd.SEND_CACHE),
        (Limits(rotational=True), nbd.ROTATIONAL),
        (EVERYTHING, nbd.SEND_TRIM | nbd.SEND_WRITE_ZEROES | nbd.SEND_FAST_ZERO | nbd.SEND_CACHE | nbd.ROTATIONAL),
    ],
)
async def test_flags_say_what_the_device_can_do(mapper: Mapper, exports: Exports, limits: Limits, flags: int) -> None:
    mapper.disks["d"] = FakeDisk("7:0", limits=limits)
    device = await mapper.create("a", table="0 64 linear d 0")
    exports.add(device, ExportSettings())
    assert exports.find("a").flags == ALWAYS | flags
    kept = flags & (nbd.SEND_CACHE | nbd.ROTATIONAL)
    exports.add(device, ExportSettings(read_only=True))
    assert exports.find("a").flags == ALWAYS | nbd.READ_ONLY | kept


async def test_a_read_only_device_is_exported_read_only(mapper: Mapper, exports: Exports) -> None:
    device = await mapper.create("a", table="0 8 zero", read_only=True)
    exports.add(device, ExportSettings())
    assert exports.find("a").flags & nbd.READ_ONLY


@pytest.mark.parametrize(("block", "preferred"), [(512, 4096), (4096, 4096), (8192, 8192)])
async def test_block_sizes(mapper: Mapper, exports: Exports, block: int, preferred: int) -> None:
    mapper.disks["d"] = FakeDisk("7:0", limits=Limits(logical_block=block))
    exports.add(await mapper.create("a", table="0 64 linear d 0"), ExportSettings())
    found = exports.find("a")
    assert (found.minimum_block, found.preferred_block, found.maximum_block) == (block, preferred, nbd.MAX_PAYLOAD)


# --- clients ---------------------------------------------------------------------------------------------------------------


async def test_looking_is_not_opening(mapper: Mapper, exports: Exports) -> None:
    device = await zero(mapper, "a")
    exports.add(device, ExportSettings())
    exports.find("a")
    exports.list()
    assert device.openers == 0


async def test_clients_are_openers(mapper: Mapper, exports: Exports) -> None:
    device = await zero(mapper, "a")
    exports.add(device, ExportSettings())
    assert exports.open("a") is exports.open("") is device
    assert (device.openers, exports.connections(device)) == (2, 2)
    with pytest.raises(Busy, match="a is open"):
        await mapper.remove(device)
    exports.discard(device)  # who uses it stays
    assert exports.connections(device) == 2
    with pytest.raises(NotFound):
        exports.open("a")
    await exports.release(device)
    await exports.release(device)
    assert (device.openers, exports.connections(device), exports._connections) == (0, 0, {})


async def test_the_last_client_ends_a_deferred_remove(mapper: Mapper, exports: Exports) -> None:
    device = await zero(mapper, "a")
    exports.add(device, ExportSettings())
    exports.open("a")
    assert not await mapper.remove(device, deferred=True)
    await exports.release(device)
    assert mapper.devices == {}
    assert exports.list() == []


async def test_no_more_clients_than_may_be(mapper: Mapper, exports: Exports) -> None:
    device = await zero(mapper, "a")
    exports.add(device, ExportSettings(max_connections=2))
    for _ in range(2):
        exports.find("a")
        exports.open("a")
    for ask in (exports.find, exports.open):
        with pytest.raises(Busy, match="export 'a' already has 2 clients, as many as it may"):
            ask("a")
    assert device.openers == 2
    exports.add(device, ExportSettings(max_connections=3))
    exports.open("a")
    exports.add(device, ExportSettings(max_connections=1))  # who is there stays
    assert exports.connections(device) == 3
    for _ in range(3):
        await exports.release(device)
    exports.open("a")
    await exports.release(device)


@pytest.fixture
def slow() -> type[Slow]:
    return fresh()


async def test_clients_that_come_while_a_table_is_exchanged_get_the_old_or_the_new_size(slow: type[Slow]) -> None:
    mapper = Mapper(types(slow), Events(lambda: 0.0))
    exports = Exports(mapper)
    mapper.disks["d"] = FakeDisk("7:0")
    device = await mapper.create("a", table="0 8 slow d 0")
    exports.add(device, ExportSettings())
    await device.load(parse_table("0 16 slow d 0"), mapper.opener(), False)
    for place, size in (("presuspend", 4096), ("close", 8192), ("preresume", 8192)):
        slow.stops[place] = Stop()
        slow.stops[place].size = size  # type: ignore[attr-defined]
    resuming = asyncio.ensure_future(device.resume())
    for stop in list(slow.stops.values()):
        await stop.reached.wait()
        assert exports.find("").size == stop.size  # type: ignore[attr-defined]
        assert exports.open("a") is device
        await exports.release(device)
        stop.go_on.set()
    await resuming
    slow.stops.clear()
    await mapper.close()

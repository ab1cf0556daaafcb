"""Devices of a configuration that change under clients who never notice; what fails is told and tried again."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from nbdmap.control.exports import ExportSettings
from nbdmap.dm.device import MappedDevice
from nbdmap.units import SECTOR
from tests.support.disks import write
from tests.support.site import DISKS, Connect, Site


async def test_a_new_table_goes_live_under_a_client(site: Site, connect: Connect) -> None:
    await site.start(DISKS + "devices: {a: {table: 0 8 linear d0 0}}")
    await write(site.mapper.disks["d0"], 0, b"0" * SECTOR)
    await write(site.mapper.disks["d1"], 0, b"1" * SECTOR)
    device = site.mapper.find("a")
    client = await connect("a")
    for turn in range(10):
        await client.more(20)
        new = f"devices: {{a: {{table: 0 8 linear d{(turn + 1) % 2} 0}}}}"
        assert await site.reload(DISKS + new) == []
        assert site.table("a") == [f"linear 1:{(turn + 1) % 2} 0"]
    await client.more()
    assert site.mapper.find("a") is device
    assert site.exports.connections(device) == 1
    assert set(client.seen) == {b"0", b"1"}


async def test_what_has_not_changed_is_not_touched(site: Site, connect: Connect) -> None:
    text = DISKS + "devices: {a: {table: 0 8 linear d0 0, export: {description: x}}, b: {table: 0 8 linear a 0}}"
    await site.start(text)
    client = await connect("a")
    device = site.mapper.find("a")
    live, table_of_b = device.live, site.mapper.find("b").live
    same = DISKS + "devices:\n  b: {table: 0 8 linear a 0}\n  a:\n    table: |\n      # the same\n      0  8 linear d0 0\n"
    for _ in range(3):
        assert await site.reload(same + "    export: {description: x}") == []
    assert device.live is live
    assert site.mapper.find("b").live is table_of_b
    await client.more()


async def test_what_was_done_at_run_time_stays(site: Site) -> None:
    text = DISKS + "devices: {a: {table: 0 8 linear d0 0}}"
    await site.start(text)
    run_time = await site.mapper.create("mine", table="0 8 linear d1 0")
    site.exports.add(run_time, ExportSettings())
    site.exports.add(site.mapper.find("a"), ExportSettings(description="changed"))
    await site.mapper.find("a").resume()
    assert await site.reload(text + "\n") == []
    assert site.exports.settings(site.mapper.find("a")) == ExportSettings(description="changed")
    assert site.mapper.find("mine") is run_time
    assert await site.reload(DISKS + "devices: {}") == []
    assert list(site.mapper.devices) == ["mine"]
    assert site.exported() == ["mine"]
    assert await site.reload(DISKS + "devices: {mine: {table: 0 8 zero}}") == [
        "c.yaml:4:11: devices.mine: the name 'mine' is in use"
    ]
    assert site.table("mine") == ["linear 1:1 0"]


async def test_devices_come_and_go(site: Site) -> None:
    await site.start(DISKS + "devices: {a: {table: 0 8 linear d0 0}, b: {table: 0 8 linear a 0}}")
    assert await site.reload(DISKS + "devices: {b: {table: 0 8 linear c 0}, c: {table: 0 8 linear d1 0}}") == []
    assert set(site.mapper.devices) == {"b", "c"}
    assert site.exported() == ["b", "c"]
    assert await site.reload(DISKS + "devices: {a: {minor: 9, table: 0 8 linear d0 0}}") == []
    assert set(site.mapper.devices) == {"a"}
    assert all(disk.openers == (name == "d0") for name, disk in site.mapper.disks.items())


async def test_a_stack_is_turned_upside_down(site: Site) -> None:
    await site.start(DISKS + "devices: {a: {table: 0 8 linear b 0}, b: {table: 0 8 linear d0 0}}")
    assert await site.reload(DISKS + "devices: {a: {table: 0 8 linear d0 0}, b: {table: 0 8 linear a 0}}") == []
    assert site.table("a") == ["linear 1:0 0"]
    assert site.table("b") == [f"linear {site.mapper.find('a').number} 0"]


async def test_an_open_device_goes_at_its_last_close(site: Site, connect: Connect) -> None:
    await site.start(DISKS + "devices: {a: {table: 0 8 linear d0 0}}")
    client = await connect("a")
    device = site.mapper.find("a")
    assert await site.reload(DISKS) == []
    assert device.deferred_remove
    assert site.exported() == []
    await client.more()
    assert await site.reload(DISKS + "devices: {a: {table: 0 8 linear d1 0}}") == []
    assert site.mapper.find("a") is device
    assert not device.deferred_remove
    assert site.exported() == ["a"]
    await client.more()
    assert await site.reload(DISKS) == []
    async with site_loses(site, device):
        await client.stop()


@contextlib.asynccontextmanager
async def site_loses(site: Site, device: MappedDevice) -> AsyncIterator[None]:
    """What is done in the block ends the device."""
    removed = asyncio.ensure_future(_removal(site))
    await asyncio.sleep(0)
    yield
    async with asyncio.timeout(5):
        assert await removed == device.name
    assert device.name not in site.mapper.devices


async def _removal(site: Site) -> str:
    async for event in site.mapper.events.listen():
        if event["ACTION"] == "remove":
            return event["DM_NAME"]
    raise AssertionError


async def test_one_failure_leaves_the_others_done_and_is_tried_again(site: Site, connect: Connect) -> None:
    await site.start(DISKS + "devices: {a: {table: 0 8 linear d0 0}, b: {table: 0 8 linear d0 0}}")
    client = await connect("a")
    wrong = "devices: {a: {table: 0 8 linear gone 0}, b: {table: 0 8 linear d1 0}, c: {table: 0 8 linear a 0}}"
    problem = "c.yaml:4:22: devices.a.table: line 1: linear: gone: no mapped device, disk or file has this name"
    for _ in range(2):
        assert await site.reload(DISKS + wrong) == [problem]
        assert site.table("a") == ["linear 1:0 0"]
        assert site.mapper.find("a").inactive is None
        assert site.table("b") == ["linear 1:1 0"]
        assert site.exported() == ["a", "b", "c"]
        await client.more()
    (site.directory / "gone").write_bytes(bytes(8 * SECTOR))
    assert await site.reload(DISKS + wrong) == []
    assert site.table("a") == ["linear 240:0 0"]


async def test_what_cannot_be_changed_is_refused(site: Site) -> None:
    await site.start(DISKS + "devices: {a: {uuid: u, minor: 1, table: 0 8 linear d0 0}, b: {table: 0 8 zero}}")
    assert await site.reload(DISKS + "devices: {a: {uuid: v, table: 0 8 linear d1 0}, b: {minor: 5}}") == [
        "c.yaml:4:11: devices.a: a already has the uuid 'u'",
        "c.yaml:4:49: devices.b: the number of a device that is there cannot be changed, it is 254:0",
    ]
    assert site.table("a") == ["linear 1:0 0"]
    assert await site.reload(DISKS + "devices: {a: {uuid: u, minor: 1}, b: {uuid: w, table: 0 8 zero}}") == [
        "c.yaml:4:11: devices.a: a table cannot be taken away from a device that is there; the present one stays"
    ]
    assert site.mapper.find("b").uuid == "w"


async def test_a_suspended_device_stays_suspended(site: Site) -> None:
    await site.start(DISKS + "devices: {a: {table: 0 8 linear d0 0}}")
    device = site.mapper.find("a")
    await device.suspend()
    assert await site.reload(DISKS + "devices: {a: {table: 0 8 linear d1 0}}") == []
    assert device.suspended
    assert site.table("a") == ["linear 1:0 0"]
    await device.resume()
    assert site.table("a") == ["linear 1:1 0"]


async def test_a_device_removed_or_renamed_at_run_time_is_made_again(site: Site) -> None:
    text = DISKS + "devices: {a: {table: 0 8 linear d0 0}, b: {table: 0 8 linear d0 0}}"
    await site.start(text)
    await site.mapper.remove(site.mapper.find("a"))
    site.mapper.rename(site.mapper.find("b"), "mine")
    assert await site.reload(text) == []
    assert set(site.mapper.devices) == {"a", "b", "mine"}

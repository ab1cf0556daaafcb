"""A configuration brought into effect: all or nothing at first; disks and exports that come, change and go."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from nbdmap.block.device import Device
from nbdmap.block.memory import MemoryDisk
from nbdmap.control.exports import ExportSettings
from nbdmap.control.verbs import Verbs
from nbdmap.errors import Busy
from nbdmap.units import MIB, SECTOR
from tests.support.disks import read, write
from tests.support.site import DISKS, Connect, Site

# --- the start -------------------------------------------------------------------------------------------------------------


async def test_devices_in_any_order_stand_on_one_another(site: Site) -> None:
    await site.start(
        DISKS + "devices:\n"
        "  top: {table: 0 16 striped 2 8 /dev/mapper/left 0 254:7 0, export: {name: T}}\n"
        "  left: {table: 0 8 linear d0 0, export: false}\n"
        "  right: {minor: 7, table: 0 8 linear d1 0, uuid: u}\n"
        "  empty: {}\n"
    )
    assert site.table("top") == [f"striped 2 8 {site.mapper.find('left').number} 0 254:7 0"]
    assert site.mapper.find("right").uuid == "u"
    assert site.exported() == ["T", "right"]
    assert site.exports.find("").name == "T"
    assert site.mapper.find("empty").live is None


async def test_a_number_that_is_asked_for_is_not_given_by_chance(site: Site) -> None:
    await site.start(
        "disks:\n  a: {memory: 1M}\n  b: {memory: 1M, number: 1:0}\n"
        "devices:\n  x: {table: 0 8 zero}\n  y: {minor: 0, table: 0 8 linear x 0}\n"
    )
    assert {name: disk.number for name, disk in site.mapper.disks.items()} == {"a": "1:1", "b": "1:0"}
    assert site.mapper.find("y").number == "254:0"
    assert site.mapper.find("x").number == "254:1"


async def test_relative_paths_start_at_the_file(site: Site) -> None:
    (site.directory / "in table.img").write_bytes(bytes(MIB))
    await site.start(
        "disks: {f: {file: sub.img, size: 1M, create: true}}\n"
        "devices:\n  a:\n    table: |\n      0 8 linear f 0\n      8 8 linear in\\ table.img 0\n"
    )
    await write(site.mapper.find("a"), 0, b"1" * 16 * SECTOR)
    assert (site.directory / "sub.img").read_bytes()[: 8 * SECTOR] == b"1" * 8 * SECTOR
    assert (site.directory / "in table.img").read_bytes()[: 8 * SECTOR] == b"1" * 8 * SECTOR


async def test_the_keyring_is_what_the_file_says_now(site: Site) -> None:
    (site.directory / "a.key").write_bytes(bytes(range(32)))
    (site.directory / "b.key").write_bytes(bytes(32))
    device = "devices:\n  a: {table: '0 8 crypt aes-xts-plain64 :32:logon:a 0 m 0'}\n"
    disk = "disks: {m: {memory: 1M}}\n"
    await site.start(f"keyring: {{logon:a: a.key}}\n{disk}{device}")
    await write(site.mapper.find("a"), 0, b"1" * SECTOR)
    assert await read(site.mapper.find("a"), 0, SECTOR) == b"1" * SECTOR
    again = device.replace("aes-xts", "aes-cbc")
    assert len(await site.reload(f"keyring: {{logon:other: b.key}}\n{disk}{again}")) == 1  # there is no such key any more
    assert await read(site.mapper.find("a"), 0, SECTOR) == b"1" * SECTOR
    assert await site.reload(f"keyring: {{logon:a: b.key}}\n{disk}{again}") == []
    assert await read(site.mapper.find("a"), 0, SECTOR) != b"1" * SECTOR


async def test_a_start_is_all_or_nothing_and_tells_all_that_is_wrong(site: Site) -> None:
    assert await site.fail(
        "disks:\n"
        "  ok: {memory: 1M}\n"
        "  gone: {file: gone.img}\n"
        "devices:\n"
        "  good: {table: 0 8 linear ok 0}\n"
        "  late:\n"
        "    table: |\n"
        "      0 8 linear ok 0\n"
        "      # a comment\n"
        "      8 8 linear ok 2048\n"
        "  on: {table: 0 8 linear late 0}\n"
        "  far: {table: 0 8 linear gone 0}\n"
        "  mute: {table: 0 8 zero, messages: [x]}\n"
    ) == [
        f"c.yaml:3:3: disks.gone: {site.directory}/gone.img: no such file",
        "c.yaml:10:7: devices.late.table: linear: sectors 2048 to 2056 are beyond the end of ok (1:0), which has 2048",
        "c.yaml:11:15: devices.on.table: line 1: linear: late: could not be made",
        "c.yaml:12:16: devices.far.table: line 1: linear: gone: could not be opened",
        "c.yaml:13:38: devices.mute.messages.0: zero takes no messages",
    ]
    assert not site.mapper.devices
    assert not site.mapper.disks
    assert site.exported() == []


async def test_a_loop_that_words_do_not_show_is_found(site: Site) -> None:
    """1 and 2 are numbers as well as names, so the file says nothing of it."""
    assert await site.fail(
        "devices:\n  1: {table: 0 8 linear 2 0}\n  2: {table: 0 8 linear 1 0}\n"
    ) == [
        "c.yaml:2:14: devices.1.table: line 1: linear: 2: could not be made",
        "c.yaml:3:14: devices.2.table: line 1: linear: the table would make 1 stand on itself: 1 on 2 on 1",
    ]


async def test_messages_are_sent_once_and_in_order(site: Site) -> None:
    text = "devices: {p: {table: 0 8 pool, messages: [one, old, two]}}"
    await site.start(text)
    assert site.heard("p") == ["one", "two"]
    assert await site.reload(text) == []
    assert site.heard("p") == ["one", "two"]
    assert await site.reload("devices: {p: {table: 0 8 pool, messages: [one, bad, three]}}") == [
        "c.yaml:1:48: devices.p.messages.1: bad is refused"
    ]
    assert site.heard("p") == ["one", "two"]
    assert await site.reload("devices: {p: {table: 0 8 pool, messages: [one, three]}}") == []
    assert site.heard("p") == ["one", "two", "three"]


async def test_messages_come_before_what_stands_on_the_device(site: Site) -> None:
    """As a thin device can be made only when its pool was told to."""
    await site.start("devices:\n  a: {table: 0 8 linear p 0}\n  p: {table: 0 8 pool, messages: [one]}\n")
    assert site.heard("p") == ["one"]


# --- exports ---------------------------------------------------------------------------------------------------------------


async def test_exports_change_while_clients_stay(site: Site, connect: Connect) -> None:
    zero = "table: 0 8 zero"
    await site.start(f"devices: {{a: {{{zero}, export: {{name: x}}}}, b: {{{zero}, export: {{name: y}}}}}}")
    client = await connect("x")
    assert await site.reload(f"devices: {{a: {{{zero}, export: {{name: y}}}}, b: {{{zero}, export: {{name: x}}}}}}") == []
    assert sorted(site.exported()) == ["x", "y"]
    assert site.exports.name_of(site.mapper.find("a")) == "y"
    read_only = "export: {name: x, read_only: on}"
    assert await site.reload(f"devices: {{a: {{{zero}, export: false}}, b: {{{zero}, {read_only}}}}}") == []
    assert site.exported() == ["x"]
    assert site.exports.settings(site.mapper.find("b")) == ExportSettings("x", "", True)
    await client.more()


async def test_an_export_name_that_is_in_use_is_refused(site: Site) -> None:
    await site.start("devices: {a: {table: 0 8 zero}}")
    mine = await site.mapper.create("mine", table="0 8 zero")
    site.exports.add(mine, ExportSettings("taken"))
    assert await site.reload("devices:\n  a: {table: 0 8 zero, export: {name: taken}}\n  b: {table: 0 8 zero}") == [
        "c.yaml:2:24: devices.a.export: the export name 'taken' is in use by mine"
    ]
    assert site.exported() == ["taken", "b"]


# --- disks -----------------------------------------------------------------------------------------------------------------


async def test_disks_come_change_and_go(site: Site) -> None:
    await site.start(DISKS + "devices: {a: {table: 0 8 linear d0 0}}")
    old = site.mapper.disks["d1"]
    assert await site.reload(
        "disks: {d0: {memory: 1M}, d1: {memory: 2M}, d2: {file: x.img, size: 1M, create: true}}\n"
        "devices: {a: {table: 0 8 linear d0 0}, b: {table: 0 8 linear d2 0}}"
    ) == []
    changed = site.mapper.disks["d1"]
    assert changed is not old
    assert (changed.size, changed.number) == (2 * MIB, old.number)
    assert site.mapper.disks["d2"].number == "240:0"
    assert await site.reload("disks: {d0: {memory: 1M}}\ndevices: {a: {table: 0 8 linear d0 0}}") == []
    assert list(site.mapper.disks) == ["d0"]


async def test_a_changed_disk_in_use_is_refused(site: Site, connect: Connect) -> None:
    await site.start(DISKS + "devices: {a: {table: 0 8 linear d0 0}, b: {table: 0 8 linear d0 0}}")
    client = await connect("a")
    disk = site.mapper.disks["d0"]
    users = "devices: {a: {table: 0 8 linear d0 0}, b: {table: 0 8 linear d0 0}}"
    for _ in range(2):
        assert await site.reload(f"disks: {{d0: {{memory: 2M}}}}\n{users}") == [
            "c.yaml:1:9: disks.d0: d0 has changed here, but is in use by a, b: it stays as it was"
        ]
    assert site.mapper.disks == {"d0": disk}
    await client.more()
    assert await site.reload("devices: {a: {table: 0 8 linear d0 0}}") == [
        "c.yaml:1:1: disks.d0: d0 is gone from here, but in use by a: it stays open"
    ]
    assert site.mapper.disks == {"d0": disk}
    assert await site.reload("disks: {d0: {memory: 2M}}\ndevices: {a: {table: 0 8 zero}}") == [
        "c.yaml:1:9: disks.d0: d0 has changed here, but is in use by a: it stays as it was"
    ]
    assert await site.reload("disks: {d0: {memory: 2M}}\ndevices: {a: {table: 0 8 zero}}") == []
    assert site.mapper.disks["d0"].size == 2 * MIB


async def test_a_disk_that_cannot_be_opened_is_not_mistaken_for_a_path(site: Site) -> None:
    (site.directory / "d2").write_bytes(bytes(8 * SECTOR))
    await site.start("devices: {}")
    assert await site.reload("disks: {d2: {file: gone.img}}\ndevices: {a: {table: 0 8 linear d2 0}}") == [
        f"c.yaml:1:9: disks.d2: {site.directory}/gone.img: no such file",
        "c.yaml:2:22: devices.a.table: line 1: linear: d2: could not be opened",
    ]


async def test_a_number_in_use_is_refused(site: Site) -> None:
    await site.start("disks: {a: {memory: 1M}}\ndevices: {}")
    assert await site.reload("disks: {a: {memory: 1M}, b: {memory: 1M, number: 1:0}}") == [
        "c.yaml:1:26: disks.b: the device number 1:0 is in use"
    ]


async def test_a_disk_that_gets_a_user_while_its_successor_is_opened_stays(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    await site.start(DISKS)
    old = site.mapper.disks["d0"]
    opened: list[Device] = []

    async def slow(name: str, number: str, entry: Any) -> Device:
        await site.mapper.create("quick", table="0 8 linear d0 0")
        opened.append(MemoryDisk(name, number, entry.memory))
        return opened[-1]

    monkeypatch.setattr("nbdmap.control.apply.open_disk", slow)
    assert await site.reload("disks:\n  d0: {memory: 2M}\n  d1: {memory: 1M}") == [
        "c.yaml:2:3: disks.d0: d0 has changed here, but is in use by quick: it stays as it was"
    ]
    assert site.mapper.disks["d0"] is old
    assert len(opened) == 1


async def test_read_only_disks_want_read_only_devices(site: Site) -> None:
    (site.directory / "x.img").write_bytes(bytes(MIB))
    text = "disks: {x: {file: x.img, read_only: true}}\ndevices: {a: {table: 0 8 linear x 0"
    assert await site.fail(text + "}}") == [
        "c.yaml:2:22: devices.a.table: line 1: linear: x is read-only; load the table read-only"
    ]
    await site.start(text + ", read_only: true}}")
    assert site.mapper.find("a").read_only


async def test_a_remote_disk(site: Site, connect: Connect, tmp_path: Path) -> None:
    await site.start(DISKS + "devices: {a: {table: 0 8 linear d0 0}}")
    await write(site.mapper.find("a"), 0, b"x" * SECTOR)
    upper = Site(tmp_path)
    try:
        await upper.start("disks: {far: {nbd: 'nbd+unix:///a?socket=nbd.sock'}}\ndevices: {b: {table: 0 8 linear far 0}}")
        assert await read(upper.mapper.find("b"), 0, SECTOR) == b"x" * SECTOR
        assert upper.mapper.disks["far"].number == "43:0"
    finally:
        await upper.mapper.close()


async def test_a_start_that_is_interrupted_leaves_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = asyncio.Event()

    async def never(*arguments: object) -> Device:
        reached.set()
        await asyncio.Event().wait()
        raise Busy("never")

    monkeypatch.setattr("nbdmap.control.apply.RemoteDisk.connect", lambda *arguments, **keywords: never())
    work = asyncio.ensure_future(site.start(DISKS + "  far: {nbd: 'nbd://h'}\ndevices: {a: {table: 0 8 linear d0 0}}"))
    await reached.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert not site.mapper.disks


async def test_what_is_dumped_makes_the_same_again(site: Site, tmp_path: Path) -> None:
    (site.directory / "by path.img").write_bytes(bytes(MIB))
    await site.start(
        "disks:\n"
        "  ram: {memory: 1M, limit: 64KiB}\n"
        "  img: {file: x.img, size: 1M, create: true, number: 8:0}\n"
        "devices:\n"
        "  top: {table: 0 8 linear mid 0, read_only: true, export: {name: t, max_connections: 3}}\n"
        "  mid:\n    uuid: u\n    export: false\n"
        "    table: |\n      0 8 linear ram 0\n      8 8 linear img 0\n      16 8 linear by\\ path.img 0\n"
        "  low: {table: 0 8 linear by\\ path.img 0, read_only: true}\n"
        "  empty: {}\n"
    )
    first = await Verbs(site.mapper, site.exports).dump_config()
    await site.mapper.close()
    again = Site(tmp_path)
    try:
        await again.start(json.dumps(first))
        second = await Verbs(again.mapper, again.exports).dump_config()
        assert second["devices"] == first["devices"]
        assert sorted(second["disks"].items()) == sorted(first["disks"].items())
    finally:
        await again.mapper.close()

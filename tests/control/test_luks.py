"""LUKS disks as devices: by the configuration and by the verb; what they hold is ciphertext, and no key is to be seen."""

import asyncio
import base64
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from nbdmap.block.memory import MemoryDisk
from nbdmap.ciphers.cipher import SectorCipher
from nbdmap.ciphers.spec import CipherSpec
from nbdmap.control import luks
from nbdmap.control.luks import DeviceImage
from nbdmap.control.verbs import Verbs
from nbdmap.errors import AccessRefused, InvalidArgument, IoFailed, NbdmapError, NoKey, NotFound, PassphraseRefused
from nbdmap.luks.kdf import Pbkdf2
from nbdmap.luks.secret import wipe
from nbdmap.targets.crypt.keys import KEYRING
from nbdmap.units import MIB
from tests.support.disks import FakeDisk, read, write
from tests.support.luks import KEY, UUID, disk_file, new_luks2
from tests.support.site import Site

SECRET = base64.b64encode(b"secret").decode()
HOME = "devices:\n  home: {luks: {disk: disk.img, key_file: key}}\n"


@pytest.fixture
def disk(site: Site) -> Path:
    (site.directory / "key").write_bytes(b"secret")
    return disk_file(site.directory / "disk.img")


def raw(path: Path) -> bytes:
    return path.read_bytes()


def emptied(path: Path) -> None:
    path.write_bytes(bytes(MIB))


def decrypted(path: Path, length: int, sector_size: int = 512) -> bytes:
    """What the data of a disk of `made` says, without nbdmap's targets."""
    data = path.read_bytes()[2 * MIB : 2 * MIB + length]
    plain = bytearray(length)
    SectorCipher(CipherSpec.parse("aes-xts-plain64"), KEY, sector_size=sector_size).decrypt(0, data, plain)
    return bytes(plain)


@pytest.mark.parametrize("version", [1, 2])
async def test_the_configuration_opens_it(site: Site, disk: Path, version: int) -> None:
    disk_file(disk, version)
    await site.start(HOME)
    device = site.mapper.find("home")
    assert device.size == MIB
    assert device.uuid == f"CRYPT-LUKS{version}-{UUID.replace('-', '')}-home"
    reference = f"cryptsetup:{UUID}" + ("-d0" if version == 2 else "")
    assert site.table("home") == [f"crypt aes-xts-plain64 :64:logon:{reference} 0 240:0 4096"]
    await write(device, 4096, b"plain text" * 100 + bytes(24))
    assert (await read(device, 4096, 1024))[:1000] == b"plain text" * 100
    await device.suspend()
    assert decrypted(disk, 8192)[4096:5096] == b"plain text" * 100
    assert b"plain text" not in raw(disk)


async def test_the_verb_opens_it(site: Site, disk: Path) -> None:
    verbs = Verbs(site.mapper, site.exports)
    row = await verbs.luks_open("home", "disk.img", SECRET, directory=str(site.directory), allow_discards=True)
    assert (row["name"], row["sectors"], row["target_types"], row["export"]) == ("home", 2048, ["crypt"], "home")
    assert site.table("home")[0].endswith(" 0 240:0 4096 1 allow_discards")
    row = await verbs.luks_open("again", str(disk), SECRET, key_slot=0, uuid="U", read_only=True, export=False)
    assert (row["uuid"], row["read_only"], row["export"]) == ("U", True, None)
    assert KEY.hex() not in json.dumps([await verbs.table(), await verbs.status(), await verbs.info(), await verbs.dump_config()])


async def test_a_detached_header(site: Site, disk: Path) -> None:
    image = new_luks2(detached=True).image
    (site.directory / "header.img").write_bytes(image.bytes)  # type: ignore[attr-defined]
    emptied(disk)
    await site.start("disks: {h: {file: header.img, read_only: true}}\n" + HOME.replace("key_file", "header: h, key_file"))
    assert site.mapper.find("home").size == MIB
    assert site.table("home")[0].endswith(" 0"), "the data begins at 0"


async def test_a_disk_that_stands_on_others(site: Site, disk: Path) -> None:
    (site.directory / "volume.key").write_bytes(KEY)
    await site.start(
        "devices:\n  home: {luks: {disk: joined, volume_key_file: volume.key}}\n  joined: {table: 0 6144 linear disk.img 0}\n"
    )
    assert site.mapper.find("home").size == MIB
    assert site.mapper.top_down()[0].name == "home"


# --- what goes wrong -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("luks", "said"),
    [
        ("disk: disk.img, key_file: wrong", "c.yaml:3:10: devices.home.luks: disk.img: no key available with this passphrase"),
        ("disk: disk.img, key_file: none", "none: No such file or directory"),
        ("disk: no.img, key_file: key", "no.img: no mapped device, disk or file has this name"),
        ("disk: key, key_file: key", "is not a LUKS disk"),
        ("disk: disk.img, key_file: key, key_slot: 3", "key slot 3 is not in use"),
        ("disk: disk.img, key_file: key, key_file_size: 7", "ends before what is asked of it"),
        ("disk: disk.img, key_file: key, key_file_size: 5", "no key available"),
        ("disk: disk.img, volume_key_file: key", "key is not its volume key"),
        ("disk: disk.img, header: key, key_file: key", "key is not a LUKS disk"),
    ],
)
async def test_a_start_that_fails(site: Site, disk: Path, luks: str, said: str) -> None:
    (site.directory / "wrong").write_bytes(b"secret\n")
    (problem,) = await site.fail(f"disks: {{}}\ndevices:\n  home: {{luks: {{{luks}}}}}\n")
    assert said in problem
    assert not site.mapper.devices


@pytest.mark.parametrize(
    ("luks", "said"),
    [
        ("{disk: d}", "should have one of the keys key_file, volume_key_file"),
        ("{disk: d, key_file: a, volume_key_file: b}", "should have one of the keys"),
        ("{key_file: a}", "the key disk is missing"),
        ("{disk: d, key_file: a, key_slot: 32}", "key_slot"),
        ("{disk: d, key_file: a, key_file_size: 0}", "key_file_size"),
        ("{disk: d, key_fil: a}", "unknown key (did you mean 'key_file'?)"),
        ("{disk: d, key_file: a}, table: 0 8 zero", "table and luks do not go together"),
        ("{disk: home, key_file: a}", "stand on itself"),
        ("no", "should be a mapping"),
    ],
)
async def test_mistakes_of_the_file(site: Site, luks: str, said: str) -> None:
    (problem,) = await site.fail(f"devices:\n  home: {{luks: {luks}}}\n")
    assert said in problem


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"passphrase": "?"}, InvalidArgument, "not in base64"),
        ({"passphrase": ""}, PassphraseRefused, "no key available with this passphrase"),
        ({"disk": "none"}, NotFound, "none: no mapped device"),
        ({"key_slot": 1}, NotFound, "key slot 1 is not in use"),
        ({"name": "a/b"}, InvalidArgument, "cannot be the name of a device"),
    ],
)
async def test_a_verb_that_fails(site: Site, disk: Path, change: dict[str, object], kind: type[NbdmapError], said: str) -> None:
    verbs = Verbs(site.mapper, site.exports)
    params = {"name": "home", "disk": str(disk), "passphrase": SECRET, **change}
    with pytest.raises(kind, match=said) as caught:
        await verbs.luks_open(**params)  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)
    assert not site.mapper.devices
    assert not site.mapper._opened, "nothing stays open"


async def test_a_dump_opens_it_again(site: Site, disk: Path) -> None:
    await site.start(HOME.replace("key}", "key, key_slot: 0, allow_discards: true}"))
    verbs = Verbs(site.mapper, site.exports)
    await verbs.luks_open("typed", str(disk), SECRET, key_slot=0)
    dumped = await verbs.dump_config()
    number = site.table("home")[0].split()[4]
    key = str(site.directory / "key")
    assert dumped["devices"]["home"]["luks"] == {"disk": number, "key_file": key, "key_slot": 0, "allow_discards": True}
    assert dumped["devices"]["typed"]["luks"] == {"disk": number, "key_slot": 0}
    del dumped["devices"]["typed"]
    before = site.table("home")
    await site.mapper.close()
    again = Site(site.directory)
    await again.start(json.dumps(dumped))
    assert again.table("home") == before
    await again.reload("devices: {home: {table: 0 2048 zero}}")
    assert "table" in (await Verbs(again.mapper, again.exports).dump_config())["devices"]["home"]
    await again.mapper.close()


async def test_the_key_is_in_the_keyring_while_the_table_is_loaded_only(site: Site, disk: Path) -> None:
    await site.start(HOME)
    assert not KEYRING._held
    (line,) = site.table("home")
    verbs = Verbs(site.mapper, site.exports)
    with pytest.raises(NoKey):
        await verbs.load("home", f"0 2048 {line}")


async def test_keys_are_derived_in_a_thread_one_at_a_time(site: Site, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    derive, threads, busy = Pbkdf2.derive, set(), [0, 0]

    def watched(kdf: Pbkdf2, passphrase: bytearray, length: int) -> bytearray:
        threads.add(threading.current_thread() is threading.main_thread())
        busy[0] += 1
        busy[1] = max(busy)
        try:
            return derive(kdf, passphrase, length)
        finally:
            busy[0] -= 1

    monkeypatch.setattr(Pbkdf2, "derive", watched)
    verbs = Verbs(site.mapper, site.exports)
    await asyncio.gather(*(verbs.luks_open(f"d{number}", str(disk), SECRET) for number in range(3)))
    assert (threads, busy[1]) == ({False}, 1)
    assert sorted(site.mapper.devices) == ["d0", "d1", "d2"]


async def test_whoever_gives_up_need_not_wait(site: Site, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop of the server is not held up by a KDF; what comes out of it in the end is wiped."""
    going, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    keys: list[bytearray] = []
    find = luks._unlock

    def slow(*words: Any) -> Any:
        found = find(*words)
        keys.append(found.key)
        going.set()
        go_on.wait(10)
        return found

    def wiped(key: bytearray) -> None:
        wipe(key)
        ended.set()

    monkeypatch.setattr(luks, "_unlock", slow)
    opening = asyncio.ensure_future(Verbs(site.mapper, site.exports).luks_open("home", str(disk), SECRET))
    await asyncio.to_thread(going.wait, 10)
    monkeypatch.setattr(luks, "wipe", wiped)
    opening.cancel()
    await asyncio.wait((opening,), timeout=5)
    assert opening.cancelled()
    assert not site.mapper.devices
    assert not site.mapper._opened
    go_on.set()
    assert await asyncio.to_thread(ended.wait, 10)
    assert keys
    assert not any(keys[0])


async def test_reads_end_with_whoever_wanted_them() -> None:
    disk = FakeDisk("7:0")
    begun = asyncio.Event()

    class Gate(asyncio.Event):
        async def wait(self) -> Any:
            begun.set()
            return await super().wait()

    disk.gate = Gate()
    image = DeviceImage(disk)
    reading = asyncio.ensure_future(asyncio.to_thread(image.read, 0, 512))
    await begun.wait()
    await image.end()
    with pytest.raises(asyncio.CancelledError):
        await reading
    with pytest.raises(IoFailed, match="nobody waits for its header any more"):
        await asyncio.to_thread(image.read, 0, 512)
    assert len(disk.log) == 1


# --- reload ----------------------------------------------------------------------------------------------------------------


async def test_a_reload(site: Site, disk: Path) -> None:
    await site.start(HOME)
    device = site.mapper.find("home")
    await write(device, 0, b"x" * 512)
    live = device.live
    (site.directory / "key").unlink()
    assert await site.reload(HOME) == []
    assert device.live is live, "what has not changed is not touched, and its key not asked for"
    (problem,) = await site.reload(HOME.replace("key}", "key, allow_discards: true}"))
    assert "devices.home.luks: key file" in problem
    assert device.live is live
    (site.directory / "key").write_bytes(b"secret")
    assert await site.reload(HOME.replace("key}", "key, allow_discards: true}")) == []
    assert site.table("home")[0].endswith("1 allow_discards")
    assert await read(device, 0, 512) == b"x" * 512
    assert await site.reload("devices: {home: {table: 0 2048 zero}}") == []
    assert site.table("home") == ["zero"]
    assert await site.reload(HOME) == []
    assert await read(device, 0, 512) == b"x" * 512
    (problem,) = await site.reload("devices: {home: {}}")
    assert "a table cannot be taken away" in problem


async def test_what_a_device_shows_to_the_code_that_reads_headers() -> None:
    disk = MemoryDisk("m", "1:0", 8192)
    await write(disk, 0, bytes(range(256)) * 32)
    image = DeviceImage(disk)
    assert await asyncio.to_thread(image.read, 500, 20) == (bytes(range(256)) * 32)[500:520]
    assert await asyncio.to_thread(image.read, 8190, 20) == b"\xfe\xff"
    assert await asyncio.to_thread(image.read, 9000, 20) == b""
    image.flush()
    with pytest.raises(AccessRefused):
        image.write(0, b"x")

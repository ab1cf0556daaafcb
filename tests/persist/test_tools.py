"""thin-provisioning-tools and the library read each other's metadata."""

import random
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nbdmap.persist.blocks import BLOCK
from tests.persist.pool import TIME_BITS, Pool, check, thin_check
from tests.support.disks import FakeDisk

pytestmark = pytest.mark.skipif(shutil.which("thin_dump") is None, reason="thin-provisioning-tools are not there")
BLOCKS = 1024


def mappings_of(xml: str) -> dict[int, dict[int, int]]:
    """The volumes of a dump."""
    found: dict[int, dict[int, int]] = {}
    for device in ElementTree.fromstring(xml).iter("device"):
        volume = found[int(device.attrib["dev_id"])] = {}
        for one in device.iter("single_mapping"):
            origin, data, time = (int(one.attrib[key]) for key in ("origin_block", "data_block", "time"))
            volume[origin] = data << TIME_BITS | time
        for one in device.iter("range_mapping"):
            origin, data, time = (int(one.attrib[key]) for key in ("origin_begin", "data_begin", "time"))
            for step in range(int(one.attrib["length"])):
                volume[origin + step] = data + step << TIME_BITS | time
    return found


def tool(*words: object) -> str:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True).stdout


async def volumes(device: FakeDisk) -> Pool:
    pool = await Pool.create(device, 40000)
    rng = random.Random(3)
    for identity in (0, 5, 9):
        await pool.create_thin(identity)
        for key in rng.sample(range(5000), 700):
            await pool.provision(identity, key)
    for identity in range(20, 26):
        await pool.create_snap(identity, rng.choice((0, 5, 9)))
        for key in rng.sample(range(5000), 50):
            await pool.provision(identity, key)
    for key in range(2000):
        await pool.provision(9, 10000 + key)
    await pool.discard(5, 1000, 2000)
    await pool.delete(22)
    await pool.commit()
    return pool


async def test_thin_dump_finds_what_was_written(tmp_path: Path) -> None:
    device = FakeDisk("7:0", BLOCKS * 8)
    pool = await volumes(device)
    (tmp_path / "metadata").write_bytes(device.bytes)
    assert mappings_of(tool("thin_dump", tmp_path / "metadata")) == pool.model


async def test_what_thin_restore_and_thin_repair_made_can_be_changed(tmp_path: Path) -> None:
    device = FakeDisk("7:0", BLOCKS * 8)
    model = (await volumes(device)).model
    made, restored, repaired = tmp_path / "metadata", tmp_path / "restored", tmp_path / "repaired"
    made.write_bytes(device.bytes)
    (tmp_path / "dump").write_text(tool("thin_dump", made))
    for image in (restored, repaired):
        image.write_bytes(bytes(BLOCKS * BLOCK))
    tool("thin_restore", "-i", tmp_path / "dump", "-o", restored)
    tool("thin_repair", "-i", made, "-o", repaired)
    for image in (restored, repaired):
        device.bytes[:] = image.read_bytes()
        found = await check(device)
        assert not found.errors, found.errors.words
        assert not found.leaks, found.leaks.words
        pool = await Pool.open(device)
        assert await pool.contents() == model
        pool.model = {identity: dict(one) for identity, one in model.items()}
        rng = random.Random(8)
        for _ in range(500):
            await pool.provision(rng.choice(list(pool.model)), rng.randrange(13000))
        await pool.create_snap(100, 9)
        await pool.discard(9, 0, 11000)
        await pool.delete(0)
        await pool.commit()
        status, words = thin_check(bytes(device.bytes), tmp_path)
        assert status == 0, words
        assert not (await check(device)).errors
        made.write_bytes(device.bytes)
        assert mappings_of(tool("thin_dump", made)) == pool.model

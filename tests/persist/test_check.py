"""The checker: sound metadata has no findings; of damaged metadata it finds all that thin_check finds, and more."""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdmap.persist.blocks import BLOCK, BlockStore, checksum, seal
from nbdmap.persist.check import Check
from nbdmap.persist.metadata_map import INDEX
from nbdmap.persist.node import NODE
from nbdmap.persist.space_map import BITMAP, get_count
from tests.persist.pool import SALT, Pool, check, set_count, thin_check
from tests.support.disks import FakeDisk

DATA_BLOCKS = 20000


async def snapshots() -> tuple[FakeDisk, Pool]:
    """Nine volumes that share and do not share, so that counts are above 2 and trees are two nodes deep."""
    device = FakeDisk("7:0", 512 * 8)
    pool = await Pool.create(device, DATA_BLOCKS)
    rng = random.Random(1)
    await pool.create_thin(0)
    for key in range(2000):
        await pool.provision(0, key * 2)
    for identity in (1, 2):
        await pool.create_snap(identity, identity - 1)
    for _ in range(300):
        await pool.provision(rng.randrange(3), rng.randrange(4000))
    for identity in range(3, 9):
        await pool.create_snap(identity, 0)
    for _ in range(200):
        await pool.provision(rng.randrange(9), rng.randrange(200))
    await pool.commit()
    return device, pool


def block(device: FakeDisk, number: int) -> memoryview:
    return memoryview(device.bytes)[number * BLOCK : (number + 1) * BLOCK]


def salt_of(data: memoryview) -> int | None:
    """The type of a block, by its checksum."""
    stored = int.from_bytes(data[:4], "little")
    return next((one for one in (NODE.salt, BITMAP.salt, INDEX.salt, SALT) if checksum(data, one) == stored), None)


async def test_sound_metadata_has_no_findings() -> None:
    device, _ = await snapshots()
    found = await check(device)
    assert not found.errors, found.errors.words
    assert not found.leaks, found.leaks.words
    assert not found.notes, found.notes.words


def damage(data: memoryview, kind: int, rng: random.Random) -> None:
    """Changes a few bits where they count, and makes the checksum right again."""
    limit = {NODE.salt: 32 + 8 * 255, BITMAP.salt: 400, INDEX.salt: 48, SALT: 400}[kind]
    match rng.randrange(3):
        case 0:
            data[rng.randrange(16, limit)] ^= 1 << rng.randrange(8)
        case 1:
            fields = [4, 16, 20, 24, 32 + 8 * rng.randrange(250), 2048 + 8 * rng.randrange(250)]
            at = rng.choice(fields) if kind == NODE.salt else rng.randrange(4, limit // 4) * 4
            old = int.from_bytes(data[at : at + 4], "little")
            new = rng.choice([0, 1, old + 1, max(old - 1, 0), rng.randrange(600), rng.getrandbits(32)]) & 0xFFFFFFFF
            data[at : at + 4] = new.to_bytes(4, "little")
        case _:
            at = rng.randrange(16, limit - 16)
            data[at : at + 8], data[at + 8 : at + 16] = bytes(data[at + 8 : at + 16]), bytes(data[at : at + 8])
    data[:4] = checksum(data, kind).to_bytes(4, "little")


@pytest.mark.skipif(shutil.which("thin_check") is None, reason="thin_check is not there")
async def test_it_finds_all_that_thin_check_finds(tmp_path: Path) -> None:
    device, _ = await snapshots()
    good = bytes(device.bytes)
    met = await check(device)
    used = [number for number in range(512) if met.owners[number]]
    rng = random.Random(7)
    seen: Counter[tuple[bool, bool]] = Counter()
    for _ in range(120):
        device.bytes[:] = good
        data = block(device, rng.choice(used))
        kind = salt_of(data)
        assert kind is not None
        damage(data, kind, rng)
        theirs, words = thin_check(bytes(device.bytes), tmp_path)
        found = await check(device)
        ours = bool(found.errors or found.leaks)
        assert ours or not theirs, words
        seen[bool(theirs), ours] += 1
    print(f"damages (thin_check finds it, we find it): {dict(seen)}")
    assert seen[True, True] > 50
    assert seen[False, False] > 10  # bytes that nobody uses


async def counts_of(device: FakeDisk, pool: Pool) -> tuple[memoryview, memoryview]:
    """The first bitmap of the data, and that of the metadata."""
    found = Check(BlockStore(device))
    data_map, metadata_map = await found.data_map(pool.data.root), await found.metadata_map(pool.space.root)
    assert data_map is not None
    assert metadata_map is not None
    return block(device, int(data_map.entries["block"][0])), block(device, int(metadata_map.entries["block"][0]))


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("which", [0, 1])
async def test_counts_that_differ(change: int, which: int, tmp_path: Path) -> None:
    device, pool = await snapshots()
    bitmap = (await counts_of(device, pool))[which]
    entry = next(entry for entry in range(1, 500) if get_count(bitmap, entry) == 1)
    set_count(bitmap, entry, get_count(bitmap, entry) + change)
    seal(bitmap, int.from_bytes(bitmap[8:16], "little"), BITMAP.salt)
    found = await check(device)
    assert bool(found.errors) == (change < 0)
    assert found.leaks or change < 0
    assert f"block {entry} has count" in (found.errors.words + found.leaks.words)[0]
    if shutil.which("thin_check"):
        assert (thin_check(bytes(device.bytes), tmp_path)[0] != 0) == (which == 1)  # it does not look at the data's counts


def _alien_key(data: memoryview) -> None:
    words = data.cast("Q")
    words[4 + (words[2] & 0xFFFFFFFF) - 1] += 1 << 40


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: data.__setitem__(slice(16, 24), b"\x5a\0\0\0\xfa\0\0\0"), "no multiple of 3"),
        (lambda data: data.__setitem__(slice(16, 20), (83).to_bytes(4, "little")), "less than a third"),
        (lambda data: data.__setitem__(slice(32, 40), bytes(8)), "its lowest key is 0, its parent says"),
        (_alien_key, "the next in its parent"),
        (lambda data: data.__setitem__(slice(40, 48), bytes(8)), "keys do not ascend"),
        (lambda data: data.__setitem__(slice(4, 8), b"\x03\0\0\0"), "flags 3"),
        (lambda data: data.__setitem__(slice(24, 28), b"\x10\0\0\0"), "do not fit"),
    ],
)
async def test_what_is_wrong_with_a_node_is_said(spoil: Callable[[memoryview], None], words: str) -> None:
    device = FakeDisk("7:0", 512 * 8)
    pool = await Pool.create(device, DATA_BLOCKS)
    await pool.create_thin(0)
    for key in range(2000):
        await pool.provision(0, key * 2)
    await pool.commit()
    tree = await pool.forest.tree(0)
    assert tree is not None
    leaf = [leaf.number async for leaf, _, _ in tree.leaves()][1]
    data = block(device, leaf)
    spoil(data)
    seal(data, leaf, NODE.salt)
    found = await check(device)
    assert any(f"metadata block {leaf}: " in one and words in one for one in found.errors.words), found.errors.words


async def test_a_loop_and_a_pointer_beyond_the_end_are_found() -> None:
    device, pool = await snapshots()
    good = bytes(device.bytes)
    tree = await pool.forest.tree(0)
    assert tree is not None
    for target, words in ((tree.root, "its parent"), (600, "a pointer to metadata block 600, the last is 511")):
        device.bytes[:] = good
        data = block(device, tree.root)
        data.cast("Q")[4 + 252 + 1] = target
        seal(data, tree.root, NODE.salt)
        found = await check(device)
        assert any(words in one for one in found.errors.words), found.errors.words


async def test_findings_are_bounded() -> None:
    device, pool = await snapshots()
    bitmap, _ = await counts_of(device, pool)
    bitmap[16:] = bytes([0xAA]) * (BLOCK - 16)
    seal(bitmap, int.from_bytes(bitmap[8:16], "little"), BITMAP.salt)
    found = await check(device)
    assert found.leaks.total > 10000
    assert len(found.leaks.words) == 100

"""The library as a whole, used as thin uses it: thin_check passes at any commit, and it reads back what was written."""

import random
from pathlib import Path

import pytest

from tests.persist.pool import Pool, thin_check
from tests.support.disks import FakeDisk


def metadata(blocks: int = 1024) -> FakeDisk:
    device = FakeDisk("7:0", blocks * 8)
    device.bytes[:] = random.Random(blocks).randbytes(len(device.bytes))  # what was there before must not matter
    return device


def checked(device: FakeDisk, directory: Path) -> None:
    status, words = thin_check(bytes(device.bytes), directory)
    assert status == 0, words


async def reopened(pool: Pool) -> Pool:
    """The pool, read from the disk: it must have what the model says."""
    other = await Pool.open(pool.store.device, pool.store.limit)
    other.model = pool.model
    assert await other.contents() == pool.model
    assert other.space.nr_free == pool.space.nr_free
    assert other.data.nr_free == pool.data.nr_free
    return other


async def test_an_empty_pool_has_as_many_blocks_in_use_as_the_kernels(tmp_path: Path) -> None:
    device = metadata(1024)
    pool = await Pool.create(device, 100)
    checked(device, tmp_path)
    assert 1024 - pool.space.nr_free == 9
    assert pool.data.nr_free == 100
    await reopened(pool)


@pytest.mark.parametrize("cache", [64, 4096])
async def test_snapshots_discards_and_deletions(cache: int, tmp_path: Path) -> None:
    device = metadata(1024)
    pool = await Pool.create(device, 40000, cache)
    empty = pool.space.nr_free
    rng = random.Random(cache)
    await pool.create_thin(0)
    for key in range(6000):
        await pool.provision(0, key)
    await pool.commit()
    checked(device, tmp_path)
    for identity, origin in ((1, 0), (2, 1), (3, 0)):
        await pool.create_snap(identity, origin)
    for step in range(6):
        for _ in range(200):
            await pool.provision(rng.randrange(4), rng.randrange(12000))
        for _ in range(3):
            first = rng.randrange(12000)
            await pool.discard(rng.randrange(4), first, first + rng.randrange(1500))
        if step == 3:
            await pool.create_snap(9, 2)
            await pool.delete(1)
            await pool.create_thin(1)
        await pool.commit()
        checked(device, tmp_path)
        assert pool.store.resident <= cache
        pool = await reopened(pool)
    for identity in list(pool.model):
        await pool.delete(identity)
    await pool.commit()
    checked(device, tmp_path)
    assert pool.data.nr_free == 40000
    assert pool.space.nr_free == empty

"""Damaged metadata, its checksums right: whatever is read or changed fails with a declared error, or goes well, and soon."""

import asyncio
import random

import pytest

from nbdmap.errors import NbdmapError
from tests.persist.pool import Metadata, check
from tests.persist.test_check import block, damage, salt_of, snapshots
from tests.support.disks import FakeDisk


async def use(device: FakeDisk, rng: random.Random) -> str:
    """Opens the pool, reads and changes it in each way: what it fails with, "" if it does not."""
    try:
        pool = await Metadata.open(device)
        await pool.contents()
        for identity in (0, 3, 8):
            await pool.forest.lookup(identity, rng.randrange(4000))
            for _ in range(30):
                await pool.provision(identity, rng.randrange(4000))
            await pool.discard(identity, rng.randrange(2000), 3000)
        await pool.create_thin(20)
        await pool.create_snap(21, 2)
        await pool.delete(1)
        await pool.commit()
        await pool.contents()
    except NbdmapError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("seed", range(4))
async def test_only_declared_errors(seed: int) -> None:
    device, _ = await snapshots()
    good = bytes(device.bytes)
    met = await check(device)
    used = [number for number in range(1, 512) if met.owners[number]]
    rng = random.Random(seed)
    failed = 0
    for _ in range(60):
        device.bytes[:] = good
        for _ in range(rng.choice((1, 1, 3))):
            data = block(device, rng.choice(used))
            kind = salt_of(data)
            assert kind is not None
            damage(data, kind, rng)
        async with asyncio.timeout(10):
            failed += bool(await use(device, rng))
    print(f"{failed} of 60 damages were met")
    assert failed > 10

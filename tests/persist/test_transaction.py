"""Transactions: the order of a commit's writes, what may be overwritten, and what happens when any I/O fails."""

import random

import pytest

from nbdmap.block.io import FUA, READ, Io
from nbdmap.errors import CorruptMetadata, IoFailed, NbdmapError
from nbdmap.persist.blocks import BLOCK
from nbdmap.persist.node import NODE
from tests.persist.pool import Pool, check
from tests.support.disks import FakeDisk, eio


async def filled(cache: int = 1024) -> tuple[FakeDisk, Pool]:
    device = FakeDisk("7:0", 1024 * 8)
    pool = await Pool.create(device, 20000, cache)
    for identity in range(3):
        await pool.create_thin(identity)
        for key in range(500):
            await pool.provision(identity, key * 3)
    await pool.create_snap(9, 1)
    await pool.commit()
    return device, pool


async def work(pool: Pool, seed: int = 0) -> None:
    """A transaction with some of everything."""
    rng = random.Random(seed)
    for _ in range(40):
        await pool.provision(rng.choice((0, 1, 2, 9)), rng.randrange(1500))
    await pool.discard(0, 100, 700)
    await pool.create_snap(20 + seed, 2)
    await pool.provision(20 + seed, 0)
    await pool.delete(1 if seed % 2 else 9)
    await pool.create_thin(1 if seed % 2 else 9)


async def test_the_order_of_a_commit() -> None:
    device, pool = await filled()
    await work(pool)
    device.log.clear()
    await pool.commit()
    names = [name for name, _, _, _ in device.log if name != "read"]
    assert names == ["write"] * (len(names) - 2) + ["flush", "write"]
    assert device.log[-1] == ("write", 0, BLOCK, FUA)
    assert all(offset and not flags for name, offset, _, flags in device.log[:-1] if name == "write")


@pytest.mark.parametrize("cache", [48, 1024])
async def test_nothing_that_is_committed_is_overwritten_before_the_next_commit(cache: int) -> None:
    device, pool = await filled(cache)
    for seed in range(6):
        met = await check(device)
        used = {number for number in range(1, 1024) if met.owners[number]}
        device.log.clear()
        await work(pool, seed)
        await pool.commit()
        for name, offset, length, _ in device.log[:-1]:
            if name == "write":
                assert not used & set(range(offset // BLOCK, (offset + length) // BLOCK))


async def test_a_block_is_shadowed_once_a_transaction() -> None:
    _, pool = await filled()
    tree = await pool.forest.tree(0)
    assert tree is not None
    copy, shared = await pool.tx.shadow(tree.root, NODE)
    assert (copy.number == tree.root, shared) == (False, False)
    again, shared = await pool.tx.shadow(copy.number, NODE)
    assert (again, shared) == (copy, False)
    pool.tx.inc(copy.number)
    other, shared = await pool.tx.shadow(copy.number, NODE)
    assert (other is copy, shared) == (False, True)


async def test_a_block_without_owners_is_corrupt() -> None:
    _, pool = await filled()
    tree = await pool.forest.tree(0)
    assert tree is not None
    pool.space.dec(tree.root)
    with pytest.raises(CorruptMetadata, match=f"block {tree.root}, a b-tree node, is in use but has no owners"):
        await pool.provision(0, 1)


class Nth:
    """The N-th I/O fails, and when it is sticky all that follow."""

    def __init__(self, number: int, *, sticky: bool) -> None:
        self.left = number
        self.sticky = sticky
        self.met = False

    def __call__(self, io: Io, offset: int) -> Exception | None:
        self.left -= 1
        if self.left == -1 or (self.sticky and self.left < 0):
            self.met = True
            return eio(io, offset)
        return None


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("cache", [48, 1024])
async def test_whichever_io_of_a_transaction_fails_the_last_commit_stands(cache: int, sticky: bool) -> None:
    """For every N: the N-th I/O fails; an abort brings back the last commit, and work goes on."""
    device, pool = await filled(cache)
    image, model = bytes(device.bytes), pool.model
    number = 0
    while True:
        device.bytes[:] = image
        pool = await Pool.open(device, cache)
        pool.model = {identity: dict(one) for identity, one in model.items()}
        nth = device.failure = Nth(number, sticky=sticky)
        try:
            await work(pool)
            await pool.commit()
            assert not nth.met
            break
        except NbdmapError:
            assert nth.met
        if pool.tx.broken:  # a look-up that fails breaks nothing
            with pytest.raises(IoFailed, match="must be aborted: broken on purpose"):
                await pool.commit()
        assert bytes(device.bytes[:BLOCK]) == image[:BLOCK]
        device.failure = lambda io, offset: None
        again = await Pool.open(device, cache)
        again.model = {identity: dict(one) for identity, one in model.items()}
        assert await again.contents() == again.model
        await work(again)
        await again.commit()
        assert not (await check(device)).errors
        number += 1
    print(f"cache {cache}, {'from then on' if sticky else 'once'}: each of {number} I/Os failed")
    assert number > 15
    device.failure = lambda io, offset: None
    other = await Pool.open(device, cache)
    assert await other.contents() == pool.model


async def test_a_broken_transaction_can_still_be_read() -> None:
    device, pool = await filled()
    device.failure = lambda io, offset: None if io.op is READ else eio(io, offset)
    await pool.provision(0, 0)
    with pytest.raises(IoFailed, match="broken on purpose"):
        await pool.commit()
    assert await pool.forest.lookup(0, 3) == pool.model[0][3]

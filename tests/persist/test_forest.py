"""Trees of trees: shared and changed at both levels, with the owners of everything right at the end."""

import random

import pytest

from nbdmap.errors import CorruptMetadata
from nbdmap.persist.btree import Btree
from nbdmap.persist.forest import Forest, Trees
from tests.persist.pool import Pool, check
from tests.support.disks import FakeDisk


async def pool(blocks: int = 2000) -> Pool:
    return await Pool.create(FakeDisk("7:0", blocks * 8), 100000)


async def sound(one: Pool) -> None:
    assert await one.contents() == one.model
    await one.commit()
    found = await check(one.store.device)
    assert not found.errors, found.errors.words
    assert not found.leaks, found.leaks.words
    assert not found.notes, found.notes.words


async def test_look_ups_go_through_both_levels() -> None:
    one = await pool()
    await one.create_thin(7)
    await one.provision(7, 40)
    assert await one.forest.lookup(7, 40) == one.model[7][40]
    assert await one.forest.lookup(7, 41) is None
    assert await one.forest.lookup(8, 40) is None
    assert await one.forest.tree(8) is None
    assert [identity async for identity, _ in one.forest.roots()] == [7]


async def test_many_trees() -> None:
    one = await pool()
    rng = random.Random(1)
    identities = rng.sample(range(1 << 24), 600)
    for identity in identities:
        await one.create_thin(identity)
        await one.provision(identity, identity % 5)
    await sound(one)
    for identity in identities[::2]:
        await one.delete(identity)
    await sound(one)


async def test_a_tree_that_is_not_there() -> None:
    one = await pool()
    await one.create_thin(1)
    for work in (one.forest.insert(2, 0, 0), one.forest.remove(2), one.forest.share(3, 2)):
        with pytest.raises(CorruptMetadata, match="no tree for 2"):
            await work
        one.tx.broken = ""
    assert await one.forest.remove_range(2, 0, 10) == 0


async def test_a_second_owner_of_the_top_keeps_all_as_it_was() -> None:
    """As a metadata snapshot does: the top has one owner more, and none of the trees below."""
    one = await pool()
    rng = random.Random(4)
    for identity in range(300):
        await one.create_thin(identity)
        for _ in range(3):
            await one.provision(identity, rng.randrange(50))
    await one.create_snap(1000, 5)
    await one.commit()
    one.space.inc(one.forest.root)
    held = Trees(one.store, one.mappings(), one.forest.root)
    before = await one.contents()
    for identity in range(0, 300, 3):
        await one.provision(identity, 77)
    for identity in (1, 5, 20):
        await one.discard(identity, 0, 50)
    await one.delete(200)
    await one.create_snap(1001, 1000)
    assert await one.contents() == one.model
    after = {}
    async for identity, _ in held.roots():
        tree = await held.tree(identity)
        assert tree is not None
        after[identity] = dict([item async for item in tree.items()])
    assert after == before
    await Forest(one.tx, one.mappings(), held.root).destroy()
    await sound(one)


async def test_snapshots_of_snapshots_cost_one_entry_each() -> None:
    one = await pool()
    await one.create_thin(0)
    for key in range(2000):
        await one.provision(0, key)
    await one.commit()
    free = one.space.nr_free
    for identity in range(1, 100):
        await one.create_snap(identity, identity - 1)
    await one.commit()
    assert free - one.space.nr_free <= 3
    for identity in range(0, 100, 7):
        await one.provision(identity, identity)
    await sound(one)
    for identity in random.Random(2).sample(range(100), 100):
        await one.delete(identity)
    await sound(one)
    assert one.data.nr_free == 100000


async def test_several_changes_of_one_tree_at_once() -> None:
    one = await pool()
    await one.create_thin(0)

    async def work(tree: Btree[int]) -> int:
        for key in range(1000):
            await tree.insert_part(key, key + 1 << 24)
            assert await one.forest.lookup(0, key) == key + 1 << 24
        return await tree.remove_part(0, 10)

    assert await one.forest.change(0, work) == 10
    assert await one.forest.lookup(0, 9) is None
    assert await one.forest.lookup(0, 999) == 1000 << 24


async def test_destroying_a_forest_leaves_nothing() -> None:
    one = await pool()
    free = one.space.nr_free
    for identity in range(40):
        await one.create_thin(identity)
        for key in range(300):
            await one.provision(identity, key)
    await one.create_snap(100, 3)
    await one.commit()
    await one.forest.destroy()
    one.forest = Forest.create(one.tx, one.mappings())
    one.model = {}
    await one.details.remove_range(0)
    await sound(one)
    assert one.space.nr_free == free
    assert one.data.nr_free == 100000

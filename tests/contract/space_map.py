"""What every space map must do: CONTRACT is a list of checks to run on a fresh one that was committed once.

A check is `async def check(kept)`; `kept` is a `Kept`: the map with its transaction, which can be committed and read again.
"""

import random
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import pytest

from nbdmap.errors import CorruptMetadata, OutOfSpace


class Kept(Protocol):
    """A space map with at least 3000 blocks."""

    spare: int
    """Free blocks that a commit may need for the map itself."""

    @property
    def nr_blocks(self) -> int: ...
    @property
    def nr_free(self) -> int: ...
    async def new_block(self) -> int: ...
    async def count(self, block: int) -> int: ...
    async def inc(self, block: int) -> None: ...
    async def dec(self, block: int) -> None: ...
    async def extend(self, nr_blocks: int) -> None: ...
    async def commit(self) -> None: ...
    async def reopen(self) -> None:
        """Forgets what was not committed and reads the map again."""
        ...


async def take(kept: Kept, number: int) -> list[int]:
    return [await kept.new_block() for _ in range(number)]


async def committed(kept: Kept, change: Awaitable[None]) -> None:
    """A change and a commit: one of them finds what is wrong."""
    await change
    await kept.commit()


async def a_new_block_was_free_and_has_one_owner(kept: Kept) -> None:
    free = kept.nr_free
    blocks = await take(kept, 300)
    assert len(set(blocks)) == 300
    assert all(0 <= block < kept.nr_blocks for block in blocks)
    assert {await kept.count(block) for block in blocks} == {1}
    assert kept.nr_free == free - 300


async def blocks_are_given_out_in_order(kept: Kept) -> None:
    blocks = await take(kept, 50)
    assert blocks == list(range(blocks[0], blocks[0] + 50))
    assert (await take(kept, 1))[0] == blocks[-1] + 1


async def counts_go_up_and_down_and_are_kept(kept: Kept) -> None:
    blocks = await take(kept, 12)
    for owners, block in enumerate(blocks):
        for _ in range(owners):
            await kept.inc(block)
    await kept.commit()
    for block in blocks:
        await kept.inc(block)
    await kept.reopen()
    assert [await kept.count(block) for block in blocks] == list(range(1, 13))
    for step in range(12):
        for owners, block in enumerate(blocks):
            if owners >= step:
                await kept.dec(block)
        owned = range(step + 1, 12)  # the others may have been taken for the map itself
        assert [await kept.count(blocks[owners]) for owners in owned] == [owners - step for owners in owned]
        await kept.commit()
        await kept.reopen()
        assert [await kept.count(blocks[owners]) for owners in owned] == [owners - step for owners in owned]


async def a_freed_block_is_not_given_out_before_the_commit(kept: Kept) -> None:
    blocks = await take(kept, kept.nr_free - kept.spare)
    await kept.commit()
    freed = blocks[100:200]
    for block in freed:
        await kept.dec(block)
    left = kept.nr_free
    assert not set(await take(kept, left)) & set(freed)
    with pytest.raises(OutOfSpace):
        await kept.new_block()


async def a_freed_block_is_given_out_after_the_commit(kept: Kept) -> None:
    blocks = await take(kept, kept.nr_free - kept.spare)
    await kept.commit()
    for block in blocks[100:400]:
        await kept.dec(block)
    free = kept.nr_free
    await kept.commit()
    assert kept.nr_free >= free + 300 - kept.spare
    again = await take(kept, kept.nr_free)
    assert len(set(again) & set(blocks[100:400])) >= 300 - kept.spare
    with pytest.raises(OutOfSpace):
        await kept.new_block()


async def what_was_given_out_and_freed_at_once_is_free_after_the_commit(kept: Kept) -> None:
    free = kept.nr_free
    for block in await take(kept, 200):
        await kept.dec(block)
    assert kept.nr_free == free - 200
    await kept.commit()
    assert kept.nr_free == free


async def nobody_owns_less_than_nothing(kept: Kept) -> None:
    (block,) = await take(kept, 1)
    await kept.commit()
    await kept.dec(block)
    with pytest.raises(CorruptMetadata, match=f"block {block}: .*take"):
        await committed(kept, kept.dec(block))


async def blocks_beyond_the_end_have_no_owners(kept: Kept) -> None:
    with pytest.raises(CorruptMetadata, match="ends with"):
        await kept.count(kept.nr_blocks)
    with pytest.raises(CorruptMetadata, match="ends with"):
        await committed(kept, kept.inc(kept.nr_blocks))


async def it_can_be_extended(kept: Kept) -> None:
    before, free = kept.nr_blocks, kept.nr_free
    blocks = await take(kept, 40)
    await kept.extend(before + 1000)
    assert kept.nr_free == free - 40 + 1000
    await kept.commit()
    await kept.reopen()
    assert kept.nr_blocks == before + 1000
    assert {await kept.count(block) for block in blocks} == {1}
    assert {await kept.count(block) for block in range(before, before + 1000)} <= {0, 1}
    more = await take(kept, kept.nr_free)
    assert len({block for block in more if block >= before}) > 900
    assert max(more) == kept.nr_blocks - 1


async def it_follows_a_model(kept: Kept) -> None:
    rng = random.Random(5)
    model: dict[int, int] = {}
    committed: dict[int, int] = {}
    for step in range(25):
        for _ in range(60):
            kind = rng.random()
            if kind < 0.3 or not model:
                block = await kept.new_block()
                assert block not in model
                assert block not in committed
                model[block] = 1
            elif kind < 0.7:
                block = rng.choice(sorted(model)[:12])  # the same ones often, so that counts become large
                await kept.inc(block)
                model[block] += 1
            else:
                block = rng.choice(list(model))
                await kept.dec(block)
                model[block] -= 1
                if not model[block]:
                    del model[block]
        if step % 5 == 4:
            await kept.reopen()
            model = dict(committed)
        else:
            await kept.commit()
            committed = dict(model)
        assert {block: await kept.count(block) for block in model} == model
    assert max(model.values()) > 10


CONTRACT: Final[list[Callable[[Kept], Awaitable[None]]]] = [
    a_new_block_was_free_and_has_one_owner,
    blocks_are_given_out_in_order,
    counts_go_up_and_down_and_are_kept,
    a_freed_block_is_not_given_out_before_the_commit,
    a_freed_block_is_given_out_after_the_commit,
    what_was_given_out_and_freed_at_once_is_free_after_the_commit,
    nobody_owns_less_than_nothing,
    blocks_beyond_the_end_have_no_owners,
    it_can_be_extended,
    it_follows_a_model,
]

"""Block status of a thin volume: what is mapped, and what is not."""

from collections.abc import AsyncIterator, Sequence
from typing import Final

from nbdmap.block.device import HOLE, ZERO, Device, Extent
from nbdmap.targets.thin.volume import Volume

MAX_EXTENTS: Final = 4096
"""Runs that one answer is made of."""


async def extents(volume: Volume, origin: Device | None, at: int, length: int) -> list[Extent]:
    """Of `length` bytes of the volume from byte `at` on: mapped blocks are data, the others holes, or what `origin` says."""
    size, end = volume.pool.block_size, at + length
    first, stop_block = at // size, -(-end // size)
    new = sorted({block for mappings in (volume.pending, volume.applying) for block in mappings})
    tree = volume.pool.metadata.mapped(volume.number, first, stop_block)
    found: list[Extent] = []
    async for begin, stop in _runs(tree, [block for block in new if first <= block < stop_block]):
        low, high = max(begin * size, at), min(stop * size, end)
        if low > at:
            found += await _hole(origin, at, low)
        found.append((high - low, 0))
        at = high
        if len(found) >= MAX_EXTENTS:
            return found
    if at < end:
        found += await _hole(origin, at, end)
    return found


async def _hole(origin: Device | None, low: int, high: int) -> list[Extent]:
    found: list[Extent] = []
    while origin is not None and low < min(high, origin.size):
        for length, flags in await origin.extents(low, min(high, origin.size) - low):
            found.append((length, flags & ZERO))
            low += length
    return [*found, (high - low, HOLE | ZERO)] if low < high else found


async def _runs(tree: AsyncIterator[tuple[int, int]], new: Sequence[int]) -> AsyncIterator[tuple[int, int]]:
    """Runs of mapped blocks, first and end, of those in the tree and the new ones, both in ascending order."""
    first = end = -1
    waiting = list(new)[::-1]

    async def merged() -> AsyncIterator[int]:
        async for block, _ in tree:
            while waiting and waiting[-1] < block:
                yield waiting.pop()
            yield block
        while waiting:
            yield waiting.pop()

    async for block in merged():
        if block == end:
            end += 1
        elif block > end:
            if first < end:
                yield first, end
            first, end = block, block + 1
    if first < end:
        yield first, end

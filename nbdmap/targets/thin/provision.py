"""What volumes do when a look-up in memory is not enough: provisioning, breaking of sharing, discards (reference h.4, h.5)."""

from typing import Final, NamedTuple

from nbdmap.block.device import Device
from nbdmap.block.io import DONE, FUA, READ, WRITE, WRITE_ZEROES, Io, Pending
from nbdmap.errors import IoFailed, OutOfSpace
from nbdmap.targets.thin.metadata import TIME_BITS
from nbdmap.targets.thin.modes import Mode
from nbdmap.targets.thin.pool import Pool
from nbdmap.targets.thin.volume import Volume

COPY: Final = 1 << 20
"""A new block is filled in pieces of at most so many bytes."""
MAX_DISCARD_BLOCKS: Final = 1024
"""Blocks that are discarded at once."""


class Source(NamedTuple):
    """What a new block begins with: bytes `start` to `end` of a device, zeroes behind; no device: zeroes only."""

    device: Device | None
    start: int
    end: int


async def read(volume: Volume, io: Io, block: int, inside: int, origin: Device | None) -> None:
    """A read (or CACHE) inside of one block."""
    pool = volume.pool
    await volume.free(block)
    value = await volume.find(block)
    if value is not None:
        await pool.flights.track(pool.data.submit(io, (value >> TIME_BITS) * pool.block_size + inside))
    elif io.op is READ:
        await read_origin(origin, io.data, block * pool.block_size + inside)


async def read_origin(origin: Device | None, data: memoryview, offset: int) -> None:
    """Reads from an external origin; there are zeroes behind its end, and without one."""
    there = min(max((origin.size if origin else 0) - offset, 0), len(data))
    if origin is not None and there:
        await origin.submit(Io(READ, there, data[:there]), offset)
    data[there:] = bytes(len(data) - there)


async def write(volume: Volume, io: Io, block: int, inside: int, origin: Device | None) -> None:
    """A write inside of one block, not durable."""
    pool = volume.pool
    while True:
        await volume.free(block)
        value = await volume.find(block)
        if block in volume.cells:
            continue
        if value is not None and not volume.is_shared(value):
            await pool.flights.track(pool.data.submit(io, (value >> TIME_BITS) * pool.block_size + inside))
            return
        try:
            await _provision(volume, io, block, inside, value, origin)
            return
        except OutOfSpace:
            await pool.wait_for_space(volume)


def write_at_once(volume: Volume, io: Io, block: int, inside: int) -> Pending | None:
    """A write inside of one block, not durable, to a volume without an external origin; None if it is not the block's first
    or something has to be waited for before it can begin."""
    pool = volume.pool
    if pool.block_size > COPY or not volume.surely_lacks(block) or (found := pool.new_block_at_once()) is None:
        return None
    new, blank = found
    writing = _fill_at_once(pool, io, new * pool.block_size, inside, blank or pool.features.skip_block_zeroing)
    if writing is DONE:
        volume.add(block, new, True)
        return DONE
    volume.take(block)
    return _rest(volume, block, new, writing, pool.generation)


async def _rest(volume: Volume, block: int, new: int, writing: Pending, generation: int) -> None:
    try:
        await _map(volume, block, new, writing, generation, True)
    finally:
        volume.give_back(block)


async def _provision(volume: Volume, io: Io, block: int, inside: int, old: int | None, origin: Device | None) -> None:
    """Gives a virtual block a data block of its own, with the write in it. Raises OutOfSpace."""
    pool = volume.pool
    volume.take(block)
    try:
        generation = pool.generation
        new, blank = await pool.new_block()
        size = pool.block_size
        if old is not None:
            start = (old >> TIME_BITS) * size
            source: Source | None = Source(pool.data, start, start + size)
        elif origin is not None:
            source = Source(origin, block * size, min((block + 1) * size, origin.size))
        else:
            source = None if blank or pool.features.skip_block_zeroing else Source(None, 0, 0)
        await _map(volume, block, new, _fill(pool, io, new * size, inside, source), generation, old is None)
    finally:
        volume.give_back(block)


async def _map(volume: Volume, block: int, new: int, filling: Pending, generation: int, is_first: bool) -> None:
    """Maps a virtual block, whose cell the caller has, to a data block when that is filled."""
    pool = volume.pool
    try:
        await filling
    except BaseException as error:
        if pool.generation == generation:
            pool.dropped.append(new)
        if isinstance(error, OutOfSpace):  # of a device below, which no block of this pool helps
            raise IoFailed(error.message, error.errno) from error
        raise
    if pool.generation != generation:
        raise IoFailed("the pool's metadata went back to its last commit while a block was provisioned")
    volume.add(block, new, is_first)


def _fill_at_once(pool: Pool, io: Io, place: int, inside: int, as_it_is: bool) -> Pending:
    """Writes a new block, zeroes around the request's data unless it may stay as it is."""
    size = pool.block_size
    if as_it_is or io.length == size:
        return pool.data.submit(Io(WRITE, io.length, io.data), place + inside)
    piece = bytearray(size)
    piece[inside : inside + io.length] = io.data
    return pool.data.submit(Io(WRITE, size, memoryview(piece)), place)


async def _fill(pool: Pool, io: Io, place: int, inside: int, source: Source | None) -> None:
    """Writes a new block: the request's data, and `source` around it."""
    size = pool.block_size
    end = inside + io.length
    if source is None or io.length == size:
        await pool.data.submit(Io(WRITE, io.length, io.data), place + inside)
        return
    for first in range(0, size, COPY):
        last = min(first + COPY, size)
        begin, stop = max(inside, first), min(end, last)
        covered = begin < stop
        if not covered and source.device is None and pool.data.limits.zero:
            await pool.data.submit(Io(WRITE_ZEROES, last - first), place + first)
            continue
        piece = bytearray(last - first)
        if not (covered and begin == first and stop == last):
            await _read_source(pool, source, first, memoryview(piece))
        if covered:
            piece[begin - first : stop - first] = io.data[begin - inside : stop - inside]
        await pool.data.submit(Io(WRITE, len(piece), memoryview(piece)), place + first)


async def _read_source(pool: Pool, source: Source, first: int, into: memoryview) -> None:
    there = min(max(source.end - source.start - first, 0), len(into))
    if source.device is not None and there:
        await pool.flights.track(source.device.submit(Io(READ, there, into[:there]), source.start + first))


async def flush(volume: Volume) -> None:
    """All that the volume was given before is durable: data, and mappings."""
    pool = volume.pool
    if volume.aborted or pool.mode is Mode.FAIL:
        raise IoFailed(f"changes of volume {volume.number} were lost")
    if volume.changed or volume.committing:
        await pool.commit()
    else:
        await pool.flush_data()


async def discard(volume: Volume, first: int, end: int, flags: int) -> None:
    """Unmaps the virtual blocks from `first` up to `end`; the data device hears of those that nobody has any more."""
    pool = volume.pool
    if pool.mode is Mode.FAIL:
        raise IoFailed("the pool failed")
    if pool.mode >= Mode.OUT_OF_METADATA:
        return
    while (part := await _next_part(volume, first, end)) is not None:
        first = part[1]
        await _discard(volume, *part)
    if pool.mode is Mode.OUT_OF_DATA:
        await pool.commit()
        pool.check_space()
    if flags & FUA:
        await flush(volume)


async def _next_part(volume: Volume, first: int, end: int) -> tuple[int, int] | None:
    """The next blocks from `first` on of which one is mapped, at most MAX_DISCARD_BLOCKS; None without any before `end`."""
    found = await volume.pool.metadata.next_mapped(volume.number, first)
    new = [block for mappings in (volume.pending, volume.applying) for block in mappings if block >= first]
    busy = [block for block in volume.cells if block >= first]
    lowest = min([*new, *busy, *([found[0]] if found else [])], default=end)
    return None if lowest >= end else (lowest, min(end, lowest + MAX_DISCARD_BLOCKS))


async def _discard(volume: Volume, first: int, end: int) -> None:
    pool = volume.pool
    blocks = range(first, end)
    for block in blocks:  # in ascending order, as everybody who takes more than one
        while block in volume.cells:
            await volume.free(block)
        volume.take(block)
    try:
        volume.forget(blocks)
        await pool.flights.drain()
        async with pool.lock:
            pool.check_writable()
            await _unmap(volume, first, end)
    finally:
        for block in blocks:
            volume.give_back(block)


async def _unmap(volume: Volume, first: int, end: int) -> None:
    """Removes the mappings; what nobody has any more is passed down after the commit, and free then."""
    pool, metadata = volume.pool, volume.pool.metadata
    fresh: set[int] = set()
    for mappings in (volume.pending, volume.applying):
        for block in [block for block in mappings if first <= block < end]:
            fresh.add(block)
            gone = mappings.pop(block) >> TIME_BITS
            pool.loose.discard(gone)
            pool.passing.append(gone)
    before = [entry async for entry in metadata.mapped(volume.number, first, end)]
    fresh.difference_update([block for block, _ in before])

    async def remove() -> None:
        volume.written -= await metadata.remove_range(volume.number, first, end)
        if pool.passdown:
            for gone in [value >> TIME_BITS for _, value in before]:
                if not await metadata.data.count(gone):
                    metadata.data.inc(gone)
                    pool.passing.append(gone)

    await pool.changing(remove())
    if fresh or before:
        volume.fresh -= len(fresh)
        volume.changed = True
        pool.something_changed()
        if first <= volume.highest < end:
            await volume.find_highest()

"""A pool's metadata without the pool: on a device that no pool has open, or the metadata snapshot of a live pool."""

from collections.abc import AsyncIterator, Iterable
from itertools import pairwise
from typing import Final, NamedTuple, Self

import numpy as np

from nbdmap.block.device import Device
from nbdmap.errors import InvalidArgument, NoData, OutOfSpace
from nbdmap.persist.blocks import BLOCK, BlockStore
from nbdmap.persist.lookup import MAX_KEY, Tree, Values, pack_u64, unpack_int
from nbdmap.persist.space_map import bitmaps_for
from nbdmap.targets.thin.metadata import DETAILS, MAX_ID, TIME_BITS, TIME_MASK, Details, Metadata
from nbdmap.targets.thin.superblock import Superblock

MAX_U32: Final = (1 << 32) - 1
CHUNK: Final = 1 << 14
"""Mappings that are restored at once."""
_MAPPINGS = Values(8, pack_u64, unpack_int)


class Run(NamedTuple):
    """`length` virtual blocks from `begin` on, mapped to as many data blocks from `data` on at one time."""

    begin: int
    data: int
    length: int
    time: int


class Offline:
    """The volumes of a superblock. Made by `open`."""

    def __init__(self, store: BlockStore, superblock: Superblock, live: Superblock) -> None:
        self.store = store
        self.superblock = superblock
        self.live = live
        """That of block 0; another one when a metadata snapshot is read."""

    @classmethod
    async def open(cls, device: Device, *, snapshot: bool = False) -> Self:
        """Reads the superblock, or the metadata snapshot's. Raises CorruptMetadata, and NoData without a snapshot."""
        store = BlockStore(device)
        live = Superblock.read(await store.read_raw(0))
        if not snapshot:
            return cls(store, live, live)
        if not live.held_root:
            raise NoData(f"{device.name} has no metadata snapshot")
        return cls(store, Superblock.read(await store.read_raw(live.held_root), live.held_root), live)

    @property
    def nr_data(self) -> int:
        """Data blocks; 0 in a metadata snapshot, which has no space maps."""
        return int.from_bytes(self.superblock.data_map[:8], "little")

    async def volumes(self) -> list[tuple[int, Details]]:
        """All volumes, in the order of their numbers."""
        return [entry async for entry in Tree(self.store, DETAILS, self.superblock.details_root).items()]

    async def _tree(self, number: int) -> Tree[int]:
        root = await Tree(self.store, _MAPPINGS, self.superblock.mapping_root).lookup(number)
        if root is None:
            raise NoData(f"no volume {number}")
        return Tree(self.store, _MAPPINGS, root)

    async def runs(self, number: int) -> AsyncIterator[Run]:
        """The mappings of a volume, in order, neighbours together. Raises NoData."""
        tree = await self._tree(number)
        last: Run | None = None
        async for keys, values in tree.arrays():
            for begin, value in zip(keys.tolist(), np.frombuffer(values, np.uint64).tolist(), strict=True):
                data, time = value >> TIME_BITS, value & TIME_MASK
                if last is not None:
                    if (begin, data, time) == (last.begin + last.length, last.data + last.length, last.time):
                        last = last._replace(length=last.length + 1)
                        continue
                    yield last
                last = Run(begin, data, 1, time)
        if last is not None:
            yield last


def compare(runs: tuple[Iterable[Run], Iterable[Run]]) -> list[tuple[str, int, int]]:
    """What two volumes share: (left_only, right_only, same or different, first block, blocks), in order."""
    left, right = ([*one] for one in runs)
    edges = sorted({edge for run in (*left, *right) for edge in (run.begin, run.begin + run.length)})
    found: list[tuple[str, int, int]] = []
    at = [0, 0]
    for begin, end in pairwise(edges):
        here: list[int | None] = []
        for side, side_runs in enumerate((left, right)):
            while at[side] < len(side_runs) and side_runs[at[side]].begin + side_runs[at[side]].length <= begin:
                at[side] += 1
            run = side_runs[at[side]] if at[side] < len(side_runs) else None
            here.append(run.data + begin - run.begin if run is not None and run.begin <= begin else None)
        if here == [None, None]:
            continue
        if None in here:
            kind = "left_only" if here[1] is None else "right_only"
        else:
            kind = "same" if here[0] == here[1] else "different"
        if found and found[-1][0] == kind and found[-1][1] + found[-1][2] == begin:
            found[-1] = (kind, found[-1][1], found[-1][2] + end - begin)
        else:
            found.append((kind, begin, end - begin))
    return found


class Restored(NamedTuple):
    """What a dump says of a pool."""

    superblock: dict[str, int]
    volumes: list[tuple[int, Details, list[Run]]]


async def restore(device: Device, dump: Restored) -> None:
    """Writes the metadata of a dump on `device`, whatever was there. Snapshots share data blocks, but no metadata.

    Raises InvalidArgument for what cannot be, OutOfSpace when the device is too small; then there is no metadata on it.
    """
    said = dump.superblock
    size, nr_data, time = said["data_block_size"], said["nr_data_blocks"], said["time"]
    if not 0 < size <= MAX_U32 or said["flags"] > MAX_U32 or time > TIME_MASK:
        raise InvalidArgument(f"the superblock: block size {size}, flags {said['flags']} or time {time} cannot be")
    metadata = await Metadata.format(BlockStore(device), size)
    try:
        if bitmaps_for(nr_data) > metadata.nr_metadata:
            raise OutOfSpace(f"{nr_data} data blocks need more metadata than {device.name} has")
        metadata.resize_data(nr_data)
        for volume in dump.volumes:
            await _restore_volume(metadata, *volume)
        metadata.set_superblock(time=time, transaction_id=said["transaction"], flags=said["flags"])
        await metadata.commit()
    except BaseException:
        await metadata.store.write_raw(0, bytes(BLOCK))
        raise


async def _restore_volume(metadata: Metadata, number: int, details: Details, runs: list[Run]) -> None:
    if number > MAX_ID or max(details.created, details.snapshotted) > MAX_U32:
        raise InvalidArgument(f"volume {number}: its number or times are too large")
    await metadata.create_thin(number)
    data = metadata.data
    mapped = 0
    new: dict[int, int] = {}
    for run in runs:
        if run.data + run.length > data.nr_blocks or run.begin + run.length > MAX_KEY + 1 or run.time > TIME_MASK:
            raise InvalidArgument(f"volume {number}: {run} is beyond the data device, the volume, or time")
        for first in range(0, run.length, CHUNK):
            blocks = range(first, min(first + CHUNK, run.length))
            data.inc_all([run.data + index for index in blocks])
            part = {run.begin + index: (run.data + index) << TIME_BITS | run.time for index in blocks}
            data.dec_all([new[block] >> TIME_BITS for block in new.keys() & part.keys()])
            new.update(part)
            if len(new) >= CHUNK:
                mapped += await metadata.insert(number, new)
                new = {}
    if new:
        mapped += await metadata.insert(number, new)
    await metadata.details.insert(number, details._replace(mapped=mapped))

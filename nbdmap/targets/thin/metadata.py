"""A pool's metadata: the volumes and where their blocks are (dm-thin-metadata.c, reference g and h.4).

Three things stand in it beside the superblock: the *details* of each volume, a *forest* with a tree of virtual block -> (data
block, time) for each, and the reference counts of the data blocks. A snapshot shares its origin's tree. `time` counts
snapshots: a mapping may be shared when its volume was snapshotted after the mapping was made.

All changes are made by one coroutine at a time, the pool's (`Pool.lock`), and count with the next `commit`. After a failure
the object is dropped and `Metadata.open` reads the last commit again.
"""

import asyncio
import struct
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Final, NamedTuple

from nbdmap.block.device import Device
from nbdmap.errors import Busy, CorruptMetadata, Exists, InvalidArgument, NoData, NotPermitted
from nbdmap.persist.blocks import BLOCK, BlockStore, BlockType
from nbdmap.persist.btree import Btree
from nbdmap.persist.data_map import DataMap
from nbdmap.persist.forest import Forest
from nbdmap.persist.lookup import Values, pack_u64, unpack_int
from nbdmap.persist.metadata_map import MetadataMap
from nbdmap.persist.transaction import Transaction
from nbdmap.targets.thin.superblock import NEEDS_CHECK, ROOT, SALT, Superblock

TIME_BITS: Final = 24
TIME_MASK: Final = (1 << TIME_BITS) - 1
MAX_ID: Final = (1 << 24) - 1
MAX_RESERVE: Final = 4096
"""Metadata blocks that are kept back at most: a tenth of them is."""
BATCH: Final = 256
"""Mappings that are inserted as one step, a millisecond; between two steps others have their turn."""
HELD: Final = BlockType("held superblock", SALT)

_DETAILS: Final = struct.Struct("<QQII")


class Details(NamedTuple):
    """What is known of a volume: blocks mapped, and when it was created and last snapshotted."""

    mapped: int
    transaction_id: int
    created: int
    snapshotted: int


DETAILS: Final = Values(_DETAILS.size, lambda details: _DETAILS.pack(*details), lambda data: Details(*_DETAILS.unpack_from(data)))


def mapping_values(data: DataMap) -> Values[int]:
    """The values of mapping trees, (block << 24) + time, each a reference to a data block."""
    return Values(
        8, pack_u64, unpack_int,
        inc=lambda values: data.inc_all(value >> TIME_BITS for value in values),
        dec=lambda values: data.dec_all(value >> TIME_BITS for value in values),
    )  # fmt: skip


class Metadata:
    """Open metadata. Made by `open`."""

    def __init__(self, tx: Transaction, space: MetadataMap, data: DataMap, superblock: Superblock) -> None:
        self.tx = tx
        self.store = tx.store
        self.space = space
        self.data = data
        self.superblock = superblock
        """As of the last commit, but for time, transaction id, held root and flags, which are those of now."""
        self.details: Btree[Details] = Btree(tx, DETAILS, superblock.details_root)
        self.mappings: Forest[int] = Forest(tx, mapping_values(data), superblock.mapping_root)
        self.changed = False
        """Whether something waits for a commit."""

    # --- open and commit -----------------------------------------------------------------------------------------------

    @classmethod
    async def open(cls, device: Device, block_size_sectors: int, may_format: bool) -> "Metadata":
        """Opens what is on `device`; formats it if its first block is all zeroes.

        Raises NotPermitted when that may not be, CorruptMetadata, and InvalidArgument for another block size.
        """
        store = BlockStore(device)
        if device.size < BLOCK:
            raise InvalidArgument(f"{device.name} is too small for metadata")
        block = await store.read_raw(0)
        if not any(block):
            if not may_format:
                raise NotPermitted(f"{device.name} has no metadata yet, and a read-only pool makes none")
            return await cls.format(store, block_size_sectors)
        superblock = Superblock.read(block)
        if superblock.block_size_sectors != block_size_sectors:
            raise InvalidArgument(
                f"the data block size is {superblock.block_size_sectors} sectors and cannot become {block_size_sectors}"
            )
        return await cls._opened(store, superblock)

    @classmethod
    async def _opened(cls, store: BlockStore, superblock: Superblock) -> "Metadata":
        space = await MetadataMap.open(store, superblock.metadata_map[:ROOT])
        if space.nr_blocks > store.nr_blocks:
            raise InvalidArgument(f"the metadata has {space.nr_blocks} blocks, {store.device.name} only {store.nr_blocks}")
        tx = Transaction(store, space)
        return cls(tx, space, await DataMap.open(tx, superblock.data_map[:ROOT]), superblock)

    @classmethod
    async def format(cls, store: BlockStore, block_size_sectors: int) -> "Metadata":
        """New metadata, committed, without data blocks so far."""
        space = MetadataMap.create(store.nr_blocks)
        tx = Transaction(store, space)
        data = DataMap.create(tx, 0)
        details, forest = Btree.create(tx, DETAILS), Forest.create(tx, mapping_values(data))
        superblock = replace(
            Superblock.new(block_size_sectors, store.nr_blocks), details_root=details.root, mapping_root=forest.root
        )
        one = cls(tx, space, data, superblock)
        await one.commit()
        return one

    async def commit(self) -> None:
        """Makes all changes durable, at once. The data device must have been flushed. A failure needs an abort."""
        await self.tx.commit(self._sealed)
        self.changed = False

    def _sealed(self) -> bytes:
        self.superblock = replace(
            self.superblock,
            data_map=self.data.root,
            metadata_map=self.space.root,
            mapping_root=self.mappings.root,
            details_root=self.details.root,
        )
        return self.superblock.sealed()

    async def write_needs_check(self) -> None:
        """Sets the flag in the superblock on the disk, which is otherwise that of the last commit."""
        self.superblock = replace(self.superblock, flags=self.superblock.flags | NEEDS_CHECK)
        await self.store.write_raw(0, self.superblock.sealed())

    def set_superblock(self, **fields: int) -> None:
        """Changes fields of the superblock, with the next commit."""
        self.superblock = replace(self.superblock, **fields)  # type: ignore[arg-type]
        self.changed = True

    # --- space ---------------------------------------------------------------------------------------------------------

    @property
    def nr_metadata(self) -> int:
        """Metadata blocks."""
        return self.space.nr_blocks

    @property
    def metadata_free(self) -> int:
        """Metadata blocks free, without those kept back so that what has begun can end."""
        return max(0, self.space.nr_free - min(MAX_RESERVE, self.nr_metadata // 10))

    def resize_data(self, nr_blocks: int) -> None:
        """Makes the data device larger."""
        self.data.extend(nr_blocks)
        self.changed = True

    def resize_metadata(self, nr_blocks: int) -> None:
        """Makes the metadata device larger."""
        self.space.extend(nr_blocks)
        self.changed = True

    # --- volumes -------------------------------------------------------------------------------------------------------

    async def volume(self, number: int) -> Details:
        """The details of a volume. Raises NoData."""
        details = await self.details.lookup(number)
        if details is None:
            raise NoData(f"the pool has no volume {number}")
        return details

    async def _check_new(self, number: int) -> None:
        if await self.details.lookup(number) is not None:
            raise Exists(f"the pool has a volume {number} already")

    async def create_thin(self, number: int) -> None:
        """A new, empty volume. Raises Exists."""
        await self._check_new(number)
        now = self.superblock.time
        await self.mappings.add(number)
        await self.details.insert(number, Details(0, self.superblock.transaction_id, now, now))
        self.changed = True

    async def check_snap(self, number: int, origin: int) -> Details:
        """The details of `origin`, if a snapshot `number` of it can be made. Raises Exists, NoData."""
        await self._check_new(number)
        return await self.volume(origin)

    async def create_snap(self, number: int, origin: int) -> None:
        """A new volume with all that `origin` has. Raises Exists, NoData."""
        details = await self.check_snap(number, origin)
        now = self.superblock.time + 1
        if now > TIME_MASK:
            raise InvalidArgument(f"the pool has made {TIME_MASK} snapshots, the most there can be")
        await self.mappings.share(number, origin)
        await self.details.insert(origin, details._replace(snapshotted=now))
        await self.details.insert(number, Details(details.mapped, self.superblock.transaction_id, now, now))
        self.set_superblock(time=now)

    async def delete(self, number: int) -> None:
        """Removes a volume. Raises NoData."""
        await self.volume(number)
        await self.details.remove(number)
        await self.mappings.remove(number)
        self.changed = True

    def set_transaction_id(self, current: int, new: int) -> None:
        """Compare and swap. Raises InvalidArgument."""
        if self.superblock.transaction_id != current:
            raise InvalidArgument(f"the transaction id is {self.superblock.transaction_id}, not {current}")
        self.set_superblock(transaction_id=new)

    # --- mappings ------------------------------------------------------------------------------------------------------

    async def lookup(self, number: int, block: int) -> int | None:
        """The mapping of a virtual block, (data block << 24) + time; None where there is none."""
        return await self.mappings.lookup(number, block)

    def surely_lacks(self, number: int, block: int) -> bool:
        """Whether it is known without reading that a virtual block has no mapping."""
        return self.mappings.surely_lacks(number, block)

    async def insert(self, number: int, new: Mapping[int, int]) -> int:
        """Makes mappings; how many of the blocks had none. What they replace loses a reference."""
        blocks = sorted(new)
        added = 0

        async def step(tree: Btree[int]) -> int:
            return await tree.insert_all_part(part)

        for start in range(0, len(blocks), BATCH):
            part = [(block, new[block]) for block in blocks[start : start + BATCH]]
            added += await self.mappings.change(number, step)
            await asyncio.sleep(0)
        self.changed = True
        return added

    async def mapped(self, number: int, first: int, end: int) -> AsyncIterator[tuple[int, int]]:
        """The mappings of the blocks from `first` up to `end`, in order, while nothing is changed."""
        tree = await self.mappings.tree(number)
        if tree is not None:
            async for entry in tree.items(first, end):
                yield entry

    async def next_mapped(self, number: int, first: int) -> tuple[int, int] | None:
        """The first mapping at or after a virtual block."""
        tree = await self.mappings.tree(number)
        return None if tree is None else await tree.next(first)

    async def remove_range(self, number: int, first: int, end: int) -> int:
        """Removes the mappings of a range of virtual blocks; how many there were."""
        removed = await self.mappings.remove_range(number, first, end)
        self.changed = self.changed or bool(removed)
        return removed

    async def highest(self, number: int) -> int:
        """The highest mapped virtual block; -1 if none is."""
        tree = await self.mappings.tree(number)
        found = await tree.highest() if tree is not None else None
        return -1 if found is None else found[0]

    async def set_details(self, number: int, mapped: int) -> None:
        """Writes down how many blocks a volume has. Raises CorruptMetadata for less than none: what it had was wrong."""
        if mapped < 0:
            raise CorruptMetadata(f"volume {number} had {-mapped} more mappings than its details said")
        details = await self.volume(number)
        if details.mapped != mapped:
            await self.details.insert(number, details._replace(mapped=mapped))
            self.changed = True

    # --- the metadata snapshot -----------------------------------------------------------------------------------------

    async def reserve_snapshot(self) -> None:
        """Keeps the metadata as it is now for others to read. The caller has committed before. Raises Busy."""
        if self.superblock.held_root:
            raise Busy("the pool has a metadata snapshot already; release it first")
        block = self.tx.allocate(HELD)
        self.tx.inc(self.superblock.mapping_root)
        self.tx.inc(self.superblock.details_root)
        copy = replace(self.superblock, data_map=bytes(128), metadata_map=bytes(128), held_root=0)
        block.data[:] = copy.sealed(block.number)
        self.set_superblock(held_root=block.number)

    async def release_snapshot(self) -> None:
        """Gives the metadata snapshot up. Raises InvalidArgument when there is none."""
        held = self.superblock.held_root
        if not held:
            raise InvalidArgument("the pool has no metadata snapshot to release")
        copy = Superblock.read(bytes((await self.store.read(held, HELD)).data), held)
        await Btree(self.tx, DETAILS, copy.details_root).destroy()
        await Forest(self.tx, self.mappings.values, copy.mapping_root).destroy()
        self.tx.dec(held)
        self.set_superblock(held_root=0)


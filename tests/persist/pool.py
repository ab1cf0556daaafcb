"""A pool of thin metadata, as little of it as the library's tests need: superblock, mappings, details (reference g.2)."""

import subprocess
from pathlib import Path
from struct import Struct
from typing import ClassVar, Final, Self

import numpy as np

from nbdmap.block.device import Device
from nbdmap.errors import CorruptMetadata
from nbdmap.persist.blocks import BLOCK, BlockStore, seal, verify
from nbdmap.persist.btree import Btree
from nbdmap.persist.check import Check, count_references
from nbdmap.persist.data_map import DataMap
from nbdmap.persist.forest import Forest
from nbdmap.persist.lookup import Values, pack_u64, unpack_int
from nbdmap.persist.metadata_map import MetadataMap
from nbdmap.persist.node import U64Array, values
from nbdmap.persist.space_map import RAW
from nbdmap.persist.transaction import Transaction

SALT: Final = 160774
_HEAD: Final = Struct("<IIQ16sQIIQQ")
_TAIL: Final = Struct("<QQIIQIII")
_DETAILS: Final = Struct("<QQII")
Details = tuple[int, int, int, int]
DETAILS: Final = Values[Details](24, lambda value: _DETAILS.pack(*value), _DETAILS.unpack)
TIME_BITS: Final = 24


class Metadata:
    """Thin metadata on `device`: made by `create`, or read by `open`."""

    store_type: ClassVar[type[BlockStore]] = BlockStore
    space_type: ClassVar[type[MetadataMap]] = MetadataMap
    transaction_type: ClassVar[type[Transaction]] = Transaction
    data_type: ClassVar[type[DataMap]] = DataMap

    def __init__(self, device: Device, cache: int) -> None:
        self.store = self.store_type(device, cache)
        self.time = 0
        self.transaction = 0
        self.held_root = 0
        self.flags = 0

    @classmethod
    async def create(cls, device: Device, data_blocks: int = 1000, cache: int = 1024) -> Self:
        pool = cls(device, cache)
        pool.space = cls.space_type.create(pool.store.nr_blocks)
        pool.tx = cls.transaction_type(pool.store, pool.space)
        pool.data = cls.data_type.create(pool.tx, data_blocks)
        pool.forest = Forest.create(pool.tx, pool.mappings())
        pool.details = Btree.create(pool.tx, DETAILS)
        await pool.commit()
        return pool

    @classmethod
    async def open(cls, device: Device, cache: int = 1024) -> Self:
        pool = cls(device, cache)
        block = await pool.store.read_raw(0)
        verify(block, 0, SALT, "superblock")
        _, pool.flags, _, _, magic, version, pool.time, pool.transaction, pool.held_root = _HEAD.unpack_from(block)
        assert (magic, version) == (27022010, 2)
        mappings, details, *_ = _TAIL.unpack_from(block, 320)
        pool.space = await cls.space_type.open(pool.store, block[192:224])
        pool.tx = cls.transaction_type(pool.store, pool.space)
        pool.data = await cls.data_type.open(pool.tx, block[64:96])
        pool.forest = Forest(pool.tx, pool.mappings(), mappings)
        pool.details = Btree(pool.tx, DETAILS, details)
        return pool

    space: MetadataMap
    tx: Transaction
    data: DataMap
    forest: Forest[int]
    details: Btree[Details]

    def mappings(self) -> Values[int]:
        return Values(
            8,
            pack_u64,
            unpack_int,
            inc=lambda values: self.data.inc_all(value >> TIME_BITS for value in values),
            dec=lambda values: self.data.dec_all(value >> TIME_BITS for value in values),
        )

    def superblock(self) -> bytes:
        block = bytearray(BLOCK)
        _HEAD.pack_into(block, 0, 0, self.flags, 0, bytes(16), 27022010, 2, self.time, self.transaction, self.held_root)
        block[64:96] = self.data.root
        block[192:224] = self.space.root
        _TAIL.pack_into(block, 320, self.forest.root, self.details.root, 128, 8, self.store.nr_blocks, 0, 0, 0)
        seal(block, 0, SALT)
        return bytes(block)

    async def commit(self) -> None:
        await self.tx.commit(self.superblock)

    # --- what thin does ----------------------------------------------------------------------------------------------

    async def create_thin(self, identity: int) -> None:
        await self.forest.add(identity)
        await self.details.insert(identity, (0, self.transaction, self.time, self.time))

    async def create_snap(self, identity: int, origin: int) -> None:
        await self.forest.share(identity, origin)
        self.time += 1
        mapped, made, created, _ = await self.of(origin)
        await self.details.insert(origin, (mapped, made, created, self.time))
        await self.details.insert(identity, (mapped, self.transaction, self.time, self.time))

    async def delete(self, identity: int) -> None:
        await self.forest.remove(identity)
        await self.details.remove(identity)

    async def of(self, identity: int) -> Details:
        details = await self.details.lookup(identity)
        if details is None:
            raise CorruptMetadata(f"volume {identity} has no details")
        return details

    async def count(self, identity: int, more: int) -> None:
        if more:
            mapped, *rest = await self.of(identity)
            if mapped + more < 0:
                raise CorruptMetadata(f"volume {identity} has fewer mappings than were removed")
            await self.details.insert(identity, (mapped + more, rest[0], rest[1], rest[2]))

    async def provision(self, identity: int, key: int) -> int:
        """Maps a virtual block to a new data block, in place of an old one if there is one; the new value."""
        value = await self.data.new_block() << TIME_BITS | self.time
        new = await self.forest.insert(identity, key, value)
        await self.count(identity, new)
        return value

    async def discard(self, identity: int, first: int, end: int) -> int:
        """Takes mappings away; how many."""
        removed = await self.forest.remove_range(identity, first, end)
        await self.count(identity, -removed)
        return removed

    async def contents(self) -> dict[int, dict[int, int]]:
        """What is in it, read."""
        found = {}
        async for identity, _ in self.forest.roots():
            tree = await self.forest.tree(identity)
            assert tree is not None
            found[identity] = {key: value async for key, value in tree.items()}
        return found


class Pool(Metadata):
    """As above, and `model` has for each volume what must be in it."""

    def __init__(self, device: Device, cache: int) -> None:
        super().__init__(device, cache)
        self.model: dict[int, dict[int, int]] = {}

    async def create_thin(self, identity: int) -> None:
        await super().create_thin(identity)
        self.model[identity] = {}

    async def create_snap(self, identity: int, origin: int) -> None:
        await super().create_snap(identity, origin)
        self.model[identity] = dict(self.model[origin])

    async def delete(self, identity: int) -> None:
        await super().delete(identity)
        del self.model[identity]

    async def provision(self, identity: int, key: int) -> int:
        value = self.model[identity][key] = await super().provision(identity, key)
        return value

    async def discard(self, identity: int, first: int, end: int) -> int:
        removed = await super().discard(identity, first, end)
        model = self.model[identity]
        gone = [key for key in model if first <= key < end]
        assert len(gone) == removed
        for key in gone:
            del model[key]
        return removed


def set_count(data: memoryview, entry: int, count: int) -> None:
    """Changes one count of a bitmap block; those above 3 are 3."""
    at, shift = 16 + (entry >> 2), (entry & 3) << 1
    data[at] = data[at] & ~(3 << shift) | RAW[min(count, 3)] << shift


def thin_check(image: bytes, directory: Path) -> tuple[int, str]:
    """What thin-provisioning-tools say of the metadata: exit status and words."""
    path = directory / "metadata"
    path.write_bytes(image)
    done = subprocess.run(["thin_check", str(path)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


async def check(device: Device) -> Check:
    """The library's own check of a pool's metadata."""
    store = BlockStore(device)
    found = Check(store)
    block = await store.read_raw(0)
    try:
        verify(block, 0, SALT, "superblock")
    except CorruptMetadata as error:
        found.errors.add(str(error))
        return found
    mappings, details, *_ = _TAIL.unpack_from(block, 320)
    roots: list[int] = []
    data: list[U64Array] = []
    found.own(0)
    await found.tree("devices", mappings, 8, lambda leaf: roots.extend(np.frombuffer(values(leaf), np.uint64).tolist()))
    for root in roots:
        await found.tree(
            "mappings", root, 8, lambda leaf: data.append(np.frombuffer(values(leaf), np.uint64) >> np.uint64(TIME_BITS))
        )
    await found.tree("details", details, 24)
    data_map, metadata_map = await found.data_map(block[64:96]), await found.metadata_map(block[192:224])
    if data_map and not found.errors:
        await found.compare(data_map, *count_references(data))
    if metadata_map and not found.errors:
        await found.compare_metadata(metadata_map)
    return found

"""thin-pool: metadata and data of thin volumes (dm-thin.c; thin-provisioning.txt; reference h.1, h.2).

    0 20971520 thin-pool /dev/meta /dev/data 128 32768 1 skip_block_zeroing
    dmsetup message /dev/mapper/pool 0 "create_thin 0"

I/O on the pool's own device goes to the data device as it is.
"""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Final, Self

from nbdmap.block.device import Device, Limits
from nbdmap.block.io import FLUSH, READ, Io, Pending
from nbdmap.dm.args import Args
from nbdmap.dm.target import Below, Spec, Target
from nbdmap.errors import Busy, InvalidArgument, Unsupported
from nbdmap.persist.lookup import MAX_KEY
from nbdmap.targets.thin.metadata import MAX_ID, Metadata
from nbdmap.targets.thin.modes import MODE_WORDS, Features, Mode
from nbdmap.targets.thin.pool import MAX_CACHED, Pool
from nbdmap.units import SECTOR, round_up

MIN_BLOCK_SECTORS: Final = 128
MAX_BLOCK_SECTORS: Final = 2097152


class ThinPool(Target):
    """`thin-pool <metadata device> <data device> <block sectors> <low water blocks> [<#features> <feature>...]`"""

    type_name = "thin-pool"
    version = (1, 23, 0)
    singleton = True
    immutable = True
    takes_flush = True

    def __init__(self, spec: Spec, pool: Pool, low_water: int, features: Features) -> None:
        super().__init__(spec)
        self.pool = pool
        self._low_water = low_water
        self._features = features
        self._raise_event = spec.raise_event
        pool.users += 1

    @classmethod
    async def construct(cls, spec: Spec, args: Args) -> Self:
        """Opens the metadata, or takes over the pool of the device's present table."""
        names = args.word("metadata device"), args.word("data device")
        if names[0] == names[1]:
            raise InvalidArgument(f"metadata and data device are the same, {names[0]}")
        block_sectors = args.number("data block size", MIN_BLOCK_SECTORS, MAX_BLOCK_SECTORS)
        if block_sectors % MIN_BLOCK_SECTORS:
            raise InvalidArgument(f"data block size: {block_sectors} is not a multiple of {MIN_BLOCK_SECTORS}")
        low_water = args.number("low water mark")
        features = Features.parse(args)
        metadata, data = await spec.open(names[0]), await spec.open(names[1])
        pool = _pool_on(metadata)
        if pool is None or not pool.users:
            pool = await _new_pool(spec, metadata, data, block_sectors, features)
        elif pool.owner is not spec.owner or spec.owner is None:
            raise Busy(f"the metadata device {metadata.name} is in use by a pool")
        elif pool.data is not data:
            raise Busy(f"the pool has the data device {pool.data.name}, which cannot become {data.name}")
        elif pool.features.ignore_discard != features.ignore_discard:
            raise InvalidArgument("ignore_discard cannot be changed while the pool is there")
        return cls(spec, pool, low_water, features)

    def submit(self, io: Io, offset: int) -> Pending:
        """To the data device; a flush commits, too."""
        if io.op is FLUSH:
            pool = self.pool
            return pool.commit() if pool.unsettled and pool.mode < Mode.OUT_OF_METADATA else pool.flush_data()
        if io.op is not READ:
            self.pool.blanks.forget()
        return self.pool.data.submit(io, offset - self.begin)

    def devices(self) -> list[Below]:
        """Metadata and data."""
        return [Below(self.pool.metadata_device, 0, 0), Below(self.pool.data, 0, self.length)]

    def limits(self) -> Limits:
        """The data device's."""
        return replace(self.pool.data.limits, io_min=self.pool.block_size, io_opt=self.pool.block_size)

    def table(self) -> str:
        """As it was loaded, with a blank at the end, as Linux has it."""
        pool = self.pool
        words = f"{pool.metadata_device.number} {pool.data.number} {pool.block_size // SECTOR} {self._low_water}"
        return f"{words} {self._features} "

    # --- status --------------------------------------------------------------------------------------------------------

    async def refresh_status(self) -> None:
        """Commits what has changed."""
        if self.pool.mode < Mode.OUT_OF_METADATA and self.pool.needs_commit:
            await self.pool.commit_quietly()

    def status(self) -> str:
        """Transaction id, blocks used, metadata snapshot, mode; see docs/thin.md. A blank at the end."""
        pool, metadata = self.pool, self.pool.metadata
        if pool.mode is Mode.FAIL:
            return "Fail"
        superblock = metadata.superblock
        discard = "ignore_discard"
        if pool.discard:
            discard = "discard_passdown" if pool.passdown else "no_discard_passdown"
        words = (
            superblock.transaction_id,
            f"{metadata.nr_metadata - metadata.metadata_free}/{metadata.nr_metadata}",
            f"{pool.nr_data - metadata.data.nr_free}/{pool.nr_data}",
            superblock.held_root or "-",
            MODE_WORDS[pool.mode],
            discard,
            "error_if_no_space" if pool.error_if_no_space else "queue_if_no_space",
            "needs_check" if superblock.needs_check else "-",
            pool.metadata_low_water,
        )
        return "".join(f"{word} " for word in words)

    def counters(self) -> dict[str, int]:
        """The caches: mappings of all volumes, and blocks of metadata."""
        pool, store = self.pool, self.pool.metadata.store
        return {
            "cached_mappings": sum(volume.cached for volume in pool.volumes.values()),
            "cached_mappings_max": MAX_CACHED,
            "cached_metadata_blocks": store.resident,
            "cached_metadata_blocks_max": store.limit,
        }

    # --- messages ------------------------------------------------------------------------------------------------------

    async def message(self, args: Args) -> str:
        """The messages of reference h.2, and `trim <id> <sectors>` of the 2011 document. Each commits."""
        if self.pool.mode >= Mode.OUT_OF_METADATA:
            raise Unsupported(f"the pool is {MODE_WORDS.get(self.pool.mode, 'failed')} and takes no messages")
        name = args.word("message").lower()
        if name not in MESSAGES:
            raise InvalidArgument(f"unknown message {name!r}")
        what, obey = MESSAGES[name]
        if len(args) != len(what):
            raise InvalidArgument(f"{name} takes {len(what)} numbers, {len(args)} given")
        numbers = [args.number(one, 0, MAX_ID if "volume" in one else MAX_KEY) for one in what]
        await self.pool.transact(partial(obey, self.pool, *numbers))
        return ""

    # --- the table's life ----------------------------------------------------------------------------------------------

    async def presuspend(self, noflush: bool) -> None:
        """The volumes first."""
        await self.pool.hold_volumes()

    async def postsuspend(self) -> None:
        """Everything is on the disks."""
        if self.pool.mode < Mode.OUT_OF_METADATA and self.pool.unsettled:
            await self.pool.commit()

    async def preresume(self) -> None:
        """Takes over what this table says, and the sizes of the devices."""
        pool = self.pool
        pool.raise_event = self._raise_event
        pool.features = self._features
        pool.low_water = self._low_water
        pool.error_if_no_space = self._features.error_if_no_space
        pool.set_mode(Mode.READ_ONLY if self._features.read_only else Mode.WRITE)
        if pool.metadata.superblock.needs_check and pool.mode is not Mode.FAIL:
            await pool.write_needs_check()
        await pool.resize(self.length // pool.block_size)

    async def resume(self) -> None:
        """Volumes may go on."""
        self.pool.resumed()

    async def close(self) -> None:
        """The last table takes the pool with it."""
        await self.pool.leave()


async def _new_pool(spec: Spec, metadata: Device, data: Device, block_sectors: int, features: Features) -> Pool:
    for target in spec.owner.targets if spec.owner is not None else ():
        if isinstance(target, ThinPool):
            raise InvalidArgument("another pool cannot take the place of a pool")
    opened = await Metadata.open(metadata, block_sectors, may_format=not features.read_only)
    known = _pool_on(metadata)
    if known is not None and known.users:
        raise Busy(f"the metadata device {metadata.name} is in use by a pool")
    pool = Pool(spec.owner, metadata, data, opened)
    pool.features = features
    metadata.holder = pool
    return pool


def _pool_on(metadata: Device) -> Pool | None:
    """The pool whose metadata the device has: a second one would destroy it."""
    return metadata.holder if isinstance(metadata.holder, Pool) else None


async def _create_thin(pool: Pool, number: int) -> None:
    await pool.metadata.create_thin(number)


async def _create_snap(pool: Pool, number: int, origin: int) -> None:
    details = await pool.metadata.check_snap(number, origin)
    if (volume := pool.volumes.get(origin)) is not None:
        # From now on each of its blocks may be shared; what still writes in place must end before the snapshot is made.
        volume.snapshotted = max(details.snapshotted, pool.metadata.superblock.time + 1)
        volume.forget()
        await pool.flights.drain()
    await pool.metadata.create_snap(number, origin)


async def _delete(pool: Pool, number: int) -> None:
    if pool.is_open(number):
        raise Busy(f"volume {number} is in use")
    await pool.metadata.delete(number)
    pool.volumes.pop(number, None)


async def _trim(pool: Pool, number: int, size_sectors: int) -> None:
    details = await pool.metadata.volume(number)
    if pool.is_open(number):
        raise Busy(f"volume {number} is in use")
    first = round_up(size_sectors * SECTOR, pool.block_size) // pool.block_size
    removed = await pool.metadata.remove_range(number, first, MAX_KEY + 1)
    await pool.metadata.set_details(number, details.mapped - removed)
    pool.volumes.pop(number, None)


async def _set_transaction_id(pool: Pool, current: int, new: int) -> None:
    pool.metadata.set_transaction_id(current, new)


async def _reserve_metadata_snap(pool: Pool) -> None:
    await pool.metadata.reserve_snapshot()


async def _release_metadata_snap(pool: Pool) -> None:
    await pool.metadata.release_snapshot()


MESSAGES: Final[dict[str, tuple[tuple[str, ...], Callable[..., Awaitable[None]]]]] = {
    "create_thin": (("volume",), _create_thin),
    "create_snap": (("volume", "origin volume"), _create_snap),
    "delete": (("volume",), _delete),
    "trim": (("volume", "new size"), _trim),
    "set_transaction_id": (("current transaction id", "new transaction id"), _set_transaction_id),
    "reserve_metadata_snap": ((), _reserve_metadata_snap),
    "release_metadata_snap": ((), _release_metadata_snap),
}

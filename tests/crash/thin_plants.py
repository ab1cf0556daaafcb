"""Bugs planted into thin provisioning, one at a time: (object, attribute, replacement) for as long as a run lasts."""

from typing import Any, Final

from nbdmap.block.io import FUA, Io
from nbdmap.persist.data_map import DataMap
from nbdmap.targets.thin import provision, thin_pool
from nbdmap.targets.thin.metadata import Metadata
from nbdmap.targets.thin.pool import Pool
from nbdmap.targets.thin.thin import Thin
from nbdmap.targets.thin.volume import Volume

_fill = provision._fill
_unmap = provision._unmap
_slow = Thin._slow
_transact = Pool.transact
_commit = Pool.commit
_apply_and_write = Pool._apply_and_write


async def no_flush(self: Pool) -> None:
    """The data device is not flushed before a commit."""


async def flush_without_commit(volume: Volume) -> None:
    """A flush makes data durable, but not the mappings that lead to it."""
    await volume.pool.flush_data()


async def commit_later(self: Pool) -> None:
    """A commit is acknowledged when it has begun."""
    self.spawn(_commit(self))


async def set_aside_after_the_flush(self: Pool) -> None:
    """Mappings join a commit whose flush of the data device was before their data."""
    self.check_writable()
    await self.flush_data()
    for volume in self.volumes.values():
        volume.begin_apply()
    async with self.lock:
        await self.changing(self._apply_and_write())


async def fill_later(pool: Pool, io: Io, place: int, inside: int, source: provision.Source | None) -> None:
    """A block is mapped, and its first write acknowledged, while its data is still being written."""
    copy = Io(io.op, io.length, memoryview(bytes(io.data)))
    pool.spawn(_fill(pool, copy, place, inside, source))


async def no_zeroing(pool: Pool, io: Io, place: int, inside: int, source: provision.Source | None) -> None:
    """A new block shows what was there before."""
    await _fill(pool, io, place, inside, None if source is None or source.device is None else source)


async def no_copy(pool: Pool, io: Io, place: int, inside: int, source: provision.Source | None) -> None:
    """When sharing is broken, the rest of the block is not copied."""
    await _fill(pool, io, place, inside, None if source is None else provision.Source(None, 0, 0))


def in_place(self: Volume, value: int) -> bool:
    """Shared blocks are written in place."""
    return False


async def no_details(self: Metadata, number: int, mapped: int) -> None:
    """The number of mapped blocks is not written down."""


async def loose_is_used(self: Pool) -> None:
    """Blocks that are given out, but not mapped yet, are in use in what is committed."""
    loose, self.loose = self.loose, set()
    await _apply_and_write(self)
    self.loose = loose


async def pass_down_at_once(volume: Volume, first: int, end: int) -> None:
    """The data device forgets blocks that the last commit still maps."""
    await _unmap(volume, first, end)
    await volume.pool._pass_down(volume.pool.passing)


async def forget_fua(self: Thin, io: Io, block: int, inside: int) -> None:
    """FUA is not looked at."""
    await _slow(self, Io(io.op, io.length, io.data, io.flags & ~FUA), block, inside)


async def transaction_id_only_in_memory(self: Pool, work: Any) -> None:
    """The transaction id waits for the next commit."""
    if work.func is thin_pool._set_transaction_id:
        async with self.lock:
            await work()
    else:
        await _transact(self, work)


async def half_a_discard(self: Metadata, number: int, first: int, end: int) -> int:
    """Nothing is unmapped, though it looks so until the volume is opened again."""
    return 0


def forget_to_give_again(self: DataMap, block: int) -> None:
    """A block that was given out before a commit can be given out again after it."""
    self.inc(block)


THIN_PLANTS: Final[dict[str, tuple[Any, str, Any]]] = {
    "thin-no-flush": (Pool, "flush_data", no_flush),
    "thin-flush-without-commit": (provision, "flush", flush_without_commit),
    "thin-commit-later": (Pool, "commit", commit_later),
    "thin-set-aside-after-the-flush": (Pool, "_commit", set_aside_after_the_flush),
    "thin-fill-later": (provision, "_fill", fill_later),
    "thin-no-zeroing": (provision, "_fill", no_zeroing),
    "thin-no-copy": (provision, "_fill", no_copy),
    "thin-in-place": (Volume, "is_shared", in_place),
    "thin-no-details": (Metadata, "set_details", no_details),
    "thin-loose-is-used": (Pool, "_apply_and_write", loose_is_used),
    "thin-pass-down-at-once": (provision, "_unmap", pass_down_at_once),
    "thin-forget-fua": (Thin, "_slow", forget_fua),
    "thin-transaction-id-only-in-memory": (Pool, "transact", transaction_id_only_in_memory),
    "thin-half-a-discard": (Metadata, "remove_range", half_a_discard),
    "thin-forget-to-give-again": (DataMap, "give_again", forget_to_give_again),
}

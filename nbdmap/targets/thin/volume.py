"""An open thin volume: where its blocks are, as far as that is in memory (reference h.4).

A mapping is looked for in `own` and `shared`, bounded caches of virtual block -> byte on the data device; then among the new
ones, `pending` (since the last commit) and `applying` (that the commit under way writes); then in the tree on the disk.

Invariants: a block in `own` is this volume's alone and may be written in place. `own` has no block whose cell is taken: who
provisions or discards a block holds its cell, and everybody who does not find it in `own` waits for that. What is in `pending`
has its data on the data device, though not durable; no commit writes a mapping before the data device was flushed.
"""

import asyncio
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from nbdmap.errors import IoFailed, NbdmapError
from nbdmap.targets.thin.metadata import TIME_BITS, TIME_MASK, Details

if TYPE_CHECKING:
    from nbdmap.targets.thin.pool import Pool

log = logging.getLogger(__name__)


class Volume:
    """Volume `number` of a pool, shared by all targets that have it open."""

    def __init__(self, pool: "Pool", number: int, details: Details, highest: int) -> None:
        self.pool = pool
        self.number = number
        self.openers = 0
        self.own: dict[int, int] = {}
        self.shared: dict[int, int] = {}
        self.pending: dict[int, int] = {}
        """Virtual block -> (data block << 24) + time."""
        self.applying: dict[int, int] = {}
        self.cells: dict[int, asyncio.Future[None]] = {}
        self.version = 0
        """Counts what makes a look-up on the disk that was begun before worthless."""
        self.written = details.mapped
        """Mappings in the tree."""
        self.recorded = details.mapped
        """Mappings according to the details that are in their tree."""
        self.fresh = 0
        """Those of pending and applying that had none before."""
        self.snapshotted = details.snapshotted
        self.highest = highest
        """The highest block that is mapped, -1 without one."""
        self.highest_known = True
        """Not after a discard or an abort when the metadata could not be read."""
        self.changed = False
        """Whether it has changes that no commit has begun to write."""
        self.committing = False
        self.handing_back = False
        """A device of it is being suspended without a flush: writes that wait for space are handed back."""
        self.aborted = False
        """Changes of it were lost: its flushes fail from now on."""

    # --- looking up ----------------------------------------------------------------------------------------------------

    async def find(self, block: int) -> int | None:
        """The mapping of a virtual block whose cell is free: (data block << 24) + time, None without one."""
        while True:
            value = self.pending.get(block)
            if value is None:
                value = self.applying.get(block)
            if value is not None:
                self.remember(block, value)
                return value
            version = self.version
            value = await self.pool.metadata.lookup(self.number, block)
            if version == self.version:
                if value is not None:
                    if value >> TIME_BITS >= self.pool.nr_data:
                        raise IoFailed(f"volume {self.number}, block {block}: mapped beyond the data device")
                    self.remember(block, value)
                return value
            if block in self.cells:
                await self.free(block)

    def surely_lacks(self, block: int) -> bool:
        """Whether it is known without reading that a virtual block has no mapping, and nobody has its cell."""
        if block in self.pending or block in self.applying or block in self.cells:
            return False
        return self.pool.metadata.surely_lacks(self.number, block)

    def is_shared(self, value: int) -> bool:
        """Whether another volume may have the block, too."""
        return self.snapshotted > value & TIME_MASK

    def remember(self, block: int, value: int) -> None:
        """Puts a mapping into the cache."""
        pool = self.pool
        cache = self.shared if self.is_shared(value) else self.own
        if block not in cache:
            pool.make_cache_room()
            cache[block] = (value >> TIME_BITS) * pool.block_size

    def forget(self, blocks: Iterable[int] | None = None) -> None:
        """Drops blocks, or all, from the cache; look-ups under way start again."""
        self.version += 1
        if blocks is None:
            self.own.clear()
            self.shared.clear()
        else:
            for block in blocks:
                self.own.pop(block, None)
                self.shared.pop(block, None)

    @property
    def cached(self) -> int:
        """Mappings in the cache."""
        return len(self.own) + len(self.shared)

    # --- cells ---------------------------------------------------------------------------------------------------------

    async def free(self, block: int) -> None:
        """Waits until nobody has the cell of a block."""
        while (cell := self.cells.get(block)) is not None:
            await asyncio.shield(cell)

    def take(self, block: int) -> None:
        """Takes a cell that is free. The block is not in the cache until it is given back."""
        self.cells[block] = asyncio.get_running_loop().create_future()
        self.own.pop(block, None)
        self.version += 1

    def give_back(self, block: int) -> None:
        """Gives a cell back and wakes who waits for it."""
        self.cells.pop(block).set_result(None)

    # --- new mappings --------------------------------------------------------------------------------------------------

    def add(self, block: int, data_block: int, new: bool) -> None:
        """A block has been provisioned and its data is written. `new`: it had no mapping."""
        value = data_block << TIME_BITS | self.pool.metadata.superblock.time
        if block in self.pending:
            self.pool.dropped.append(self.pending[block] >> TIME_BITS)
        self.pending[block] = value
        self.fresh += new
        self.changed = True
        self.highest = max(self.highest, block)
        self.shared.pop(block, None)
        self.version += 1
        self.remember(block, value)
        self.pool.something_changed()

    def begin_apply(self) -> None:
        """What is pending is to be written by the commit that begins."""
        self.applying, self.pending = self.pending, {}
        self.committing = self.committing or self.changed
        self.changed = False

    async def find_highest(self) -> None:
        """Finds the highest mapped block, with the pool's lock held. It stays unknown when the metadata cannot be read."""
        self.highest_known = False
        try:
            in_tree = await self.pool.metadata.highest(self.number)
        except NbdmapError as error:
            log.error("volume %d: the highest mapped block: %s", self.number, error)
            return
        self.highest = max([in_tree, *self.pending, *self.applying])
        self.highest_known = True

    def rolled_back(self, details: Details | None) -> None:
        """Everything since the last commit is lost. `details` None: the volume itself is. `highest` is to be found anew."""
        self.aborted = self.aborted or self.changed or self.committing
        self.changed = self.committing = False
        self.pending, self.applying, self.fresh = {}, {}, 0
        self.forget()
        self.written = self.recorded = details.mapped if details else 0
        self.snapshotted = details.snapshotted if details else 0

    @property
    def mapped(self) -> int:
        """Blocks that are mapped."""
        return self.written + self.fresh

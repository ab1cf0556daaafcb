"""The state of a pool: metadata, open volumes, mode, commits (dm-thin.c, reference h).

It outlives the tables of its device: a table that is loaded for a pool takes over the `Pool` of the one before. What works on
the data of volumes is in volume.py and provision.py.

The order of a commit, which is all that durability rests on: the new mappings are set aside; requests that are under way end;
the data device is flushed; the mappings are put into the trees; the metadata's blocks are written and flushed; the superblock
follows with FUA. `lock` is held by whoever changes metadata, `commit_lock` by whoever commits.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from nbdmap.block.device import Device
from nbdmap.block.io import DISCARD, FLUSH, Io
from nbdmap.dm.target import Owner
from nbdmap.errors import Busy, Exists, InvalidArgument, IoFailed, NbdmapError, NoData, OutOfSpace, Requeue
from nbdmap.persist.blocks import MAX_BLOCKS
from nbdmap.targets.thin.blanks import Blanks
from nbdmap.targets.thin.flight import Flights
from nbdmap.targets.thin.metadata import TIME_BITS, Metadata
from nbdmap.targets.thin.modes import Mode
from nbdmap.targets.thin.space import Space
from nbdmap.targets.thin.volume import Volume

COMMIT_PERIOD_S: Final = 1.0
"""What has changed is committed after this time at the latest."""
MAX_CACHED: Final = 1 << 20
"""Mappings in the caches of all volumes; some 110 bytes each. When there are more, all are dropped."""
MAX_PENDING: Final = 1 << 16
"""New mappings that wait for a commit; then one is made."""
BLOCKS_FOR_A_MAPPING: Final = 3
"""Metadata blocks that a new mapping may take: with less free than this for each, commits are made one by one."""

log = logging.getLogger(__name__)


class Pool(Space):
    """One of it for each metadata device in use."""

    def __init__(self, owner: Owner | None, metadata_device: Device, data: Device, metadata: Metadata) -> None:
        super().__init__(metadata_device, data, metadata)
        self.owner = owner
        self.users = 0
        self.lock = asyncio.Lock()
        self.commit_lock = asyncio.Lock()
        self.flights = Flights()
        self.blanks = Blanks(data, self.block_size)
        self.loose: set[int] = set()
        """Data blocks that are given out and not (or no longer) mapped in the tree: a commit takes them for free."""
        self.dropped: list[int] = []
        """Loose blocks whose owner has let go of them."""
        self.passing: list[int] = []
        """Data blocks that nobody has any more, and that the data device is told of after the commit that says so."""
        self.generation = 0
        """Counts the aborts."""
        self.cached = 0
        """Mappings in the caches of volumes, at most MAX_CACHED."""
        self._low_water_told = False
        self._next: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self.openers: list[Owner] = []
        """The mapped device of each target that has a volume open."""
        self._held: list[Owner] = []

    # --- blocks ----------------------------------------------------------------------------------------------------------

    async def new_block(self) -> tuple[int, bool]:
        """A data block that is nobody's, loose, and whether it reads as zeroes and the pool zeroes blocks. Raises OutOfSpace
        after it has told the mode so."""
        tried = False
        while True:
            if self.mode is Mode.OUT_OF_DATA:
                raise OutOfSpace("no data block is free")
            if len(self.loose) > self._affordable():
                await self.commit()
            async with self.lock:
                self.check_writable()
                data = self.metadata.data
                if data.nr_free <= self.low_water and not self._low_water_told:
                    self._low_water_told = True
                    self.raise_event()
                if data.nr_free:
                    try:
                        block = await data.new_block()
                    except NbdmapError as error:
                        await self.abort(error)
                        raise IoFailed(f"no data block can be given out: {error}") from error
                    self.loose.add(block)
                    try:
                        return block, not self.features.skip_block_zeroing and await self.blanks.given(block, data)
                    except BaseException:
                        self.dropped.append(block)
                        raise
            if tried:
                self.set_mode(Mode.OUT_OF_DATA)
                raise OutOfSpace("no data block is free")
            if self.needs_commit:
                await self.commit()  # what was freed since the last one can be had after it
            tried = True

    def new_block_at_once(self) -> tuple[int, bool] | None:
        """As `new_block`; None where that might wait, commit, raise or tell somebody something."""
        data, zeroes = self.metadata.data, not self.features.skip_block_zeroing
        waiting, most = len(self.loose), self._affordable()
        if self.mode is not Mode.WRITE or self.lock.locked() or waiting > most:
            return None
        if waiting > most // 2 and not self.commit_lock.locked():
            self.commit_soon()  # before writes have to wait for one
        block = data.next_block()
        if block < 0 or data.nr_free <= self.low_water or (zeroes and not self.blanks.knows(block)):
            return None
        self.loose.add(data.give(block))
        return block, zeroes and self.blanks.given_at_once(block)

    def _affordable(self) -> int:
        """New mappings that may wait: there must be room for all of them in the metadata."""
        return min(MAX_PENDING, max(self.metadata.metadata_free - 16, 0) // BLOCKS_FOR_A_MAPPING)

    def make_cache_room(self) -> None:
        """Before a mapping goes into a volume's cache."""
        if self.cached >= MAX_CACHED:
            self.cached = sum(volume.cached for volume in self.volumes.values())
            if self.cached >= MAX_CACHED:
                for volume in self.volumes.values():
                    volume.forget()
                self.cached = 0
        self.cached += 1

    # --- volumes -------------------------------------------------------------------------------------------------------

    async def open_volume(self, number: int) -> Volume:
        """One opener more for a volume. Raises NoData."""
        async with self.lock:
            volume = self.volumes.get(number)
            if volume is None:
                details = await self.metadata.volume(number)
                volume = Volume(self, number, details, await self.metadata.highest(number))
                self.volumes[number] = volume
            volume.openers += 1
            return volume

    def close_volume(self, volume: Volume) -> None:
        """One less; the volume is kept until its changes are committed."""
        volume.openers -= 1
        self._drop_closed()

    def _drop_closed(self) -> None:
        for volume in list(self.volumes.values()):
            if not (volume.openers or volume.changed or volume.committing):
                self.cached -= volume.cached
                del self.volumes[volume.number]

    def is_open(self, number: int) -> bool:
        """Whether a table has the volume."""
        return number in self.volumes and self.volumes[number].openers > 0

    # --- commits -------------------------------------------------------------------------------------------------------

    def something_changed(self) -> None:
        """There is something for the next commit, which comes within COMMIT_PERIOD_S."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(COMMIT_PERIOD_S, self._period_is_over)

    def _period_is_over(self) -> None:
        self._timer = None
        if self.mode < Mode.OUT_OF_METADATA and self.needs_commit:
            self.commit_soon()

    def commit_soon(self) -> None:
        """Begins a commit, unless one is about to begin."""
        if self._next is None:
            self.spawn(self.commit_quietly())

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that the pool waits for when it closes."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def commit_quietly(self) -> None:
        try:
            await self.commit()
        except NbdmapError as error:
            log.error("thin pool on %s: periodic commit: %s", self.metadata_device.name, error)

    @property
    def needs_commit(self) -> bool:
        """Whether there is anything that a commit would write."""
        return bool(self.dropped or self.passing) or self.metadata.changed or any(one.changed for one in self.volumes.values())

    @property
    def unsettled(self) -> bool:
        """Whether there is anything that is not durable yet: for the next commit, or of the one under way."""
        return self.needs_commit or self.commit_lock.locked()

    async def commit(self) -> None:
        """Ends when all that was done before is durable, on the data device, too. Who asks meanwhile shares the next one."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
            self.spawn(self._commit_for(self._next))
        await asyncio.shield(self._next)

    async def _commit_for(self, waiting: "asyncio.Future[None]") -> None:
        async with self.commit_lock:
            self._next = None  # who asks from now on needs another
            try:
                await self._commit()
            except BaseException as error:
                waiting.set_exception(error)
                waiting.exception()  # nobody may be waiting any more
            else:
                waiting.set_result(None)

    async def _commit(self) -> None:
        self.check_writable()
        if not self.needs_commit:
            await self.flush_data()
            return
        for volume in self.volumes.values():
            volume.begin_apply()
        try:
            await self.flights.drain()
            await self.flush_data()
        except Exception as error:
            async with self.lock:
                await self.abort(error)
            raise IoFailed(f"the data device was not flushed: {error}") from error
        async with self.lock:
            await self.changing(self._apply_and_write())

    async def transact(self, work: Callable[[], Awaitable[None]]) -> None:
        """Commits what is pending, changes metadata with `work`, and commits again. Raises what `work` raises, after which
        nothing of it is left, and nothing else is lost."""
        async with self.commit_lock, self.lock:
            self.check_writable()
            if not self.metadata.metadata_free:
                self.check_metadata_space()
                self.check_writable()
            await self.flights.drain()
            for volume in self.volumes.values():
                volume.begin_apply()
            await self.changing(self._apply())
            if self.needs_commit:
                await self._flush_and_write()
            try:
                await work()
            except (NoData, InvalidArgument, Busy, Exists):
                raise
            except OutOfSpace as error:
                full = not self.metadata.space.nr_free  # else it is the metadata device that has no room
                await self.abort(error, Mode.OUT_OF_METADATA if full else Mode.READ_ONLY)
                raise
            except Exception as error:
                await self.abort(error)
                raise
            await self._flush_and_write()
        self.check_space()

    async def _flush_and_write(self) -> None:
        await self.changing(self.flush_data())
        await self.changing(self._write())

    async def flush_data(self) -> None:
        """Makes what was written to the data device durable."""
        await self.data.submit(Io(FLUSH, 0), 0)

    async def changing(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs a change of the metadata, with the lock held: when it fails, everything goes back to the last commit."""
        try:
            await work
        except Exception as error:
            await self.abort(error)
            raise IoFailed(f"the pool's metadata was not written: {error}") from error

    async def _apply_and_write(self) -> None:
        await self._apply()
        await self._write()

    async def _apply(self) -> None:
        """Puts the mappings that are set aside into the trees."""
        for volume in self.volumes.values():
            if volume.applying:
                added = await self.metadata.insert(volume.number, volume.applying)
                self.loose.difference_update([value >> TIME_BITS for value in volume.applying.values()])
                volume.applying = {}
                volume.written += added
                volume.fresh -= added
            if volume.written != volume.recorded:
                await self.metadata.set_details(volume.number, volume.written)
                volume.recorded = volume.written

    async def _write(self) -> None:
        """Commits. Blocks that are loose are free in what is committed, and given out again afterwards."""
        self.loose.difference_update(self.dropped)
        self.metadata.data.dec_all(self.dropped)
        self.dropped.clear()
        passing, self.passing = self.passing, []
        data, loose = self.metadata.data, sorted([*self.loose, *passing])
        data.dec_all(loose)
        await self.metadata.commit()
        for block in loose:
            data.give_again(block)
        await self._pass_down(passing)
        for block in passing:
            data.give_up(block)
        for volume in self.volumes.values():
            volume.committing = False
        self._drop_closed()
        self.check_metadata_space()
        self.check_space()

    async def _pass_down(self, blocks: list[int]) -> None:
        """Tells the data device of blocks that are free, neighbours together. It need not understand."""
        runs: list[tuple[int, int]] = []
        for block in sorted(blocks):
            if runs and runs[-1][1] == block:
                runs[-1] = (runs[-1][0], block + 1)
            else:
                runs.append((block, block + 1))
        size = self.block_size
        for first, end in runs if self.passdown else ():
            try:
                await self.data.submit(Io(DISCARD, (end - first) * size), first * size)
            except NbdmapError as error:
                log.debug("thin pool on %s: discard: %s", self.metadata_device.name, error)

    async def abort(self, error: Exception, mode: Mode = Mode.READ_ONLY) -> None:
        """Goes back to the last commit, with the lock held: needs_check is set, and the mode is `mode` or worse."""
        log.error("thin pool on %s: back to the last commit: %s", self.metadata_device.name, error)
        self.generation += 1
        self.loose.clear()
        self.dropped.clear()
        self.passing.clear()
        try:
            superblock = self.metadata.superblock
            self.metadata = await Metadata.open(self.metadata_device, superblock.block_size_sectors, may_format=False)
            for volume in self.volumes.values():
                volume.rolled_back(await self.metadata.details.lookup(volume.number))
                await volume.find_highest()
        except Exception as second:
            log.error("thin pool on %s: the last commit cannot be read: %s", self.metadata_device.name, second)
            for volume in self.volumes.values():
                volume.rolled_back(None)
            self.set_mode(Mode.FAIL)
            return
        if mode is Mode.READ_ONLY:
            await self.write_needs_check()
        self.set_mode(mode)

    async def write_needs_check(self) -> None:
        """Says on the disk that the metadata must be checked; tried again at the next resume if it fails."""
        try:
            await self.metadata.write_needs_check()
        except NbdmapError as error:
            log.error("thin pool on %s: needs_check was not written: %s", self.metadata_device.name, error)

    # --- suspend and resume --------------------------------------------------------------------------------------------

    async def hold_volumes(self) -> None:
        """Suspends, from inside, the devices that have volumes open."""
        self.suspended = True
        self.wake_parked(Requeue("the pool is being suspended"))
        for owner in dict.fromkeys(self.openers):
            await owner.hold()
            self._held.append(owner)

    def let_volumes_go(self) -> None:
        """Ends `hold_volumes`."""
        self.suspended = False
        held, self._held = self._held, []
        for owner in held:
            owner.let_go()

    async def resize(self, data_blocks: int) -> None:
        """Takes over new sizes of the devices, with a commit. Raises InvalidArgument when one is smaller than before.

        A commit that fails is no failure of the resume, as in Linux: the pool goes on, read-only. OutOfSpace is one.
        """
        metadata_blocks = min(self.metadata_device.size // 4096, MAX_BLOCKS)
        if data_blocks < self.nr_data:
            raise InvalidArgument(f"the pool's table has {data_blocks} blocks, its metadata says {self.nr_data}")
        if metadata_blocks < self.metadata.nr_metadata:
            raise InvalidArgument(f"{self.metadata_device.name} has {metadata_blocks} blocks, not {self.metadata.nr_metadata}")
        if data_blocks == self.nr_data and metadata_blocks == self.metadata.nr_metadata:
            return
        if self.metadata.superblock.needs_check or self.mode in (Mode.READ_ONLY, Mode.FAIL):
            return
        async with self.commit_lock, self.lock:
            if metadata_blocks > self.metadata.nr_metadata:
                self.metadata.resize_metadata(metadata_blocks)
                if self.mode is Mode.OUT_OF_METADATA:
                    self.set_mode(Mode.WRITE)
            if data_blocks > self.nr_data:
                self.metadata.resize_data(data_blocks)
            try:
                await self.metadata.commit()
            except NbdmapError as error:
                await self.abort(error)
                if isinstance(error, OutOfSpace):  # what tells of the new blocks has no room; Linux writes that earlier
                    raise
                return
        self.check_space()

    def resumed(self) -> None:
        """Requests follow."""
        self._low_water_told = False
        self.blanks.forget()
        self.let_volumes_go()
        if self.mode is not Mode.OUT_OF_DATA:
            self.wake_parked()

    async def leave(self) -> None:
        """One user less. With the last one the pool ends: what there is is committed."""
        self.users -= 1
        if self.users:
            return
        self.stop_waiting()
        if self.mode < Mode.OUT_OF_METADATA and self.needs_commit:
            await self.commit_quietly()
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._timer is not None:
            self._timer.cancel()
        self.let_volumes_go()

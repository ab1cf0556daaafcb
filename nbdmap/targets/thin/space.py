"""How a pool is doing: its mode, its free blocks, the writes that wait for some (reference h.6)."""

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from nbdmap.block.device import Device
from nbdmap.errors import IoFailed, OutOfSpace, Requeue
from nbdmap.targets.thin.metadata import Metadata
from nbdmap.targets.thin.modes import MODE_WORDS, Features, Mode
from nbdmap.targets.thin.volume import Volume
from nbdmap.units import SECTOR

if TYPE_CHECKING:
    from collections.abc import Callable

NO_SPACE_TIMEOUT_S: Final = 60.0
"""How long writes wait for space."""

log = logging.getLogger(__name__)


class Space:
    """The devices of a pool and its mode; `Pool` is the rest."""

    def __init__(self, metadata_device: Device, data: Device, metadata: Metadata) -> None:
        self.metadata_device = metadata_device
        self.data = data
        self.metadata = metadata
        self.block_size = metadata.superblock.block_size_sectors * SECTOR
        """Bytes."""
        self.features = Features()
        self.low_water = 0
        self.raise_event: Callable[[], None] = lambda: None
        self.error_if_no_space = False
        """As the features say, or because the wait for space was in vain."""
        self.mode = Mode.WRITE
        self.suspended = True
        self.volumes: dict[int, Volume] = {}
        self.parked: set[asyncio.Future[None]] = set()
        """Writes that wait for space; no more than the connections let in."""
        self._metadata_low_told = False
        self._space_timer: asyncio.TimerHandle | None = None

    @property
    def nr_data(self) -> int:
        """Data blocks."""
        return self.metadata.data.nr_blocks

    @property
    def metadata_low_water(self) -> int:
        """Free metadata blocks at which an event is raised."""
        return min(1024, self.metadata.nr_metadata // 4)

    @property
    def discard(self) -> bool:
        """Whether volumes take discards."""
        return not self.features.ignore_discard

    @property
    def passdown(self) -> bool:
        """Whether discards go on to the data device."""
        return self.discard and not self.features.no_discard_passdown and self.data.limits.discard

    def set_mode(self, wanted: Mode) -> None:
        """Changes the mode; some changes are not possible, and end in another one. Raises an event when it changes."""
        old, new = self.mode, wanted
        if new is Mode.WRITE and self.metadata.superblock.needs_check:
            log.error("thin pool on %s: not writable until it is checked", self.metadata_device.name)
            new = max(old, Mode.READ_ONLY)
        if old is Mode.FAIL:
            new = old
        self.mode = new
        if self._space_timer is not None:
            self._space_timer.cancel()
            self._space_timer = None
        if new is Mode.OUT_OF_DATA and not self.error_if_no_space:
            self._space_timer = asyncio.get_running_loop().call_later(NO_SPACE_TIMEOUT_S, self._waited_in_vain)
        if new is Mode.WRITE:
            self.error_if_no_space = self.features.error_if_no_space
        if new is Mode.FAIL:
            for volume in self.volumes.values():
                volume.forget()
        if new is not old:
            log.info("thin pool on %s: mode %s after %s", self.metadata_device.name, new.name, old.name)
            self.raise_event()
        if new is not Mode.OUT_OF_DATA:
            self.wake_parked()

    def _waited_in_vain(self) -> None:
        self._space_timer = None
        if self.mode is Mode.OUT_OF_DATA and not self.error_if_no_space:
            self.error_if_no_space = True
            self.raise_event()
            self.wake_parked()

    def wake_parked(self, error: Exception | None = None) -> None:
        """Lets the writes that wait for space try again, or fail."""
        parked, self.parked = self.parked, set()
        for waiter in parked:
            if not waiter.done():
                waiter.set_exception(error) if error else waiter.set_result(None)

    async def wait_for_space(self, volume: Volume) -> None:
        """Ends when it is worth trying again. Raises OutOfSpace when there is none to be waited for."""
        if self.mode is Mode.OUT_OF_DATA:
            if self.error_if_no_space:
                raise OutOfSpace(f"no data block is free, {self.nr_data} are in use")
            if self.suspended or volume.handing_back:
                raise Requeue("the pool is being suspended")
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.parked.add(waiter)
            try:
                await waiter
            finally:
                self.parked.discard(waiter)

    def check_space(self) -> None:
        """Back to normal when blocks have become free."""
        if self.mode is Mode.OUT_OF_DATA and self.metadata.data.nr_free:
            self.set_mode(Mode.WRITE)

    def check_metadata_space(self) -> None:
        """Tells when metadata gets short, and ends writing when there is none."""
        free = self.metadata.metadata_free
        low = free <= self.metadata_low_water
        if low and not self._metadata_low_told:
            self.raise_event()
        self._metadata_low_told = low
        if not free and self.mode < Mode.OUT_OF_METADATA:
            self.set_mode(Mode.OUT_OF_METADATA)

    def check_writable(self) -> None:
        """Raises IoFailed when no metadata may be changed."""
        if self.mode >= Mode.OUT_OF_METADATA:
            raise IoFailed(f"the pool is {MODE_WORDS.get(self.mode, 'failed')}")

    def stop_waiting(self) -> None:
        """No write waits for space any more."""
        if self._space_timer is not None:
            self._space_timer.cancel()
        self.wake_parked(IoFailed("the pool is gone"))

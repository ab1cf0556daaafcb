"""thin: a volume of a pool (dm-thin.c; thin-provisioning.txt; reference h.3, h.4).

    0 2097152 thin /dev/mapper/pool 0
    0 2097152 thin /dev/mapper/pool 1 /dev/external_origin

A read or write inside of a block that is this volume's alone costs one look-up in a dictionary and goes to the data device, a
read of one that is shared two; everything else is in provision.py.
"""

from dataclasses import replace
from typing import Self

from nbdmap.block.device import Device, Extent, Limits
from nbdmap.block.io import DISCARD, DONE, FLUSH, FUA, READ, WRITE, Io, Pending, run_all
from nbdmap.dm.args import Args
from nbdmap.dm.device import MappedDevice
from nbdmap.dm.target import Below, Owner, Spec, Target
from nbdmap.errors import InvalidArgument, IoFailed, Unsupported
from nbdmap.targets.thin import provision
from nbdmap.targets.thin.extents import extents
from nbdmap.targets.thin.metadata import MAX_ID
from nbdmap.targets.thin.modes import Mode
from nbdmap.targets.thin.thin_pool import ThinPool
from nbdmap.targets.thin.volume import Volume
from nbdmap.units import SECTOR


class Thin(Target):
    """`thin <pool device> <volume> [<external origin>]`"""

    type_name = "thin"
    version = (1, 23, 0)
    takes_flush = True

    def __init__(self, spec: Spec, device: Device, volume: Volume, origin: Device | None) -> None:
        super().__init__(spec)
        self._device = device
        self._volume = volume
        self._origin = origin
        self._owner: Owner | None = spec.owner
        self._pool = volume.pool
        self._own = volume.own
        self._shared = volume.shared
        self._size = self._pool.block_size
        self._data = self._pool.data
        self._track = self._pool.flights.track
        self._pool.users += 1
        if self._owner is not None:
            self._pool.openers.append(self._owner)

    @classmethod
    async def construct(cls, spec: Spec, args: Args) -> Self:
        """Opens a volume of a pool that is active."""
        name, word = args.word("pool device"), args.word("volume")
        external = args.word("external origin") if args else ""
        args.end()
        if external == name:
            raise InvalidArgument("the pool cannot be the external origin")
        origin = await spec.open(external, read_only=True) if external else None
        device = await spec.open(name)
        number = Args([word]).number("volume", 0, MAX_ID)
        targets = device.targets if isinstance(device, MappedDevice) else ()
        target = targets[0] if targets else None
        if not isinstance(device, MappedDevice) or not isinstance(target, ThinPool):
            raise InvalidArgument(f"{name} is not an active thin-pool")
        if device.suspended or target.pool.suspended:
            raise InvalidArgument(f"the pool {name} is suspended")
        if target.pool.mode is Mode.FAIL:
            raise InvalidArgument(f"the pool {name} has failed")
        return cls(spec, device, await target.pool.open_volume(number), origin)

    # --- requests ------------------------------------------------------------------------------------------------------

    def submit(self, io: Io, offset: int) -> Pending:
        """To the data device, if the block is known and this volume's alone; else the long way."""
        block, inside = divmod(offset - self.begin, self._size)
        if inside + io.length <= self._size:
            address = self._own.get(block)
            if address is None and io.op is READ:
                address = self._shared.get(block)
            if address is not None and (io.op is READ or (io.op is WRITE and not io.flags)):
                pending = self._data.submit(io, address + inside)
                return pending if pending is DONE else self._track(pending)
        elif io.op is READ or (io.op is WRITE and not io.flags):
            return run_all(self._pieces(io, block, inside))
        return self._unknown(io, block, inside)

    def _unknown(self, io: Io, block: int, inside: int) -> Pending:
        """What a look-up in memory does not answer; the first write to a block that often waits for nothing all the same."""
        if io.op is WRITE and not io.flags and self._origin is None and block not in self._shared:
            return provision.write_at_once(self._volume, io, block, inside) or self._slow(io, block, inside)
        return self._slow(io, block, inside)

    def _pieces(self, io: Io, block: int, inside: int) -> list[Pending]:
        """A request of more than one block: those that are known and lie side by side go together."""
        pieces: list[Pending] = []
        done, start, address, size = 0, 0, -1, self._size

        def put() -> None:
            if start < done:
                pieces.append(self._track(self._data.submit(io.part(start, done - start), address)))

        while done < io.length:
            length = min(size - inside, io.length - done)
            known = self._own.get(block)
            if known is None and io.op is READ:
                known = self._shared.get(block)
            if known is None:
                put()
                pieces.append(self._unknown(io.part(done, length), block, inside))
                start = done + length
            elif start == done:
                address = known + inside
            elif known + inside != address + done - start:
                put()
                start, address = done, known + inside
            done += length
            block, inside = block + 1, 0
        put()
        return pieces

    async def _slow(self, io: Io, block: int, inside: int) -> None:
        """Everything that a look-up in memory does not answer."""
        volume, op = self._volume, io.op
        volume.handing_back = False
        if self._pool.mode is Mode.FAIL:
            raise IoFailed("the pool failed")
        if op is FLUSH:
            await provision.flush(volume)
        elif op is DISCARD:
            await self._discard(io, block, inside)
        elif op is WRITE:
            if io.flags & FUA:
                plain = Io(WRITE, io.length, io.data)
                await run_all(self._pieces(plain, block, inside))
                await provision.flush(volume)
            else:
                await provision.write(volume, io, block, inside, self._origin)
        elif op is READ:
            await provision.read(volume, io, block, inside, self._origin)
        elif inside + io.length <= self._size:  # CACHE
            await provision.read(volume, io, block, inside, None)

    async def _discard(self, io: Io, block: int, inside: int) -> None:
        """Whole blocks only; less than one is no error."""
        if not self._pool.discard:
            raise Unsupported("the pool ignores discards")
        end = (block * self._size + inside + io.length) // self._size
        first = block + (inside > 0)
        if first < end:
            await provision.discard(self._volume, first, end, io.flags)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Mapped blocks are data; the others are holes, or what the external origin says."""
        return await extents(self._volume, self._origin, offset - self.begin, length)

    # --- what it is ----------------------------------------------------------------------------------------------------

    def devices(self) -> list[Below]:
        """The external origin, and the pool."""
        return [Below(device, 0, 0) for device in (self._origin, self._device) if device is not None]

    def limits(self) -> Limits:
        """Those of the data device; discards are the pool's own."""
        size = self._size
        return replace(
            self._data.limits, discard=self._pool.discard, zero=False, fast_zero=False, sparse=True, io_min=size, io_opt=size
        )

    def table(self) -> str:
        """`<pool> <volume>[ <external origin>]`; `Fail` when the pool has failed."""
        if self._pool.mode is Mode.FAIL:
            return "Fail"
        origin = f" {self._origin.number}" if self._origin is not None else ""
        return f"{self._device.number} {self._volume.number}{origin}"

    async def refresh_status(self) -> None:
        """Looks again for the highest mapped block when that could not be read."""
        if not self._volume.highest_known and self._pool.mode is not Mode.FAIL:
            async with self._pool.lock:
                await self._volume.find_highest()

    def status(self) -> str:
        """`<mapped sectors> <highest mapped sector, or ->`; `Error` when the metadata cannot be read."""
        if self._pool.mode is Mode.FAIL:
            return "Fail"
        if not self._volume.highest_known:
            return "Error"
        mapped, size = self._volume.mapped, self._size // SECTOR
        return f"{mapped * size} {(self._volume.highest + 1) * size - 1 if mapped else '-'}"

    # --- the table's life ----------------------------------------------------------------------------------------------

    async def presuspend(self, noflush: bool) -> None:
        """Without a flush, writes that wait for space are handed back."""
        self._volume.handing_back = noflush
        if noflush:
            self._pool.wake_parked()

    async def postsuspend(self) -> None:
        """What was acknowledged is durable, even if the pool is being suspended, too, and takes no flush any more."""
        volume = self._volume
        if not volume.handing_back and (volume.changed or volume.committing) and self._pool.mode < Mode.OUT_OF_METADATA:
            await self._pool.commit()

    async def resume(self) -> None:
        """As ever."""
        self._volume.handing_back = False

    async def close(self) -> None:
        """Gives the volume back."""
        if self._owner is not None:
            self._pool.openers.remove(self._owner)
        self._pool.close_volume(self._volume)
        await self._pool.leave()

"""A mapped device: a live and an inactive table, suspend and resume, an event counter.

Life cycle, as in the kernel's dm.c and dm-ioctl.c: `load` builds a table into the inactive slot; `resume` swaps it live;
`suspend` holds new requests in the order they came, waits until none is in flight and flushes what is below. A swap drops
no request: those that were held run on the new table. A failed load or suspend changes nothing; a target that fails to
get ready (`preresume`) leaves the device suspended with the new table live.

Invariant: a request runs on exactly one table, the one that was live when it was let in, and that table is closed only
when it has no request in flight.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

from nbdmap.block.device import Device, Extent, Limits
from nbdmap.block.io import DONE, FLUSH, Deferred, Failed, Io, Op, Pending, run_all, to_the_end
from nbdmap.dm.args import Args
from nbdmap.dm.table import Table, TableLine
from nbdmap.dm.target import Opener, Target
from nbdmap.errors import InvalidArgument, IoFailed, NbdmapError, NoSuchDevice, Requeue

_NO_LIMITS = Limits()


class EventSink(Protocol):
    """Where a device's uevents go."""

    def __call__(self, device: "MappedDevice", action: str, keys: Mapping[str, str]) -> None:
        """`action` is add, change or remove; `keys` are the variables beyond the device's own."""
        ...


class MappedDevice(Device):
    """A device made of a table. `number` is "major:minor"; `uuid` may be empty; `size` is 0 without a live table."""

    def __init__(self, name: str, uuid: str, number: str, types: Mapping[str, type[Target]], sink: EventSink) -> None:
        self.name = name
        self.uuid = uuid
        self.number = number
        self.size = 0
        self.read_only = False
        self.limits = _NO_LIMITS
        self.openers = 0
        self.deferred_remove = False
        self.loaded = False
        """Whether it ever had a table: only then Linux has a node for it."""
        self.event_number = 0
        self.requests = [0] * len(Op)
        """Requests let in so far, by Op."""
        self.bytes_done = [0] * len(Op)
        """Bytes of those that ended well, by Op."""
        self.errors = 0
        self.live: Table | None = None
        self.inactive: Table | None = None
        self._types = types
        self._sink = sink
        self._gate: asyncio.Future[None] | None = None  # set while suspended: what new requests wait for
        self._idle: asyncio.Future[None] | None = None  # set while a suspend waits for the last request in flight
        self._event: asyncio.Future[None] | None = None  # what `wait` waits for
        self._admin = asyncio.Lock()
        self._held = False  # `hold` has the lock, until `let_go`
        self._suspended = False
        self._gone = False  # closed
        self._uevents = 0  # DM_SEQNUM of the last

    # --- the data path ---------------------------------------------------------------------------------------------

    def submit(self, io: Io, offset: int) -> Pending:
        """As Device.submit. Waits while the device is suspended; EIO when it has no table or the range is beyond it."""
        if self._gate is not None:
            return self._submit_later(io, offset)
        table = self.live
        if table is None:
            return Failed(IoFailed(f"{self.name} has no table"))
        op = io.op
        self.requests[op] += 1
        pending = table.submit(io, offset)
        if pending is DONE:
            self.bytes_done[op] += io.length
            return DONE
        table.in_flight += 1
        if isinstance(pending, Deferred):
            pending.then(partial(self._ended, table, io))
            return pending
        return self._track(table, io, pending, offset)

    async def _submit_later(self, io: Io, offset: int) -> None:
        while self._gate is not None:
            await asyncio.shield(self._gate)
        await self.submit(io, offset)

    async def _track(self, table: Table, io: Io, pending: Pending, offset: int) -> None:
        try:
            await pending
        except Requeue:
            self.requests[io.op] -= 1
            self._out(table)
        except BaseException as error:
            self._ended(table, io, error)
            raise
        else:
            self._ended(table, io, None)
            return
        await self._submit_later(io, offset)

    def _ended(self, table: Table, io: Io, error: BaseException | None) -> None:
        """A request that had to wait is over."""
        if error is None:
            self.bytes_done[io.op] += io.length
        elif isinstance(error, NbdmapError):
            self.errors += 1
        self._out(table)

    def _out(self, table: Table) -> None:
        table.in_flight -= 1
        if self._idle is not None and not table.in_flight and not self._idle.done():
            self._idle.set_result(None)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """As Device.extents; waits and counts like a request."""
        while self._gate is not None:
            await asyncio.shield(self._gate)
        table = self.live
        if table is None:
            raise IoFailed(f"{self.name} has no table")
        table.in_flight += 1
        try:
            return await table.extents(offset, length)
        finally:
            self._out(table)

    # --- tables ----------------------------------------------------------------------------------------------------

    @property
    def suspended(self) -> bool:
        """Whether `suspend` holds new requests."""
        return self._suspended

    @property
    def held(self) -> bool:
        """Whether a device below holds its requests, as that one is suspended."""
        return self._held

    @property
    def targets(self) -> Sequence[Target]:
        """Those of the live table."""
        return self.live.targets if self.live is not None else ()

    async def load(self, lines: Sequence[TableLine], opener: Opener, read_only: bool) -> None:
        """Builds a table into the inactive slot, in place of what is there. On any error nothing has changed."""
        async with self._admin:
            self._check_there()
            table = await Table.build(lines, self._types, opener, read_only, self.event, self)
            for device in table.devices:
                if path := _path_to(device, self):
                    await table.close()
                    names = " on ".join(one.name for one in [self, *path])
                    raise InvalidArgument(f"the table would make {self.name} stand on itself: {names}")
            kept = next((target.type_name for target in self.targets if target.immutable), "")
            if kept and lines[0].type_name not in (kept, "error"):
                await table.close()
                raise InvalidArgument(f"{self.name} is a {kept} and stays one")
            old, self.inactive = self.inactive, table
            self.loaded = True
            if old is not None:
                await old.close()

    async def clear(self) -> None:
        """Drops the inactive table, if any."""
        async with self._admin:
            old, self.inactive = self.inactive, None
            if old is not None:
                await old.close()

    async def suspend(self, *, noflush: bool = False) -> None:
        """Holds new requests, waits for those in flight and, unless `noflush`, flushes the devices below.

        No effect on a suspended device. If it fails or is cancelled, the device runs on as before.
        """
        async with self._admin:
            self._check_there()
            await self._suspend(noflush)

    def _check_there(self) -> None:
        """What waited while the device was removed comes too late."""
        if self._gone:
            raise NoSuchDevice(f"{self.name} was removed")

    async def _suspend(self, noflush: bool) -> None:
        if self._suspended:
            return
        table, targets = self.live, self.targets
        self._gate = asyncio.get_running_loop().create_future()
        self._suspended = True
        try:
            for target in targets:
                await target.presuspend(noflush)
            await self._wait_idle()
            if table is not None and not noflush and not table.read_only:
                await run_all([device.submit(Io(FLUSH, 0), 0) for device in _to_flush(table)])
            for target in targets:
                await target.postsuspend()
            return
        except BaseException as error:
            failure = error  # compiled code must not wait within an except clause, see setup.py
        for target in targets:
            await target.resume()
        self._release()
        raise failure

    async def _wait_idle(self) -> None:
        """Ends when no request of the live table is in flight."""
        if self.live is not None and self.live.in_flight:
            self._idle = asyncio.get_running_loop().create_future()
            try:
                await self._idle
            finally:
                self._idle = None

    async def hold(self) -> None:
        """Suspends the device from inside, for a device below it that is being suspended, without a flush.

        New requests wait until `let_go`, and so does everything that `suspend` would have to wait for; one that is suspended
        already stays so afterwards. Ends when no request is in flight. If it is cancelled nothing is held.
        """
        await self._admin.acquire()
        self._held = True
        try:
            if not self._suspended:
                self._gate = asyncio.get_running_loop().create_future()
                for target in self.targets:
                    await target.presuspend(True)
                await self._wait_idle()
        except BaseException:
            self.let_go()
            raise

    def let_go(self) -> None:
        """Ends a `hold`."""
        self._held = False
        if not self._suspended:
            self._open_gate()
        self._admin.release()

    def _release(self) -> None:
        self._suspended = False
        self._open_gate()

    def _open_gate(self) -> None:
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.set_result(None)

    async def resume(self, *, noflush: bool = False) -> None:
        """Makes the inactive table live, if there is one (suspending first where needed), and lets requests in.

        Raises InvalidArgument, and leaves everything as it is, when the inactive table no longer fits the devices below.
        """
        async with self._admin:
            self._check_there()
            table = self.inactive
            if table is not None:
                table.check()
                await self._suspend(noflush)
                self._swap(table)
                old, self.inactive = self.live, None
                self.live = table
                if old is not None:
                    await old.close()
            elif not self._suspended:
                return
            elif self.live is None:
                raise InvalidArgument(f"{self.name} has no table to resume")
            for target in self.live.targets if self.live else []:
                await target.preresume()
            for target in self.live.targets if self.live else []:
                await target.resume()
            self._release()
        self._sink(self, "change", {})

    def add_ways(self, count: int) -> None:
        """As Device.add_ways, for what the live table stands on as well."""
        self.ways += count
        for device in self.live.devices if self.live else ():
            device.add_ways(count)

    def restarts(self) -> bool:
        """As Device.restarts, of what the live table stands on."""
        return any(device.restarts() for device in (self.live.devices if self.live else ()))

    def _swap(self, table: Table) -> None:
        for device in table.devices:
            device.add_ways(self.ways)
        for device in self.live.devices if self.live else ():
            device.add_ways(-self.ways)
        self.size = table.size
        self.read_only = table.read_only
        self.limits = table.limits

    async def message(self, sector: int, words: Sequence[str]) -> str:
        """Hands a message to the target at `sector` and returns its answer; nothing happens without a live table."""
        if not words:
            raise InvalidArgument("an empty message")
        if self.live is None:
            return ""
        return await self.live.target_at_sector(sector).message(Args(words))

    async def close(self) -> None:
        """Drops both tables; the device is gone. A cancellation does not stop it half-way."""
        await to_the_end(self._close())

    async def _close(self) -> None:
        if self._held:  # and quiet; whoever holds it has the lock
            await self._drop()
        else:
            async with self._admin:
                await self._drop()

    async def _drop(self) -> None:
        self._gone = True
        self.add_ways(-self.ways)
        tables = [table for table in (self.inactive, self.live) if table is not None]
        self.inactive = self.live = None
        self.size = 0
        self._release()
        try:
            for table in tables:
                await table.close()
        finally:
            self.event_number += 1
            self._wake()

    # --- events ----------------------------------------------------------------------------------------------------

    def event(self, keys: Mapping[str, str] | None = None) -> None:
        """Counts a table event, wakes who waits for one, and sends a change uevent with `keys`.

        One with a DM_ACTION gets the device's next DM_SEQNUM, which counts them from 1.
        """
        self.event_number += 1
        self._wake()
        numbered: dict[str, str] = {}
        for key, value in (keys or {}).items():
            numbered[key] = value
            if key == "DM_ACTION":
                self._uevents += 1
                numbered["DM_SEQNUM"] = str(self._uevents)
        self._sink(self, "change", numbered)

    def _wake(self) -> None:
        waited, self._event = self._event, None
        if waited is not None:
            waited.set_result(None)

    async def wait(self, number: int | None = None) -> int:
        """Waits until the event number differs from `number` (default: the present one) and returns it."""
        if number is None:
            number = self.event_number
        while self.event_number == number:
            if self._event is None:
                self._event = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._event)
        return self.event_number


def _tables(device: Device) -> Iterator[Table]:
    if isinstance(device, MappedDevice):
        yield from (table for table in (device.live, device.inactive) if table is not None)


def _holds(device: Device) -> bool:
    """Whether a request to `device` may have to wait for a resume, its own or that of one below."""
    if not isinstance(device, MappedDevice):
        return False
    return device.suspended or any(_holds(below) for below in (device.live.devices if device.live else ()))


def _to_flush(table: Table) -> list[Device]:
    """What a suspend flushes. A suspended device below was flushed by its own suspend and would hold a flush up for ever,
    so those around it are flushed instead."""
    found: list[Device] = []
    for device in table.flushed:
        if not _holds(device):
            found.append(device)
        elif isinstance(device, MappedDevice) and not device.suspended and device.live is not None:
            found += _to_flush(device.live)
    return found


def _path_to(start: Device, wanted: Device) -> list[Device]:
    """The devices from `start` down to `wanted`, through live and inactive tables; empty if it does not stand on it."""
    seen: set[int] = set()

    def walk(device: Device) -> list[Device]:
        if device is wanted:
            return [device]
        if id(device) in seen:
            return []
        seen.add(id(device))
        for table in _tables(device):
            for below in table.devices:
                if path := walk(below):
                    return [device, *path]
        return []

    return walk(start)

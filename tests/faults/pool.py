"""The N-th I/O of a pool's disks goes wrong, for every N: what becomes of the pool, what its users are told, what is kept.

One run: a pool with a volume and a snapshot of it is opened, and goes through all that changes metadata: blocks provisioned,
sharing broken, flushes, discards, messages, a commit by the clock, suspends, growth. At the N-th I/O of the right kind of one
of the two disks it fails, once or from there on. After each step its mode must be what reference h.6 says, and the errno
of what failed; no mode changes without a fault. When the disk is well again a pool that went back to its last commit stays
read-only, with `needs_check` on the disk, until the flag is taken away; then it is writable, its metadata is without a
finding, and nothing that was acknowledged is lost; nor is it in the other world, where the power fails at that moment.
"""

import asyncio
import errno
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

from nbdmap.block.io import DISCARD, FUA, Io
from nbdmap.dm.device import MappedDevice
from nbdmap.dm.table import parse_table
from nbdmap.errors import NbdmapError
from nbdmap.persist.blocks import BLOCK as METADATA_BLOCK
from nbdmap.targets import TARGETS
from nbdmap.targets.thin.check import check
from nbdmap.targets.thin.modes import Mode
from nbdmap.targets.thin.pool import Pool
from nbdmap.targets.thin.superblock import Superblock
from nbdmap.targets.thin.thin_pool import ThinPool
from nbdmap.units import SECTOR
from tests.crash.clock import run
from tests.crash.cut import Cut, State
from tests.crash.disks import CALM, RecordingDisk
from tests.crash.explore import wrong_sectors
from tests.crash.log import WriteLog
from tests.crash.oracle import Client, read_all
from tests.faults.harness import KINDS, PATIENCE, STALL, Kind, Plan
from tests.support.disks import FakeOpener, Uevents

BLOCK: Final = 128
"""Sectors."""
SIZE: Final = 2 * BLOCK + BLOCK // 2
"""Of each volume."""
METADATA_BLOCKS: Final = 128
DATA_BLOCKS: Final = 12
META, DATA = 0, 1
TABLES: Final = {
    "pool": f"0 {DATA_BLOCKS * BLOCK} thin-pool 7:0 7:1 {BLOCK} 0",
    "thin": f"0 {SIZE} thin pool 0",
    "snap": f"0 {SIZE} thin pool 1",
}
LARGER: Final = f"0 {(DATA_BLOCKS + 2) * BLOCK} thin-pool 7:0 7:1 {BLOCK} 0"


class Site:
    """A pool and its volumes over two disks with these contents."""

    def __init__(self, disks: list[RecordingDisk], pool: str = TABLES["pool"]) -> None:
        self.disks = disks
        self.tables = {**TABLES, "pool": pool}
        self.opener = FakeOpener(*disks)
        self.devices: dict[str, MappedDevice] = {}

    async def open(self) -> None:
        """Whatever is not open yet."""
        for name in TABLES:
            if name not in self.devices:
                await self.create(name)

    async def create(self, name: str) -> None:
        """A device with a live table, or none."""
        device = MappedDevice(name, "", f"254:{list(TABLES).index(name)}", TARGETS, Uevents())
        try:
            await device.load(parse_table(self.tables[name]), self.opener, read_only=False)
            await device.resume()
        except BaseException:
            await device.close()
            raise
        self.devices[name] = self.opener.devices[name] = device

    async def close(self) -> None:
        """Everything, the pool last."""
        for device in reversed(self.devices.values()):
            await device.close()
        self.devices = {}

    @property
    def pool(self) -> Pool:
        target = self.devices["pool"].targets[0]
        assert isinstance(target, ThinPool)
        return target.pool

    async def message(self, text: str) -> bool:
        await self.devices["pool"].message(0, text.split())
        return True

    async def status(self, name: str = "pool") -> list[str]:
        """The words of the status line, as `dmsetup status` prints it."""
        device = self.devices[name]
        for target in device.targets:
            await target.refresh_status()
        assert device.live is not None
        (line,) = device.live.status_lines()
        return line.params.split()


@asynccontextmanager
async def opened(images: list[bytes], pool: str = TABLES["pool"]) -> AsyncIterator[Site]:
    """Over disks that are well."""
    site = Site([RecordingDisk(index, image, WriteLog(), CALM) for index, image in enumerate(images)], pool)
    await site.open()
    yield site
    await site.close()


async def made() -> list[bytes]:
    """The disks of a pool with volume 0, which has two blocks, and volume 1, a snapshot that shares one of them."""
    garbage = random.Random(5).randbytes((DATA_BLOCKS + 2) * BLOCK * SECTOR)
    site = Site([RecordingDisk(0, bytes(METADATA_BLOCKS * METADATA_BLOCK), WriteLog(), CALM),
                 RecordingDisk(1, garbage, WriteLog(), CALM)])  # fmt: skip
    await site.create("pool")
    await site.message("create_thin 0")
    await site.create("thin")
    thin = Client("made", site.devices["thin"], WriteLog(), bytes(SIZE * SECTOR), discard_zeroes=True)
    await thin.write(0, 2 * BLOCK)
    await thin.flush()
    await site.message("create_snap 1 0")
    await thin.write(3, 4)
    for device in reversed(site.devices.values()):
        await device.suspend()
    await site.close()
    return [disk.contents for disk in site.disks]


Action = Callable[["PoolRun"], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class Step:
    """What is done. `commits`: it ends with a commit of its own, whatever was before; `mixed`: some of its flushes have
    nothing to commit; `quiet`: nobody is told when it fails."""

    name: str
    do: Action
    commits: bool = False
    mixed: bool = False
    quiet: bool = False

    @property
    def message(self) -> bool:
        """Whether it is but a message to the pool."""
        return self.commits and not self.mixed


async def _batch(one: "PoolRun") -> bool:
    """Writes and flushes at once; a flush that succeeds covers what was acknowledged before it was asked for."""
    thin, snap = one.clients.values()
    work = [thin.write(2 * BLOCK, 3), thin.flush(), snap.write(BLOCK, 2), snap.flush(), thin.write(9, 1, fua=True), snap.flush()]
    return all(await asyncio.gather(*work))


async def _by_the_clock(one: "PoolRun") -> bool:
    good = await one.clients["snap"].write(2 * BLOCK + 1, 2)
    await asyncio.sleep(1.5)
    return good


async def _suspend(one: "PoolRun", name: str) -> bool:
    """A volume whose changes were lost can be suspended, which promises nothing then."""
    device = one.site.devices[name]
    try:
        if name == "pool" or one.site.pool.mode is not Mode.WRITE:
            await device.suspend()
        elif not await one.clients[name].suspend():
            return False
    finally:
        if device.suspended:
            await device.resume()
    return True


async def _snapshot(one: "PoolRun") -> bool:
    """Of a volume that is suspended meanwhile, as the document says how."""
    return await _suspend(one, "thin") and await one.tell("create_snap 2 0")


async def _grow(one: "PoolRun") -> bool:
    device = one.site.devices["pool"]
    await device.load(parse_table(LARGER), one.site.opener, read_only=False)
    try:
        await device.resume()
    finally:
        if device.suspended:
            one.plan.armed = False
            await device.resume()
    return True


async def _status(one: "PoolRun") -> bool:
    for name in TABLES:
        await one.site.status(name)
    return True


def _of(name: str, method: str, *args: int, **keywords: bool) -> Action:
    return lambda one: getattr(one.clients[name], method)(*args, **keywords)


def _discard(name: str, block: int, *, fua: bool) -> Action:
    async def do(one: "PoolRun") -> bool:
        if one.site.pool.mode is not Mode.READ_ONLY:
            return await one.clients[name].discard(block * BLOCK, BLOCK, fua=fua)
        device = one.site.devices[name]
        before = await read_all(device)
        await device.submit(Io(DISCARD, BLOCK * SECTOR, flags=FUA * fua), block * BLOCK * SECTOR)
        assert await read_all(device) == before, "a pool that is read-only unmaps blocks"
        return True

    return do


def _told(text: str) -> Action:
    return lambda one: one.tell(text)


STEPS: Final = (
    Step("read", _of("thin", "read", 0, 2)),
    Step("write in place", _of("thin", "write", 1, 2)),
    Step("break sharing", _of("thin", "write", BLOCK + 5, 3)),
    Step("provision", _of("snap", "write", 2 * BLOCK, 3)),
    Step("flush", _of("thin", "flush")),
    Step("provision with fua", _of("thin", "write", 2 * BLOCK, 2, fua=True), commits=True, mixed=True),
    Step("discard", _discard("snap", 1, fua=False)),
    Step("snapshot", _snapshot, commits=True, mixed=True),
    Step("batch", _batch, commits=True, mixed=True),
    Step("transaction id", _told("set_transaction_id 0 1"), commits=True),
    Step("create", _told("create_thin 3"), commits=True),
    Step("reserve", _told("reserve_metadata_snap"), commits=True),
    Step("delete", _told("delete 2"), commits=True),
    Step("by the clock", _by_the_clock, commits=True, mixed=True, quiet=True),
    Step("release", _told("release_metadata_snap"), commits=True),
    Step("status", _status, commits=True, mixed=True, quiet=True),
    Step("suspend", lambda one: _suspend(one, "pool"), mixed=True),
    Step("grow", _grow, commits=True, mixed=True, quiet=True),
    Step("discard with fua", _discard("thin", 0, fua=True), commits=True, mixed=True),
)


@dataclass(slots=True)
class PoolRun:
    """One run: the kind of fault, the disk that has it, at which of its I/Os; there only, or `sticky`."""

    images: list[bytes]
    kind: Kind
    disk: int
    number: int
    sticky: bool
    log: WriteLog = field(default_factory=WriteLog)
    clients: dict[str, Client] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)
    """Messages."""
    seen: dict[str, bytes] = field(default_factory=dict)
    """What the volumes of a pool that is read-only hold in the end."""
    plan: Plan = field(init=False)
    site: Site = field(init=False)

    def go(self) -> list[str]:
        """The names of the modes it was in. AssertionError when something goes wrong in another way than it should."""
        return run(self._go())

    async def _go(self) -> list[str]:
        self.plan = Plan(self.number, self.kind, self.number, sticky=self.sticky)
        plans = [Plan(3, self.kind, 1 << 30, sticky=False)] * 2
        plans[self.disk] = self.plan
        self.site = Site([RecordingDisk(index, image, self.log, plans[index]) for index, image in enumerate(self.images)])
        await self._open()
        async with opened(self.images) as before:
            first = {name: await read_all(before.devices[name]) for name in ("thin", "snap")}
        self.clients = {
            name: Client(name, self.site.devices[name], self.log, first[name], discard_zeroes=True) for name in first
        }
        modes = [Mode.WRITE]
        late: list[asyncio.Task[bool]] = []
        for step in STEPS:
            modes.append(await self._step(step, late))
            if late:
                break
        self.plan.armed = False
        self.plan.release()
        if late:
            assert await asyncio.wait_for(asyncio.shield(late[0]), PATIENCE), "a request that was held up fails in the end"
            assert self.site.pool.mode is Mode.WRITE
        await self._afterwards(modes[-1])
        durable = Cut(self.log, self.images, self.log.now).images(self.log, State(()))
        await self.site.close()
        left = [disk.contents for disk in self.site.disks]
        await self._nothing_is_lost(durable)
        on_disk = Superblock.read(left[META][:METADATA_BLOCK])
        assert on_disk.needs_check == (modes[-1] is Mode.READ_ONLY), f"needs_check on the disk after {modes[-1].name}"
        after = await self._nothing_is_lost(left)
        assert not self.seen or after == self.seen, "a read-only pool showed what is not in its last commit"
        return [mode.name for mode in dict.fromkeys(modes)]

    async def tell(self, text: str) -> bool:
        """Sends the pool a message."""
        self.asked.append(text)
        await self.site.message(text)
        self.acknowledged.append(text)
        return True

    # --- steps -----------------------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        """A disk that fails makes the opening fail, with its errno, and leaves nothing behind."""
        before = len(self.plan.hits)
        opening = asyncio.ensure_future(self.site.open())
        done, _ = await asyncio.wait((opening,), timeout=20 * PATIENCE)  # each of its reads may be held up
        self.plan.armed = False
        if not done:
            assert self.kind.fault.stall == math.inf
            self.plan.release()
            await opening
            return
        hits = self.plan.hits[before:]
        error = opening.exception()
        assert (error is not None) == bool(hits and self.kind.fault.errno), f"the opening: {error!r} after {hits}"
        if error is not None:
            assert isinstance(error, NbdmapError)
            assert error.errno == self.kind.fault.errno, error
            await self.site.open()
        self.plan.armed = not hits or self.sticky

    async def _step(self, step: Step, late: list["asyncio.Task[bool]"]) -> Mode:
        """Does it, and compares with what must become of it. A task that does not end goes into `late`."""
        pool, fault, loop = self.site.pool, self.kind.fault, asyncio.get_running_loop()
        before, events, failures = pool.mode, self.site.devices["pool"].event_number, self._failures()
        dirty = pool.volumes[0].changed if step.name == "flush" else pool.needs_commit
        first, began = len(self.plan.hits), loop.time()
        task = asyncio.ensure_future(_result(step.do(self)))
        done, _ = await asyncio.wait((task,), timeout=PATIENCE * (20 if fault.stall == STALL else 1))
        if fault.stall == STALL:  # the clock may have begun a commit that is held up
            async with pool.commit_lock:
                pass
        hits = self.plan.hits[first:]
        if not done:
            assert fault.stall == math.inf, f"{step.name} hangs after {hits}"
            late.append(asyncio.ensure_future(_good(task)))
            return before
        good, number = task.result()
        what = f"{step.name}: {'good' if good else f'error {number}'} in mode {before.name}, {pool.mode.name} after {hits}"
        assert loop.time() - began <= (STALL * len(hits) if fault.stall else 0) + 3, f"{what}, {loop.time() - began} s"
        expected = self._expected(step, before, hits, dirty=dirty)
        assert pool.mode in expected, f"{what}, not {[one.name for one in expected]}"
        told = self.site.devices["pool"].event_number - events
        assert told == (pool.mode is not before), f"{what}: {told} events"
        if before is not Mode.WRITE:
            assert not step.message or number == errno.EOPNOTSUPP, what
        elif not good:
            assert hits, f"{what}, for no reason"
            assert fault.errno, what
            assert number in (0, errno.EIO, *((fault.errno,) if pool.mode is before else ())), what
        elif hits and fault.errno and not step.quiet and set(hits) != {"discard"}:
            assert pool.mode is before, what
            assert self.disk == META or self._failures() > failures, f"{what}: nobody is told"
        return pool.mode

    def _failures(self) -> int:
        """Requests of clients that failed."""
        return sum(client.failures for client in self.clients.values())

    def _expected(self, step: Step, before: Mode, hits: list[str], *, dirty: bool) -> set[Mode]:
        """The modes that reference h.6 allows after a step that met `hits`."""
        fault = self.kind.fault
        if before is not Mode.WRITE or not hits or not fault.errno:
            return {before}
        if self.disk == DATA:
            if "flush" not in hits or not (dirty or step.commits or fault.stall):
                return {before}
            return {Mode.READ_ONLY, *((before,) if step.mixed or fault.stall else ())}
        if "write" not in hits and "flush" not in hits:  # a look-up is no change, and an abort reads
            return {before, Mode.READ_ONLY, *((Mode.FAIL,) if len(hits) > 1 else ())}
        if set(hits) == {"flush"} and step.name in ("suspend", "grow"):  # flushes all that is below, even with nothing to commit
            return {before, Mode.READ_ONLY}
        return {Mode.FAIL if self.sticky and "read" in self.kind.sites else Mode.READ_ONLY}

    # --- afterwards --------------------------------------------------------------------------------------------------------

    async def _afterwards(self, mode: Mode) -> None:
        """The disks are well again: a pool that has gone back to its last commit does not write metadata, whatever is done."""
        site, pool, thin = self.site, self.site.pool, self.clients["thin"]
        for _ in range(2):
            words = await site.status()
            if mode is Mode.FAIL:
                assert words == ["Fail"]
                for name in ("thin", "snap"):
                    device = site.devices[name]
                    assert await site.status(name) == ["Fail"]
                    assert device.live is not None
                    assert [line.params for line in device.live.table_lines()] == ["Fail"]
                for request in (thin.read(0, 1), thin.write(0, 1), thin.flush(), thin.discard(0, BLOCK)):
                    assert not await request, "a failed pool does I/O"
            elif mode is Mode.READ_ONLY:
                assert (words[4], words[7]) == ("ro", "needs_check"), words
                for name, client in self.clients.items():
                    data = await read_all(site.devices[name])
                    assert not (wrong := wrong_sectors(name, data, client.allowed(self.log.now))), wrong
                    self.seen[name] = data
            else:
                assert (words[4], words[7]) == ("rw", "-"), words
                assert pool.mode is Mode.WRITE
                for client in self.clients.values():
                    await client.read(0, client.sectors)
                    assert await client.write(0, 1)
            if mode is not Mode.WRITE:
                number = (await _result(site.message("create_thin 9")))[1]
                assert number == errno.EOPNOTSUPP, f"a message gets error {number}"
            await _suspend(self, "pool")

    async def _nothing_is_lost(self, images: list[bytes]) -> dict[str, bytes]:
        """Opens it on these contents, without the flag; what the volumes hold."""
        after: dict[str, bytes] = {}
        superblock = Superblock.read(images[META][:METADATA_BLOCK])
        cleared = replace(superblock, flags=0).sealed() + images[META][METADATA_BLOCK:]
        async with opened([cleared, images[DATA]], LARGER) as site:
            found = await check(site.disks[META])
            assert not found.errors, found.errors.words
            assert not found.leaks, found.leaks.words
            assert site.pool.mode is Mode.WRITE
            for name, client in self.clients.items():
                after[name] = await read_all(site.devices[name])
                wrong = wrong_sectors(name, after[name], client.allowed(self.log.now))
                assert not wrong, f"lost: {wrong}"
            await self._messages_are_kept(site)
            last = Client("thin", site.devices["thin"], WriteLog(), bytes(SIZE * SECTOR), discard_zeroes=True)
            assert await last.write(0, SIZE)
            assert await last.flush()
            assert await site.message("create_thin 100")
        return after

    async def _messages_are_kept(self, site: Site) -> None:
        metadata = site.pool.metadata
        for text in self.acknowledged:
            name, *numbers = text.split()
            if name == "set_transaction_id":
                assert metadata.superblock.transaction_id == 1, f"{text} is lost"
            elif name in ("create_thin", "create_snap", "delete"):
                is_there = await metadata.details.lookup(int(numbers[0])) is not None
                if name == "delete" or f"delete {numbers[0]}" not in self.asked:  # one that failed may have been done
                    assert is_there is (name != "delete"), f"{text} is lost"


async def _result(work: Awaitable[Any]) -> tuple[bool, int]:
    """Whether it went well, and the errno: 0 when it is not known."""
    try:
        return bool(await work), 0
    except NbdmapError as error:
        return False, error.errno


async def _good(task: "asyncio.Task[tuple[bool, int]]") -> bool:
    return (await task)[0]


def sites(images: list[bytes], kind: str, disk: int, *, sticky: bool) -> list[PoolRun]:
    """All runs that meet their fault."""
    runs: list[PoolRun] = []
    while True:
        one = PoolRun(images, KINDS[kind], disk, len(runs), sticky)
        try:
            one.go()
        except AssertionError as error:
            how = "for good" if sticky else "once"
            where = ("metadata", "data")[disk]
            raise AssertionError(f"{kind} {how} at I/O {len(runs)} of the {where} disk: {error}") from error
        if not one.plan.hits:
            return runs
        runs.append(one)

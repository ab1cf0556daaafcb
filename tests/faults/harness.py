"""The N-th I/O goes wrong, for every N: a server with a client, in virtual time, over disks or files that fail on purpose.

One run: a device is served, a client works on it, and from the N-th I/O of the right kind on (a *site*) a disk fails, once or
for good. Checked are: the errno that the client sees, that what needs no failing I/O succeeds, that each request is answered in
time, that reads give what was acknowledged and a power cut at the end loses nothing that was promised, that the server stops
in time, and that no task and no opener is left. N goes up until a run does not come to its N-th I/O.
"""

import asyncio
import errno
import math
import random
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from nbdmap.block.device import Device, Limits
from nbdmap.block.io import DISCARD, FLUSH, FUA, READ, WRITE, WRITE_ZEROES, Io
from nbdmap.errors import IoFailed
from nbdmap.nbd.constants import Cmd
from tests.crash.clock import run
from tests.crash.cut import Cut, State
from tests.crash.disks import CALM, Fault, Weather
from tests.crash.explore import opened, wrong_sectors
from tests.crash.log import WriteLog
from tests.crash.oracle import Client as Promises
from tests.crash.oracle import Unanswered, read_all
from tests.crash.stacks import Tables
from tests.faults.net import NetLoop
from tests.support.nbd import Client, serving

PATIENCE: Final = 30.0
"""How long a client waits for a reply. A stall is shorter, what takes for ever is longer."""
STALL: Final = 5.0
STOP: Final = 2.0
"""How long the server may take to stop, whatever is stuck."""
_COMMANDS: Final = {READ: Cmd.READ, WRITE: Cmd.WRITE, FLUSH: Cmd.FLUSH, DISCARD: Cmd.TRIM, WRITE_ZEROES: Cmd.WRITE_ZEROES}
ANY_IO: Final = frozenset(("read", "write", "zero", "discard", "flush", "range"))
CHANGES: Final = frozenset(("write", "zero", "discard"))
SYNCS: Final = frozenset(("flush", "range"))


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault: what happens, at which I/Os, and whether only files know it."""

    fault: Fault
    sites: frozenset[str] = ANY_IO
    files: bool = False


KINDS: Final = {
    "eio": Kind(Fault(errno.EIO, 0.0)),
    "eio-half-done": Kind(Fault(errno.EIO, 0.5), CHANGES),
    "eio-all-done": Kind(Fault(errno.EIO, 1.0), CHANGES),
    "enospc": Kind(Fault(errno.ENOSPC, 0.0), CHANGES),
    "enospc-half-done": Kind(Fault(errno.ENOSPC, 0.5), CHANGES),
    "flush-eio": Kind(Fault(errno.EIO, 0.0), SYNCS),
    "flush-enospc": Kind(Fault(errno.ENOSPC, 0.0), SYNCS),
    "short-read": Kind(Fault(0, 0.5), frozenset(("read",)), files=True),
    "short-write": Kind(Fault(0, 0.5), frozenset(("write",)), files=True),
    "stall": Kind(Fault(stall=STALL)),
    "stall-then-eio": Kind(Fault(errno.EIO, 0.0, STALL)),
    "never": Kind(Fault(stall=math.inf)),
}


class Plan(Weather):
    """Faults of one kind from site `first` on: there only, or `sticky`."""

    def __init__(self, seed: int, kind: Kind, first: int, *, sticky: bool) -> None:
        super().__init__(seed)
        self.kind = kind
        self.armed = True
        self.hits: list[str] = []
        self._first = first
        self._sticky = sticky
        self._sites = 0

    async def pause(self) -> None:
        """An I/O takes some milliseconds."""
        assert self.rng is not None
        await asyncio.sleep(self.rng.random() / 100)

    def fault(self, kind: str, *, waits: bool) -> Fault | None:
        if not self.armed or kind not in self.kind.sites or (self.kind.fault.stall and not waits):
            return None
        number = self._sites
        self._sites += 1
        if number == self._first or (self._sticky and number > self._first):
            self.hits.append(kind)
            return self.kind.fault
        return None


class Served(Device):
    """The export, as a device of the client: each request is sent at once and waits for its own reply."""

    def __init__(self, client: Client, size: int, limits: Limits) -> None:
        self.name, self.number, self.size, self.limits, self.read_only = "served", "43:0", size, limits, False
        self._client = client
        self._cookie = 0
        self._waiting: dict[int, tuple[asyncio.Future[bytes], int]] = {}
        self._reader = asyncio.get_running_loop().create_task(self._receive())
        self.error: int | None = 0
        """Of the last request: that of the reply, None when there was none."""

    async def submit(self, io: Io, offset: int) -> None:
        self._cookie += 1
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[self._cookie] = future, io.length if io.op is READ else 0
        payload = bytes(io.data) if io.op is WRITE else b""
        self._client.ask(_COMMANDS[io.op], self._cookie, offset, io.length, io.flags & FUA, payload)
        self.error = 0
        done, _ = await asyncio.wait((future,), timeout=PATIENCE)
        if not done:
            self.error = None
            raise Unanswered(f"{io} got no reply")
        data = future.result()
        if io.op is READ:
            io.data[:] = data

    async def _receive(self) -> None:
        while True:
            try:
                error, cookie, _ = await self._client.simple()
            except asyncio.IncompleteReadError:
                return
            future, length = self._waiting.pop(cookie)
            if error:
                self.error = error
                future.set_exception(IoFailed("the server says no", error))
                future.exception()  # seen, even if nobody waits any more
            else:
                future.set_result(await self._client.reader.readexactly(length))

    async def end(self) -> None:
        """The connection is over."""
        await self._reader


@dataclass(slots=True)
class Run:
    """One run: its table and disks, what goes wrong, and how the requests are sent: one by one, or all at once."""

    scenario: Tables
    kind: Kind
    site: int
    sticky: bool
    seed: int
    at_once: bool
    slack: float = 1.0
    """How long a request may take beyond the stalls it meets."""
    plan: Plan = field(init=False)
    log: WriteLog = field(default_factory=WriteLog)

    def __post_init__(self) -> None:
        self.plan = Plan(self.seed, self.kind, self.site, sticky=self.sticky)

    def go(self) -> bool:
        """Whether anything went wrong in it. AssertionError when something goes wrong in another way than it should."""
        run(self._go(), NetLoop)
        return bool(self.plan.hits)

    async def _go(self) -> None:
        images = self.scenario.first_images(random.Random(self.seed))
        promises = await self.session(images)
        state = Cut(self.log, images, self.log.now).images(self.log, State(()))
        async with opened(self.scenario, WriteLog(), state, CALM) as stack:
            for device in stack.devices.values():
                wrong = wrong_sectors("after a power cut", await read_all(device), promises.allowed(self.log.now))
                assert not wrong, wrong

    async def session(self, images: Sequence[bytes]) -> Promises:
        """A client's session, on disks with these contents, and what it was promised."""
        async with self._served(images) as (served, promises):
            if self.at_once:
                await self._all_at_once(served, promises)
            else:
                await self._one_by_one(served, promises)
            self.plan.armed = False
            await promises.read(0, promises.sectors)
        return promises

    @asynccontextmanager
    async def disks(self, images: Sequence[bytes]) -> AsyncIterator[list[Device]]:
        """The disks below, which the plan makes fail."""
        with self.scenario.disks(self.log, images, self.plan) as disks:
            yield disks
            for disk in disks:
                await disk.close()

    @asynccontextmanager
    async def _served(self, images: Sequence[bytes]) -> AsyncIterator[tuple[Served, Promises]]:
        """The server, with a client; at the end it stops, in time, with nothing left."""
        loop = asyncio.get_running_loop()
        async with self.disks(images) as disks, serving() as stack:
            mapped: list[Device] = []
            for name, table in self.scenario.tables.items():
                device = await stack.add(name, table, *disks, *mapped)
                mapped.append(device)
            self.plan.armed = False
            first = await read_all(device)
            self.plan.armed = True
            client = await (await Client.connect(stack.socket)).greet()
            size, _ = await client.go(device.name)
            served = Served(client, size, device.limits)
            yield served, Promises(device.name, served, self.log, first, discard_zeroes=self.scenario.files)
            begun = loop.time()
            await stack.listener.close()
            assert loop.time() - begun <= STOP, f"the server took {loop.time() - begun} s to stop"
            await served.end()
            self.plan.release()
            if device.openers:
                await asyncio.sleep(PATIENCE)  # virtual; what was stuck runs to its end
            assert not device.openers, "the client is gone, and still has the device open"
            for name in [*self.scenario.tables][::-1]:
                await stack.mapper.remove(stack.mapper.devices[name])
            assert not any(disk.openers for disk in disks)

    async def _one_by_one(self, served: Served, promises: Promises) -> None:
        loop = asyncio.get_running_loop()
        latched = stuck = False
        for step in script(promises, random.Random(self.seed), served.limits):
            before, begun = len(self.plan.hits), loop.time()
            name, good = await step
            hits, took = self.plan.hits[before:], loop.time() - begun
            fault = self.kind.fault
            durable = name in ("flush", "fua")
            unanswered = served.error is None
            if hits and fault.stall == math.inf:
                assert unanswered, f"{name}: a reply, although {hits} never ended"
                stuck = True
            elif unanswered:
                assert (stuck, durable, self.scenario.files) == (True, True, True), f"{name} is not answered"
            elif hits and fault.errno:
                may_be = {fault.errno, errno.EIO} if latched and durable else {fault.errno}  # another disk's may come first
                assert not good, f"{name} succeeds after {hits}"
                assert served.error in may_be, f"{name}: {served.error} after {hits}"
            elif good:
                assert not (latched and name == "flush"), "a flush succeeds after one that failed"
            else:
                assert (latched, durable, served.error) == (True, True, errno.EIO), f"{name}: error {served.error} for no reason"
            if not unanswered:
                assert took <= STALL * (len(hits) if fault.stall else 0) + self.slack, f"{name} took {took} s"
                assert took >= fault.stall or not hits, f"{name}: a reply before the I/O has ended"
            latched |= self.scenario.files and bool(fault.errno) and not SYNCS.isdisjoint(hits)

    async def _all_at_once(self, served: Served, promises: Promises) -> None:
        tasks = [asyncio.ensure_future(step) for step in script(promises, random.Random(self.seed), served.limits)]
        results = [await task for task in tasks]
        failed = [name for name, good in results if not good]
        if self.kind.fault.errno and self.plan.hits:
            assert failed, f"all succeed, although {self.plan.hits} failed"
        elif self.kind.fault.stall < math.inf or not self.plan.hits:
            assert not failed, f"{failed} failed for no reason"


Step = Coroutine[Any, Any, tuple[str, bool]]


def script(client: Promises, rng: random.Random, limits: Limits) -> Iterator[Step]:
    """What the client does: every kind of request that is offered, long enough to be cut, in an order and at places by chance."""
    steps = ["write", "write", "fua", "read", "read", "flush", "write", "flush"]
    steps += ["zero", "fua zero"] * limits.zero + ["discard"] * limits.discard
    rng.shuffle(steps)
    for step in [*steps, "write", "flush"]:
        count = rng.choice((1, 5, 9))
        sector = rng.randrange(client.sectors - count + 1)
        match step:
            case "read":
                yield _step("read", client.read(sector, count))
            case "flush":
                yield _step("flush", client.flush())
            case "discard":
                yield _step("discard", client.discard(sector, count))
            case "write" | "fua":
                yield _step(step, client.write(sector, count, fua=step == "fua"))
            case _:
                yield _step("fua" if "fua" in step else "zero", client.zero(sector, count, fua="fua" in step))


async def _step(name: str, request: Coroutine[Any, Any, bytes | bool | None]) -> tuple[str, bool]:
    return name, bool(await request)

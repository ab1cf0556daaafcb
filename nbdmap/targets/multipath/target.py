"""The multipath target: each request goes one way; a way that fails is not used any more, and the request tries another.

Which way, which errors and which states: Linux's dm-mpath.c (6.12) in bio mode, as seen in tests/golden/dmsetup/multipath.txt.

- The group in use is kept while it has a usable path; then the first enabled group with one, then the disabled ones.
- Errors that are the caller's (`CALLERS`) go back to the caller; every other one fails the path.
- Without a usable path requests fail with EIO, or with queue_if_no_path wait: until a path is reinstated, until
  fail_if_no_path, or until the device is suspended, which fails them; a suspend without a flush keeps them for the next table.

What servers have not flushed is kept for the case that all of them restart: see memory.py.

Invariants: `_valid` counts the active paths of all groups; a request is counted on exactly one path, from when it is sent
there until it has ended there. It is taken for granted that all paths lead to the same storage: what is acknowledged on one
can be read, and is made durable by a flush, on every other.
"""

import asyncio
import errno
import logging
import time
from typing import Final, Self

from nbdmap.block.device import Extent, Limits
from nbdmap.block.io import DONE, FLUSH, READ, Io, Pending
from nbdmap.dm.args import Args, parse_number
from nbdmap.dm.target import Below, Spec, Target, merge_limits
from nbdmap.errors import Busy, InvalidArgument, IoFailed, NbdmapError, NoSuchDevice, Requeue
from nbdmap.targets.multipath.grammar import Features, read_features, read_groups
from nbdmap.targets.multipath.memory import Memory
from nbdmap.targets.multipath.paths import Group, Path, why_unfit

CALLERS: Final = frozenset(
    (errno.EOPNOTSUPP, errno.ENOSPC, errno.EREMOTEIO, errno.EBADE, errno.ENODATA, errno.EILSEQ, errno.EINVAL, errno.EOVERFLOW)
)
"""Errors of the request, not of the path: not supported, no space, Linux's target, reservation, medium and protection errors,
and the two by which an NBD server refuses a request as wrong, which would be as wrong on every other path."""
PROBE_SECONDS: Final = 10.0
"""An active path that has not answered a check for so long has failed."""

_log: Final = logging.getLogger(__name__)


class Multipath(Target):
    """`multipath <features> <handler> <#groups> <initial group> <group>...`"""

    type_name = "multipath"
    version = (1, 14, 0)
    flushed = False
    takes_flush = True
    singleton = True
    read_only_too = True
    immutable = True

    def __init__(self, spec: Spec, features: Features, groups: list[Group], initial: int) -> None:
        super().__init__(spec)
        self._features = features
        self._groups = groups
        self._paths = [path for group in groups for path in group.paths]
        self._valid = len(self._paths)
        self._next = groups[initial - 1] if 0 < initial <= len(groups) else None  # to be used from the next request on
        self._group: Group | None = None  # in use
        self._path: Path | None = None  # in use
        self._left = 0  # requests that it gets before another one is chosen, -1: all
        self._unused = True  # no request came yet
        self._queueing = features.queue_if_no_path
        self._saved_queueing = False  # what it was before a suspend
        self._suspended = True
        self._noflush = False
        self._pushing_back = False  # what would wait goes back to the device, for the next table
        self._waiting = 0  # requests that wait for a path
        self._path_back: asyncio.Future[None] | None = None  # what they wait for
        self._memory = Memory(any(path.device.restarts() for path in self._paths))
        self._repeating: asyncio.Task[None] | None = None
        self._in_flight = 0  # requests on all paths
        self._quiet: asyncio.Future[None] | None = None  # what `_repeating` waits for
        self._relief = asyncio.Lock()
        self._own_flushes: set[Io] = set()
        self._spec = spec
        self._limits = merge_limits([path.device.limits for path in self._paths if not path.device.absent])
        for path in self._paths:
            path.device.add_ways(1)

    @classmethod
    async def construct(cls, spec: Spec, args: Args) -> Self:
        """As the grammar says. A path whose server is away is opened all the same, and fails when the table goes live."""
        features = read_features(args)
        groups, initial = await read_groups(spec, args, features.bio)
        return cls(spec, features, groups, initial)

    # --- the data path -------------------------------------------------------------------------------------------------

    def submit(self, io: Io, offset: int) -> Pending:
        """Sends a request, of any kind, by one path."""
        path = self._choose(io.length)
        if path is None:
            return self._follow(io, offset - self.begin, None, DONE)
        began_ns = time.monotonic_ns() if path.group.selector.timed else 0
        mark = self._memory.mark()
        pending = path.device.submit(io, offset - self.begin)
        if pending is DONE and not self._memory.keep:
            if began_ns:
                path.group.selector.ended(path, began_ns)
            return DONE
        self._count(path, io, 1)
        return self._follow(io, offset - self.begin, path, pending, began_ns, mark)

    async def _follow(
        self, io: Io, offset: int, path: Path | None, pending: Pending, began_ns: int = 0, mark: int = 0
    ) -> None:
        """Awaits a request that was sent by `path`, or found none; sends it again as long as paths fail."""
        trouble = ""
        while True:
            if path is not None:
                try:
                    await pending
                    break
                except NbdmapError as error:
                    if error.errno in CALLERS:
                        raise
                    trouble = error.message
                finally:
                    self._count(path, io, -1)
                    if began_ns:
                        path.group.selector.ended(path, began_ns)
                self._fail(path, trouble)
            while (path := self._choose(io.length)) is None:
                await self._wait_for_path(trouble)
            self._count(path, io, 1)
            began_ns = time.monotonic_ns() if path.group.selector.timed else 0
            mark = self._memory.mark()
            pending = path.device.submit(io, offset)
        if self._memory.keep:
            await self._remember(io, offset, mark)

    def _count(self, path: Path, io: Io, one: int) -> None:
        path.in_flight += one
        path.in_flight_bytes += one * io.length
        self._in_flight += one
        if not self._in_flight and self._quiet is not None and not self._quiet.done():
            self._quiet.set_result(None)

    async def _wait_for_path(self, trouble: str) -> None:
        """Ends when it is worth while to choose again. Raises IoFailed (EIO), or Requeue, when nothing is waited for."""
        if self._pushing_back:
            raise Requeue("suspended without a flush")
        if not self._queueing and not self._valid:
            raise IoFailed(f"multipath: no usable path{trouble and ': '}{trouble}")
        if self._path_back is None:
            self._path_back = asyncio.get_running_loop().create_future()
        self._waiting += 1
        try:
            await asyncio.shield(self._path_back)
        finally:
            self._waiting -= 1

    def _drive(self) -> None:
        """Has those that wait choose again, in the order they came."""
        waited, self._path_back = self._path_back, None
        if waited is not None:
            waited.set_result(None)

    def _choose(self, size: int) -> Path | None:
        """The path for a request of `size` bytes; none while what the storage may have forgotten is written again."""
        if self._memory.at_risk and self._valid:
            return None
        if self._left and self._path is not None:
            self._left -= 1
            return self._path
        self._unused = False
        if not self._valid:
            self._group = self._path = None
            return None
        following, self._next = self._next, None
        for group in (following, self._group):
            if group is not None and group.usable:
                return self._use(group, size)
        for disabled in (False, True):
            for group in self._groups:
                if group.disabled is disabled and group.usable:
                    return self._use(group, size)
        raise AssertionError("an active path is usable in its group")

    def _use(self, group: Group, size: int) -> Path:
        path = group.choose(size)
        self._group = group
        self._path = path
        self._left = path.repeat - 1  # -1, for 0, never comes to an end
        return path

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Those that the path in use, or else any, tells; all data when none does."""
        path = self._path or next((path for path in self._paths if path.active), None)
        if path is not None:
            try:
                return await path.device.extents(offset - self.begin, length)
            except NbdmapError as error:
                if error.errno not in CALLERS:
                    self._fail(path, error.message)
        return [(length, 0)]

    # --- what the storage may forget -----------------------------------------------------------------------------------

    async def _remember(self, io: Io, offset: int, mark: int) -> None:
        """Takes note of what was acknowledged. Raises IoFailed for the first flush of a client after something was lost."""
        memory = self._memory
        memory.done(io, offset, mark, self._paths)
        if io.op is FLUSH and memory.forgotten and io not in self._own_flushes:
            memory.forgotten = False
            raise IoFailed("multipath: the storage forgot writes that it had acknowledged, and would not take them again")
        if memory.full:
            async with self._relief:
                if memory.full:
                    await self._flush()

    async def _flush(self) -> None:
        """A flush that no client asked for."""
        io = Io(FLUSH, 0)
        self._own_flushes.add(io)
        try:
            await self.submit(io, self.begin)
        finally:
            self._own_flushes.discard(io)

    async def _repeat(self) -> None:
        """Writes again what the storage may have forgotten, while nothing else is under way."""
        memory = self._memory
        while memory.at_risk and self._valid:
            while self._in_flight:
                self._quiet = asyncio.get_running_loop().create_future()
                await self._quiet
            path = next(path for group in self._groups for path in group.usable) if self._valid else None
            if path is None:
                return
            try:
                await memory.repeat(path)
            except NbdmapError as error:
                if error.errno not in CALLERS:
                    self._fail(path, error.message)
                    continue
                memory.forgotten = True
                _log.error("multipath: what the storage forgot cannot be written again: %s", error.message)
            memory.at_risk = False
            for one in self._paths:
                one.lost = not one.active
            self._drive()

    def _begin_repeat(self) -> None:
        if self._memory.at_risk and self._valid and (self._repeating is None or self._repeating.done()):
            self._repeating = asyncio.get_running_loop().create_task(self._repeat())

    # --- paths that fail and come back ---------------------------------------------------------------------------------

    def _fail(self, path: Path, why: str) -> None:
        if not path.active:
            return
        path.active = False
        path.failures += 1
        path.group.usable.remove(path)
        self._valid -= 1
        if path is self._path:
            self._path = None
        _log.warning("multipath: path %s (%s) failed, %d left: %s", path.device.number, path.device.name, self._valid, why)
        self._tell("PATH_FAILED", path)
        path.lost = True
        self._memory.path_lost(self._paths)
        self._begin_repeat()
        if not self._valid:
            self._drive()

    def _reinstate(self, path: Path) -> None:
        if path.active:
            return
        path.active = True
        path.by_hand = False
        path.group.usable.append(path)
        self._valid += 1
        _log.warning("multipath: path %s (%s) is back, %d now", path.device.number, path.device.name, self._valid)
        self._tell("PATH_REINSTATED", path)
        if self._valid == 1:
            self._path = None
            self._begin_repeat()
            self._drive()

    def _tell(self, action: str, path: Path) -> None:
        self._spec.raise_event(
            {
                "DM_TARGET": self.type_name, "DM_ACTION": action,
                "DM_PATH": path.device.number, "DM_NR_VALID_PATHS": str(self._valid),
            }
        )  # fmt: skip

    def check_paths(self, now: float) -> None:
        """To be called now and then with the time in seconds: begins to read a block by every path, but for those that a
        message has failed. What cannot be read fails its path, what can reinstates it."""
        if self._suspended:
            return
        for path in self._paths:
            if path.by_hand:
                continue
            if path.probe is None or path.probe.done():
                path.asked_at = now
                path.probe = asyncio.get_running_loop().create_task(self._check(path))
            elif now - path.asked_at >= PROBE_SECONDS:
                self._fail(path, f"no answer to a check for {now - path.asked_at:.0f} s")

    async def _check(self, path: Path) -> None:
        block = path.device.limits.logical_block
        try:
            await path.device.submit(Io(READ, block, memoryview(bytearray(block))), 0)
        except NbdmapError as error:
            if error.errno not in CALLERS:
                self._fail(path, error.message)
                return
        if path.active or path.by_hand or self._suspended:
            return
        unfit = why_unfit(path.device, self.length, self._limits, self._spec.read_only)
        if not unfit:
            self._reinstate(path)
        elif unfit != path.unfit:
            _log.warning("multipath: path %s (%s) is back, but %s", path.device.number, path.device.name, unfit)
        path.unfit = unfit

    # --- tables and status ---------------------------------------------------------------------------------------------

    def devices(self) -> list[Below]:
        """The whole length on every path."""
        return [Below(path.device, 0, self.length) for path in self._paths]

    def limits(self) -> Limits:
        """What all paths could that were there when the table was loaded."""
        return self._limits

    def table(self) -> str:
        """As it was loaded, with the present queue_if_no_path and all that selectors understand; a blank at the end."""
        groups = "".join(group.table() for group in self._groups)
        return f"{self._features.words(self._queueing)}{len(self._groups)} {self._group_number()} {groups}"

    def status(self) -> str:
        """`2 <waiting> 0 0 <#groups> <group> (<A|D|E> <words> <#paths> <#words> (<device> <A|F> <failures> <words>)...)...`

        `<waiting>` is the number of requests that wait for a path, as in the documents; with `queue_mode bio` it is 1 until the
        first request, as in Linux today.
        """
        waiting = int(self._unused) if self._features.bio else self._waiting
        groups = "".join(group.status(in_use=group is self._group) for group in self._groups)
        return f"2 {waiting} 0 0 {len(self._groups)} {self._group_number()} {groups}"

    def _group_number(self) -> int:
        """The group that the next request goes to, as far as that is known."""
        group = self._next or self._group
        return group.number if group is not None else min(1, len(self._groups))

    # --- messages ------------------------------------------------------------------------------------------------------

    async def message(self, args: Args) -> str:
        """queue_if_no_path, fail_if_no_path, fail_path and reinstate_path with a device, switch_group, disable_group and
        enable_group with a number. Raises Busy while suspended, InvalidArgument for anything else."""
        if self._suspended:
            raise Busy("multipath: messages are not taken while the device is suspended")
        words = [args.word("message") for _ in range(len(args))]
        match [words[0].lower(), *words[1:]]:
            case ["queue_if_no_path"]:
                self._queueing = True
            case ["fail_if_no_path"]:
                self._stop_queueing()
            case ["fail_path", reference]:
                for path in await self._named(reference):
                    self._fail(path, "by a message")
                    path.by_hand = True
            case ["reinstate_path", reference]:
                for path in await self._named(reference):
                    self._reinstate(path)
            case ["switch_group", number]:
                self._next = self._numbered(number)
                for group in self._groups:
                    group.disabled = False
                self._leave_group()
            case [("disable_group" | "enable_group") as what, number]:
                self._numbered(number).disabled = what == "disable_group"
                self._leave_group()
            case _:
                raise InvalidArgument(f"multipath: message {' '.join(words)!r} is not understood")
        return ""

    async def _named(self, reference: str) -> list[Path]:
        """The paths that `reference` names, one in each place where the table has it."""
        found = [path for path in self._paths if reference in (path.device.number, path.device.name, path.reference)]
        if not found:
            try:
                device = await self._spec.find(reference)
            except NoSuchDevice:  # a number; a name that is none is NotFound
                device = None
            found = [path for path in self._paths if path.device is device]
        if not found:
            raise InvalidArgument(f"multipath: {reference} is not a path of this table")
        return found

    def _numbered(self, word: str) -> Group:
        return self._groups[parse_number(word, "group", 1, len(self._groups)) - 1]

    def _leave_group(self) -> None:
        self._group = self._path = None
        self._spec.raise_event()

    def _stop_queueing(self) -> None:
        self._queueing = self._saved_queueing = False
        self._drive()

    # --- suspend and resume --------------------------------------------------------------------------------------------

    async def presuspend(self, noflush: bool) -> None:
        """Nothing waits, and nothing is written again, from now on. With `queue_mode bio` the table lacks queue_if_no_path."""
        self._noflush = noflush
        self._pushing_back = noflush
        if self._features.bio or not noflush:
            self._saved_queueing, self._queueing = self._queueing, False
        self._drive()
        if self._repeating is not None:
            await asyncio.wait((self._repeating,))

    async def postsuspend(self) -> None:
        """Flushes by one path what was written. Without a path there is nobody to flush: the device can be suspended still."""
        self._suspended = True
        if self._noflush or self._spec.read_only or self._unused:
            return
        if self._valid:
            await self._flush()
        else:
            _log.warning("multipath: suspended without a flush: there is no usable path")

    async def resume(self) -> None:
        """queue_if_no_path is as it was; paths that are not there fail."""
        self._queueing = self._queueing or self._saved_queueing
        self._saved_queueing = self._noflush = self._pushing_back = self._suspended = False
        for path in self._paths:
            if path.device.absent:
                self._fail(path, "its server is not there yet")

    async def close(self) -> None:
        """Ends the checks; the devices repeat lost writes themselves again."""
        tasks = [task for task in (self._repeating, *(path.probe for path in self._paths)) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for path in self._paths:
            path.device.add_ways(-1)

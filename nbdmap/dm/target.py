"""The base of all targets: the kernel's `struct target_type`, one method an entry.

A target stands at `begin`..`end` (bytes) of its table and is asked in device coordinates: `offset` counts from the start
of the mapped device, so a target that shifts subtracts its own begin once, when it is made.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Protocol, Self

from mypy_extensions import mypyc_attr

from nbdmap.block.device import Device, Extent, Limits
from nbdmap.block.io import Io, Pending, run_all
from nbdmap.dm.args import Args
from nbdmap.errors import InvalidArgument
from nbdmap.units import SECTOR


class Below(NamedTuple):
    """A range of a device that a target stands on, in bytes."""

    device: Device
    start: int
    length: int


class Opener(Protocol):
    """Finds and opens the devices that tables name."""

    async def open(self, reference: str, read_only: bool, *, may_be_absent: bool = False) -> Device:
        """The device that `reference` names (NAME, /dev/mapper/NAME, major:minor, URI or path), one opener more.

        With `may_be_absent` also one whose server cannot be reached at present. Raises NotFound, AccessRefused or another
        NbdmapError naming the reference.
        """
        ...

    async def release(self, device: Device) -> None:
        """Takes back one `open`."""
        ...


class Opened:
    """The devices that one table has open: each once, however many of its targets stand on it."""

    def __init__(self, opener: Opener, read_only: bool) -> None:
        self.read_only = read_only
        self._opener = opener
        self._devices: list[Device] = []

    async def open(self, reference: str, *, read_only: bool = False, may_be_absent: bool = False) -> Device:
        """Opens a device for the life of the table; read-only if that is enough, or in a read-only table. `may_be_absent`: as
        Opener.open."""
        device = await self._opener.open(reference, read_only or self.read_only, may_be_absent=may_be_absent)
        if device in self._devices:
            await self._opener.release(device)
        else:
            self._devices.append(device)
        return device

    async def find(self, reference: str) -> Device:
        """The device that `reference` names now, to be compared with those that are open."""
        device = await self._opener.open(reference, self.read_only, may_be_absent=True)
        await self._opener.release(device)
        return device

    async def release(self) -> None:
        """Gives all devices back, the last opened first."""
        while self._devices:
            await self._opener.release(self._devices.pop())


class Owner(Protocol):
    """The mapped device that a table is for, as a target of another device may use it that this one stands on."""

    @property
    def targets(self) -> "Sequence[Target]":
        """The targets of its live table."""
        ...

    async def hold(self) -> None:
        """Suspends it from inside, without a flush, until `let_go`: new requests and new suspends wait."""
        ...

    def let_go(self) -> None:
        """Ends one `hold`."""
        ...


RaiseEvent = Callable[..., None]
"""What a target calls to raise a table event: with nothing, or with a mapping of the keys that its uevent has beyond the
device's own, DM_TARGET and DM_ACTION first."""


class Spec:
    """What a target's constructor is told: its range in bytes, the table's mode, how to open and find devices, what
    to call to raise a table event, and the device that the table is for."""

    def __init__(
        self, begin: int, length: int, opened: "Opened", raise_event: RaiseEvent, owner: Owner | None = None
    ) -> None:
        self.owner = owner
        self.begin = begin
        self.length = length
        self.read_only = opened.read_only
        self.open = opened.open
        self.find = opened.find
        self.raise_event = raise_event


@mypyc_attr(allow_interpreted_subclasses=True)
class Target:
    """One entry of a table. Subclasses set `type_name` and `version` and override what they do differently."""

    type_name: ClassVar[str]
    version: ClassVar[tuple[int, int, int]]
    flushed: ClassVar[bool] = True
    """Whether a flush of the mapped device must reach the devices below this target."""
    singleton: ClassVar[bool] = False
    """Whether it must be the only target of its table, which must not be read-only."""
    read_only_too: ClassVar[bool] = False
    """Whether such a table may be read-only all the same."""
    immutable: ClassVar[bool] = False
    """Whether a device keeps this type: while it is live no table of another type, but error, can be loaded."""
    takes_flush: ClassVar[bool] = False
    """Whether that flush comes to `submit`, with the target's begin as offset, instead of going straight to those devices."""

    def __init__(self, spec: Spec) -> None:
        self.begin = spec.begin
        self.length = spec.length
        self.end = spec.begin + spec.length

    @classmethod
    async def construct(cls, spec: Spec, args: Args) -> Self:
        """Makes the target from the words after its type. Raises InvalidArgument naming the word that is wrong."""
        raise NotImplementedError

    def submit(self, io: Io, offset: int) -> Pending:
        """Does `io`, which lies inside the target. FLUSH only comes where `takes_flush` is set; then the target flushes
        its devices itself."""
        raise NotImplementedError

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """As Device.extents, inside the target."""
        return [(length, 0)]

    def devices(self) -> list[Below]:
        """What the target stands on, in the order of its table line: checked, flushed, listed as dependencies."""
        return []

    def limits(self) -> Limits:
        """What the target can do: as a rule what all devices below can."""
        return merge_limits([below.device.limits for below in self.devices()])

    def table(self) -> str:
        """The words of its table line; `construct(table())` makes the same target."""
        return ""

    def status(self) -> str:
        """The words of its status line."""
        return ""

    async def refresh_status(self) -> None:
        """What is to be done before `status` is asked for by someone who wants the state of the disk: a commit, if any."""

    def counters(self) -> dict[str, int]:
        """What the target counts of itself, for `nbdmap stats --json`: how much its caches hold, and may."""
        return {}

    async def message(self, args: Args) -> str:
        """Obeys a message and returns the answer's text, mostly none."""
        raise InvalidArgument(f"{self.type_name} takes no messages")

    async def presuspend(self, noflush: bool) -> None:
        """Before new requests are held: issue what is queued, pause jobs."""

    async def postsuspend(self) -> None:
        """When no request is in flight any more."""

    async def preresume(self) -> None:
        """Before the first request; a failure leaves the device suspended."""

    async def resume(self) -> None:
        """The table is live and requests follow."""

    async def close(self) -> None:
        """The table is being dropped. The devices of `spec.open` are given back by it."""


def submit_chunks(io: Io, place: int, inside: int, chunk: int, submit: Callable[[Io, int, int], Pending]) -> Pending:
    """A request that begins `inside` bytes into chunk `place`, cut at the borders of chunks of `chunk` bytes.

    `submit(part, place, inside)` does what lies in one chunk; the parts run side by side.
    """
    pieces: list[Pending] = []
    done = 0
    while done < io.length:
        length = min(chunk - inside, io.length - done)
        pieces.append(submit(io.part(done, length), place, inside))
        done += length
        place += 1
        inside = 0
    return run_all(pieces)


def merge_limits(all_limits: list[Limits]) -> Limits:
    """What is possible over the whole of several devices or targets at once."""
    if len(all_limits) == 1:
        return all_limits[0]
    return Limits(
        logical_block=max((one.logical_block for one in all_limits), default=SECTOR),
        discard=all(one.discard for one in all_limits),
        zero=all(one.zero for one in all_limits),
        fast_zero=all(one.fast_zero for one in all_limits),
        cache=all(one.cache for one in all_limits),
        sparse=any(one.sparse for one in all_limits),
        io_min=max((one.io_min for one in all_limits), default=0),
        io_opt=max((one.io_opt for one in all_limits), default=0),
        rotational=any(one.rotational for one in all_limits),
    )

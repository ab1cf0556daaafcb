"""A path of a multipath target and the group that it is in.

Invariant: `group.usable` holds exactly the active paths of the group, the one to be preferred among equals first.
"""

from typing import TYPE_CHECKING

from nbdmap.block.device import Device, Limits

if TYPE_CHECKING:
    import asyncio

    from nbdmap.targets.multipath.selectors import Selector


class Path:
    """One way: a device, whether it is used, and what selectors go by."""

    __slots__ = (
        "active", "asked_at", "by_hand", "device", "failures", "group", "history", "in_flight", "in_flight_bytes", "lost",
        "probe", "reference", "repeat", "throughput", "unfit",
    )  # fmt: skip

    def __init__(self, device: Device, reference: str, group: "Group") -> None:
        self.device = device
        self.reference = reference
        """The word of the table."""
        self.group = group
        self.active = True
        self.by_hand = False
        """Failed by a message: only a message reinstates it."""
        self.failures = 0
        self.lost = False
        """Whether it has failed since everything was flushed."""
        self.in_flight = 0
        """Requests that are under way."""
        self.in_flight_bytes = 0
        self.repeat = 1
        """Requests in a row before another path is chosen; 0: as long as it works."""
        self.throughput = 1
        """Relative to the other paths of the group, 0 to 100."""
        self.history = History()
        self.probe: asyncio.Task[None] | None = None
        self.asked_at = 0.0
        """When `probe` was begun, in seconds."""
        self.unfit = ""
        """Why it cannot be reinstated though it answers."""


class History:
    """What historical-service-time remembers of a path. Times are nanoseconds, the average has 10 more bits."""

    __slots__ = ("average", "last_finish_ns", "stale_after_ns")

    def __init__(self) -> None:
        self.average = 1 << 10
        self.stale_after_ns = 0
        self.last_finish_ns = 0


class Group:
    """Paths of the same priority, of which `selector` chooses. Groups are numbered from 1."""

    __slots__ = ("disabled", "number", "paths", "selector", "usable")

    def __init__(self, number: int, selector: "Selector") -> None:
        self.number = number
        self.selector = selector
        self.paths: list[Path] = []
        self.usable: list[Path] = []
        self.disabled = False
        """Passed over while another group has a usable path."""

    def add(self, path: Path) -> None:
        """One path more; used from now on."""
        self.paths.append(path)
        self.usable.append(path)

    def choose(self, size: int) -> Path:
        """The path for a request of `size` bytes; among equals it will be the last from now on."""
        usable = self.usable
        if len(usable) == 1:
            return usable[0]
        path = self.selector.choose(usable, size)
        usable.remove(path)
        usable.append(path)
        return path

    def table(self) -> str:
        """Its words in a table line, a blank behind each."""
        selector = self.selector
        head = f"{selector.name} {selector.own_words()} {len(self.paths)} {selector.table_words} "
        return head + "".join(f"{path.device.number} {selector.table(path)} " for path in self.paths)

    def status(self, *, in_use: bool) -> str:
        """Its words in a status line, a blank behind each."""
        selector = self.selector
        state = "D" if self.disabled else "A" if in_use else "E"
        words = [f"{state} {selector.own_words()} {len(self.paths)} {selector.info_words} "]
        for path in self.paths:
            info = selector.info(path)
            words.append(f"{path.device.number} {'A' if path.active else 'F'} {path.failures} {info}{' ' if info else ''}")
        return "".join(words)


def why_unfit(device: Device, size: int, wanted: Limits, read_only: bool) -> str:
    """Why a device that was away when the table was loaded cannot be a path of `size` bytes, "" if it can."""
    if device.size < size:
        return f"has {device.size} bytes, {size} are needed"
    if device.read_only and not read_only:
        return "is read-only"
    if device.limits.logical_block > wanted.logical_block:
        return f"takes blocks of {device.limits.logical_block} bytes, not of {wanted.logical_block}"
    if missing := [name for name in ("discard", "zero", "cache") if getattr(wanted, name) > getattr(device.limits, name)]:
        return f"cannot do {', '.join(missing)}"
    return ""

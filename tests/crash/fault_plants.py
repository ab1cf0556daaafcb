"""Bugs of the targets of tests of faults, planted as those of plants.py are."""

from typing import Final

from nbdmap.block.io import DONE, FLUSH, Io, Pending
from nbdmap.dm.target import Below, Target
from nbdmap.targets.delay import Delay
from nbdmap.targets.flakey import Flakey
from nbdmap.targets.log_writes import Flag, Logged, LogWrites
from nbdmap.targets.switch import Switch


class FlushAtOnce(LogWrites):
    """A flush is logged and not sent."""

    def submit(self, io: Io, offset: int) -> Pending:
        return self._append(Logged(0, 0, Flag.FLUSH)) if io.op is FLUSH else super().submit(io, offset)


class FlushesGoTheirWayOnly(Delay):
    """A flush reaches the device of the flushes only, as in the kernel."""

    def submit(self, io: Io, offset: int) -> Pending:
        self._flushes._devices[1:] = []
        return super().submit(io, offset)


class DropsFlushesWhileUp(Flakey):
    """What is meant for the down interval is always done to flushes."""

    def submit(self, io: Io, offset: int) -> Pending:
        return DONE if io.op is FLUSH else super().submit(io, offset)


class FlushFirstPath(Switch):
    """A flush reaches the first path only."""

    def devices(self) -> list[Below]:
        return super().devices()[:1]


FAULT_PLANTS: Final[dict[str, tuple[str, type[Target]]]] = {
    "log-flush-only": ("faults", FlushAtOnce),
    "flush-the-flush-device": ("delayed", FlushesGoTheirWayOnly),
    "flakey-drops-flushes": ("faults", DropsFlushesWhileUp),
    "flush-first-path": ("faults", FlushFirstPath),
}
"""Each with the scenario that it is planted into."""

"""The stacks that are crashed: linear and striped, over disks and over files; the targets of tests of faults."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

from nbdmap.block.device import Device
from nbdmap.dm.device import MappedDevice
from nbdmap.dm.table import parse_table
from tests.crash.persist import Persist
from tests.crash.scenario import Scenario, Stack
from tests.crash.thin import Thin, ThinFiles
from tests.support.disks import FakeOpener


def _no_events(device: MappedDevice, action: str, keys: Mapping[str, str]) -> None:
    """Nobody listens."""


class Tables(Scenario):
    """A device for each of `tables`, each over the disks (7:0, 7:1, ...) and the devices before it (by name)."""

    tables: ClassVar[Mapping[str, str]]
    """The last is the one that clients use."""

    async def open(self, disks: Sequence[Device]) -> Stack:
        mapped: list[MappedDevice] = []
        for name, table in self.tables.items():
            device = self.device_type(name, "", f"254:{len(mapped)}", self.types, _no_events)
            await device.load(parse_table(table), FakeOpener(*disks, *mapped), read_only=False)
            await device.resume()
            mapped.append(device)
        top = mapped[-1]
        return Stack({top.name: self.seen(top)}, mapped)


class Linear(Tables):
    """Three ranges of two disks, out of order, so that requests are cut at their borders."""

    name = "linear"
    sectors = (40, 32)
    tables: ClassVar = {"lin": "0 20 linear 7:0 8\n20 24 linear 7:1 4\n44 8 linear 7:0 30"}


class Striped(Tables):
    """Three stripes with chunks of four sectors, starting at different sectors."""

    name = "striped"
    sectors = (20, 18, 24)
    tables: ClassVar = {"str": "0 48 striped 3 4 7:0 2 7:1 0 7:2 8"}


class Stacked(Tables):
    """Stripes over a linear device and a disk, a linear device over those: two floors, a disk that is used twice."""

    name = "stacked"
    sectors = (30, 28)
    tables: ClassVar = {
        "low": "0 24 linear 7:0 5",
        "mid": "0 48 striped 2 3 low 0 7:1 2",
        "top": "0 30 linear mid 18\n30 18 linear mid 0",
    }


class Crypted(Tables):
    """Two ciphers, one after the other: a sector holds the plaintext of one write, whole, and never that of two."""

    name = "crypt"
    sectors = (30, 26)
    tables: ClassVar = {
        "secret": f"0 24 crypt aes-xts-plain64 {bytes(range(64)).hex()} 7 7:0 4\n"
        f"24 24 crypt aes-cbc-essiv:sha256 {bytes(range(32)).hex()} 0 7:1 1",
    }


class LinearFiles(Linear):
    """As Linear, over FileDisks."""

    name = "linear-files"
    files = True


class StripedFiles(Striped):
    """As Striped, over FileDisks."""

    name = "striped-files"
    files = True


class StackedFiles(Stacked):
    """As Stacked, over FileDisks."""

    name = "stacked-files"
    files = True


class Faults(Tables):
    """The targets that are there to make trouble, while they make none, on one another: what they pass on they pass on
    whole, flushes too. The log of log-writes is on a disk of its own."""

    name = "faults"
    sectors = (40, 40, 400)
    tables: ClassVar = {
        "log": "0 40 log-writes 7:0 7:2",
        "paths": "0 36 switch 2 5 0 log 2 7:1 4",
        "slow": "0 36 delay paths 0 100 paths 0 300 paths 0 200",
        "dusty": "0 36 dust slow 0 1024",
        "shaky": "0 32 flakey dusty 4 1000000 1",
    }


class Delayed(Tables):
    """A delay whose writes and flushes go to different disks."""

    name = "delayed"
    sectors = (36, 36)
    tables: ClassVar = {"slow": "0 36 delay 7:0 0 10 7:0 0 300 7:1 0 20"}


class Paths(Tables):
    """Two paths to the same disk, and a third in a group that is used when they have failed. What fails on one is done on
    another; when all have failed everything does, until the stack is opened again."""

    name = "paths"
    sectors = (40,)
    tables: ClassVar = {
        "a": "0 40 linear 7:0 0",
        "b": "0 40 linear 7:0 0",
        "c": "0 40 linear 7:0 0",
        "mp": "0 36 multipath 0 0 2 1 round-robin 0 2 1 a 1 b 3 queue-length 0 1 1 c 2",
    }


_ALL: Final[tuple[type[Scenario], ...]] = (
    Linear,
    Striped,
    Stacked,
    Crypted,
    LinearFiles,
    StripedFiles,
    StackedFiles,
    Faults,
    Delayed,
    Paths,
    Persist,
    Thin,
    ThinFiles,
)

SCENARIOS: Final[dict[str, type[Scenario]]] = {kind.name: kind for kind in _ALL}

"""switch: regions of fixed size, each on a path of one's choice (Documentation device-mapper/switch).

    0 8192 switch 2 128 0 /dev/sda 0 /dev/sdb 0

    dmsetup message switch1 0 set_region_mappings 0:1 :1 :0 R2,10

Region r is on path r % paths until a message says otherwise; sector s of the target is sector start + s of the path's
device. A flush reaches every path and a discard the paths of its regions; the kernel sends no flush and discards on the
path of the first region only, as there all paths lead to the same disk.
"""

import re
from array import array
from typing import Final, NamedTuple, Self

from nbdmap.block.device import Extent
from nbdmap.block.io import Io, Pending
from nbdmap.dm.args import Args
from nbdmap.dm.target import Below, Spec, Target, submit_chunks
from nbdmap.errors import InvalidArgument
from nbdmap.units import SECTOR

MAX_UINT: Final = (1 << 32) - 1
MAX_PATHS: Final = 1 << 16
MAX_REGIONS: Final = 1 << 26
"""Of one target; each takes a byte, or two where there are more than 256 paths."""
MAX_EXTENTS: Final = 1024
"""One answer to block status looks at no more regions than this."""

_MAPPING: Final = re.compile(r"([0-9a-fA-F]*):([0-9a-fA-F]+)")
_REPEAT: Final = re.compile(r"[rR]([0-9a-fA-F]+),([0-9a-fA-F]+)")


class _Step(NamedTuple):
    """A part of a message: `length` regions from `first` on take `path`, or repeat the `cycle` regions before them."""

    first: int
    length: int
    cycle: int
    path: int


class Switch(Target):
    """`switch <paths> <region sectors> 0 (<device> <start>)...`"""

    type_name = "switch"
    version = (1, 1, 0)

    def __init__(self, spec: Spec, region: int, paths: list[Below]) -> None:
        super().__init__(spec)
        self._region = region
        self._paths = paths
        self._count = -(-spec.length // region)
        self._map = array("B" if len(paths) <= 256 else "H", range(len(paths))) * -(-self._count // len(paths))

    @classmethod
    async def construct(cls, spec: Spec, args: Args) -> Self:
        """The number of paths, the region in sectors, no optional words, then a device and start for each path."""
        count = args.number("number of paths", 1, MAX_PATHS)
        region = args.number("region size", 1, MAX_UINT) * SECTOR
        args.number("number of optional words", 0, 0)
        if len(args) != 2 * count:
            raise InvalidArgument(f"{count} paths need {2 * count} words of devices and starts, {len(args)} given")
        if spec.length > region * MAX_REGIONS:
            raise InvalidArgument(f"there would be {-(-spec.length // region)} regions, more than {MAX_REGIONS}")
        paths: list[Below] = []
        for number in range(count):
            device = await spec.open(args.word(f"device of path {number}"))
            start = args.start(f"start of path {number}")
            paths.append(Below(device, start, spec.length))
        return cls(spec, region, paths)

    def submit(self, io: Io, offset: int) -> Pending:
        """Sends each region's piece to its path, side by side."""
        number, inside = divmod(offset - self.begin, self._region)
        if inside + io.length <= self._region:
            return self._piece(io, number, inside)
        return submit_chunks(io, number, inside, self._region, self._piece)

    def _piece(self, io: Io, number: int, inside: int) -> Pending:
        device, start, _ = self._paths[self._map[number]]
        return device.submit(io, start + number * self._region + inside)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Those of the paths' devices, region by region."""
        found: list[Extent] = []
        inside, end = offset - self.begin, offset - self.begin + length
        while inside < end and len(found) < MAX_EXTENTS:
            device, start, _ = self._paths[self._map[inside // self._region]]
            piece = min(self._region - inside % self._region, end - inside)
            extents = await device.extents(start + inside, piece)
            found += extents
            inside += sum(size for size, _ in extents)
        return found

    def devices(self) -> list[Below]:
        """Every path."""
        return self._paths

    def table(self) -> str:
        """`<paths> <region> 0 (<major:minor> <start>)...`"""
        paths = "".join(f" {device.number} {start // SECTOR}" for device, start, _ in self._paths)
        return f"{len(self._paths)} {self._region // SECTOR} 0{paths}"

    async def message(self, args: Args) -> str:
        """`set_region_mappings [<region>]:<path>|R<n>,<m>...`, all numbers in hexadecimal. Without a region the one after
        the last is meant; R repeats the last n mappings in the next m regions. A mistake anywhere changes nothing."""
        word = args.word("message")
        if word.lower() != "set_region_mappings":
            raise InvalidArgument(f"unknown message {word!r}")
        steps: list[_Step] = []
        last = 0
        while args:
            step = self._step(args.word("mapping"), last)
            last = step.first + step.length - 1
            steps.append(step)
        for step in steps:
            pattern = self._map[step.first - step.cycle : step.first] if step.cycle else array(self._map.typecode, [step.path])
            repeated = pattern * -(-step.length // len(pattern))
            self._map[step.first : step.first + step.length] = repeated[: step.length]
        return ""

    def _step(self, word: str, last: int) -> _Step:
        """One word, when `last` is the region that the word before ended with (0 if there is none)."""
        if repeat := _REPEAT.fullmatch(word):
            cycle, count = (int(number, 16) for number in repeat.groups())
            if not 0 < cycle <= last + 1:
                raise InvalidArgument(f"{word}: {cycle} mappings cannot be repeated behind region {last}")
            if last + count >= self._count:
                raise InvalidArgument(f"{word}: region {last + count} is not there, there are {self._count}")
            return _Step(last + 1, count, cycle, 0)
        mapping = _MAPPING.fullmatch(word)
        if mapping is None:
            raise InvalidArgument(f"{word!r} is neither [<region>]:<path> nor R<n>,<m>")
        region = int(mapping[1], 16) if mapping[1] else last + 1
        path = int(mapping[2], 16)
        if region >= self._count:
            raise InvalidArgument(f"{word}: region {region} is not there, there are {self._count}")
        if path >= len(self._paths):
            raise InvalidArgument(f"{word}: path {path} is not there, there are {len(self._paths)}")
        return _Step(region, 1, 0, path)

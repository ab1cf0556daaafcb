"""dust: bad sectors at places of one's choice (Documentation device-mapper/dm-dust).

    0 8192 dust /dev/sda 0 4096

    dmsetup message dust1 0 addbadblock 60
    dmsetup message dust1 0 addbadblock 67 2
    dmsetup message dust1 0 enable

Once enabled, a read that touches a bad block fails with EIO. A write to one fails as often as was asked for (2 times for
block 67), then makes the block good, as a disk does that has sectors to spare. The list of a table is gone with the table.
As in the kernel, blocks are counted from the start of the *device*, also where the target starts further on.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, Final, Self

from nbdmap.block.device import Device, Extent, Limits
from nbdmap.block.io import CACHE, DISCARD, READ, Failed, Io, Pending, run_all
from nbdmap.dm.args import Args
from nbdmap.dm.target import Below, Spec, Target
from nbdmap.errors import InvalidArgument, IoFailed
from nbdmap.units import GIB, SECTOR

MAX_BLOCK: Final = GIB
MAX_FAILED_WRITES: Final = 255
MAX_BAD_BLOCKS: Final = 1 << 20
"""Of one target: what takes some 100 MiB."""

log = logging.getLogger(__name__)


class Dust(Target):
    """`dust <device> <start> <block size in bytes>`"""

    type_name = "dust"
    version = (1, 0, 0)

    def __init__(self, spec: Spec, device: Device, start: int, block: int) -> None:
        super().__init__(spec)
        self._device = device
        self._start = start
        self._shift = start - spec.begin
        self._block = block
        self._bad: dict[int, int] = {}  # the number of a bad block: how many writes of it will fail
        self._enabled = False
        self._quiet = False

    @classmethod
    async def construct(cls, spec: Spec, args: Args) -> Self:
        """A device, its first sector, and the size of a block."""
        reference = args.word("device")
        start = args.start()
        block = args.number("block size", SECTOR, MAX_BLOCK)
        args.end()
        if block & block - 1:
            raise InvalidArgument(f"block size: {block} is not a power of 2")
        if block > spec.length:
            raise InvalidArgument(f"block size: {block} is more than the target's length, {spec.length} bytes")
        return cls(spec, await spec.open(reference), start, block)

    # --- requests ------------------------------------------------------------------------------------------------------

    def submit(self, io: Io, offset: int) -> Pending:
        """Passes the request down, shifted, but for what is bad."""
        if self._bad and self._enabled:
            pieces = list(self._bad_pieces(io, offset))
            if pieces:
                return self._meet(io, offset, pieces)
        return self._device.submit(io, offset + self._shift)

    def _bad_pieces(self, io: Io, offset: int) -> Iterator[tuple[int, int, int]]:
        """(number of the block, start, end) of each piece of the request that the kernel would look up as a bad block.

        It cuts reads and writes at multiples of the block from the target's start, and looks at a piece's first sector.
        """
        relative, block = offset - self.begin, self._block
        first, base = (self._start + relative) // block, self._start // block
        if first in self._bad:
            yield first, 0, min(io.length, block - relative % block)
        if io.op is DISCARD:  # this is not cut
            return
        low, high = relative // block + 1, (relative + io.length - 1) // block
        numbers = range(base + low, base + high + 1)
        for number in numbers if len(numbers) <= len(self._bad) else sorted(self._bad):
            if number not in self._bad or number not in numbers:
                continue
            start = (number - base) * block - relative
            yield number, start, min(io.length, start + block)

    def _meet(self, io: Io, offset: int, pieces: list[tuple[int, int, int]]) -> Pending:
        if io.op is READ or io.op is CACHE:
            return Failed(self._failure(io, pieces[0][0]))
        failing = [piece for piece in pieces if self._write_fails(piece[0])]
        if not failing:
            return self._device.submit(io, offset + self._shift)
        if io.op is DISCARD:
            return Failed(self._failure(io, failing[0][0]))
        requests: list[Pending] = []
        done = 0
        for number, start, end in failing:
            if start > done:
                requests.append(self._device.submit(io.part(done, start - done), offset + self._shift + done))
            requests.append(Failed(self._failure(io, number)))
            done = end
        if done < io.length:
            requests.append(self._device.submit(io.part(done, io.length - done), offset + self._shift + done))
        return run_all(requests)

    def _write_fails(self, number: int) -> bool:
        if self._bad.get(number):
            self._bad[number] -= 1
            return True
        if self._bad.pop(number, None) is None:  # another piece of the request has made it good
            return False
        self._say("block %d removed from badblocklist by write", number)
        return False

    def _failure(self, io: Io, number: int) -> IoFailed:
        return IoFailed(f"{io.op.name.lower()} of bad block {number} of {self._device.name}")

    def _say(self, text: str, *values: int) -> None:
        if not self._quiet:
            log.info(text, *values)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Data: who knows of a hole does not read it, and would not meet a bad block in there."""
        return [(length, 0)]

    def devices(self) -> list[Below]:
        """The one range."""
        return [Below(self._device, self._start, self.length)]

    def limits(self) -> Limits:
        """What the device can. (The kernel offers no write-zeroes, and writes zeroes instead.)"""
        return replace(self._device.limits, sparse=False)

    # --- what is told and asked ----------------------------------------------------------------------------------------

    def table(self) -> str:
        """`<major:minor> <start> <block size>`"""
        return f"{self._device.number} {self._start // SECTOR} {self._block}"

    def status(self) -> str:
        """`<major:minor> <fail_read_on_bad_block or bypass> <quiet or verbose>`"""
        mode = "fail_read_on_bad_block" if self._enabled else "bypass"
        return f"{self._device.number} {mode} {'quiet' if self._quiet else 'verbose'}"

    async def message(self, args: Args) -> str:
        """One of MESSAGES."""
        word = args.word("message")
        if word.lower() not in self.MESSAGES:
            raise InvalidArgument(f"unknown message {word!r}")
        answer = self.MESSAGES[word.lower()](self, args)
        args.end()
        return answer

    def _number(self, args: Args) -> int:
        """The block of a message; that just behind the device's last is taken as well, as by the kernel."""
        return args.number("block", 0, self._device.size // self._block)

    def _add(self, args: Args) -> str:
        number = self._number(args)
        fails = args.number("number of failing writes", 0, MAX_FAILED_WRITES) if args else 0
        args.end()
        if number in self._bad:
            raise InvalidArgument(f"block {number} already in badblocklist")
        if len(self._bad) >= MAX_BAD_BLOCKS:
            raise InvalidArgument(f"there are {MAX_BAD_BLOCKS} bad blocks, no more are taken")
        self._bad[number] = fails
        self._say("badblock added at block %d with write fail count %d", number, fails)
        return ""

    def _remove(self, args: Args) -> str:
        number = self._number(args)
        args.end()
        if number not in self._bad:
            raise InvalidArgument(f"block {number} not found in badblocklist")
        del self._bad[number]
        self._say("badblock removed at block %d", number)
        return ""

    def _query(self, args: Args) -> str:
        number = self._number(args)
        return f"dust_query_block: block {number} {'found' if number in self._bad else 'not found'} in badblocklist"

    def _enable(self, args: Args) -> str:
        args.end()
        self._enabled = True
        return ""

    def _disable(self, args: Args) -> str:
        args.end()
        self._enabled = False
        return ""

    def _toggle_quiet(self, args: Args) -> str:
        args.end()
        self._quiet = not self._quiet
        return ""

    def _count(self, args: Args) -> str:
        return f"countbadblocks: {len(self._bad)} badblock(s) found"

    def _clear(self, args: Args) -> str:
        args.end()
        found = bool(self._bad)
        self._bad.clear()
        return f"dust_clear_badblocks: {'badblocks cleared' if found else 'no badblocks found'}"

    def _list(self, args: Args) -> str:
        return "".join(f"{number}\n" for number in sorted(self._bad)) or "No blocks in badblocklist"

    MESSAGES: ClassVar[Mapping[str, Callable[["Dust", Args], str]]] = {
        "addbadblock": _add,
        "removebadblock": _remove,
        "queryblock": _query,
        "enable": _enable,
        "disable": _disable,
        "quiet": _toggle_quiet,
        "countbadblocks": _count,
        "clearbadblocks": _clear,
        "listbadblocks": _list,
    }
    """Each `<name>`, or `<name> <block>`; addbadblock takes the number of writes that will fail, too."""

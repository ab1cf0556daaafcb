"""flakey: a linear mapping that misbehaves at times (Documentation device-mapper/flakey).

    0 8192 flakey /dev/sda 0 5 1
    0 8192 flakey /dev/sda 0 5 1 1 drop_writes
    0 8192 flakey /dev/sda 0 0 1 5 corrupt_bio_byte 32 r 1 0
    0 8192 flakey /dev/sda 0 5 1 4 random_read_corrupt 1000000 seed 7

From the moment the table is loaded it is well for the up interval, then misbehaves for the down interval, and so on, in
whole seconds of the loop's clock. What a request meets is settled when it arrives. A corrupted write goes down as a copy:
the caller's data stays as it is. `seed` is nbdmap's own: with it the random features do the same to the same requests.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Self

from nbdmap.block.device import Device, Extent, Limits
from nbdmap.block.io import CACHE, DONE, FLUSH, FUA, READ, WRITE, Failed, Io, Op, Pending
from nbdmap.dm.args import Args
from nbdmap.dm.target import Below, Spec, Target
from nbdmap.errors import InvalidArgument, IoFailed
from nbdmap.units import SECTOR

MAX_WORDS: Final = 13
"""Of features: the kernel's 11, and `seed`."""
MAX_UINT: Final = (1 << 32) - 1
CERTAIN: Final = 1_000_000_000
"""The probability of random_read_corrupt and random_write_corrupt that means always."""
OPF: Final = {READ: 0, WRITE: 1}
"""The operation in Linux 6.12's bi_opf, which the flags of corrupt_bio_byte are compared with."""
OPF_FUA: Final = 1 << 17


@dataclass(frozen=True, slots=True)
class CorruptByte:
    """`corrupt_bio_byte`: byte `nth` (from 1) of each request of `op` whose bi_opf has all `flags` becomes `value`."""

    nth: int
    op: Op
    value: int
    flags: int

    def strike(self, io: Io, data: memoryview | bytearray) -> None:
        """Corrupts `data`, the data of `io`, if it is meant."""
        opf = OPF[io.op] | (OPF_FUA if io.flags & FUA else 0)
        if io.op is self.op and self.nth <= io.length and opf & self.flags == self.flags:
            data[self.nth - 1] = self.value

    def words(self) -> str:
        """As in a table."""
        return f"corrupt_bio_byte {self.nth} {'w' if self.op is WRITE else 'r'} {self.value} {self.flags}"


@dataclass(slots=True)
class Features:
    """What it does while it is down; nothing at all becomes error_reads and error_writes."""

    error_reads: bool = False
    drop_writes: bool = False
    error_writes: bool = False
    corrupt: CorruptByte | None = None
    random_read: int = 0
    """The probability that one byte of a read becomes another, in CERTAIN."""
    random_write: int = 0
    seed: int | None = None

    @classmethod
    def parse(cls, args: Args) -> Self:
        """The words of the group. Raises InvalidArgument for what is unknown or in conflict, and for a switch that is given
        twice; of a feature with a value the last one counts."""
        found = cls()
        while args:
            word = args.word("feature")
            read = _FEATURES.get(word.lower())
            if read is None:
                raise InvalidArgument(f"unknown feature {word!r}")
            read(found, args)
        found._check()
        if not (found.drop_writes or found.error_writes or found.corrupt or found.random_read or found.random_write):
            found.error_writes = not found.error_reads
            found.error_reads = True
        return found

    def _switch(self, name: str) -> None:
        if getattr(self, name):
            raise InvalidArgument(f"{name} is given twice")
        setattr(self, name, True)

    def _read_corrupt(self, args: Args) -> None:
        nth = args.number("corrupt_bio_byte: number of the byte", 1, MAX_UINT)
        direction = args.word("corrupt_bio_byte: direction").lower()
        if direction not in ("r", "w"):
            raise InvalidArgument(f"corrupt_bio_byte: direction {direction!r} is not r or w")
        value = args.number("corrupt_bio_byte: value", 0, 255)
        flags = args.number("corrupt_bio_byte: flags", 0, MAX_UINT)
        self.corrupt = CorruptByte(nth, READ if direction == "r" else WRITE, value, flags)

    def _read_number(self, name: str, word: str, args: Args) -> None:
        setattr(self, name, args.number(word, 0, CERTAIN))

    def _read_seed(self, args: Args) -> None:
        self.seed = args.number("seed")

    def _check(self) -> None:
        if self.drop_writes and self.error_writes:
            raise InvalidArgument("drop_writes and error_writes are in conflict")
        if (self.drop_writes or self.error_writes) and self.corrupt and self.corrupt.op is WRITE:
            name = "drop_writes" if self.drop_writes else "error_writes"
            raise InvalidArgument(f"{name} and corrupt_bio_byte of writes are in conflict")

    def words(self) -> str:
        """As the kernel prints them: the number of words, then the features in an order of its own."""
        switches = [name for name in ("error_reads", "drop_writes", "error_writes") if getattr(self, name)]
        found = " ".join(switches + ([self.corrupt.words()] if self.corrupt else []))
        for word, value in (
            ("random_read_corrupt", self.random_read or None),
            ("random_write_corrupt", self.random_write or None),
            ("seed", self.seed),
        ):
            if value is not None:
                found += f" {word} {value}"
        return f"{len(found.split())} {found.strip()}"


_FEATURES: Final[dict[str, Callable[[Features, Args], None]]] = {
    "error_reads": lambda found, args: found._switch("error_reads"),
    "drop_writes": lambda found, args: found._switch("drop_writes"),
    "error_writes": lambda found, args: found._switch("error_writes"),
    "corrupt_bio_byte": Features._read_corrupt,
    "random_read_corrupt": lambda found, args: found._read_number("random_read", "random_read_corrupt", args),
    "random_write_corrupt": lambda found, args: found._read_number("random_write", "random_write_corrupt", args),
    "seed": Features._read_seed,
}


class Flakey(Target):
    """`flakey <device> <start> <up s> <down s> [<number of feature words> <feature>...]`"""

    type_name = "flakey"
    version = (1, 5, 0)
    takes_flush = True

    def __init__(self, spec: Spec, device: Device, start: int, up_s: int, down_s: int, features: Features) -> None:
        super().__init__(spec)
        self._device = device
        self._start = start
        self._shift = start - spec.begin
        self._up_s = up_s
        self._down_s = down_s
        self._period_s = up_s + down_s
        self._features = features
        self._clock = asyncio.get_running_loop().time
        self._loaded = self._clock()
        self._random = random.Random(features.seed)
        corrupts = features.corrupt.op if features.corrupt else None
        self._spoils_reads = bool(down_s and (features.error_reads or features.random_read or corrupts is READ))
        self._spoils_writes = bool(features.random_write or corrupts is WRITE)

    @classmethod
    async def construct(cls, spec: Spec, args: Args) -> Self:
        """A device and its first sector, two intervals in seconds, and the features."""
        reference = args.word("device")
        start = args.start()
        up_s = args.number("up interval", 0, MAX_UINT)
        down_s = args.number("down interval", 0, MAX_UINT)
        if not 0 < up_s + down_s <= MAX_UINT:
            raise InvalidArgument(f"up and down interval together, {up_s + down_s} s, are not in the range 1 to {MAX_UINT}")
        features = Features.parse(args.group("feature words", MAX_WORDS))
        return cls(spec, await spec.open(reference), start, up_s, down_s, features)

    def submit(self, io: Io, offset: int) -> Pending:
        """Passes the request down, shifted, unless it is down now."""
        if int(self._clock() - self._loaded) % self._period_s >= self._up_s:
            return self._submit_down(io, offset)
        return self._device.submit(io, 0 if io.op is FLUSH else offset + self._shift)

    def _submit_down(self, io: Io, offset: int) -> Pending:
        op, features = io.op, self._features
        below = 0 if op is FLUSH else offset + self._shift
        if op is READ or op is CACHE:
            if features.error_reads:
                return Failed(self._failure(io, offset))
            if op is READ and self._spoils_reads:
                return self._read(io, below)
        elif features.drop_writes:
            return DONE
        elif features.error_writes:
            return Failed(self._failure(io, offset))
        elif op is WRITE and self._spoils_writes:
            io = self._spoiled(io)
        return self._device.submit(io, below)

    def _failure(self, io: Io, offset: int) -> IoFailed:
        return IoFailed(f"{io.op.name.lower()} of {io.length} bytes at {offset}: the flakey target is down")

    async def _read(self, io: Io, offset: int) -> None:
        await self._device.submit(io.unplugged(), offset)
        if self._features.corrupt:
            self._features.corrupt.strike(io, io.data)
        self._strike_at_random(self._features.random_read, io.data)

    def _spoiled(self, io: Io) -> Io:
        """The write with what the features make of its data."""
        data = bytearray(io.data)
        if self._features.corrupt:
            self._features.corrupt.strike(io, data)
        self._strike_at_random(self._features.random_write, data)
        return Io(WRITE, io.length, memoryview(data), io.flags, io.plug)

    def _strike_at_random(self, probability: int, data: memoryview | bytearray) -> None:
        if probability and self._random.randrange(CERTAIN) < probability:
            data[self._random.randrange(len(data))] = self._random.randrange(256)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Those of the device. Holes are not told where reads are spoiled at times: who knows of one does not read it."""
        if self._spoils_reads:
            return [(length, 0)]
        return await self._device.extents(offset + self._shift, length)

    def devices(self) -> list[Below]:
        """The one range."""
        return [Below(self._device, self._start, self.length)]

    def limits(self) -> Limits:
        """What the device can. (The kernel offers no write-zeroes, and writes zeroes instead, which it does not corrupt.)"""
        below = self._device.limits
        return replace(below, sparse=below.sparse and not self._spoils_reads)

    def table(self) -> str:
        """`<major:minor> <start> <up> <down> <number of words> <features>`"""
        return f"{self._device.number} {self._start // SECTOR} {self._up_s} {self._down_s} {self._features.words()}"

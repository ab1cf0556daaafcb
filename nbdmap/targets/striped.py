"""striped: chunks dealt out in turn to several devices, RAID-0 (Documentation device-mapper/striped).

    0 73728 striped 2 256 /dev/sda 0 /dev/sdb 0

Chunk k of the target is chunk k // n of stripe k % n. The chunk may be of any size; the target's length must be a
multiple of the stripes, and each stripe's share a multiple of the chunk. Reads and writes are cut at chunk borders;
a discard or write-zeroes goes to every stripe once, with that stripe's contiguous share of the range.
"""

from dataclasses import replace
from typing import Self

from nbdmap.block.device import Device, Extent, Limits
from nbdmap.block.io import DISCARD, DONE, WRITE_ZEROES, Io, Pending, run_all
from nbdmap.dm.args import Args
from nbdmap.dm.target import Below, Spec, Target, merge_limits, submit_chunks
from nbdmap.errors import InvalidArgument, NbdmapError, Unsupported
from nbdmap.units import SECTOR

MAX_EVENTS = 15
"""A stripe raises an event for its first errors only."""
MAX_CHUNKS = 1 << 16
"""One answer to block status looks at no more chunks than this."""


class Stripe:
    """One device of the set: where its share starts, in bytes, and how many requests have failed on it."""

    __slots__ = ("device", "errors", "start")

    def __init__(self, device: Device, start: int) -> None:
        self.device = device
        self.start = start
        self.errors = 0


class Striped(Target):
    """`striped <stripes> <chunk sectors> (<device> <start>)...`"""

    type_name = "striped"
    version = (1, 6, 0)

    def __init__(self, spec: Spec, chunk: int, stripes: list[Stripe]) -> None:
        super().__init__(spec)
        self._chunk = chunk
        self._stripes = stripes
        self._raise_event = spec.raise_event

    @classmethod
    async def construct(cls, spec: Spec, args: Args) -> Self:
        """The number of stripes, the chunk in sectors, then a device and start for each stripe."""
        count = args.number("number of stripes", 1, (1 << 32) - 1)
        chunk = args.number("chunk size", 1, (1 << 32) - 1) * SECTOR
        if spec.length % (count * SECTOR):
            raise InvalidArgument(f"length {spec.length // SECTOR} is not a multiple of the {count} stripes")
        if spec.length // count % chunk:
            raise InvalidArgument(
                f"a stripe's share, {spec.length // count // SECTOR} sectors, is not a multiple of the chunk, {chunk // SECTOR}"
            )
        if len(args) != 2 * count:
            raise InvalidArgument(f"{count} stripes need {2 * count} words of devices and starts, {len(args)} given")
        stripes: list[Stripe] = []
        for number in range(count):
            device = await spec.open(args.word(f"device of stripe {number}"))
            start = args.start(f"start of stripe {number}")
            stripes.append(Stripe(device, start))
        return cls(spec, chunk, stripes)

    def submit(self, io: Io, offset: int) -> Pending:
        """Sends each chunk's piece to its stripe, side by side."""
        if io.op is DISCARD or io.op is WRITE_ZEROES:
            return run_all(self._shares(io, offset))
        place, inside = divmod(offset - self.begin, self._chunk)
        if inside + io.length <= self._chunk:
            return self._piece(io, place, inside)
        return submit_chunks(io, place, inside, self._chunk, self._piece)

    def _piece(self, io: Io, place: int, inside: int) -> Pending:
        row, number = divmod(place, len(self._stripes))
        return self._send(self._stripes[number], io, row * self._chunk + inside)

    def _send(self, stripe: Stripe, io: Io, at: int) -> Pending:
        """Sends a request to byte `at` of a stripe's share."""
        pending = stripe.device.submit(io, stripe.start + at)
        return pending if pending is DONE else self._watch(stripe, pending)

    async def _watch(self, stripe: Stripe, pending: Pending) -> None:
        try:
            await pending
        except NbdmapError as error:
            self._failed(stripe, error)
            raise

    def _failed(self, stripe: Stripe, error: NbdmapError) -> None:
        """Counts an error on every stripe of the same device; what is merely unsupported is none."""
        if isinstance(error, Unsupported):
            return
        for other in self._stripes:
            if other.device is stripe.device:
                other.errors += 1
                if other.errors < MAX_EVENTS:
                    self._raise_event()

    def _share(self, number: int, begin: int, end: int) -> tuple[int, int]:
        """The bytes begin..end of the target as a range of stripe `number`; empty if it has no part in it."""
        return self._map_edge(number, begin), self._map_edge(number, end)

    def _map_edge(self, number: int, edge: int) -> int:
        """Where the first byte at or after `edge` that lies on stripe `number` is in that stripe's share."""
        place, inside = divmod(edge, self._chunk)
        row, owner = divmod(place, len(self._stripes))
        if owner == number:
            return row * self._chunk + inside
        return (row + (number < owner)) * self._chunk

    def _shares(self, io: Io, offset: int) -> list[Pending]:
        requests: list[Pending] = []
        for number, stripe in enumerate(self._stripes):
            begin, end = self._share(number, offset - self.begin, offset - self.begin + io.length)
            if begin < end:
                requests.append(self._send(stripe, Io(io.op, end - begin, flags=io.flags), begin))
        return requests

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """One question to each stripe, dealt back into the order of the chunks."""
        begin = offset - self.begin
        runs: list[_Runs] = []
        for number, stripe in enumerate(self._stripes):
            low, high = self._share(number, begin, begin + length)
            found = await stripe.device.extents(stripe.start + low, high - low) if low < high else []
            runs.append(_Runs(low, high, found))
        kinds = {flags for run in runs for _, flags in run.extents}
        if len(kinds) == 1 and all(run.covered for run in runs):
            return [(length, kinds.pop())]
        merged: list[Extent] = []
        at = begin
        for _ in range(MAX_CHUNKS):
            if at == begin + length:
                break
            place, inside = divmod(at, self._chunk)
            row, number = divmod(place, len(self._stripes))
            piece = min(self._chunk - inside, begin + length - at)
            known = runs[number].at(row * self._chunk + inside, piece)
            if known is None:
                break
            if merged and merged[-1][1] == known[1]:
                merged[-1] = (merged[-1][0] + known[0], known[1])
            else:
                merged.append(known)
            at += known[0]
        return merged

    def devices(self) -> list[Below]:
        """Every stripe's share."""
        share = self.length // len(self._stripes)
        return [Below(stripe.device, stripe.start, share) for stripe in self._stripes]

    def limits(self) -> Limits:
        """What all devices can; the preferred sizes are a chunk and a row of chunks."""
        below = merge_limits([stripe.device.limits for stripe in self._stripes])
        return replace(below, io_min=self._chunk, io_opt=self._chunk * len(self._stripes))

    def table(self) -> str:
        """`<stripes> <chunk> (<major:minor> <start>)...`"""
        legs = "".join(f" {stripe.device.number} {stripe.start // SECTOR}" for stripe in self._stripes)
        return f"{len(self._stripes)} {self._chunk // SECTOR}{legs}"

    def status(self) -> str:
        """`<stripes> <major:minor>... 1 <A or D for each>`; D after an error."""
        numbers = " ".join(stripe.device.number for stripe in self._stripes)
        health = "".join("D" if stripe.errors else "A" for stripe in self._stripes)
        return f"{len(self._stripes)} {numbers} 1 {health}"


class _Runs:
    """The extents of one stripe's share low..high, read from left to right."""

    def __init__(self, low: int, high: int, extents: list[Extent]) -> None:
        self.extents = extents
        self.covered = low + sum(length for length, _ in extents) >= high
        self._next = 0
        self._end = low

    def at(self, position: int, most: int) -> Extent | None:
        """The extent from `position` on, at most `most` long; None where the stripe's answer ended before it."""
        while self._end <= position:
            if self._next == len(self.extents):
                return None
            self._end += self.extents[self._next][0]
            self._next += 1
        return min(most, self._end - position), self.extents[self._next - 1][1]

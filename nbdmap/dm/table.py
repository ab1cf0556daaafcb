"""A table: the targets of a mapped device, one after another without a gap.

    0 10240 linear /dev/sda 0
    10240 4096 striped 2 8 /dev/sdb 0 /dev/sdc 0

Invariants: the first target starts at 0, each starts where the one before ends, and every device below is long enough
and aligned. A request is cut at target borders and its pieces run side by side; a flush goes once to every distinct
device below, or to the targets that take flushes themselves; discard and write-zeroes are offered only when every target
and device can. Rules and errnos are those of the kernel's dm-table.c.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from nbdmap.block.device import Device, Extent, Limits
from nbdmap.block.io import DISCARD, FLUSH, WRITE_ZEROES, Failed, Io, Pending, run_all, to_the_end
from nbdmap.dm.args import Args, parse_number, split_words
from nbdmap.dm.target import Opened, Opener, Owner, RaiseEvent, Spec, Target, merge_limits
from nbdmap.errors import InvalidArgument, IoFailed, NbdmapError, Unsupported
from nbdmap.units import MAX_SIZE, SECTOR, round_up

MAX_TARGETS = 1 << 20
MAX_EXTENTS = 4096
"""The most extents that one answer to block status carries."""


class TableLine(NamedTuple):
    """One line, parsed: where it stands in the text (from 1), its range in sectors, its target and the rest."""

    number: int
    start_sectors: int
    length_sectors: int
    type_name: str
    params: str


class TargetLine(NamedTuple):
    """A target's table or status line."""

    start_sectors: int
    length_sectors: int
    type_name: str
    params: str


def parse_table(text: str) -> list[TableLine]:
    """The lines of a table; blank lines and lines that start with # are skipped. Raises InvalidArgument.

    >>> parse_table("0 8 linear 7:0 16")
    [TableLine(number=1, start_sectors=0, length_sectors=8, type_name='linear', params='7:0 16')]
    """
    lines: list[TableLine] = []
    for number, raw in enumerate(text.split("\n"), 1):
        stripped = raw.strip()
        if not stripped or stripped.startswith("#"):
            continue
        words = stripped.split(None, 3)
        try:
            if len(words) < 3:
                raise InvalidArgument(f"{stripped!r} is not '<start> <length> <target> [<arguments>]'")
            start = parse_number(words[0], "start", 0, MAX_SIZE // SECTOR)
            length = parse_number(words[1], "length", 1, MAX_SIZE // SECTOR)
        except InvalidArgument as error:
            raise InvalidArgument(f"line {number}: {error.message}") from None
        lines.append(TableLine(number, start, length, words[2], words[3] if len(words) > 3 else ""))
    return lines


def check_layout(lines: Sequence[TableLine]) -> None:
    """Raises InvalidArgument unless the lines follow one another from 0 on without a gap."""
    if not lines:
        raise InvalidArgument("the table has no targets")
    if len(lines) > MAX_TARGETS:
        raise InvalidArgument(f"{len(lines)} targets are more than {MAX_TARGETS}")
    expected = 0
    for line in lines:
        if line.start_sectors != expected:
            kind = "overlaps the line before" if line.start_sectors < expected else "leaves a gap"
            raise InvalidArgument(f"line {line.number}: start {line.start_sectors} {kind}, {expected} was expected")
        expected += line.length_sectors
    if expected > MAX_SIZE // SECTOR:
        raise InvalidArgument(f"line {lines[-1].number}: the device would have {expected} sectors, too many")


class Table:
    """Targets that are built and checked. Made by `build`; ended by `close`, which gives the devices back."""

    def __init__(self, targets: list[Target], opened: Opened) -> None:
        self.targets = targets
        self.read_only = opened.read_only
        self.size = targets[-1].end
        self.limits: Limits = merge_limits([target.limits() for target in targets])
        self.in_flight = 0
        self.devices = _distinct(targets)
        """The distinct devices below, in the order of the table."""
        self.flushed = _distinct(target for target in targets if target.flushed)
        """Those that a flush must reach, and that a suspend flushes."""
        self._flush_directly = _distinct(target for target in targets if target.flushed and not target.takes_flush)
        self._flush_through = [target for target in targets if target.takes_flush]
        self._only = targets[0] if len(targets) == 1 else None
        self._opened = opened
        self._starts = [target.begin for target in targets]

    @classmethod
    async def build(
        cls,
        lines: Sequence[TableLine],
        types: Mapping[str, type[Target]],
        opener: Opener,
        read_only: bool,
        raise_event: RaiseEvent,
        owner: Owner | None = None,
    ) -> "Table":
        """Constructs every target of `lines`; `raise_event` is what they call for a table event, `owner` whom it is for.

        On any failure everything opened is given back and the error, which names line, target and word, is raised.
        """
        check_layout(lines)
        targets: list[Target] = []
        opened = Opened(opener, read_only)
        try:
            for line in lines:
                kind = types.get(line.type_name)
                if kind is None:
                    raise InvalidArgument(f"line {line.number}: unknown target type {line.type_name!r}")
                if kind.singleton and (len(lines) > 1 or (read_only and not kind.read_only_too)):
                    wrong = "must be the only target of a table" if len(lines) > 1 else "needs a table that is not read-only"
                    raise InvalidArgument(f"line {line.number}: {line.type_name} {wrong}")
                begin, length = line.start_sectors * SECTOR, line.length_sectors * SECTOR
                spec = Spec(begin, length, opened, raise_event, owner)
                try:
                    targets.append(await kind.construct(spec, Args(split_words(line.params))))
                except NbdmapError as error:
                    error.message = f"line {line.number}: {line.type_name}: {error.message}"
                    error.args = (error.message,)
                    raise
            table = cls(targets, opened)
            table.check(lines)
            return table
        except BaseException as error:
            failure = error  # compiled code must not wait within an except clause, see setup.py
        await to_the_end(_release(targets, opened))
        raise failure

    def check(self, lines: Sequence[TableLine] | None = None) -> None:
        """Checks sizes and alignment against the devices below, whose sizes may have changed since it was built."""
        for number, target in enumerate(self.targets):
            where = f"line {lines[number].number}: {target.type_name}" if lines else target.type_name
            block = target.limits().logical_block
            for device, start, length in target.devices():
                if device.size and start + length > device.size:
                    raise InvalidArgument(
                        f"{where}: sectors {start // SECTOR} to {(start + length) // SECTOR} are beyond the end of "
                        f"{device.name} ({device.number}), which has {device.size // SECTOR}"
                    )
                for name, value in (("start", start), ("length", length)):
                    if value % block:
                        raise InvalidArgument(
                            f"{where}: {name} {value // SECTOR} on {device.name} ({device.number}) is not a multiple of "
                            f"its logical block, {block // SECTOR} sectors"
                        )
        self._check_borders(lines)

    def _check_borders(self, lines: Sequence[TableLine] | None) -> None:
        """A request of the largest logical block must be cut into pieces that every target can take."""
        block = self.limits.logical_block
        for number, target in enumerate(self.targets):
            where = f"line {lines[number].number}: {target.type_name}" if lines else target.type_name
            piece = round_up(target.begin, block) - target.begin
            if piece < target.length and piece % target.limits().logical_block:
                raise InvalidArgument(
                    f"{where}: start {target.begin // SECTOR} cuts a logical block of {block // SECTOR} sectors into "
                    f"pieces that its device cannot take"
                )
        if self.size % block:
            raise InvalidArgument(
                f"the device would have {self.size // SECTOR} sectors, not a multiple of the logical block, {block // SECTOR}"
            )

    def submit(self, io: Io, offset: int) -> Pending:
        """Does `io` at byte `offset` of the table. Fails with EIO beyond its end, with Unsupported where it cannot."""
        op = io.op
        if op is FLUSH:
            return self._flush(io)
        if (op is DISCARD and not self.limits.discard) or (op is WRITE_ZEROES and not self.limits.zero):
            return Failed(Unsupported(f"{op.name.lower()} is not supported by every device below"))
        end = offset + io.length
        if end > self.size:
            return Failed(IoFailed(f"bytes {offset} to {end} are beyond the end of the table, {self.size}"))
        target = self._only or self._target_at(offset)
        if end <= target.end:
            return target.submit(io, offset)
        return run_all(self._pieces(io, offset))

    def _target_at(self, offset: int) -> Target:
        return self.targets[bisect_right(self._starts, offset) - 1]

    def _pieces(self, io: Io, offset: int) -> list[Pending]:
        pieces: list[Pending] = []
        done = 0
        while done < io.length:
            target = self._target_at(offset + done)
            length = min(io.length - done, target.end - offset - done)
            pieces.append(target.submit(io.part(done, length), offset + done))
            done += length
        return pieces

    def _flush(self, io: Io) -> Pending:
        devices, targets = self._flush_directly, self._flush_through
        if len(devices) == 1 and not targets:
            return devices[0].submit(io, 0)
        if self._only is not None and targets:
            return self._only.submit(io, 0)
        flushes = [device.submit(io, 0) for device in devices]
        return run_all(flushes + [target.submit(io, target.begin) for target in targets])

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """As Device.extents: neighbours of one kind are merged, at most MAX_EXTENTS are returned."""
        if offset + length > self.size:
            raise IoFailed(f"bytes {offset} to {offset + length} are beyond the end of the table, {self.size}")
        found: list[Extent] = []
        end = offset + length
        while offset < end and len(found) < MAX_EXTENTS:
            target = self._target_at(offset)
            for size, flags in await target.extents(offset, min(end, target.end) - offset):
                offset += size
                if found and found[-1][1] == flags:
                    found[-1] = (found[-1][0] + size, flags)
                else:
                    found.append((size, flags))
        return found[:MAX_EXTENTS]

    def table_lines(self) -> list[TargetLine]:
        """What was loaded, as the kernel prints it."""
        return [TargetLine(t.begin // SECTOR, t.length // SECTOR, t.type_name, t.table()) for t in self.targets]

    def status_lines(self) -> list[TargetLine]:
        """How each target is doing."""
        return [TargetLine(t.begin // SECTOR, t.length // SECTOR, t.type_name, t.status()) for t in self.targets]

    def target_at_sector(self, sector: int) -> Target:
        """The target that a message to `sector` goes to. Raises InvalidArgument beyond the end."""
        if sector * SECTOR >= self.size:
            raise InvalidArgument(f"sector {sector} is beyond the end of the device, {self.size // SECTOR} sectors")
        return self._target_at(sector * SECTOR)

    async def close(self) -> None:
        """Ends the targets and gives the devices back."""
        await to_the_end(_release(self.targets, self._opened))


def _distinct(targets: Iterable[Target]) -> list[Device]:
    return list({id(below.device): below.device for target in targets for below in target.devices()}.values())


async def _release(targets: list[Target], opened: Opened) -> None:
    for target in reversed(targets):
        await target.close()
    await opened.release()

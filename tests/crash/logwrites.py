"""The write log of one disk in dm-log-writes' format, for `replay-log` of josefbacik/log-writes and xfstests.

The records are those of the log-writes target, in sectors of 512 bytes. As the kernel's target does it, a plain write enters
the log when a flush that came after its end has ended, or else at the end; FUA writes and marks enter it at once.
"""

from collections.abc import Iterator

from nbdmap.errors import CorruptMetadata
from nbdmap.targets.log_writes import END, MAGIC, VERSION, Flag, Head, Logged, Superblock
from nbdmap.units import SECTOR
from tests.crash.log import Entry, WriteLog


def entries_of(log: WriteLog, disk: int) -> Iterator[Logged]:
    """What dm-log-writes would have logged of one disk, but for this: a FUA write takes with it the earlier plain writes
    that it overlaps, which the kernel logs behind it, so that its log ends with another disk than there was. What a flush of a
    range covers enters the log as FUA writes."""
    ends = [(entry.completed, entry) for entry in log.entries if entry.disk == disk and entry.completed and not entry.failed]
    events: list[tuple[int, Entry | str]] = [*ends, *log.marks]
    unflushed: list[Entry] = []
    for _, what in sorted(events, key=lambda one: one[0]):
        if isinstance(what, str):
            yield Logged(0, 0, Flag.MARK, what.encode())
        elif what.kind == "flush" and what.length:
            taken = _overlapped([entry for entry in unflushed if (entry.completed or 0) < what.submitted], what)
            yield from (_write(entry, fua=True) for entry in unflushed if entry in taken)
            unflushed = [entry for entry in unflushed if entry not in taken]
        elif what.kind == "flush":
            covered = [entry for entry in unflushed if (entry.completed or 0) < what.submitted]
            yield from map(_write, covered)
            unflushed = unflushed[len(covered) :]
            yield Logged(0, 0, Flag.FLUSH)
        elif what.fua:
            taken = _overlapped(unflushed, what)
            yield from (_write(entry) for entry in unflushed if entry in taken)
            unflushed = [entry for entry in unflushed if entry not in taken]
            yield _write(what)
        else:
            unflushed.append(what)
    yield from map(_write, unflushed)
    yield Logged(0, 0, Flag.MARK, END.encode())


def _overlapped(unflushed: list[Entry], by: Entry) -> set[Entry]:
    """Those that must stand before `by` in the log: what it overlaps, and what that overlaps in its turn."""
    taken: set[Entry] = set()
    covered = set(by.sectors)
    for entry in reversed(unflushed):
        if not covered.isdisjoint(entry.sectors):
            taken.add(entry)
            covered.update(entry.sectors)
    return taken


def _write(entry: Entry, *, fua: bool = False) -> Logged:
    flags = (Flag.FUA if fua or entry.fua else Flag(0)) | (Flag.DISCARD if entry.kind == "discard" else Flag(0))
    data = entry.data if entry.kind == "write" else bytes(entry.length if entry.kind == "zero" else 0)
    return Logged(entry.offset // SECTOR, entry.length // SECTOR, flags, data)


def dump(log: WriteLog, disk: int) -> bytes:
    """The log device of one disk."""
    entries = list(entries_of(log, disk))
    head = Superblock(MAGIC, VERSION, len(entries), SECTOR).pack().ljust(SECTOR, b"\0")
    return head + b"".join(entry.encode() for entry in entries)


def load(raw: bytes) -> list[Logged]:
    """The entries of a log device. Raises CorruptMetadata."""
    superblock = Superblock.unpack(raw)
    size = superblock.sector_size
    if (superblock.magic, superblock.version) != (MAGIC, VERSION) or size < Head.layout.size or size % SECTOR:
        raise CorruptMetadata(f"{superblock} is not dm-log-writes'")
    found: list[Logged] = []
    at = size
    for number in range(superblock.entries):
        if at + size > len(raw):
            raise CorruptMetadata(f"entry {number} of {superblock.entries} is beyond the end")
        head = Head.unpack(raw, at)
        flags = Flag(head.flags)
        inside = at + Head.layout.size
        at += size
        if flags & Flag.MARK:
            data = raw[inside : inside + head.data_length]
        else:
            data = b"" if flags & Flag.DISCARD else raw[at : at + head.sectors * size]
            at += len(data)
        found.append(Logged(head.sector, head.sectors, flags, data))
    return found


def replay(entries: list[Logged], image: bytearray) -> None:
    """Does to a disk what the entries say; discards are zeroes."""
    for entry in entries:
        if not entry.flags & Flag.MARK:
            data = entry.data or bytes(entry.sectors * SECTOR)
            image[entry.sector * SECTOR : entry.sector * SECTOR + len(data)] = data

"""The write log of one disk in dm-log-writes' format, for `replay-log` of josefbacik/log-writes and xfstests.

Little-endian, in sectors of 512 bytes: a superblock {u64 magic, u64 version, u64 entries, u32 sector size}, then for each
entry a sector {u64 sector, u64 sectors, u64 flags, u64 data length} and its data; a discard has none, a mark's text stands in
the rest of its own sector. As the kernel's target does it, a plain write enters the log when a flush that came after its end
has ended, or else at the end; FUA writes and marks enter it at once.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntFlag
from typing import Final

from nbdmap.errors import CorruptMetadata
from nbdmap.units import SECTOR
from tests.crash.log import Entry, WriteLog

MAGIC: Final = 0x6A736677736872
VERSION: Final = 1
END: Final = "dm-log-writes-end"

_SUPER: Final = struct.Struct("<QQQI")
_ENTRY: Final = struct.Struct("<QQQQ")


class Flag(IntFlag):
    """What an entry is."""

    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8
    METADATA = 16


@dataclass(frozen=True, slots=True)
class Logged:
    """An entry as it stands in the log; `data` is a write's, or a mark's text."""

    sector: int
    sectors: int
    flags: Flag
    data: bytes = b""

    def encode(self) -> bytes:
        """Its sectors."""
        mark = bool(self.flags & Flag.MARK)
        head = _ENTRY.pack(self.sector, self.sectors, self.flags, len(self.data) if mark else 0)
        if mark:
            return (head + self.data[: SECTOR - len(head) - 1]).ljust(SECTOR, b"\0")
        return head.ljust(SECTOR, b"\0") + self.data


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
    head = _SUPER.pack(MAGIC, VERSION, len(entries), SECTOR).ljust(SECTOR, b"\0")
    return head + b"".join(entry.encode() for entry in entries)


def load(raw: bytes) -> list[Logged]:
    """The entries of a log device. Raises CorruptMetadata."""
    magic, version, count, size = _SUPER.unpack_from(raw)
    if (magic, version) != (MAGIC, VERSION) or size < _ENTRY.size or size % SECTOR:
        raise CorruptMetadata(f"superblock: magic {magic:#x}, version {version}, sectors of {size} are not dm-log-writes'")
    found: list[Logged] = []
    at = size
    for number in range(count):
        if at + size > len(raw):
            raise CorruptMetadata(f"entry {number} of {count} is beyond the end")
        sector, sectors, bits, length = _ENTRY.unpack_from(raw, at)
        flags = Flag(bits)
        inside = at + _ENTRY.size
        at += size
        if flags & Flag.MARK:
            data = raw[inside : inside + length]
        else:
            data = b"" if flags & Flag.DISCARD else raw[at : at + sectors * size]
            at += len(data)
        found.append(Logged(sector, sectors, flags, data))
    return found


def replay(entries: list[Logged], image: bytearray) -> None:
    """Does to a disk what the entries say; discards are zeroes."""
    for entry in entries:
        if not entry.flags & Flag.MARK:
            data = entry.data or bytes(entry.sectors * SECTOR)
            image[entry.sector * SECTOR : entry.sector * SECTOR + len(data)] = data

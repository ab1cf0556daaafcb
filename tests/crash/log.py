"""The write log: what every disk of a stack was asked, when, and what was promised to the client meanwhile.

One log for all disks of a stack, as a power cut hits all at once. Its clock counts *events*: the submission and the end of
every disk request, and every mark (a client's request sent or answered). A moment is a number of events; a power cut at
moment k happens after the k-th.
"""

from dataclasses import dataclass, field
from typing import Final

from nbdmap.units import SECTOR

ALL: Final = -1
"""A mask of sectors: all of them."""


@dataclass(slots=True, eq=False)
class Entry:
    """One request to one disk. `kind` is write, zero, discard or flush; `data` is a write's payload. A flush with a length is
    one of that range only, as msync does.

    `completed` is the moment it ended, None while it is in flight; a write that ended with an error holds what of it was
    done. `lost` is the moment at which a failed sync forgot it: no later flush makes it durable.
    """

    number: int
    disk: int
    kind: str
    offset: int
    length: int
    data: bytes
    fua: bool
    submitted: int
    completed: int | None = None
    failed: bool = False
    lost: int | None = None

    @property
    def sectors(self) -> range:
        """The sectors of its disk that it touches."""
        return range(self.offset // SECTOR, (self.offset + self.length) // SECTOR)


@dataclass(slots=True)
class WriteLog:
    """All entries in the order they were submitted, and the marks: (moment, text)."""

    entries: list[Entry] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)
    now: int = 0

    def tick(self) -> int:
        """The next moment."""
        self.now += 1
        return self.now

    def mark(self, text: str) -> int:
        """Notes what the client was told or asked for; the moment of it."""
        moment = self.tick()
        self.marks.append((moment, text))
        return moment

    def submit(self, disk: int, kind: str, offset: int, length: int, data: bytes = b"", *, fua: bool = False) -> Entry:
        """A request has reached a disk."""
        entry = Entry(len(self.entries), disk, kind, offset, length, data, fua, self.tick())
        self.entries.append(entry)
        return entry

    def complete(self, entry: Entry, done: int | None = None) -> None:
        """A request was done, or `done` bytes of it, and what it wrote is seen by reads."""
        entry.completed = self.tick()
        if done is not None:
            entry.length = done
            entry.data = entry.data[:done]

    def fail(self, entry: Entry, done: int = 0, *, forget: bool = False) -> None:
        """A request ended with an error after `done` bytes. `forget`: as a failed fsync does, which marks dirty pages
        clean, so that what was not durable by then (in the range of the flush, if it has one) may never be."""
        entry.completed = self.tick()
        entry.failed = True
        flush_range = set(entry.sectors) if entry.kind == "flush" else set()
        entry.length = done
        entry.data = entry.data[:done]
        if forget:
            for other in self.entries:
                touched = not flush_range or not flush_range.isdisjoint(other.sectors)
                if other.disk == entry.disk and other.kind != "flush" and other.lost is None and touched:
                    other.lost = entry.completed

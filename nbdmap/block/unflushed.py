"""The record of what a remote server acknowledged but may still lose: writes since the last flush, kept to be sent again.

Linux's NFS client does the same: a server that restarts may forget everything it has not been told to commit. Entries are
in the order of their acknowledgement. Invariant: an entry leaves the record only when a flush that began after its
acknowledgement has succeeded. A write that was durable at once (FUA) is recorded too when an older entry could undo it.
"""

from collections import deque
from collections.abc import Iterator
from typing import Final

from nbdmap.nbd.constants import CMD_FLAG_FUA, Cmd
from nbdmap.nbd.replies import Request, cover

ENTRY_OVERHEAD: Final = 256
"""What an entry costs beside its data, so that a million small trims have a limit too."""
MAX_BATCH: Final = 64
"""The most requests that are sent again side by side."""


class Unflushed:
    """`size` is the memory the record takes. With `keep` False it only knows whether there is something to lose."""

    def __init__(self, keep: bool) -> None:
        self.size = 0
        self._keep = keep
        self._entries: deque[tuple[int, Request]] = deque()
        self._noted = 0
        self._flushed = 0

    @property
    def dirty(self) -> bool:
        """Whether a server that forgets would lose something that it acknowledged."""
        return self._noted > self._flushed

    @property
    def whole(self) -> bool:
        """Whether all of that can be sent again."""
        return len(self._entries) == self._noted - self._flushed

    def keep(self, keep: bool) -> None:
        """Whether what is recorded from now on is kept. When it is not, what was kept is forgotten."""
        self._keep = keep
        if not keep:
            self._entries.clear()
            self.size = 0

    def note(self, request: Request) -> None:
        """Records an acknowledged WRITE, TRIM or WRITE_ZEROES; copies its data."""
        if request.flags & CMD_FLAG_FUA and not self.dirty:
            return
        self._noted += 1
        if self._keep:
            data = memoryview(bytes(request.data))
            copy = Request(request.command, request.offset, request.length, data, request.flags)
            self._entries.append((self._noted, copy))
            self.size += len(data) + ENTRY_OVERHEAD

    def mark(self) -> int:
        """To be taken before a flush is sent, and given to `flushed` when it has succeeded."""
        return self._noted

    def flushed(self, mark: int) -> None:
        """Forgets what was recorded before `mark` was taken."""
        self._flushed = max(self._flushed, mark)
        while self._entries and self._entries[0][0] <= mark:
            self.size -= len(self._entries.popleft()[1].data) + ENTRY_OVERHEAD

    def batches(self) -> Iterator[list[Request]]:
        """All entries in order, in groups within which none touches another, so that a group may be sent at once."""
        batch: list[Request] = []
        bounds: list[int] = []
        for _, entry in list(self._entries):
            end = entry.offset + entry.length
            if len(batch) == MAX_BATCH or not cover(bounds, entry.offset, end):
                yield batch
                batch, bounds = [], [entry.offset, end]
            batch.append(entry)
        if batch:
            yield batch


WRITES: Final = frozenset({Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES})
"""The commands that change the disk."""

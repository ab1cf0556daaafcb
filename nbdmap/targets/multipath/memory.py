"""What was written by paths to servers and not flushed yet, kept for the case that the storage behind all of them restarts.

As long as one path holds, the storage is there, and so is what it acknowledged. When every path has been lost since the last
flush it may have restarted and forgotten; then all is written again, in the order of the acknowledgements, by the first path
that is back, before any other request. If it has not forgotten, that changes nothing.
"""

from collections.abc import Sequence
from typing import Final

from nbdmap.block.io import DISCARD, FLUSH, WRITE, WRITE_ZEROES, Io, Op, run_all
from nbdmap.block.unflushed import Unflushed
from nbdmap.nbd.constants import Cmd
from nbdmap.nbd.replies import Request
from nbdmap.targets.multipath.paths import Path
from nbdmap.units import MIB

MAX_SIZE: Final = 64 * MIB
"""Beyond it the storage is told to flush."""
_COMMANDS: Final = {WRITE: Cmd.WRITE, DISCARD: Cmd.TRIM, WRITE_ZEROES: Cmd.WRITE_ZEROES}
_OPS: Final[dict[int, Op]] = {command: op for op, command in _COMMANDS.items()}


class Memory:
    """The record of one target; without `keep` it records nothing."""

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.at_risk = False
        """Whether all must be written again."""
        self.forgotten = False
        """Whether something could not be: the next flush says so."""
        self._unflushed = Unflushed(keep)

    @property
    def full(self) -> bool:
        """Whether it is time for a flush."""
        return self._unflushed.size > MAX_SIZE

    def mark(self) -> int:
        """To be taken before a request is sent, and given to `done`."""
        return self._unflushed.mark()

    def done(self, io: Io, offset: int, mark: int, paths: Sequence[Path]) -> None:
        """A request was acknowledged."""
        command = _COMMANDS.get(io.op)
        if command is not None:
            self._unflushed.note(Request(command, offset, io.length, io.data, io.flags))
        elif io.op is FLUSH:
            self._unflushed.flushed(mark)
            if not self._unflushed.dirty:
                for path in paths:
                    path.lost = False

    def path_lost(self, paths: Sequence[Path]) -> None:
        """A path has failed."""
        if self._unflushed.dirty and all(path.lost or not path.active for path in paths):
            self.at_risk = True

    async def repeat(self, path: Path) -> None:
        """Writes all again. Raises the first error."""
        for batch in self._unflushed.batches():
            await run_all(
                path.device.submit(Io(_OPS[one.command], one.length, one.data, one.flags), one.offset) for one in batch
            )

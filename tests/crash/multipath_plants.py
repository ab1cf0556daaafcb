"""Bugs of multipath, planted into the scenario `paths` as those of plants.py are."""

from typing import Final

from nbdmap.block.io import DONE, FLUSH, FUA, WRITE, Io, Pending
from nbdmap.dm.target import Target
from nbdmap.errors import NbdmapError
from nbdmap.targets.multipath import Multipath


class FlushNoPath(Multipath):
    """A flush is done at once: no path is told."""

    def submit(self, io: Io, offset: int) -> Pending:
        return DONE if io.op is FLUSH else super().submit(io, offset)


class SuspendNoPath(Multipath):
    """A suspend flushes nothing."""

    async def postsuspend(self) -> None:
        self._suspended = True


class LoseFuaOnTheWay(Multipath):
    """A write is passed on without its FUA."""

    def submit(self, io: Io, offset: int) -> Pending:
        if io.op is WRITE and io.flags & FUA:
            io = Io(WRITE, io.length, io.data)
        return super().submit(io, offset)


class OnceIsEnough(Multipath):
    """A request whose path has failed is taken for done."""

    async def _follow(
        self, io: Io, offset: int, path: object, pending: Pending, began_ns: int = 0, mark: int = 0
    ) -> None:
        try:
            await pending
        except NbdmapError:
            pass


MULTIPATH_PLANTS: Final[dict[str, type[Target]]] = {
    "flush-no-path": FlushNoPath,
    "suspend-no-path": SuspendNoPath,
    "lose-fua-on-the-way": LoseFuaOnTheWay,
    "once-is-enough": OnceIsEnough,
}

"""Bugs planted into the persistent-data library, one at a time: at least one for each flush, FUA and rule of its commits."""

import errno
import random
from collections.abc import Callable, Iterable
from typing import Any, Final

from nbdmap.block.io import WRITE, Io
from nbdmap.errors import IoFailed, OutOfSpace
from nbdmap.persist.blocks import BLOCK, Block, BlockStore, BlockType
from nbdmap.persist.data_map import DataMap
from nbdmap.persist.metadata_map import MetadataMap
from nbdmap.persist.transaction import Transaction
from tests.crash.disks import Fault
from tests.persist.pool import Metadata


class NoFlush(BlockStore):
    """The blocks are not made durable before the superblock is written."""

    async def flush(self) -> None:
        pass


class NoFua(BlockStore):
    """The superblock may still be in the disk's cache when the commit ends."""

    async def write_raw(self, number: int, data: bytes) -> None:
        await self.device.submit(Io(WRITE, BLOCK, memoryview(data)), number * BLOCK)


class LoseBlock(BlockStore):
    """A block that was changed, written, and changed again is not written again."""

    def touch(self, block: Block) -> None:
        if block.number % 5 or not block.words[0] & 0xFFFFFFFF:
            super().touch(block)


class HideErrors(BlockStore):
    """Blocks that could not be written count as written."""

    async def write(self) -> None:
        try:
            await super().write()
        except IoFailed:
            pass


class SuperblockFirst(Transaction):
    """The superblock is written before the blocks that it leads to."""

    async def _commit(self, superblock: Callable[[], bytes]) -> None:
        for one in self.maps:
            await one.write()
        await self.space.write(self)
        await self.store.write_raw(0, superblock())
        await super()._commit(superblock)


class InPlace(Transaction):
    """A block of the last commit with one owner is changed where it is."""

    async def shadow(self, number: int, kind: BlockType) -> tuple[Block, bool]:
        if self.space.count(number) == 1:
            block = await self.store.read(number, kind)
            self.store.touch(block)
            return block, False
        return await super().shadow(number, kind)


class ChildrenNotCounted(Transaction):
    """What a shared block points to does not get an owner more when it is copied."""

    async def shadow(self, number: int, kind: BlockType) -> tuple[Block, bool]:
        block, _ = await super().shadow(number, kind)
        return block, False


class ReuseAtOnce(MetadataMap):
    """A block that this transaction has freed is given out again."""

    def new_block(self) -> int:
        try:
            block = self._counts.index(0)
        except ValueError:
            raise OutOfSpace("no block is free") from None
        self._allocated += 1
        self.inc(block)
        return block


class BitmapsInPlace(MetadataMap):
    """The space map's blocks stay where they are."""

    def _moved(self, tx: Transaction, block: int) -> int:
        return block or self.new_block()


class ForgetSpilled(MetadataMap):
    """A count above 2 that goes down stays in its tree as it was."""

    def dec(self, block: int) -> None:
        super().dec(block)
        self._spilled.discard(block)


class ForgetReferences(DataMap):
    """A data block that is unmapped keeps its reference."""

    def dec_all(self, blocks: Iterable[int]) -> None:
        pass


class NotWritten(DataMap):
    """The data's space map is written by every second commit."""

    commits = 0

    async def write(self) -> None:
        self.commits += 1
        if self.commits % 2:
            await super().write()


def _a_write_fails(rng: random.Random) -> list[tuple[tuple[str, int], Fault]]:
    return [(("write", rng.randrange(8)), Fault(errno.EIO, 0.0))]


def _with(part: str, kind: type) -> dict[str, Any]:
    return {"metadata_type": type(kind.__name__, (Metadata,), {part: kind})}


PERSIST_PLANTS: Final[dict[str, dict[str, Any]]] = {
    "persist-no-flush": _with("store_type", NoFlush),
    "persist-no-fua": _with("store_type", NoFua),
    "persist-lose-block": _with("store_type", LoseBlock),
    "persist-hide-errors": {**_with("store_type", HideErrors), "faults": _a_write_fails},
    "persist-superblock-first": _with("transaction_type", SuperblockFirst),
    "persist-in-place": _with("transaction_type", InPlace),
    "persist-children-not-counted": _with("transaction_type", ChildrenNotCounted),
    "persist-reuse-at-once": _with("space_type", ReuseAtOnce),
    "persist-bitmaps-in-place": _with("space_type", BitmapsInPlace),
    "persist-forget-spilled": _with("space_type", ForgetSpilled),
    "persist-forget-references": _with("data_type", ForgetReferences),
    "persist-map-not-written": _with("data_type", NotWritten),
}
"""What each changes in the scenario `persist`."""

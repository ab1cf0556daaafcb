"""Transactions: copy-on-write of blocks, and the commit that makes all changes count at once (dm-transaction-manager).

A block is changed in place only if it was allocated in this transaction and has one owner. Any other is *shadowed*: copied to
a newly allocated block, and the old one loses an owner. When the old one was shared, what it points to has one owner more.
"""

from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from nbdmap.errors import CorruptMetadata, IoFailed
from nbdmap.persist.blocks import Block, BlockStore, BlockType

T = TypeVar("T")


class CountedSpace(Protocol):
    """What a transaction needs of the metadata's space map; metadata_map.MetadataMap is it."""

    def count(self, block: int) -> int:
        """The owners of a block now."""
        ...

    def new_block(self) -> int:
        """Takes a free block. Raises OutOfSpace."""
        ...

    def inc(self, block: int) -> None:
        """One owner more."""
        ...

    def dec(self, block: int) -> None:
        """One owner less. Raises CorruptMetadata for a block that has none."""
        ...

    async def write(self, tx: "Transaction") -> None:
        """Brings the space map on the disk up to date, as part of the transaction."""
        ...

    def committed(self) -> None:
        """What is now is what is on the disk."""
        ...


class WrittenMap(Protocol):
    """Another map that lives in the transaction and is written before the metadata's; data_map.DataMap is one."""

    async def write(self) -> None:
        """Brings the map on the disk up to date, as part of the transaction."""
        ...

    async def make_room(self) -> None:
        """Writes when there is much to remember. Called when no block is being changed."""
        ...

    def committed(self) -> None:
        """What is now is what is on the disk."""
        ...


class Transaction:
    """The transaction that is open on `store`; a commit ends it and begins the next one."""

    def __init__(self, store: BlockStore, space: CountedSpace) -> None:
        self.store = store
        self.space = space
        self.maps: list[WrittenMap] = []
        """Written, in order, before the metadata's space map. A map adds itself."""
        self.broken = ""
        """Why nothing can be changed or committed any more; "" as long as it can."""
        self._fresh: set[int] = set()
        """The blocks allocated in this transaction that have owners."""
        self.inc = space.inc
        """inc(block): one owner more."""

    def check(self) -> None:
        """Raises IoFailed when the transaction is broken."""
        if self.broken:
            raise IoFailed(f"the metadata transaction failed and must be aborted: {self.broken}")

    async def change(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs one change. It fails when the transaction is broken, and breaks it when it fails."""
        try:
            self.check()
            await self.make_room()
            return await work
        except BaseException as error:
            work.close()  # it may not have begun
            self.broken = self.broken or str(error) or type(error).__name__
            raise

    async def make_room(self) -> None:
        """Writes what has piled up. To be called when no block is being changed."""
        for one in self.maps:
            await one.make_room()
        await self.store.make_room()

    def allocate(self, kind: BlockType) -> Block:
        """A new block of zeroes with one owner, to be changed in place. Raises OutOfSpace."""
        number = self.space.new_block()
        self._fresh.add(number)
        self.store.changes += 1
        return self.store.new(number, kind)

    async def shadow(self, number: int, kind: BlockType) -> tuple[Block, bool]:
        """The block, or its copy, to be changed in place until the next wait; the caller makes its pointer the block's number.

        True: the block was shared, and the caller must call `inc` (or its like) for all that it points to.
        """
        owners = self.space.count(number)
        block = self.store.get(number)
        if block is None or block.type is not kind:
            block = await self.store.read(number, kind)
        self.store.changes += 1
        if owners == 1 and number in self._fresh:
            self.store.touch(block)
            return block, False
        if not owners:
            raise CorruptMetadata(f"metadata block {number}, a {kind.name}, is in use but has no owners in the space map")
        copy = self.store.copy(block, self.space.new_block())
        self._fresh.add(copy.number)
        self.dec(number)
        return copy, owners > 1

    def dec(self, number: int) -> None:
        """One owner less; without any left the block is gone, and what it points to is the caller's."""
        self.space.dec(number)
        if not self.space.count(number):
            self._fresh.discard(number)
            self.store.changes += 1
            self.store.forget(number)

    async def commit(self, superblock: Callable[[], bytes]) -> None:
        """Makes everything that was changed durable, at once. On failure the transaction is broken.

        `superblock` is called when the maps are written, so that it can take their roots, and gives the bytes of block 0,
        sealed. Flush the data device before, when what the metadata points to must be durable.
        """
        await self.change(self._commit(superblock))

    async def _commit(self, superblock: Callable[[], bytes]) -> None:
        for one in self.maps:
            await one.write()
        await self.space.write(self)
        # The order: every block that the new superblock leads to, flush, the superblock with FUA.
        await self.store.write()
        await self.store.flush()
        await self.store.write_raw(0, superblock())
        self._fresh.clear()
        self.store.changes += 1
        self.space.committed()
        for one in self.maps:
            one.committed()

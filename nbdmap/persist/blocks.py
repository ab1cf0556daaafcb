"""Checksummed blocks of 4 KiB of a metadata device, and a bounded cache of them (dm-block-manager).

Every block begins with a u32 checksum, CRC-32C without the final inversion xor a constant of its type, over bytes 4 to 4095,
and has its own number in the u64 at byte 8 (reference g.1). Both are checked when a block is read and made when it is written.

Invariants: `BlockStore` holds at most `cache` blocks, of which at most half are dirty when a change begins (`make_room`). A
dirty block is never evicted. Only blocks that no committed state refers to are ever dirty, so they may be written at any time
and in any order; the one write that makes them count, the superblock's, is `Transaction.commit`'s.
"""

import errno
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from google_crc32c import value as crc32c

from nbdmap.block.device import Device
from nbdmap.block.io import FLUSH, FUA, READ, WRITE, Io, Pending, run_all, to_the_end
from nbdmap.errors import CorruptMetadata

T = TypeVar("T")

BLOCK: Final = 4096
"""The size of a metadata block, bytes."""
MAX_BLOCKS: Final = 255 * 16320
"""A metadata device is not used beyond so many blocks."""
DEFAULT_CACHE: Final = 16384
"""Blocks; 64 MiB, and some 10 MiB of Python's own."""
MAX_RUN: Final = 64
"""Blocks that one request reads or writes at most."""
MAX_REQUESTS: Final = 16
"""Requests of one `write` or `read_ahead` that run side by side."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockType:
    """What a block is: its name in messages, the constant of its checksum, and what else must hold of a block that is read.

    `check(data)` returns what is wrong with it, "" if nothing is.
    """

    name: str
    salt: int
    check: Callable[[memoryview], str] = lambda data: ""


def checksum(data: bytes | bytearray | memoryview, salt: int) -> int:
    """The checksum of a block of 4096 bytes, which it must have at its start."""
    crc: int = crc32c(bytes(data[4:]))
    return crc ^ 0xFFFFFFFF ^ salt


def seal(data: bytearray | memoryview, number: int, salt: int) -> None:
    """Puts a block's number and its checksum in their places."""
    data[8:16] = number.to_bytes(8, "little")
    data[:4] = checksum(data, salt).to_bytes(4, "little")


def verify(data: bytes | bytearray | memoryview, number: int, salt: int, what: str) -> None:
    """Raises CorruptMetadata unless the block is sealed as `number`: ENOTBLK for another number, EILSEQ for a wrong checksum."""
    found = int.from_bytes(data[8:16], "little")
    if found != number:
        error = CorruptMetadata(f"metadata block {number}: {what} says that it is block {found}")
        error.errno = errno.ENOTBLK
        raise error
    stored, computed = int.from_bytes(data[:4], "little"), checksum(data, salt)
    if stored != computed:
        raise CorruptMetadata(f"metadata block {number}: {what}: checksum {stored:#010x}, but {computed:#010x} is right")


class Block:
    """One block in the cache. `data` may be changed only between `BlockStore.touch` and the next wait; `words` is the same
    bytes as 512 u64 in the machine's order, which must be little-endian."""

    __slots__ = ("data", "dirty", "number", "type", "used", "words")

    def __init__(self, number: int, kind: BlockType, data: bytearray) -> None:
        self.number = number
        self.type = kind
        self.data = memoryview(data)
        self.words = self.data.cast("Q")
        self.dirty = False
        self.used = False
        """Asked for since the cache last looked for a block to drop."""


class BlockStore:
    """The blocks of `device`, of which at most `cache` are in memory."""

    def __init__(self, device: Device, cache: int = DEFAULT_CACHE) -> None:
        self.device = device
        self.limit = cache
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._dirty: dict[int, Block] = {}
        self._loading: dict[int, object] = {}
        """A token for each block that is being read; gone when the block is made anew meanwhile."""
        self.changes = 0
        """Grows with every change of what blocks mean: readers that waited compare."""
        self.get = self._blocks.get
        """get(number): the block if it is in the cache, else None. Plain, without a mark in `used`."""

    @property
    def nr_blocks(self) -> int:
        """Whole blocks of the device, as many of them as can be used."""
        return min(self.device.size // BLOCK, MAX_BLOCKS)

    @property
    def resident(self) -> int:
        """Blocks in the cache."""
        return len(self._blocks)

    @property
    def dirty(self) -> int:
        """Blocks that are not yet written."""
        return len(self._dirty)

    async def read_raw(self, number: int) -> bytes:
        """The bytes of a block, neither checked nor cached. Raises CorruptMetadata for one beyond the end."""
        if number >= self.nr_blocks:
            raise CorruptMetadata(f"a pointer to block {number}: the device ends with block {self.nr_blocks - 1}")
        data = bytearray(BLOCK)
        await self.device.submit(Io(READ, BLOCK, memoryview(data)), number * BLOCK)
        return bytes(data)

    async def write_raw(self, number: int, data: bytes) -> None:
        """Writes a block past the cache, durable when it ends. For the superblock."""
        await self.device.submit(Io(WRITE, BLOCK, memoryview(data), FUA), number * BLOCK)

    async def read(self, number: int, kind: BlockType) -> Block:
        """The block, checked. Raises CorruptMetadata, or what the device raises."""
        block = self._blocks.get(number)
        if block is not None:
            block.used = True
        while block is None:
            block = await self._load(number, kind)
        if block.type is not kind:
            raise CorruptMetadata(f"metadata block {number} is used as a {block.type.name} and as a {kind.name}")
        return block

    async def _load(self, number: int, kind: BlockType) -> Block | None:
        """Reads a block into the cache; None if it must be asked for again, as it was made anew meanwhile."""
        self._check_number(number, kind)
        token = self._loading.setdefault(number, object())
        data = bytearray(BLOCK)
        try:
            await self.device.submit(Io(READ, BLOCK, memoryview(data)), number * BLOCK)
        finally:
            current = self._loading.get(number) is token
            if current:
                del self._loading[number]
        return self._loaded(number, kind, data) if current else self._blocks.get(number)

    def _loaded(self, number: int, kind: BlockType, data: bytearray) -> Block:
        verify(data, number, kind.salt, kind.name)
        if wrong := kind.check(memoryview(data)):
            raise CorruptMetadata(f"metadata block {number}: {kind.name}: {wrong}")
        return self._add(Block(number, kind, data))

    def _check_number(self, number: int, kind: BlockType) -> None:
        if not 0 < number < self.nr_blocks:
            raise CorruptMetadata(
                f"a pointer to a {kind.name} in block {number}: the device has blocks 1 to {self.nr_blocks - 1}"
            )

    async def read_ahead(self, numbers: Iterable[int], kind: BlockType) -> None:
        """Brings blocks into the cache that will be read soon, neighbours in one request. More than a quarter of the cache
        is not read; blocks that are wrong are left for `read` to complain about."""
        wanted = sorted({number for number in numbers if number not in self._blocks and 0 < number < self.nr_blocks})
        for batch in batched(_runs(wanted[: self.limit // 4]), MAX_REQUESTS):
            await run_all([self._load_run(run, kind) for run in batch])

    async def _load_run(self, run: Sequence[int], kind: BlockType) -> None:
        tokens = [self._loading.setdefault(number, object()) for number in run]
        data = bytearray(BLOCK * len(run))
        try:
            await self.device.submit(Io(READ, len(data), memoryview(data)), run[0] * BLOCK)
        finally:
            current = [self._loading.get(number) is token for number, token in zip(run, tokens, strict=True)]
            for number, is_current in zip(run, current, strict=True):
                if is_current:
                    del self._loading[number]
        for place, (number, is_current) in enumerate(zip(run, current, strict=True)):
            if is_current:
                try:
                    self._loaded(number, kind, data[place * BLOCK : (place + 1) * BLOCK])
                except CorruptMetadata:
                    continue

    def new(self, number: int, kind: BlockType) -> Block:
        """A block of zeroes that nothing refers to yet, dirty."""
        return self._made(Block(number, kind, bytearray(BLOCK)))

    def copy(self, block: Block, number: int) -> Block:
        """A copy of `block` as block `number`, which nothing refers to yet, dirty."""
        return self._made(Block(number, block.type, bytearray(block.data)))

    def touch(self, block: Block) -> None:
        """Says that `block`, one of this transaction's, is about to be changed."""
        if not block.dirty:
            block.dirty = True
            self._dirty[block.number] = block
            if block.number not in self._blocks:
                self._add(block)

    def forget(self, number: int) -> None:
        """Drops a block that nothing refers to any more; if it was dirty it is not written."""
        block = self._blocks.pop(number, None)
        if block is not None and block.dirty:
            block.dirty = False
            del self._dirty[number]

    def _made(self, block: Block) -> Block:
        self._loading.pop(block.number, None)
        self.forget(block.number)
        self.touch(block)
        return block

    def _add(self, block: Block) -> Block:
        blocks = self._blocks
        for _ in range(2 * len(blocks)):  # at most: each is met used once, and then not
            if len(blocks) < self.limit:
                break
            number, oldest = blocks.popitem(last=False)
            if oldest.dirty or oldest.used:
                oldest.used = False
                blocks[number] = oldest
        blocks[block.number] = block
        return block

    async def make_room(self) -> None:
        """Writes the dirty blocks when they are half of the cache. To be called when no block is being changed."""
        if len(self._dirty) > self.limit // 2:
            await self.write()

    async def write(self) -> None:
        """Writes all dirty blocks, neighbours in one request; not yet durable. Not cut short by a cancellation.

        When it fails, some of the blocks are not written and none is dirty any more: the transaction is over.
        """
        if self._dirty:
            dirty, self._dirty = self._dirty, {}
            await to_the_end(self._write(dirty))

    async def _write(self, dirty: dict[int, Block]) -> None:
        for batch in batched(_runs(sorted(dirty)), MAX_REQUESTS):
            requests: list[Pending] = []
            for run in batch:
                blocks = [dirty[number] for number in run]
                for block in blocks:
                    block.dirty = False
                    seal(block.data, block.number, block.type.salt)
                data = b"".join([block.data for block in blocks])
                requests.append(self.device.submit(Io(WRITE, len(data), memoryview(data)), run[0] * BLOCK))
            await run_all(requests)

    async def flush(self) -> None:
        """Ends when all that was written is durable."""
        await self.device.submit(Io(FLUSH, 0), 0)


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as runs of neighbours, none longer than MAX_RUN."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1 and len(runs[-1]) < MAX_RUN:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """`items` in pieces of `size`; the last may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]

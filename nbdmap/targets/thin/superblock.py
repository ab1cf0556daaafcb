"""Block 0 of a pool's metadata: where everything else begins (reference g.2; dm-thin-metadata.c).

It is the only block that is ever written in place, and always the last of a commit.
"""

import errno
from dataclasses import dataclass, replace
from typing import Annotated, Final, Self

from nbdmap.errors import CorruptMetadata, InvalidArgument
from nbdmap.layout import Record
from nbdmap.persist.blocks import BLOCK, seal, verify
from nbdmap.units import SECTOR

SALT: Final = 160774
MAGIC: Final = 27022010
VERSION: Final = 2
NEEDS_CHECK: Final = 1
"""Flag: a transaction was aborted; no writing until `thin_check --clear-needs-check-flag` has been over it."""
MAX_TIME: Final = (1 << 24) - 1
"""Mappings have 24 bits for it."""
ROOT: Final = 32
"""Bytes of a space map's root; its place in the superblock is larger."""


@dataclass(frozen=True)
class Superblock(Record, order="<"):
    """The fields. Block size in sectors, `metadata_blocks` as of the format, roots as metadata blocks."""

    checksum: Annotated[int, "I"]
    flags: Annotated[int, "I"]
    number: Annotated[int, "Q"]
    uuid: Annotated[bytes, "16s"]
    magic: Annotated[int, "Q"]
    version: Annotated[int, "I"]
    time: Annotated[int, "I"]
    transaction_id: Annotated[int, "Q"]
    held_root: Annotated[int, "Q"]
    data_map: Annotated[bytes, "128s"]
    metadata_map: Annotated[bytes, "128s"]
    mapping_root: Annotated[int, "Q"]
    details_root: Annotated[int, "Q"]
    block_size_sectors: Annotated[int, "I"]
    metadata_block_sectors: Annotated[int, "I"]
    metadata_blocks: Annotated[int, "Q"]
    compat: Annotated[int, "I"]
    compat_read_only: Annotated[int, "I"]
    incompat: Annotated[int, "I"]

    @classmethod
    def new(cls, block_size_sectors: int, metadata_blocks: int) -> Self:
        """That of metadata which is about to be formatted."""
        return cls(
            0, 0, 0, bytes(16), MAGIC, VERSION, 0, 0, 0, bytes(128), bytes(128), 0, 0,
            block_size_sectors, BLOCK // SECTOR, metadata_blocks, 0, 0, 0,
        )  # fmt: skip

    @classmethod
    def read(cls, block: bytes, number: int = 0) -> Self:
        """Checks and unpacks the 4096 bytes of block `number`: 0, or where a metadata snapshot's copy is.

        Raises CorruptMetadata: ENOTBLK for another block's number, EILSEQ for magic and checksum; InvalidArgument for
        features that are not known.
        """
        found = cls.unpack(block)
        if found.number != number or found.magic == MAGIC:
            verify(block, number, SALT, "the superblock")
        if found.magic != MAGIC:
            error = CorruptMetadata(f"metadata block {number}: magic {found.magic}, {MAGIC} is a superblock's")
            error.errno = errno.EILSEQ
            raise error
        if found.incompat:
            raise InvalidArgument(f"the metadata has incompatible features, {found.incompat:#x}, that are not known")
        if found.metadata_block_sectors * SECTOR != BLOCK:
            raise CorruptMetadata(f"metadata block {number}: metadata blocks of {found.metadata_block_sectors} sectors, not 8")
        if found.time > MAX_TIME:
            raise CorruptMetadata(f"metadata block {number}: the time is {found.time}, the most there can be is {MAX_TIME}")
        return found

    def sealed(self, number: int = 0) -> bytes:
        """The 4096 bytes of block `number` that hold it."""
        block = bytearray(BLOCK)
        packed = replace(self, number=number).pack()
        block[: len(packed)] = packed
        seal(block, number, SALT)
        return bytes(block)

    @property
    def needs_check(self) -> bool:
        """Whether the metadata must be checked before it may be written."""
        return bool(self.flags & NEEDS_CHECK)

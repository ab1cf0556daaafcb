"""Space maps on the disk: what the metadata's and the data's have in common (dm-space-map-common, reference g.4).

The count of each block is two bits in a bitmap block of 16320 entries: 0, 1, 2, or 3 for "look in the tree of reference counts",
which has the counts above 2. An index has, for each bitmap block, where it is and how many of its entries are free.

    bitmap block   u32 checksum, u32 0, u64 number, 4080 bytes: entry i in bits 2i (the high bit!) and 2i + 1 (the low bit)
    index entry    u64 bitmap block, u32 free entries, u32 no entry before this one is free
    root           u64 blocks, u64 blocks with a count, u64 index, u64 root of the tree of reference counts
"""

from dataclasses import dataclass
from struct import Struct
from typing import Annotated, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from nbdmap.layout import Record
from nbdmap.persist.blocks import BLOCK, BlockType
from nbdmap.persist.lookup import Values, unpack_int

ENTRIES: Final = (BLOCK - 16) * 4
"""Counts in one bitmap block."""
MANY: Final = 3
"""Entries from this count on are in the tree."""
BITMAP: Final = BlockType("space-map bitmap", 240779)
_BITS: Final = 16
_ENTRY: Final = Struct("<QII")
INDEX_ENTRY: Final = np.dtype([("block", "<u8"), ("free", "<u4"), ("none_before", "<u4")])

RAW: Final = (0, 2, 1, 3)
"""The two bits of a count, and the count of two bits: the bits are swapped."""
_COUNTS: Final = np.array([[RAW[byte >> shift & 3] for shift in (0, 2, 4, 6)] for byte in range(256)], np.uint8)
_RAW: Final = np.array(RAW, np.uint8)

Counts = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Root(Record, order="<"):
    """What a superblock has of a space map; 32 bytes."""

    nr_blocks: Annotated[int, "Q"]
    nr_allocated: Annotated[int, "Q"]
    index_block: Annotated[int, "Q"]
    ref_counts: Annotated[int, "Q"]


class Entry(NamedTuple):
    """One bitmap block in an index."""

    block: int
    free: int
    none_before: int

    def pack(self) -> bytes:
        """Its 16 bytes."""
        return _ENTRY.pack(*self)

    @classmethod
    def unpack(cls, data: memoryview) -> "Entry":
        """Reads it from 16 bytes."""
        return cls(*_ENTRY.unpack_from(data))


REF_COUNTS: Final = Values(4, lambda value: value.to_bytes(4, "little"), unpack_int)
"""The tree of the counts above 2."""
INDEX_ENTRIES: Final = Values(16, Entry.pack, Entry.unpack)
"""The index of a data space map."""


def bitmaps_for(nr_blocks: int) -> int:
    """Bitmap blocks that `nr_blocks` counts need."""
    return -(-nr_blocks // ENTRIES)


def unpack_counts(data: bytes | memoryview) -> Counts:
    """The 16320 counts of a bitmap block, each 0 to 3; an array of its own."""
    return _COUNTS[np.frombuffer(data, np.uint8, BLOCK - _BITS, _BITS)].reshape(-1)


def pack_counts(data: memoryview, counts: npt.NDArray[np.uint8] | npt.NDArray[np.uint32]) -> tuple[int, int]:
    """Writes up to 16320 counts into a bitmap block; returns the free entries, and the first that is free."""
    raw = np.zeros(ENTRIES, np.uint8)
    raw[: len(counts)] = _RAW[np.minimum(counts, MANY)]
    four = raw.view(np.uint32)  # four entries, a byte each: bits 0, 8, 16 and 24 come to 0, 2, 4 and 6
    data[_BITS:] = (four | four >> 6 | four >> 12 | four >> 18).astype(np.uint8).tobytes()
    return ENTRIES - int(np.count_nonzero(raw)), first_free(raw)


def first_free(counts: Counts) -> int:
    """The first entry that is 0; ENTRIES if none is."""
    place = int(np.argmin(counts))
    return ENTRIES if counts[place] else place


def get_count(data: memoryview, entry: int) -> int:
    """One count of a bitmap block, 0 to 3."""
    return RAW[data[_BITS + (entry >> 2)] >> ((entry & 3) << 1) & 3]

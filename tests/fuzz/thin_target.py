"""A target that reads and changes the metadata of a thin pool, as it comes from a disk that somebody else has written; and
one that reads thin_dump's XML.

The metadata is that of a small pool with snapshots, a metadata snapshot and trees of two floors, into which the input puts bytes;
checksums are made right again, mostly. All that reads it must say nothing but declared errors; what changes it, too, and when the
check had found nothing wrong before, all of it must go well and leave nothing wrong.
"""

import re
from collections.abc import Sequence
from typing import Final

from nbdmap.cli.thin import read_xml
from nbdmap.errors import NbdmapError
from nbdmap.persist.blocks import BLOCK, BlockStore, checksum, seal
from nbdmap.persist.metadata_map import INDEX
from nbdmap.persist.node import NODE
from nbdmap.persist.space_map import BITMAP
from nbdmap.targets.thin.check import check
from nbdmap.targets.thin.metadata import TIME_BITS, Metadata
from nbdmap.targets.thin.offline import Offline, Run, compare, restore
from nbdmap.targets.thin.superblock import SALT, Superblock
from tests.crash.clock import run
from tests.fuzz.mutate import Pieces
from tests.support.disks import FakeDisk

BLOCKS: Final = 96
DATA_BLOCKS: Final = 3000
SALTS: Final = (NODE.salt, BITMAP.salt, INDEX.salt, SALT)
NO_SEAL: Final = 0x80
"""In the first byte of a piece: the checksum is left as it is."""


async def _write(metadata: Metadata, number: int, blocks: Sequence[int]) -> None:
    """Gives virtual blocks of a volume new data blocks."""
    new = {block: await metadata.data.new_block() << TIME_BITS | metadata.superblock.time for block in blocks}
    added = await metadata.insert(number, new)
    await metadata.set_details(number, (await metadata.volume(number)).mapped + added)


async def _discard(metadata: Metadata, number: int, first: int, end: int) -> None:
    removed = await metadata.remove_range(number, first, end)
    await metadata.set_details(number, (await metadata.volume(number)).mapped - removed)


async def _made() -> bytes:
    disk = FakeDisk("7:0", BLOCKS * 8)
    metadata = await Metadata.format(BlockStore(disk), 128)
    metadata.resize_data(DATA_BLOCKS)
    for number in range(3):
        await metadata.create_thin(number)
        await _write(metadata, number, range(90 * number, 270 + 90 * number))
    for number in (3, 4, 5):
        await metadata.create_snap(number, 0)
    await _write(metadata, 3, range(40, 60))
    await metadata.commit()
    await metadata.reserve_snapshot()
    await _write(metadata, 0, range(300, 320))
    await metadata.commit()
    return bytes(disk.bytes)


GOOD: Final = run(_made())
USED: Final = [number for number in range(BLOCKS) if any(GOOD[number * BLOCK : (number + 1) * BLOCK])]


def _salt(block: int) -> int:
    """By its checksum; blocks that are in use no more have one, too."""
    data = GOOD[block * BLOCK : (block + 1) * BLOCK]
    return next(salt for salt in SALTS if checksum(data, salt) == int.from_bytes(data[:4], "little"))


SALT_OF: Final = {block: _salt(block) for block in USED}


def _piece(block: int, offset: int, data: bytes) -> bytes:
    return bytes([USED.index(block)]) + offset.to_bytes(2, "big") + data


def _seeds() -> list[Pieces]:
    """Each block with one of the fields that matter one more, or as its neighbour is."""
    seeds: list[Pieces] = [[]]
    for block in USED:
        for offset in (*range(16, 64, 8), 320, 328, 336, 2048, 2056):
            start = block * BLOCK + offset
            number = int.from_bytes(GOOD[start : start + 8], "little")
            seeds.append([_piece(block, offset, ((number + 1) % (1 << 64)).to_bytes(8, "little"))])
            seeds.append([_piece(block, offset, GOOD[start + 8 : start + 16])])
    return seeds


def _words() -> list[bytes]:
    """Pieces that put a number where it may matter."""
    numbers = [*range(4), *USED, BLOCKS - 1, BLOCKS, 84, 126, 252, 253, DATA_BLOCKS, 1 << 24, 3 << 24, 1 << 31, 1 << 40, 1 << 63]
    places = [*range(16, 80, 4), 64, 192, 200, 208, 216, 2048, 2056, 2064]
    return [
        _piece(block, offset, numbers[(block * 7 + offset + turn) % len(numbers)].to_bytes(8, "little"))
        for block in USED for offset in places for turn in (0, 5, 11)
    ]  # fmt: skip


class Metadatas:
    """Pieces: a byte that says which block, two for the offset in it, and what is put there."""

    name = "thin"
    seeds: Sequence[Pieces] = _seeds()
    words: Sequence[bytes] = _words()

    def join(self, pieces: Pieces) -> bytes:
        return b"".join(len(piece).to_bytes(2, "big") + piece for piece in pieces)

    async def run(self, data: bytes) -> object:
        disk = FakeDisk("7:0", BLOCKS * 8)
        disk.bytes[:] = GOOD
        _put(disk.bytes, data)
        before = await check(disk)
        sound = not (before.errors or before.leaks)
        outcome = [len(before.errors.words) % 8, bool(before.leaks), before.errors.words[:1] and _plain(before.errors.words[0])]
        steps = [await _tried(_read(disk, snapshot)) for snapshot in (False, True)] + [await _tried(_use(disk))]
        if sound and not before.notes:
            assert steps[2] in ("", "the pool has made  snapshots, the most there can be"), steps
            if steps[2]:
                return steps[2]
            found = await check(disk)
            assert not found.errors, found.errors.words
            assert not found.leaks, found.leaks.words
        return tuple(map(str, [*outcome, *steps]))


def _put(disk: bytearray, data: bytes) -> None:
    touched: set[int] = set()
    while len(data) >= 2:
        size = int.from_bytes(data[:2], "big")
        piece, data = data[2 : 2 + size], data[2 + size :]
        if len(piece) > 3:
            block = USED[(piece[0] & ~NO_SEAL) % len(USED)]
            offset = int.from_bytes(piece[1:3], "big") % BLOCK
            what = piece[3 : 3 + BLOCK - offset]
            disk[block * BLOCK + offset : block * BLOCK + offset + len(what)] = what
            if not piece[0] & NO_SEAL:
                touched.add(block)
    for block in touched:
        view = memoryview(disk)[block * BLOCK : (block + 1) * BLOCK]
        number = view[8:16].tobytes()
        seal(view, block, SALT_OF[block])
        if number[7] & 1:  # a block in another's place
            view[8:16] = number
            view[:4] = checksum(view, SALT_OF[block]).to_bytes(4, "little")


async def _tried(work: object) -> str:
    try:
        await work  # type: ignore[misc]
    except NbdmapError as error:
        return _plain(error.message)
    return ""


def _plain(text: str) -> str:
    return re.sub("[0-9]+", "", text)[:60]


async def _read(disk: FakeDisk, snapshot: bool) -> None:
    """As dump, ls, delta and rmap do."""
    pool = await Offline.open(disk, snapshot=snapshot)
    volumes = await pool.volumes()
    runs: list[list[Run]] = []
    for number, _ in volumes[:8]:
        runs.append([one async for one in pool.runs(number)])
    if len(runs) > 1:
        compare((runs[0], runs[1]))


async def _use(disk: FakeDisk) -> None:
    """As a pool does."""
    size = Superblock.read(bytes(disk.bytes[:BLOCK])).block_size_sectors
    metadata = await Metadata.open(disk, size, may_format=False)
    for number in range(6):
        details = await metadata.volume(number)
        assert details.mapped >= 0
        await metadata.highest(number)
        for block in (0, 41, 300, 699):
            await metadata.lookup(number, block)
    await _write(metadata, 0, range(0, 60, 4))
    await _discard(metadata, 1, 30, 400)
    await metadata.create_snap(40, 3)
    await _write(metadata, 40, range(500, 530))
    await metadata.delete(4)
    await metadata.commit()
    if metadata.superblock.held_root:
        await metadata.release_snapshot()
    await metadata.delete(0)
    await metadata.create_thin(0)
    await _write(metadata, 0, [1])
    metadata.resize_data(metadata.data.nr_blocks + 20000)
    await metadata.commit()


_XML: Final = (
    '<superblock uuid="" time="2" transaction="3" flags="0" version="2" data_block_size="128" nr_data_blocks="900">',
    '<device dev_id="1" mapped_blocks="4" transaction="0" creation_time="0" snap_time="1">',
    '<range_mapping origin_begin="0" data_begin="0" length="3" time="0"/>',
    '<single_mapping origin_block="7" data_block="3" time="1"/>',
    "</device>",
    '<device dev_id="5" mapped_blocks="1" transaction="1" creation_time="1" snap_time="1">',
    '<single_mapping origin_block="90" data_block="1" time="0"/>',
    "</device>",
    "</superblock>",
)


class Xml:
    """thin_dump's XML, restored and checked."""

    name = "thinxml"
    seeds: Sequence[Pieces] = [
        [line.encode() for line in _XML],
        [piece.encode() for line in _XML for piece in re.findall(r'[^"]*"?', line) if piece],
    ]
    words: Sequence[bytes] = [
        *(b'16777215"', b'16777216"', b'4294967296"', b'18446744073709551615"', b'900"', b'160000"'),
        *(b"<def>", b"<!DOCTYPE a [", b'<!ENTITY b "bb">', b"&b;", b"]>"),
        *(line.encode() for line in _XML),
    ]

    def join(self, pieces: Pieces) -> bytes:
        return b"".join(pieces)

    async def run(self, data: bytes) -> object:
        disk = FakeDisk("7:0", BLOCKS * 8)
        try:
            await restore(disk, read_xml(data))
        except NbdmapError as error:
            return _plain(error.message)
        found = await check(disk)
        assert not found.errors, found.errors.words
        assert not found.leaks, found.leaks.words
        return "restored"

"""nbdmap.targets.flakey, in virtual time."""

import asyncio
import errno

import pytest

from nbdmap.block.device import HOLE, ZERO
from nbdmap.block.io import CACHE, DISCARD, DONE, FLUSH, FUA, READ, WRITE, WRITE_ZEROES, Io, Op
from nbdmap.dm.table import Table
from nbdmap.errors import InvalidArgument, IoFailed
from tests.crash.clock import run
from tests.support.disks import FakeDisk, build, mapped, read, write

PLAIN = bytes(range(256)) * 16


async def flakey(words: str, begin: int = 0) -> tuple[Table, FakeDisk]:
    """A target on a disk full of PLAIN."""
    disk = FakeDisk("7:0")
    disk.bytes[:] = (PLAIN * 128)[: disk.size]
    lead = f"0 {begin} error\n" if begin else ""
    return await build(f"{lead}{begin} 64 flakey 7:0 8 {words}", disk), disk


async def fails(table: Table, op: Op) -> bool:
    found = 0
    try:
        await table.submit(Io(op, 0 if op is FLUSH else 512, memoryview(bytearray(512))), 0)
    except IoFailed as error:
        found = error.errno
    assert found in (0, errno.EIO)
    return found != 0




@pytest.mark.parametrize(
    ("up", "down", "wanted"),
    [(2, 3, "uudddUUDDDuu"), (1, 1, "udUDud"), (0, 1, "dDdD"), (1, 0, "uUuU"), (3, 2, "uuuddUUUDD")],
)
def test_the_cycle(up: int, down: int, wanted: str) -> None:
    """From the load on, in whole seconds; when it is resumed does not matter."""

    async def main() -> None:
        await asyncio.sleep(0.7)
        disk = FakeDisk("7:0")
        device = await mapped("f", f"0 8 flakey 7:0 0 {up} {down}", disk)
        await device.suspend()
        await asyncio.sleep(0.25)
        await device.resume()
        assert device.live is not None
        seen = ""
        for _ in wanted:
            seen += "d" if await fails(device.live, READ) else "u"
            await asyncio.sleep(0.74)
            assert ("d" if await fails(device.live, READ) else "u") == seen[-1]
            await asyncio.sleep(0.26)
        assert seen == wanted.lower()
        await device.close()

    run(main())


@pytest.mark.parametrize(
    ("features", "failing", "dropped"),
    [
        ("", "read cache write flush discard write_zeroes", ""),
        (" 0", "read cache write flush discard write_zeroes", ""),
        (" 1 error_reads", "read cache", ""),
        (" 1 error_writes", "write flush discard write_zeroes", ""),
        (" 1 drop_writes", "", "write flush discard write_zeroes"),
        (" 2 drop_writes error_reads", "read cache", "write flush discard write_zeroes"),
        (" 5 corrupt_bio_byte 1 r 1 0", "", ""),
        (" 5 corrupt_bio_byte 1 w 1 0", "", ""),
        (" 2 random_read_corrupt 1", "", ""),
        (" 2 random_write_corrupt 1", "", ""),
    ],
)
def test_what_each_feature_does_to_each_operation(features: str, failing: str, dropped: str) -> None:
    async def main() -> None:
        table, disk = await flakey("0 1" + features)
        for op in (READ, CACHE, WRITE, FLUSH, DISCARD, WRITE_ZEROES):
            name = op.name.lower()
            assert await fails(table, op) is (name in failing.split()), name
            reached = [entry[0] for entry in disk.log]
            assert reached == ([] if name in failing.split() or name in dropped.split() else [name])
            disk.log.clear()

    run(main())


def test_dropped_writes_leave_the_disk_alone() -> None:
    async def main() -> None:
        table, disk = await flakey("1 1 1 drop_writes", begin=4)
        before = bytes(disk.bytes)
        await write(table, 4 * 512, b"a" * 512)
        await asyncio.sleep(1)
        await write(table, 5 * 512, b"b" * 512, FUA)
        await table.submit(Io(FLUSH, 0), 0)
        assert disk.bytes == before[: 8 * 512] + b"a" * 512 + before[9 * 512 :]
        assert await read(table, 4 * 512, 1024) == b"a" * 512 + before[9 * 512 : 10 * 512]
        await asyncio.sleep(1)
        await table.submit(Io(FLUSH, 0), 0)
        assert [entry[0] for entry in disk.log] == ["write", "read", "flush"]

    run(main())


@pytest.mark.parametrize(
    ("words", "length", "flags", "reads", "writes"),
    [
        ("32 r 7 0", 512, 0, 31, None),
        ("1 r 7 0", 4096, 0, 0, None),
        ("512 w 7 0", 512, 0, None, 511),
        ("513 r 7 0", 512, 0, None, None),
        ("513 r 7 0", 1024, 0, 512, None),
        ("9 w 7 1", 512, 0, None, 8),
        ("9 r 7 1", 512, 0, None, None),
        ("9 w 7 131072", 512, 0, None, None),
        ("9 w 7 131073", 512, FUA, None, 8),
        ("9 w 7 4096", 512, FUA, None, None),
    ],
)
def test_corrupt_bio_byte(words: str, length: int, flags: int, reads: int | None, writes: int | None) -> None:
    async def main() -> None:
        table, disk = await flakey(f"0 1 5 corrupt_bio_byte {words}")
        wanted = bytearray(disk.bytes[4096 : 4096 + length])
        if reads is not None:
            wanted[reads] = 7
        assert await read(table, 0, length) == wanted
        assert disk.bytes == (PLAIN * 128)[: disk.size]
        data = bytearray(b"d" * length)
        await table.submit(Io(WRITE, length, memoryview(data), flags), 0)
        assert data == b"d" * length, "the caller's data was changed"
        if writes is not None:
            data[writes] = 7
        assert disk.bytes[4096 : 4096 + length] == data
        assert disk.log[-1] == ("write", 4096, length, flags)

    run(main())


def test_a_read_that_fails_fails() -> None:
    async def main() -> None:
        table, disk = await flakey("0 1 5 corrupt_bio_byte 1 r 1 0")
        disk.failure = lambda io, offset: IoFailed("no medium", errno.ENOMEDIUM)
        with pytest.raises(IoFailed) as caught:
            await read(table, 0, 512)
        assert caught.value.errno == errno.ENOMEDIUM

    run(main())


def test_what_a_request_meets_is_settled_when_it_arrives() -> None:
    async def main() -> None:
        table, disk = await flakey("1 1 5 corrupt_bio_byte 1 r 255 0")
        disk.gate = asyncio.Event()
        early = asyncio.create_task(read(table, 0, 512))
        await asyncio.sleep(1)
        late = asyncio.create_task(read(table, 0, 512))
        await asyncio.sleep(1)
        disk.gate.set()
        assert (await early)[0] == PLAIN[0]
        assert (await late)[0] == 255

    run(main())


async def spoiled(seed: str, probability: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Which bytes of 400 reads and writes became what."""
    both = f"random_read_corrupt {probability} random_write_corrupt {probability}"
    words = f"0 1 {6 if seed else 4} {both}{seed}"
    table, disk = await flakey(words)
    reads: list[tuple[int, ...]] = []
    writes: list[tuple[int, ...]] = []
    for number in range(400):
        data = await read(table, 0, 512)
        reads += [(number, at, byte) for at, byte in enumerate(data) if byte != PLAIN[at]]
        await write(table, 4096, PLAIN[:512])
        writes += [(number, at, disk.bytes[8192 + at]) for at in range(512) if disk.bytes[8192 + at] != PLAIN[at]]
    return reads, writes


def test_random_corruption() -> None:
    async def main() -> None:
        always = await spoiled(" seed 7", 1_000_000_000)
        for changes in always:  # one byte each, but for those that became what they were
            assert 380 < len(changes) <= 400
            assert len({number for number, _, _ in changes}) == len(changes)
            assert len({at for _, at, _ in changes}) > 200
            assert len({byte for _, _, byte in changes}) > 100
        assert await spoiled(" seed 7", 1_000_000_000) == always
        assert await spoiled(" seed 8", 1_000_000_000) != always
        assert await spoiled("", 1_000_000_000) != await spoiled("", 1_000_000_000)
        for changes in await spoiled(" seed 0", 250_000_000):
            assert 70 < len(changes) < 130

    run(main())


def test_up_is_no_detour() -> None:
    async def main() -> None:
        table, disk = await flakey("1 1")
        disk.submit = lambda io, offset: DONE  # type: ignore[method-assign]
        for op in (READ, WRITE, FLUSH, DISCARD):
            assert table.submit(Io(op, 0, memoryview(b"")), 0) is DONE

    run(main())


def test_holes_and_limits() -> None:
    async def main() -> None:
        for words, told in (
            ("1 1 1 drop_writes", True), ("1 1", False), ("1 0", True), ("1 1 5 corrupt_bio_byte 1 r 1 0", False),
            ("1 1 5 corrupt_bio_byte 1 w 1 0", True), ("1 1 2 random_read_corrupt 5", False),
        ):  # fmt: skip
            table, disk = await flakey(words, begin=2)
            disk.runs = [(4096 + 512, 0), (1015 * 512, HOLE | ZERO)]
            wanted = [(512, 0), (1024, HOLE | ZERO)] if told else [(1536, 0)]
            assert await table.targets[1].extents(1024, 1536) == wanted
            limits = table.targets[1].limits()
            assert (limits.sparse, limits.discard, limits.cache) == (told, True, True)
            assert (limits.zero, limits.fast_zero) == (True, True)

    run(main())


@pytest.mark.parametrize(
    ("given", "printed"),
    [
        ("1 2", "1 2 2 error_reads error_writes"),
        ("1 2 0 words that are not counted", "1 2 2 error_reads error_writes"),
        ("1 2 2 random_read_corrupt 0", "1 2 2 error_reads error_writes"),
        ("1 2 4 seed 5 random_read_corrupt 6", "1 2 4 random_read_corrupt 6 seed 5"),
        ("1 2 4 seed 1 seed 0", "1 2 4 error_reads error_writes seed 0"),
        ("1 2 4 random_write_corrupt 1 random_write_corrupt 2", "1 2 2 random_write_corrupt 2"),
        ("1 2 10 corrupt_bio_byte 1 w 2 3 corrupt_bio_byte 4 r 5 6", "1 2 5 corrupt_bio_byte 4 r 5 6"),
        ("1 2 2 seed 0", "1 2 4 error_reads error_writes seed 0"),
        (
            "1 2 13 seed 5 random_write_corrupt 1 random_read_corrupt 2 corrupt_bio_byte 3 R 4 5 ERROR_writes error_reads",
            "1 2 13 error_reads error_writes corrupt_bio_byte 3 r 4 5 random_read_corrupt 2 random_write_corrupt 1 seed 5",
        ),
    ],
)
def test_table(given: str, printed: str) -> None:
    """More of it in tests/golden/dmsetup/target-flakey.txt."""

    async def main() -> None:
        table, _ = await flakey(given)
        assert table.table_lines()[0].params == f"7:0 8 {printed}"
        again, _ = await flakey(printed)
        assert again.table_lines() == table.table_lines()
        assert table.status_lines()[0].params == ""

    run(main())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("1", "down interval is missing"),
        ("0 0", "up and down interval together, 0 s, are not in the range 1 to 4294967295"),
        ("4294967295 1", "up and down interval together, 4294967296 s, are not in the range"),
        ("1 1 1 nothing", "unknown feature 'nothing'"),
        ("1 1 14 drop_writes", "number of feature words: 14 is not in the range 0 to 13"),
        ("1 1 2 drop_writes", "number of feature words: 2 announced, 1 given"),
        ("1 1 2 drop_writes DROP_WRITES", "drop_writes is given twice"),
        ("1 1 2 drop_writes error_writes", "drop_writes and error_writes are in conflict"),
        ("1 1 6 drop_writes corrupt_bio_byte 1 w 0 0", "drop_writes and corrupt_bio_byte of writes are in conflict"),
        ("1 1 6 error_writes corrupt_bio_byte 1 w 0 0", "error_writes and corrupt_bio_byte of writes are in conflict"),
        ("1 1 3 corrupt_bio_byte 1 r", "corrupt_bio_byte: value is missing"),
        ("1 1 5 corrupt_bio_byte 0 r 1 0", "corrupt_bio_byte: number of the byte: 0 is not in the range 1 to"),
        ("1 1 5 corrupt_bio_byte 1 x 1 0", "corrupt_bio_byte: direction 'x' is not r or w"),
        ("1 1 5 corrupt_bio_byte 1 r 256 0", "corrupt_bio_byte: value: 256 is not in the range 0 to 255"),
        ("1 1 2 random_read_corrupt 1000000001", "random_read_corrupt: 1000000001 is not in the range 0 to 1000000000"),
        ("1 1 2 error_reads error_reads", "error_reads is given twice"),
    ],
)
async def test_bad_words(words: str, complaint: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await flakey(words)
    assert f"line 1: flakey: {complaint}" in caught.value.message

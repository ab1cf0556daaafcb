"""nbdmap.targets.dust: the kernel's document (admin-guide/device-mapper/dm-dust), and a model."""

import errno
import logging
import random
from itertools import pairwise

import pytest

from nbdmap.block.device import HOLE, ZERO
from nbdmap.block.io import CACHE, DISCARD, FLUSH, WRITE_ZEROES, Io
from nbdmap.dm.args import Args, split_words
from nbdmap.dm.table import Table
from nbdmap.errors import InvalidArgument, IoFailed
from nbdmap.targets import dust
from tests.support.disks import FakeDisk, build, read, write


async def say(table: Table, text: str, target: int = -1) -> str:
    return await table.targets[target].message(Args(split_words(text)))


async def dusty(words: str = "7:0 0 512", *messages: str) -> tuple[Table, FakeDisk]:
    disk = FakeDisk("7:0")
    table = await build(f"0 512 dust {words}", disk)
    for message in messages:
        await say(table, message)
    return table, disk


def status(table: Table) -> str:
    return table.status_lines()[-1].params


async def test_as_in_the_document(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    table, disk = await dusty("disk7:0 0 512")
    assert status(table) == "7:0 bypass verbose"
    for block in (60, 67, 72):
        assert await say(table, f"addbadblock {block}") == ""
    assert caplog.messages[0] == "badblock added at block 60 with write fail count 0"
    await read(table, 0, 128 * 512)
    assert await say(table, "enable") == ""
    assert status(table) == "7:0 fail_read_on_bad_block verbose"
    with pytest.raises(IoFailed, match="read of bad block 67 of disk7:0") as caught:
        await read(table, 67 * 512, 512)
    assert caught.value.errno == errno.EIO
    assert await say(table, "queryblock 72") == "dust_query_block: block 72 found in badblocklist"
    assert await say(table, "countbadblocks") == "countbadblocks: 3 badblock(s) found"
    assert await say(table, "listbadblocks") == "60\n67\n72\n"
    caplog.clear()
    await write(table, 0, b"z" * 128 * 512)
    assert disk.bytes[: 128 * 512] == b"z" * 128 * 512
    assert caplog.messages == [f"block {block} removed from badblocklist by write" for block in (60, 67, 72)]
    assert await say(table, "queryblock 72") == "dust_query_block: block 72 not found in badblocklist"
    assert await say(table, "listbadblocks") == "No blocks in badblocklist"
    assert await say(table, "clearbadblocks") == "dust_clear_badblocks: no badblocks found"
    await say(table, "addbadblock 88")
    with pytest.raises(InvalidArgument, match="block 88 already in badblocklist"):
        await say(table, "addbadblock 88")
    with pytest.raises(InvalidArgument, match="block 87 not found in badblocklist"):
        await say(table, "removebadblock 87")
    assert await say(table, "removebadblock 88") == ""
    await say(table, "addbadblock 1")
    assert await say(table, "clearbadblocks") == "dust_clear_badblocks: badblocks cleared"
    assert await say(table, "quiet") == ""
    assert status(table) == "7:0 fail_read_on_bad_block quiet"
    caplog.clear()
    await say(table, "addbadblock 1")
    await write(table, 512, b"q" * 512)
    assert not caplog.messages
    await say(table, "QUIET")
    assert await say(table, "Disable") == ""
    assert status(table) == "7:0 bypass verbose"


async def test_writes_that_fail_a_number_of_times() -> None:
    table, disk = await dusty("7:0 0 512", "enable", "addbadblock 3 2", "addbadblock 5")
    for _ in range(2):
        disk.log.clear()
        with pytest.raises(IoFailed, match="write of bad block 3"):
            await write(table, 0, b"a" * 4096)
        assert disk.log == [("write", 0, 3 * 512, 0), ("write", 4 * 512, 4 * 512, 0)]
        assert disk.bytes[: 4096] == b"a" * 3 * 512 + bytes(512) + b"a" * 4 * 512
    await write(table, 0, b"a" * 4096)
    assert disk.bytes[:4096] == b"a" * 4096
    assert await read(table, 0, 4096) == b"a" * 4096


@pytest.mark.parametrize(("start", "block"), [(0, 512), (16, 4096), (24, 8192), (3, 4096)])
async def test_against_a_model(start: int, block: int) -> None:
    """Requests are cut at blocks from the target's start; a piece meets the block of the device that it begins in."""
    rng = random.Random(start)
    disk = FakeDisk("7:0")
    table = await build(f"0 16 error\n16 512 dust 7:0 {start} {block}", disk)
    await say(table, "enable")
    bad: dict[int, int] = {}
    for _ in range(400):
        if rng.random() < 0.4:
            number, fails = rng.randrange((start * 512 + 512 * 512) // block), rng.choice((0, 0, 1, 3))
            if number not in bad:
                await say(table, f"addbadblock {number} {fails}")
                bad[number] = fails
        first, last = sorted(rng.sample(range(513), 2))
        cuts = sorted({first * 512, last * 512, *range(-(-first * 512 // block) * block, last * 512, block)})
        pieces = [(low, high, (start * 512 + low) // block) for low, high in pairwise(cuts)]
        if rng.random() < 0.5:
            reading = read(table, (16 + first) * 512, (last - first) * 512)
            if any(number in bad for *_, number in pieces):
                with pytest.raises(IoFailed):
                    await reading
            else:
                assert await reading == disk.bytes[(start + first) * 512 : (start + last) * 512]
            continue
        data = rng.randbytes((last - first) * 512)
        wanted = bytearray(disk.bytes)
        failing = False
        for low, high, number in pieces:
            if bad.get(number):
                bad[number] -= 1
                failing = True
                continue
            bad.pop(number, None)
            wanted[start * 512 + low : start * 512 + high] = data[low - first * 512 : high - first * 512]
        writing = write(table, (16 + first) * 512, data)
        if failing:
            with pytest.raises(IoFailed):
                await writing
        else:
            await writing
        assert disk.bytes == wanted
        assert await say(table, "countbadblocks") == f"countbadblocks: {len(bad)} badblock(s) found"


async def test_other_operations() -> None:
    table, disk = await dusty("7:0 0 512", "enable", "addbadblock 0 1", "addbadblock 1")
    with pytest.raises(IoFailed):
        await table.submit(Io(CACHE, 512), 0)
    with pytest.raises(IoFailed, match="discard of bad block 0"):
        await table.submit(Io(DISCARD, 1024), 0)
    await table.submit(Io(DISCARD, 1024), 0)  # as in the kernel only its first block counts
    assert await say(table, "listbadblocks") == "1\n"
    await table.submit(Io(FLUSH, 0), 0)
    assert [entry[0] for entry in disk.log] == ["discard", "flush"]
    await say(table, "addbadblock 3 1")
    disk.log.clear()
    with pytest.raises(IoFailed, match="write_zeroes of bad block 3"):
        await table.submit(Io(WRITE_ZEROES, 4096), 0)
    assert [entry[:3] for entry in disk.log] == [("write_zeroes", 0, 3 * 512), ("write_zeroes", 4 * 512, 4 * 512)]
    assert await say(table, "listbadblocks") == "3\n"


async def test_nothing_is_a_hole() -> None:
    table, disk = await dusty()
    disk.runs = [(disk.size, HOLE | ZERO)]
    assert await table.extents(0, 4096) == [(4096, 0)]
    assert not table.limits.sparse


async def test_there_is_an_end_to_bad_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dust, "MAX_BAD_BLOCKS", 2)
    table, _ = await dusty("7:0 0 512", "addbadblock 1", "addbadblock 2")
    with pytest.raises(InvalidArgument, match="there are 2 bad blocks, no more are taken"):
        await say(table, "addbadblock 3")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("hello", "unknown message 'hello'"),
        ("addbadblock", "block is missing"),
        ("addbadblock x", "block: 'x' is not a decimal number"),
        ("addbadblock 1025", "block: 1025 is not in the range 0 to 1024"),
        ("addbadblock 1 256", "number of failing writes: 256 is not in the range 0 to 255"),
        ("addbadblock 1 1 1", "unexpected word '1'"),
        ("queryblock 1 1", "unexpected word '1'"),
        ("removebadblock 1 1", "unexpected word '1'"),
        ("enable 1", "unexpected word '1'"),
        ("disable 1", "unexpected word '1'"),
        ("quiet 1", "unexpected word '1'"),
        ("clearbadblocks 1", "unexpected word '1'"),
        ("countbadblocks 1", "unexpected word '1'"),
        ("listbadblocks 1", "unexpected word '1'"),
    ],
)
async def test_bad_messages_change_nothing(text: str, complaint: str) -> None:
    table, _ = await dusty("7:0 0 512", "addbadblock 1")
    with pytest.raises(InvalidArgument) as caught:
        await say(table, text)
    assert caught.value.message == complaint
    assert status(table) == "7:0 bypass verbose"
    assert await say(table, "listbadblocks") == "1\n"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("7:0 0", "block size is missing"),
        ("7:0 0 512 1", "unexpected word '1'"),
        ("7:0 0 256", "block size: 256 is not in the range 512 to 1073741824"),
        ("7:0 0 1536", "block size: 1536 is not a power of 2"),
        ("7:0 0 524288", "block size: 524288 is more than the target's length, 262144 bytes"),
        ("7:0 x 512", "start sector: 'x' is not a decimal number"),
    ],
)
async def test_bad_words(words: str, complaint: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await dusty(words)
    assert caught.value.message == f"line 1: dust: {complaint}"


async def test_table() -> None:
    table, _ = await dusty("disk7:0 8 4096")
    assert table.table_lines()[0].params == "7:0 8 4096"

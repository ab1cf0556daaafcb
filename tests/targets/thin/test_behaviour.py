"""What the device-mapper-test-suite asserts of thin provisioning (reliability.md 1.2), without a kernel."""

import asyncio
import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from nbdmap.block.device import HOLE, ZERO, Limits
from nbdmap.block.io import FUA, WRITE_ZEROES, Io
from nbdmap.dm.table import parse_table
from nbdmap.errors import Busy, Exists, InvalidArgument, IoFailed, NoData, NotPermitted, OutOfSpace, Unsupported
from tests.support.disks import ALL, FakeDisk, eio, read, write
from tests.support.thin import BLOCK, ThinSite, contents, discard, flush, settle

A, B, C = b"a" * 4096, b"b" * 4096, b"c" * 4096


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[ThinSite]:
    """A pool of 8 blocks of 64 KiB; closed and checked at the end."""
    made = ThinSite(tmp_path, data_blocks=8)
    await made.open()
    yield made
    await made.close()


# --- provisioning ------------------------------------------------------------------------------------------------------


async def test_an_empty_volume_reads_zeroes_and_uses_nothing(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    assert await contents(thin) == bytes(thin.size)
    assert await site.used() == 0
    assert await site.status("t") == "0 -"
    assert await thin.extents(0, thin.size) == [(thin.size, HOLE | ZERO)]


async def test_a_small_write_provisions_one_zeroed_block(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, 17 * 4096, A)
    assert await site.status("t") == "128 255"
    assert await read(thin, BLOCK, BLOCK) == bytes(4096) + A + bytes(BLOCK - 8192)
    assert await thin.extents(0, 4 * BLOCK) == [(BLOCK, HOLE | ZERO), (BLOCK, 0), (2 * BLOCK, HOLE | ZERO)]


async def test_a_whole_block_is_written_once(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    site.data.log.clear()
    await write(thin, 0, b"x" * BLOCK)
    assert [entry[:3] for entry in site.data.log] == [("write", 0, BLOCK)]


async def test_skip_block_zeroing_leaves_what_was_there(tmp_path: Path) -> None:
    made = ThinSite(tmp_path)
    await made.open("skip_block_zeroing")
    thin = await made.new("t", 0)
    await write(thin, 0, A)
    assert (await read(thin, 0, BLOCK)) == A + b"\xee" * (BLOCK - 4096)
    await made.close()


async def test_zeroing_hides_what_another_volume_had(site: ThinSite) -> None:
    first = await site.new("t", 0)
    await write(first, 0, b"secret!!" * (8 * BLOCK // 8))
    await site.remove("t")
    await site.message("delete 0")
    second = await site.new("u", 1)
    for block in range(8):
        await write(second, block * BLOCK, A)
    assert b"secret" not in await contents(second)


async def test_concurrent_first_writes_provision_once(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    site.data.gate = asyncio.Event()
    writes = [asyncio.ensure_future(write(thin, number * 4096, bytes([number]) * 4096)) for number in range(16)]
    await settle()
    site.data.gate.set()
    await asyncio.gather(*writes)
    assert await site.used() == 1
    assert await read(thin, 0, BLOCK) == b"".join(bytes([number]) * 4096 for number in range(16))


async def test_a_write_over_many_blocks(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    data = bytes(range(256)) * (3 * BLOCK // 256)
    await write(thin, BLOCK // 2, data)
    assert await site.used() == 4
    assert await read(thin, BLOCK // 2, len(data)) == data
    site.data.log.clear()
    await read(thin, BLOCK // 2, len(data))
    assert len(site.data.log) == 1, "neighbours on the data device are read at once"


async def test_blocks_that_are_no_power_of_two(tmp_path: Path) -> None:
    made = ThinSite(tmp_path, data_blocks=10, block=192 << 10)
    await made.open()
    thin = await made.new("t", 0, blocks=5)
    await write(thin, (192 << 10) - 4096, A + B)
    assert await read(thin, (192 << 10) - 8192, 4 * 4096) == bytes(4096) + A + B + bytes(4096)
    assert await made.status("t") == "768 767"
    await made.close()


async def test_large_blocks_are_filled_in_pieces(tmp_path: Path) -> None:
    made = ThinSite(tmp_path, data_blocks=4, block=4 << 20)
    await made.open()
    thin = await made.new("t", 0, blocks=4)
    await write(thin, (3 << 20) + 4096, A)
    assert max(length for _, _, length, _ in made.data.log) <= 1 << 20
    snap = await made.snap("s", 1, "t", 0, blocks=4)
    await write(thin, (1 << 20) - 4096, B + C)
    assert await read(snap, 0, 4 << 20) == bytes((3 << 20) + 4096) + A + bytes((1 << 20) - 8192)
    expected = bytearray((3 << 20) + 4096) + A + bytes((1 << 20) - 8192)
    expected[(1 << 20) - 4096 : (1 << 20) + 4096] = B + C
    assert await read(thin, 0, 4 << 20) == expected
    await made.close()


@pytest.mark.parametrize("sectors", [64, 127, 185, 0, 2097153, 2097280])
async def test_block_sizes_that_are_refused(tmp_path: Path, sectors: int) -> None:
    made = ThinSite(tmp_path)
    with pytest.raises(InvalidArgument, match="data block size"):
        await made.create("pool", f"0 8192 thin-pool 7:0 7:1 {sectors} 0")
    assert not made.meta.openers


async def test_the_largest_block_size(tmp_path: Path) -> None:
    made = ThinSite(tmp_path)
    await made.create("pool", "0 8192 thin-pool 7:0 7:1 2097152 0")
    assert (await made.status()).split()[2] == "0/0"
    await made.close()


async def test_volume_numbers(site: ThinSite) -> None:
    await site.message(f"create_thin {(1 << 24) - 1}")
    with pytest.raises(InvalidArgument):
        await site.message(f"create_thin {1 << 24}")
    with pytest.raises(Exists):
        await site.message(f"create_thin {(1 << 24) - 1}")
    with pytest.raises(NoData):
        await site.thin("t", 5)


async def test_many_volumes_and_recursive_snapshots(tmp_path: Path) -> None:
    made = ThinSite(tmp_path, metadata_blocks=2048)
    await made.open()
    for number in range(200):
        await made.message(f"create_thin {number}")
    for number in range(200, 400):
        await made.message(f"create_snap {number} 0")
    for number in range(400, 600):
        await made.message(f"create_snap {number} {number - 1}")
    thin = await made.thin("t", 599)
    await write(thin, 0, A)
    await made.close()


async def test_a_volume_of_a_suspended_pool_is_refused(site: ThinSite) -> None:
    await site.message("create_thin 0")
    await site.devices["pool"].suspend()
    with pytest.raises(InvalidArgument, match="is suspended"):
        await site.thin("t", 0)
    await site.devices["pool"].resume()
    await site.thin("t", 0)


# --- commits -----------------------------------------------------------------------------------------------------------


async def test_a_flush_after_a_new_mapping_commits(site: ThinSite) -> None:
    thin, other = await site.new("t", 0), await site.new("u", 1)
    before = site.commits()
    await write(thin, 0, A)
    await flush(other)
    assert site.commits() == before, "another volume's flush does not"
    await flush(thin)
    assert site.commits() == before + 1
    await flush(thin)
    assert site.commits() == before + 1, "nothing has changed"
    site.data.log.clear()
    await write(thin, 0, B)
    await flush(thin)
    assert site.commits() == before + 1
    assert ("flush", 0, 0, 0) in site.data.log


async def test_fua_commits_and_is_passed_down(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    before = site.commits()
    await write(thin, 0, A, FUA)
    assert site.commits() == before + 1


async def test_the_data_is_flushed_before_the_superblock_is_written(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, 0, A)
    order: list[str] = []
    site.data.failure = lambda io, offset: order.append(f"data {io.op.name}")
    site.meta.failure = lambda io, offset: order.append(f"meta {io.op.name} {'sb' if not offset else ''}".strip())
    await flush(thin)
    assert order[0] == "data FLUSH"
    superblock = order.index("meta WRITE sb")
    assert "meta FLUSH sb" in order[1:superblock]
    assert superblock == len(order) - 1
    assert site.meta.log[-1] == ("write", 0, 4096, FUA)


async def test_concurrent_flushes_share_commits(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, 0, A)
    before = site.commits()
    await asyncio.gather(*(flush(thin) for _ in range(20)))
    assert site.commits() - before <= 2


async def test_a_flush_waits_for_what_came_before_it_only(site: ThinSite) -> None:
    """A commit under way does not cover what was written after it began."""
    thin = await site.new("t", 0)
    await write(thin, 0, A)
    site.meta.gate = asyncio.Event()
    first = asyncio.ensure_future(flush(thin))
    await settle()
    await write(thin, 0, B)
    second = asyncio.ensure_future(flush(thin))
    await settle()
    assert not first.done()
    assert not second.done()
    site.data.log.clear()
    site.meta.gate.set()
    await asyncio.gather(first, second)
    assert ("flush", 0, 0, 0) in site.data.log


async def test_a_discard_is_committed_by_a_flush(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, 0, A, FUA)
    before = site.commits()
    await discard(thin, 0, BLOCK)
    await flush(thin)
    assert site.commits() == before + 1
    assert await site.used() == 0


async def test_commits_come_each_second(site: ThinSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdmap.targets.thin.pool.COMMIT_PERIOD_S", 0.01)
    thin = await site.new("t", 0)
    before = site.commits()
    await write(thin, 0, A)
    await asyncio.sleep(0.05)
    assert site.commits() == before + 1


# --- discards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "can", "word", "passed"),
    [
        ("", True, "discard_passdown", True),
        ("", False, "no_discard_passdown", False),
        ("no_discard_passdown", True, "no_discard_passdown", False),
        ("no_discard_passdown", False, "no_discard_passdown", False),
    ],
)
async def test_passdown(tmp_path: Path, features: str, can: bool, word: str, passed: bool) -> None:
    made = ThinSite(tmp_path)
    made.data.limits = ALL if can else Limits()
    await made.open(features)
    thin = await made.new("t", 0)
    assert (await made.status()).split()[5] == word
    await write(thin, 0, A)
    await write(thin, BLOCK, B)
    await discard(thin, 0, 2 * BLOCK)
    assert await read(thin, 0, BLOCK * 2) == bytes(2 * BLOCK)
    assert await made.used() == 0
    assert (("discard", 0, 2 * BLOCK, 0) in made.data.log) is passed
    await made.close()


async def test_ignore_discard(tmp_path: Path) -> None:
    made = ThinSite(tmp_path)
    await made.open("ignore_discard")
    thin = await made.new("t", 0)
    await write(thin, 0, A)
    with pytest.raises(Unsupported):
        await discard(thin, 0, BLOCK)
    with pytest.raises(InvalidArgument, match="ignore_discard cannot be changed"):
        await made.reload("pool", made.pool_table())
    await made.close()


@pytest.mark.parametrize(("first", "length"), [(0, BLOCK // 2), (512, BLOCK - 512), (BLOCK // 2, BLOCK), (4096, 4096)])
async def test_partial_blocks_are_not_discarded(site: ThinSite, first: int, length: int) -> None:
    thin = await site.new("t", 0)
    await write(thin, 0, b"x" * 2 * BLOCK)
    await discard(thin, first, length)
    assert await read(thin, 0, 2 * BLOCK) == b"x" * 2 * BLOCK


async def test_a_discard_is_rounded_inward(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, 0, b"x" * 4 * BLOCK)
    await discard(thin, 512, 3 * BLOCK)
    assert await site.status("t") == "256 511"
    await discard(thin, 3 * BLOCK, BLOCK)
    assert await site.status("t") == "128 127"


async def test_alternate_blocks(site: ThinSite) -> None:
    thin = await site.new("t", 0, blocks=8)
    await write(thin, 0, b"x" * 8 * BLOCK)
    for block in range(0, 8, 2):
        await discard(thin, block * BLOCK, BLOCK)
    assert await contents(thin) == (bytes(BLOCK) + b"x" * BLOCK) * 4
    assert await site.used() == 4


async def test_a_shared_block_is_not_passed_down(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, 0, A)
    snap = await site.snap("s", 1, "t", 0)
    site.data.log.clear()
    await discard(snap, 0, BLOCK)
    await site.status()
    assert not [entry for entry in site.data.log if entry[0] == "discard"]
    assert await read(thin, 0, 4096) == A
    assert await read(snap, 0, 4096) == bytes(4096)
    await discard(thin, 0, BLOCK)
    assert not [entry for entry in site.data.log if entry[0] == "discard"], "a commit comes first"
    assert await site.used() == 0
    assert [entry for entry in site.data.log if entry[0] == "discard"], "previously shared"


async def test_a_discard_beyond_the_end_fails(site: ThinSite) -> None:
    thin = await site.new("t", 0, blocks=2)
    with pytest.raises(IoFailed):
        await discard(thin, BLOCK, 2 * BLOCK)


async def test_a_failing_discard_of_the_data_device_is_no_failure(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, 0, A)
    site.data.failure = lambda io, offset: IoFailed("no") if io.op.name == "DISCARD" else None
    await discard(thin, 0, BLOCK)
    assert await site.used() == 0


async def test_a_discarded_block_is_not_reused_before_a_commit(site: ThinSite) -> None:
    thin = await site.new("t", 0, blocks=16)
    await write(thin, 0, A, FUA)
    await discard(thin, 0, BLOCK)
    site.data.log.clear()
    for block in range(1, 8):
        await write(thin, block * BLOCK, B)
    assert all(entry[1] // BLOCK != 0 for entry in site.data.log if entry[0] == "write")
    await write(thin, 8 * BLOCK, C)  # the pool is full but for that one: a commit comes first
    assert await site.used() == 8


async def test_reads_under_way_end_before_their_block_is_freed(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, 0, A, FUA)
    site.data.gate = asyncio.Event()
    reading = asyncio.ensure_future(read(thin, 0, 4096))
    discarding = asyncio.ensure_future(discard(thin, 0, BLOCK))
    await settle()
    assert site.pool.volumes[0].written == 1
    site.data.gate.set()
    assert await reading == A
    await discarding
    assert site.pool.volumes[0].written == 0


async def test_discards_with_io_around(site: ThinSite) -> None:
    thin = await site.new("t", 0, blocks=8)
    for _ in range(5):
        await asyncio.gather(
            *(write(thin, block * BLOCK, A) for block in range(8)), *(discard(thin, block * BLOCK, BLOCK) for block in range(8))
        )
        found = [await read(thin, block * BLOCK, 4096) for block in range(8)]
        assert set(found) <= {A, bytes(4096)}
    await flush(thin)


async def test_write_zeroes_is_not_supported(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    with pytest.raises(Unsupported):
        await thin.submit(Io(WRITE_ZEROES, 4096), 0)


# --- snapshots ---------------------------------------------------------------------------------------------------------


async def test_breaking_sharing_counts_blocks(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, 0, b"x" * 3 * BLOCK)
    snap = await site.snap("s", 1, "t", 0)
    assert await site.used() == 3
    await write(thin, 0, A)
    assert await site.used() == 4
    await write(thin, 4096, B)
    assert await site.used() == 4
    await write(snap, 0, C)
    assert await site.used() == 4, "it is copied again, as it was mapped before the snapshot; then nobody has the old one"
    assert await read(thin, 0, BLOCK) == A + B + b"x" * (BLOCK - 8192)
    assert await read(snap, 0, BLOCK) == C + b"x" * (BLOCK - 4096)


async def test_overwriting_a_whole_shared_block_reads_nothing(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, 0, A)
    await site.snap("s", 1, "t", 0)
    site.data.log.clear()
    await write(thin, 0, b"y" * BLOCK)
    assert [entry[0] for entry in site.data.log] == ["write"]


async def test_many_snapshots_of_one_origin(tmp_path: Path) -> None:
    """More than two references spill into the tree of counts."""
    made = ThinSite(tmp_path, data_blocks=100)
    await made.open()
    thin = await made.new("t", 0, blocks=8)
    await write(thin, 0, A)
    await write(thin, BLOCK, A)
    snaps = []
    for number in range(1, 9):
        snaps.append(await made.snap(f"s{number}", number, "t", 0, blocks=8))
        await write(snaps[-1], BLOCK, bytes([number]) * 4096)
    made.check()
    for number, snap in enumerate(snaps, 1):
        assert await read(snap, 0, 4096) == A
        assert await read(snap, BLOCK, 4096) == bytes([number]) * 4096
    await made.close()


async def test_a_chain_of_snapshots(tmp_path: Path) -> None:
    made = ThinSite(tmp_path, data_blocks=100, metadata_blocks=1024)
    await made.open()
    await made.new("t0", 0, blocks=8)
    for depth in range(1, 30):
        await write(made.devices[f"t{depth - 1}"], depth % 8 * BLOCK, bytes([depth]) * 4096)
        await made.snap(f"t{depth}", depth, f"t{depth - 1}", depth - 1, blocks=8)
    for depth in range(1, 30):
        assert await read(made.devices[f"t{depth}"], depth % 8 * BLOCK, 4096) == bytes([depth]) * 4096
    await made.close()


async def test_a_snapshot_of_an_active_origin_that_nobody_suspended(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, 0, A)
    await site.message("create_snap 1 0")
    await write(thin, 0, B)
    assert await read(await site.thin("s", 1), 0, 4096) == A
    assert await read(thin, 0, 4096) == B


async def test_a_refused_snapshot_changes_nothing(site: ThinSite) -> None:
    await site.message("create_thin 0")
    await site.message("create_thin 1")
    with pytest.raises(Exists):
        await site.message("create_snap 1 0")
    with pytest.raises(NoData):
        await site.message("create_snap 2 9")
    with pytest.raises(NoData):
        await site.thin("t", 2)


async def test_deleting(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, 0, A)
    with pytest.raises(Busy):
        await site.message("delete 0")
    await site.remove("t")
    await site.message("delete 0")
    assert await site.used() == 0
    with pytest.raises(NoData):
        await site.message("delete 0")


async def test_trim(site: ThinSite) -> None:
    """The message of the 2011 document."""
    thin = await site.new("t", 0)
    await write(thin, 0, b"x" * 4 * BLOCK)
    with pytest.raises(Busy):
        await site.message("trim 0 128")
    await site.remove("t")
    await site.message("trim 0 129")
    thin = await site.thin("t", 0)
    assert await site.status("t") == "256 255"
    assert await read(thin, 0, 4 * BLOCK) == b"x" * 2 * BLOCK + bytes(2 * BLOCK)
    with pytest.raises(NoData):
        await site.message("trim 7 0")


# --- external origins --------------------------------------------------------------------------------------------------


async def test_an_external_origin(site: ThinSite) -> None:
    origin = FakeDisk("7:9", 300)
    origin.bytes[:] = b"o" * origin.size
    site.opener.devices["7:9"] = origin
    thin = await site.new("x", 0, blocks=4, origin="7:9")
    assert await contents(thin) == b"o" * origin.size + bytes(4 * BLOCK - origin.size)
    await write(thin, 33 * 4096, A)
    expected = bytearray(b"o" * origin.size + bytes(4 * BLOCK - origin.size))
    expected[33 * 4096 : 34 * 4096] = A
    assert await contents(thin) == expected
    assert bytes(origin.bytes) == b"o" * origin.size
    await discard(thin, 2 * BLOCK, BLOCK)
    assert await read(thin, 33 * 4096, 4096) == b"o" * 4096
    assert (await thin.extents(0, thin.size))[-1] == (4 * BLOCK - origin.size, HOLE | ZERO)
    assert not [entry for entry in origin.log if entry[0] != "read"]
    assert [line.params for line in thin.live.table_lines()] == ["254:0 0 7:9"] if thin.live else False


async def test_the_pool_is_no_external_origin(site: ThinSite) -> None:
    await site.message("create_thin 0")
    with pytest.raises(InvalidArgument):
        await site.thin("t", 0, origin="pool")


# --- out of data space -------------------------------------------------------------------------------------------------


async def fill(site: ThinSite, thin: object = None, blocks: int = 8) -> None:
    for block in range(blocks):
        await write(site.devices["t"], block * BLOCK, b"x" * BLOCK)


async def test_errors_at_once_when_told_so(tmp_path: Path) -> None:
    made = ThinSite(tmp_path, data_blocks=8)
    await made.open("error_if_no_space", low_water=2)
    thin = await made.new("t", 0)
    pool = made.devices["pool"]
    await fill(made)
    assert pool.event_number == 1, "the low water mark"
    with pytest.raises(OutOfSpace):
        await write(thin, 9 * BLOCK, A)
    assert await made.mode() == "out_of_data_space"
    assert pool.event_number == 2
    await write(thin, 0, B)  # what is mapped goes on
    assert await read(thin, 0, 4096) == B
    await made.message("create_thin 5")
    await discard(thin, 6 * BLOCK, 2 * BLOCK)
    assert await made.mode() == "rw"
    assert pool.event_number == 3
    await write(thin, 9 * BLOCK, A)
    assert "needs_check" not in await made.status()
    await made.close()


async def test_waits_for_space(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await fill(site)
    waiting = asyncio.ensure_future(write(thin, 9 * BLOCK, A))
    await settle()
    assert not waiting.done()
    assert await site.mode() == "out_of_data_space"
    site.data.bytes += bytes(8 * BLOCK)
    site.data.size += 8 * BLOCK
    await settle()
    assert not waiting.done(), "a larger device does nothing until the table says so"
    await site.reload("pool", site.pool_table(blocks=16))
    await waiting
    assert await read(thin, 9 * BLOCK, 4096) == A
    assert (await site.status()).split()[2:5] == ["9/16", "-", "rw"]


async def test_waits_in_vain(site: ThinSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdmap.targets.thin.space.NO_SPACE_TIMEOUT_S", 0.01)
    thin = await site.new("t", 0)
    await fill(site)
    with pytest.raises(OutOfSpace):
        await write(thin, 9 * BLOCK, A)
    status = (await site.status()).split()
    assert (status[4], status[6]) == ("out_of_data_space", "error_if_no_space")
    assert site.devices["pool"].event_number == 3
    with pytest.raises(OutOfSpace):
        await write(thin, 9 * BLOCK, A)
    await discard(thin, 0, BLOCK)
    status = (await site.status()).split()
    assert (status[4], status[6], site.devices["pool"].event_number) == ("rw", "queue_if_no_space", 4)


async def test_a_suspend_without_flush_hands_waiting_writes_back(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await fill(site)
    waiting = asyncio.ensure_future(write(thin, 9 * BLOCK, A))
    await settle()
    await thin.suspend(noflush=True)
    assert not waiting.done()
    await discard_of(site, "s")
    await thin.resume()
    await waiting


async def discard_of(site: ThinSite, name: str) -> None:
    """Frees space: through another table on the same volume."""
    other = await site.thin(name, 0)
    await discard(other, 0, BLOCK)
    await site.remove(name)


async def test_a_discard_wakes_waiting_writes(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await fill(site)
    waiting = asyncio.ensure_future(write(thin, 9 * BLOCK, A))
    await settle()
    await discard(thin, 0, BLOCK)
    await waiting


async def test_deleting_a_volume_wakes_waiting_writes(site: ThinSite) -> None:
    await site.new("t", 0)
    await fill(site, blocks=4)
    await site.remove("t")
    thin = await site.new("t", 1)
    await fill(site, blocks=4)
    waiting = asyncio.ensure_future(write(thin, 9 * BLOCK, A))
    await settle()
    await site.message("delete 0")
    await waiting


# --- out of metadata space ---------------------------------------------------------------------------------------------


async def test_out_of_metadata_space(tmp_path: Path) -> None:
    made = ThinSite(tmp_path, metadata_blocks=64)
    await made.open()
    created = 0
    while await made.mode() == "rw":
        await made.message(f"create_thin {created}")
        created += 1
    assert 30 < created < 64
    assert await made.mode() == "ro"
    with pytest.raises(Unsupported):
        await made.message("create_thin 99")
    thin = await made.thin("t", 0)
    with pytest.raises(IoFailed):
        await write(thin, 0, A)
    assert await read(thin, 0, 4096) == bytes(4096)
    await discard(thin, 0, BLOCK)
    made.check()
    made.meta.bytes += bytes(192 * 4096)
    made.meta.size = len(made.meta.bytes)
    await made.devices["pool"].suspend()
    await made.devices["pool"].resume()
    assert (await made.status()).split()[1].endswith("/256")
    assert await made.mode() == "rw"
    await write(thin, 0, A)
    await made.close()


# --- failures of the metadata ------------------------------------------------------------------------------------------


async def test_a_commit_that_fails(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, 0, A, FUA)
    await write(thin, BLOCK, B)
    before = bytes(site.meta.bytes)
    site.meta.failure = lambda io, offset: IoFailed("no") if io.op.name == "WRITE" else None
    events = site.devices["pool"].event_number
    with pytest.raises(IoFailed):
        await flush(thin)
    status = (await site.status()).split()
    assert (status[4], status[7]) == ("ro", "needs_check")
    assert site.devices["pool"].event_number == events + 1
    assert bytes(site.meta.bytes) == before
    with pytest.raises(IoFailed):
        await flush(thin)
    with pytest.raises(Unsupported):
        await site.message("create_thin 1")
    await write(thin, 0, C)
    assert await read(thin, 0, 4096) == C
    assert await read(thin, BLOCK, 4096) == bytes(4096), "back to the last commit"
    with pytest.raises(IoFailed):
        await write(thin, BLOCK, B)
    site.meta.failure = lambda io, offset: None
    await site.devices["pool"].suspend()
    await site.devices["pool"].resume()
    assert (await site.status()).split()[7] == "needs_check", "it does not go away"
    assert site.meta.bytes[4] == 1, "and is on the disk"
    site.meta.bytes[:] = await cleared(site)


async def cleared(site: ThinSite) -> bytes:
    """The metadata after `thin_check --clear-needs-check-flag`."""
    path = site.save()
    process = await asyncio.create_subprocess_exec("thin_check", "-q", "--clear-needs-check-flag", path)
    assert await process.wait() == 0
    return path.read_bytes()


async def test_needs_check_survives_until_it_is_cleared(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, 0, A)
    site.meta.failure = lambda io, offset: IoFailed("no") if io.op.name == "FLUSH" else None
    with pytest.raises(IoFailed):
        await flush(thin)
    site.meta.failure = lambda io, offset: None
    await site.remove("t", "pool")
    await site.open()
    status = (await site.status()).split()
    assert (status[4], status[7], site.devices["pool"].event_number) == ("ro", "needs_check", 1)
    await site.remove("pool")
    site.meta.bytes[:] = await cleared(site)
    await site.open()
    assert await site.mode() == "rw"


async def test_the_data_device_does_not_flush(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, 0, A)
    site.data.failure = lambda io, offset: IoFailed("no") if io.op.name == "FLUSH" else None
    with pytest.raises(IoFailed):
        await flush(thin)
    assert (await site.status()).split()[7] == "needs_check"
    site.data.failure = lambda io, offset: None
    site.meta.bytes[:] = await cleared(site)


async def test_metadata_that_fails_altogether(tmp_path: Path) -> None:
    made = ThinSite(tmp_path)
    await made.open()
    thin = await made.new("t", 0)
    await write(thin, 0, A)
    events = made.devices["pool"].event_number
    made.meta.failure = eio
    with pytest.raises(IoFailed):
        await flush(thin)
    assert await made.status() == "Fail"
    assert await made.status("t") == "Fail"
    assert [line.params for line in thin.live.table_lines()] == ["Fail"] if thin.live else False
    assert made.devices["pool"].event_number == events + 1
    for request in (read(thin, 0, 4096), write(thin, 0, A), flush(thin), discard(thin, 0, BLOCK)):
        with pytest.raises(IoFailed):
            await request
    made.meta.failure = lambda io, offset: None
    await made.devices["pool"].suspend()
    await made.devices["pool"].resume()
    assert await made.status() == "Fail"
    await made.close()


async def test_status_says_error_while_the_mappings_cannot_be_read(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, BLOCK, A, FUA)
    await write(thin, 2 * BLOCK, A)
    mappings = site.pool.metadata.superblock.mapping_root * 4096
    site.data.failure = lambda io, offset: IoFailed("no") if io.op.name == "FLUSH" else None
    site.meta.failure = lambda io, offset: IoFailed("no") if (io.op.name, offset) == ("READ", mappings) else None
    with pytest.raises(IoFailed):
        await flush(thin)
    assert (await site.status()).split()[7] == "needs_check"
    assert await site.status("t") == "Error"
    site.meta.failure = site.data.failure = lambda io, offset: None
    assert await site.status("t") == "128 255"
    site.meta.bytes[:] = await cleared(site)


async def test_a_data_device_without_space_is_not_waited_for(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    site.data.failure = lambda io, offset: OutOfSpace("a thin volume below") if io.op.name == "WRITE" else None
    with pytest.raises(IoFailed) as caught:
        await asyncio.wait_for(write(thin, 0, A), 5)
    assert caught.value.errno == errno.ENOSPC
    assert await site.mode() == "rw"
    site.data.failure = lambda io, offset: None
    await write(thin, 0, A)


async def test_a_metadata_device_without_space_is_no_full_metadata(site: ThinSite) -> None:
    site.meta.failure = lambda io, offset: OutOfSpace("a thin volume below") if io.op.name == "WRITE" else None
    with pytest.raises(IoFailed):
        await site.message("create_thin 0")
    assert (await site.status()).split()[4:8:3] == ["ro", "needs_check"]
    site.meta.failure = lambda io, offset: None
    site.meta.bytes[:] = await cleared(site)


async def commit_under_way(site: ThinSite, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """A write that a commit has set aside; its flush of the data device ends when the event is set."""
    thin = await site.new("t", 0)
    await write(thin, 0, A)
    gate = asyncio.Event()
    flush_data = site.pool.flush_data

    async def slow() -> None:
        monkeypatch.undo()
        await gate.wait()
        await flush_data()

    monkeypatch.setattr(site.pool, "flush_data", slow)
    site.pool.spawn(site.pool.commit())
    await settle()
    return gate


async def test_a_suspend_waits_for_the_commit_under_way(site: ThinSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even after its pool was suspended, which holds the volume's device from inside."""
    gate = await commit_under_way(site, monkeypatch)
    thin = site.devices["t"]
    await thin.hold()
    thin.let_go()
    suspend = asyncio.ensure_future(thin.suspend())
    await settle()
    assert not suspend.done()
    gate.set()
    await suspend
    await thin.resume()


async def test_a_flush_of_the_pool_waits_for_the_commit_under_way(site: ThinSite, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = await commit_under_way(site, monkeypatch)
    flushed = asyncio.ensure_future(flush(site.devices["pool"]))
    await settle()
    assert not flushed.done()
    gate.set()
    await flushed


async def test_the_caches_are_counted(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    for block in range(3):
        await write(thin, block * BLOCK, A)
    counters = site.devices["pool"].targets[0].counters()
    assert counters["cached_mappings"] == 3
    assert 0 < counters["cached_metadata_blocks"] <= counters["cached_metadata_blocks_max"]
    await site.remove("t")
    assert site.devices["pool"].targets[0].counters()["cached_mappings"] in (0, 3)  # until it is committed
    await site.status()
    assert site.devices["pool"].targets[0].counters()["cached_mappings"] == 0


async def test_a_read_only_pool(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, 0, A)
    await site.snap("s", 1, "t", 0)
    await write(thin, BLOCK, B)
    await site.reload("pool", site.pool_table("read_only"))
    assert await site.mode() == "ro"
    await write(thin, BLOCK, C)
    assert await read(thin, BLOCK, 4096) == C
    with pytest.raises(IoFailed):
        await write(thin, 0, B)  # shared
    with pytest.raises(IoFailed):
        await write(thin, 2 * BLOCK, B)
    await discard(thin, 0, BLOCK)
    assert await read(thin, 0, 4096) == A
    await site.reload("pool", site.pool_table())
    await write(thin, 2 * BLOCK, B)


async def test_a_read_only_pool_is_not_formatted(tmp_path: Path) -> None:
    made = ThinSite(tmp_path)
    with pytest.raises(NotPermitted):
        await made.open("read_only")
    assert not any(made.meta.bytes)


async def test_metadata_that_is_none(tmp_path: Path) -> None:
    made = ThinSite(tmp_path)
    made.meta.bytes[:4096] = b"\x55" * 4096
    with pytest.raises(Exception, match="superblock") as caught:
        await made.open()
    assert getattr(caught.value, "errno", 0) == 15  # ENOTBLK


# --- the metadata snapshot -----------------------------------------------------------------------------------------------


async def test_the_metadata_snapshot(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, 0, A)
    await site.message("reserve_metadata_snap")
    held = (await site.status()).split()[3]
    assert held.isdigit()
    with pytest.raises(Busy):
        await site.message("reserve_metadata_snap")
    for block in range(8):
        await write(thin, block * BLOCK, B)
    site.check()
    await site.message("release_metadata_snap")
    with pytest.raises(InvalidArgument):
        await site.message("release_metadata_snap")


# --- tables --------------------------------------------------------------------------------------------------------------


async def test_two_pools_on_one_metadata_device(site: ThinSite) -> None:
    site.opener.devices["7:2"] = FakeDisk("7:2", 8192)
    with pytest.raises(Busy):
        await site.create("other", "0 8192 thin-pool 7:0 7:2 128 0")
    with pytest.raises(Busy):
        await site.reload("pool", "0 8192 thin-pool 7:0 7:2 128 0")
    with pytest.raises(InvalidArgument):
        await site.reload("pool", "0 8192 thin-pool 7:2 7:1 128 0")


@pytest.mark.parametrize("table", ["0 1024 linear 7:1 0", "0 1024 zero", "0 512 thin-pool 7:0 7:1 128 0\n512 8 zero"])
async def test_replacements_that_are_refused(site: ThinSite, table: str) -> None:
    with pytest.raises(InvalidArgument):
        await site.reload("pool", table)


@pytest.mark.parametrize("table", ["0 1024 error", "0 1024 zero", "0 1024 linear 7:1 0"])
async def test_a_volume_can_become_something_else(site: ThinSite, table: str) -> None:
    await site.new("t", 0)
    await site.reload("t", table)
    await site.message("delete 0")


async def test_transaction_ids(site: ThinSite) -> None:
    for number in range(100):
        await site.message(f"set_transaction_id {number} {number + 1}")
    with pytest.raises(InvalidArgument, match="the transaction id is 100, not 99"):
        await site.message("set_transaction_id 99 5")
    assert (await site.status()).split()[0] == "100"


async def test_a_smaller_pool_is_refused_at_resume(site: ThinSite) -> None:
    pool = site.devices["pool"]
    await pool.load(parse_table(site.pool_table(blocks=4)), site.opener, False)
    with pytest.raises(InvalidArgument, match="its metadata says 8"):
        await pool.resume()
    assert pool.suspended
    await site.reload("pool", site.pool_table())
    assert not pool.suspended


# --- suspending ----------------------------------------------------------------------------------------------------------


async def test_a_suspended_pool_holds_its_volumes(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, 0, A)
    await site.devices["pool"].suspend()
    assert not thin.suspended
    requests = [asyncio.ensure_future(one) for one in (write(thin, 0, B), read(thin, BLOCK, 4096), flush(thin), thin.suspend())]
    await settle()
    assert not any(request.done() for request in requests)
    await site.devices["pool"].resume()
    await requests[3]
    await thin.resume()
    await asyncio.gather(*requests)
    assert await read(thin, 0, 4096) == B


async def test_suspends_in_the_other_order(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await thin.suspend()
    await site.devices["pool"].suspend()
    await site.devices["pool"].resume()
    assert thin.suspended
    await thin.resume()


async def test_removing_all_while_the_pool_is_suspended(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, 0, A)
    await site.devices["pool"].suspend()
    await site.remove("t")
    await site.devices["pool"].resume()


async def test_a_suspend_commits(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, 0, A)
    await site.devices["pool"].suspend()
    site.check()
    assert not site.pool.needs_commit
    await site.devices["pool"].resume()
    assert await read(thin, 0, 4096) == A


async def test_a_pool_is_opened_again(site: ThinSite) -> None:
    thin = await site.new("t", 0)
    await write(thin, 0, A)
    await site.remove("t", "pool")
    await site.open()
    assert await read(await site.thin("t", 0), 0, 4096) == A


async def test_a_volume_grows_and_shrinks_with_its_table(site: ThinSite) -> None:
    thin = await site.new("t", 0, blocks=4)
    await write(thin, 3 * BLOCK, A)
    await site.reload("t", "0 128 thin pool 0")
    with pytest.raises(IoFailed):
        await read(thin, 3 * BLOCK, 4096)
    await site.reload("t", "0 1111 thin pool 0")
    assert await read(thin, 3 * BLOCK, 4096) == A
    await write(thin, 1110 * 512, b"z" * 512)
    assert await read(thin, 1110 * 512, 512) == b"z" * 512


async def test_io_on_the_pool_goes_to_the_data_device(site: ThinSite) -> None:
    pool = site.devices["pool"]
    await write(pool, 3 * 4096, A)
    assert bytes(site.data.bytes[3 * 4096 : 4 * 4096]) == A
    assert await read(pool, 3 * 4096, 4096) == A


async def test_a_volume_suspended_while_its_pool_is(site: ThinSite) -> None:
    """The pool takes no flush any more, and commits only at the end of its own suspend."""
    thin = await site.new("t", 0)
    await write(thin, 0, A)
    site.meta.gate = asyncio.Event()
    ending = asyncio.gather(thin.suspend(), site.devices["pool"].suspend())
    await settle()
    assert not thin.suspended or not ending.done()
    site.meta.gate.set()
    await ending
    assert not site.pool.needs_commit
    await site.devices["pool"].resume()
    await thin.resume()


async def test_the_metadata_snapshot_is_of_a_commit(site: ThinSite) -> None:
    """What is pending is committed first: the roots that are kept are those on the disk."""
    thin = await site.new("t", 0)
    for number in range(4):
        await write(thin, number * BLOCK, A)
        await site.message("reserve_metadata_snap")
        await write(thin, number * BLOCK + 4096, B)
        site.check()
        await site.message("release_metadata_snap")
    site.check()

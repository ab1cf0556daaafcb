"""nbdmap.dm.table: grammar, checks, splitting, flushing, limits."""

import pytest

from nbdmap.block.device import HOLE, ZERO, Limits
from nbdmap.block.io import CACHE, DISCARD, FLUSH, FUA, WRITE_ZEROES, Io
from nbdmap.dm import table as table_module
from nbdmap.dm.args import Args
from nbdmap.dm.table import Table, TableLine, TargetLine, parse_table
from nbdmap.dm.target import Opened, Spec
from nbdmap.errors import InvalidArgument, IoFailed, NotFound, Unsupported
from nbdmap.targets import TARGETS
from nbdmap.targets.linear import Linear
from tests.support.disks import FakeDisk, FakeOpener, build, eio, read, write


def test_parse() -> None:
    lines = parse_table("\n# a comment\n  0 8  linear   7:0 16 \n8\t8\tzero\n")
    assert lines == [TableLine(3, 0, 8, "linear", "7:0 16"), TableLine(4, 8, 8, "zero", "")]
    assert parse_table("") == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0 8", "line 1: '0 8' is not '<start> <length> <target> "),
        ("\n0x0 8 zero", "line 2: start: '0x0' is not a decimal number"),
        ("0 0 zero", "line 1: length: 0 is not in the range"),
        ("0 36028797018963968 zero", "line 1: length: 36028797018963968 is not in the range"),
        ("0 -8 zero", "line 1: length: '-8' is not a decimal number"),
    ],
)
def test_malformed_lines(text: str, complaint: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_table(text)
    assert complaint in caught.value.message


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "the table has no targets"),
        ("8 8 zero", "line 1: start 8 leaves a gap, 0 was expected"),
        ("0 8 zero\n16 8 zero", "line 2: start 16 leaves a gap, 8 was expected"),
        ("0 8 zero\n4 8 zero", "line 2: start 4 overlaps the line before, 8 was expected"),
        ("0 18014398509481983 zero\n18014398509481983 8 zero", "line 2: the device would have 18014398509481991 sectors"),
        ("0 8 nosuch 1 2", "line 1: unknown target type 'nosuch'"),
        ("0 8 zero 1", "line 1: zero: unexpected word '1'"),
        ("0 8 zero\n8 8 linear", "line 2: linear: device is missing"),
        ("0 2048 linear 7:0 0", "line 1: linear: sectors 0 to 2048 are beyond the end of disk7:0 (7:0), which has 1024"),
        ("0 8 linear 7:0 1020", "line 1: linear: sectors 1020 to 1028 are beyond the end"),
        ("0 8 linear 7:1 4", "line 1: linear: start 4 on disk7:1 (7:1) is not a multiple of its logical block, 8 sectors"),
        ("0 4 linear 7:1 0", "line 1: linear: length 4 on disk7:1 (7:1) is not a multiple of its logical block, 8 sectors"),
        ("0 4 linear 7:0 0\n4 16 linear 7:1 0", "line 2: linear: start 4 cuts a logical block of 8 sectors"),
        ("0 8 linear 7:1 0\n8 4 linear 7:0 0", "the device would have 12 sectors, not a multiple of the logical block, 8"),
    ],
)
async def test_refused_tables_give_everything_back(text: str, complaint: str) -> None:
    disks = FakeDisk("7:0"), FakeDisk("7:1", limits=Limits(logical_block=4096))
    with pytest.raises(InvalidArgument) as caught:
        await build(text, *disks)
    assert complaint in caught.value.message
    assert str(caught.value) == caught.value.message
    assert [disk.openers for disk in disks] == [0, 0]


async def test_too_many_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "MAX_TARGETS", 2)
    with pytest.raises(InvalidArgument, match="3 targets are more than 2"):
        await build("0 1 zero\n1 1 zero\n2 1 zero")


async def test_a_missing_device_keeps_its_errno_and_its_class() -> None:
    disk = FakeDisk("7:0")
    with pytest.raises(NotFound, match="line 2: linear: 9:9: no such device"):
        await build("0 8 linear 7:0 0\n8 8 linear 9:9 0", disk)
    assert disk.openers == 0


async def test_mixed_logical_blocks_that_fit() -> None:
    disks = FakeDisk("7:0"), FakeDisk("7:1", limits=Limits(logical_block=4096))
    table = await build("0 8 linear 7:0 0\n8 16 linear 7:1 0", *disks)
    assert table.limits.logical_block == 4096
    # a target that ends before the block that its neighbour began does not matter
    table = await build("0 4 linear 7:0 0\n4 2 linear 7:0 8\n6 2 linear 7:0 16\n8 8 linear 7:1 0", *disks)
    assert table.size == 16 * 512


async def test_a_device_of_unknown_size_is_not_checked() -> None:
    disk = FakeDisk("7:0")
    disk.size = 0
    assert (await build("0 8192 linear 7:0 0", disk)).size == 8192 * 512


async def test_requests_are_cut_at_borders() -> None:
    first, second = FakeDisk("7:0"), FakeDisk("7:1")
    table = await build("0 8 linear 7:0 100\n8 8 zero\n16 8 linear 7:1 200", first, second)
    data = bytes(range(256)) * 48
    await write(table, 0, data, FUA)
    assert first.log == [("write", 100 * 512, 4096, FUA)]
    assert second.log == [("write", 200 * 512, 4096, FUA)]
    assert await read(table, 0, 12288) == data[:4096] + bytes(4096) + data[8192:]
    assert await read(table, 4096 - 512, 1024) == data[3584:4096] + bytes(512)
    assert await read(table, 8192, 512) == data[8192:8704]
    assert first.log[-1] == ("read", 100 * 512 + 3584, 512, 0)


async def test_a_piece_that_fails_does_not_stop_the_others() -> None:
    first, second = FakeDisk("7:0"), FakeDisk("7:1")
    table = await build("0 8 linear 7:0 0\n8 8 linear 7:1 0", first, second)
    first.failure = eio
    with pytest.raises(IoFailed, match="broken on purpose"):
        await write(table, 0, b"x" * 8192)
    assert second.bytes[:4096] == b"x" * 4096


async def test_beyond_the_end() -> None:
    table = await build("0 8 zero")
    with pytest.raises(IoFailed, match="bytes 512 to 4608 are beyond the end of the table, 4096"):
        await read(table, 512, 4096)
    with pytest.raises(IoFailed, match="beyond the end"):
        await table.extents(0, 8192)
    with pytest.raises(InvalidArgument, match="sector 8 is beyond the end of the device, 8 sectors"):
        table.target_at_sector(8)
    assert table.target_at_sector(7) is table.targets[0]


async def test_flush_reaches_every_device_once() -> None:
    first, second, third = FakeDisk("7:0"), FakeDisk("7:1"), FakeDisk("7:2")
    table = await build("0 8 linear 7:0 0\n8 8 linear 7:1 0\n16 8 linear 7:0 8\n24 8 error 7:2 0", first, second, third)
    await table.submit(Io(FLUSH, 0), 0)
    assert first.log == second.log == [("flush", 0, 0, 0)]
    assert third.log == []
    single = await build("0 8 linear 7:2 0", third)
    await single.submit(Io(FLUSH, 0), 0)
    assert third.log == [("flush", 0, 0, 0)]
    await (await build("0 8 zero")).submit(Io(FLUSH, 0), 0)


async def test_targets_that_take_flushes_are_given_them() -> None:
    class Taking(Linear):
        """Passes a flush on twice."""

        takes_flush = True

        async def submit(self, io: Io, offset: int) -> None:
            assert (io.op, offset) == (FLUSH, self.begin)
            for _ in range(2):
                await self._device.submit(io, 0)

    first, second = FakeDisk("7:0"), FakeDisk("7:1")
    types = {**TARGETS, "linear2": Taking}

    async def flushed(text: str) -> list[int]:
        table = await Table.build(parse_table(text), types, FakeOpener(first, second), False, lambda: None)
        await table.submit(Io(FLUSH, 0), 0)
        logs = [len(disk.log) for disk in (first, second)]
        assert table.flushed == [first, second][: len(table.devices)]
        first.log.clear()
        second.log.clear()
        return logs

    assert await flushed("0 8 linear2 7:0 0") == [2, 0]
    assert await flushed("0 8 linear 7:0 0\n8 8 linear2 7:1 0") == [1, 2]
    assert await flushed("0 8 linear2 7:0 0\n8 8 linear2 7:1 0\n16 8 linear 7:1 8") == [2, 3]


async def test_discard_and_zeroes_only_where_all_can() -> None:
    able, unable = FakeDisk("7:0"), FakeDisk("7:1", limits=Limits())
    both = await build("0 8 linear 7:0 0\n8 8 linear 7:1 0", able, unable)
    assert both.limits == Limits(sparse=True)
    for op in (DISCARD, WRITE_ZEROES):
        with pytest.raises(Unsupported, match=f"{op.name.lower()} is not supported by every device below"):
            await both.submit(Io(op, 512), 0)
    assert able.log == []
    one = await build("0 8 linear 7:0 0\n8 8 linear 7:0 64", able)
    await one.submit(Io(DISCARD, 8192, flags=FUA), 0)
    await one.submit(Io(WRITE_ZEROES, 512), 0)
    await one.submit(Io(CACHE, 512), 0)
    assert [entry[0] for entry in able.log] == ["discard", "discard", "write_zeroes", "cache"]
    mixed = await build("0 8 linear 7:0 0\n8 8 zero", able)
    assert mixed.limits.discard
    assert not mixed.limits.zero


async def test_extents_are_merged_across_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FakeDisk("7:0")
    disk.runs = [(4096, 0), (4096, HOLE | ZERO), (1024 * 512, 0)]
    table = await build("0 8 linear 7:0 0\n8 8 linear 7:0 16\n16 8 zero\n24 8 linear 7:0 8", disk)
    whole = [(8192, 0), (4096, ZERO), (4096, HOLE | ZERO)]
    assert await table.extents(0, 16384) == whole
    assert await table.extents(512, 1024) == [(1024, 0)]
    monkeypatch.setattr(table_module, "MAX_EXTENTS", 2)
    assert await table.extents(0, 16384) == whole[:2]


async def test_lines_and_devices() -> None:
    first, second = FakeDisk("7:0"), FakeDisk("7:1")
    text = "0 8 linear 7:1 0\n8 16 striped 2 8 7:0 0 7:1 8\n24 8 zero"
    table = await build(text, first, second)
    assert table.devices == [second, first]
    assert table.table_lines() == [
        TargetLine(0, 8, "linear", "7:1 0"),
        TargetLine(8, 16, "striped", "2 8 7:0 0 7:1 8"),
        TargetLine(24, 8, "zero", ""),
    ]
    assert [line.params for line in table.status_lines()] == ["", "2 7:0 7:1 1 AA", ""]
    assert (first.openers, second.openers) == (1, 1)
    await table.close()
    assert (first.openers, second.openers) == (0, 0)


async def test_sizes_are_checked_again_without_lines() -> None:
    disk = FakeDisk("7:0", limits=Limits(logical_block=4096))
    table = await build("0 1024 linear 7:0 0", disk)
    table.check()
    disk.size = 512 * 512
    with pytest.raises(InvalidArgument, match=r"^linear: sectors 0 to 1024 are beyond the end"):
        table.check()


async def test_construct_of_table_is_the_same_target() -> None:
    disks = FakeDisk("7:0"), FakeDisk("7:1")
    text = """
        0 32 striped 2 16 7:0 8 7:1 16
        32 8 linear 7:0 0
        40 8 zero
        48 8 error
        56 8 delay 7:0 0 1 7:1 8 2 7:0 16 3
        64 8 flakey 7:1 0 1 2 8 error_writes corrupt_bio_byte 1 r 2 3 seed 4
        72 8 dust 7:0 8 1024
        80 8 log-writes 7:0 7:1
        88 8 unstriped 2 4 1 7:0 8
        96 8 switch 2 3 0 7:0 1 7:1 2
        104 8 ebs 7:1 16 1 8
    """
    table = await build(text, *disks)
    assert [line.params for line in table.table_lines()] == [line.split(None, 3)[3] if line.split()[3:] else ""
                                                             for line in text.strip().splitlines()]  # fmt: skip
    again = await build("".join(f"{a} {b} {c} {d}\n" for a, b, c, d in table.table_lines()), *disks)
    assert again.table_lines() == table.table_lines()


async def test_read_only_tables_open_read_only() -> None:
    asked: list[bool] = []

    class Opener(FakeOpener):
        async def open(self, reference: str, read_only: bool, *, may_be_absent: bool = False) -> FakeDisk:
            asked.append(read_only)
            return FakeDisk("7:0")

    spec = Spec(0, 4096, Opened(Opener(), True), lambda: None)
    await Linear.construct(spec, Args(["7:0", "0"]))
    assert asked == [True]


async def test_cancelled_construction_gives_back() -> None:
    disk = FakeDisk("7:0")

    class Stuck(Linear):
        @classmethod
        async def construct(cls, spec: Spec, args: Args) -> "Stuck":
            await spec.open("7:0")
            raise KeyboardInterrupt

    opener = FakeOpener(disk)
    with pytest.raises(KeyboardInterrupt):
        await table_module.Table.build(parse_table("0 8 stuck"), {**TARGETS, "stuck": Stuck}, opener, False, lambda: None)
    assert disk.openers == 0

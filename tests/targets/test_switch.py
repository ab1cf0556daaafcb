"""nbdmap.targets.switch: the kernel's document (admin-guide/device-mapper/switch), and a model."""

import random

import pytest

from nbdmap.block.device import HOLE, ZERO
from nbdmap.block.io import DISCARD, FLUSH, Io
from nbdmap.dm.args import Args, split_words
from nbdmap.dm.table import Table
from nbdmap.errors import InvalidArgument
from nbdmap.targets import switch
from tests.support.disks import FakeDisk, build, read, write


async def switched(paths: int = 3, regions: int = 8, size: int = 8) -> tuple[Table, list[FakeDisk]]:
    """Path n begins at sector n of disk n."""
    disks = [FakeDisk(f"7:{number}", regions * size + paths) for number in range(paths)]
    legs = " ".join(f"7:{number} {number}" for number in range(paths))
    return await build(f"0 4 error\n4 {regions * size} switch {paths} {size} 0 {legs}", *disks), disks


async def say(table: Table, text: str) -> None:
    assert await table.targets[-1].message(Args(split_words(text))) == ""


async def paths_of(table: Table, disks: list[FakeDisk], regions: int, size: int = 8) -> list[int]:
    """Which disk each region is on: where its write arrives."""
    found: list[int] = []
    for region in range(regions):
        for disk in disks:
            disk.log.clear()
        await write(table, (4 + region * size) * 512, b"x" * 512)
        (number,) = (number for number, disk in enumerate(disks) if disk.log)
        assert disks[number].log == [("write", (number + region * size) * 512, 512, 0)]
        found.append(number)
    return found


async def test_round_robin_at_first() -> None:
    table, disks = await switched()
    assert await paths_of(table, disks, 8) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert table.table_lines()[1].params == "3 8 0 7:0 0 7:1 1 7:2 2"
    assert table.status_lines()[1].params == ""


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("0:0 :1 :2 :0 :1 :2 :1", "01201211"),  # the document's first example
        ("0:1 :2 R2,6", "12121212"),
        ("0:1 :2 r2,5", "12121211"),
        ("2:2 R3,5", "01201201"),
        ("1:2 r1,3 7:0", "02222200"),
        (":0", "00201201"),
        ("R1,7", "00000000"),
        ("R1,0", "01201201"),
        ("F:0", ""),
        ("7:00000000000000000000002", "01201202"),
        ("", "01201201"),
        ("0:2 0:1", "11201201"),
    ],
)
async def test_mappings(message: str, wanted: str) -> None:
    table, disks = await switched()
    if wanted:
        await say(table, f"SET_region_mappings {message}")
        assert await paths_of(table, disks, 8) == [int(digit) for digit in wanted]
    else:
        with pytest.raises(InvalidArgument):
            await say(table, f"set_region_mappings {message}")


async def test_the_documents_second_example() -> None:
    """`1000:1 :2 R2,10` is `1000:1 :2` and eight times `:1 :2`, all in hexadecimal."""
    table, _ = await switched(regions=0x1014, size=1)
    for text in ("1000:1 :2 R2,10", "1000:1 :2 " + ":1 :2 " * 8):
        await say(table, "set_region_mappings 1000:0 R1,13")
        await say(table, f"set_region_mappings {text}")
        target = table.targets[-1]
        assert isinstance(target, switch.Switch)
        assert list(target._map[0x1000:0x1014]) == [1, 2] * 9 + [0, 0]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("hello", "unknown message 'hello'"),
        ("set_region_mappings 0:1 0:", "'0:' is neither [<region>]:<path> nor R<n>,<m>"),
        ("set_region_mappings 0:1 x:0", "'x:0' is neither [<region>]:<path> nor R<n>,<m>"),
        ("set_region_mappings 0:1 R1,", "'R1,' is neither [<region>]:<path> nor R<n>,<m>"),
        ("set_region_mappings 0:1 8:0", "8:0: region 8 is not there, there are 8"),
        ("set_region_mappings 0:1 7:1 :1", ":1: region 8 is not there, there are 8"),
        ("set_region_mappings 0:1 0:3", "0:3: path 3 is not there, there are 3"),
        ("set_region_mappings 0:1 R1,8", "R1,8: region 8 is not there, there are 8"),
        ("set_region_mappings 0:1 R2,1", "R2,1: 2 mappings cannot be repeated behind region 0"),
        ("set_region_mappings 0:1 R0,1", "R0,1: 0 mappings cannot be repeated behind region 0"),
    ],
)
async def test_a_mistake_anywhere_changes_nothing(text: str, complaint: str) -> None:
    table, disks = await switched()
    with pytest.raises(InvalidArgument) as caught:
        await say(table, text)
    assert caught.value.message == complaint
    assert await paths_of(table, disks, 8) == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("size", [1, 8, 24])
async def test_against_a_model(size: int) -> None:
    rng = random.Random(size)
    table, disks = await switched(regions=20, size=size)
    model = [disk.bytes[:] for disk in disks]
    total = 20 * size
    for _ in range(60):
        target = table.targets[-1]
        assert isinstance(target, switch.Switch)
        await say(table, f"set_region_mappings {rng.randrange(20):x}:{rng.randrange(3)}")
        first, last = sorted(rng.sample(range(total + 1), 2))
        data = rng.randbytes((last - first) * 512)
        places = [(target._map[sector // size], sector) for sector in range(first, last)]
        if rng.random() < 0.3:
            await table.submit(Io(DISCARD, len(data)), (4 + first) * 512)
            data = bytes(len(data))
        else:
            await write(table, (4 + first) * 512, data)
        for path, sector in places:
            at = (path + sector) * 512
            model[path][at : at + 512] = data[(sector - first) * 512 : (sector - first + 1) * 512]
        assert [disk.bytes for disk in disks] == model
        assert await read(table, (4 + first) * 512, len(data)) == data


async def test_flush_reaches_every_path() -> None:
    table, disks = await switched()
    await table.submit(Io(FLUSH, 0), 0)
    assert [disk.log for disk in disks] == [[("flush", 0, 0, 0)]] * 3


async def test_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    table, disks = await switched(paths=2, regions=4)
    disks[1].runs = [(disks[1].size, HOLE | ZERO)]
    hole = (8 * 512, HOLE | ZERO)
    assert await table.extents(4 * 512, 32 * 512) == [(8 * 512, 0), hole, (8 * 512, 0), hole]
    assert await table.extents((4 + 6) * 512, 4 * 512) == [(2 * 512, 0), (2 * 512, HOLE | ZERO)]
    monkeypatch.setattr(switch, "MAX_EXTENTS", 2)
    assert await table.targets[-1].extents(4 * 512, 32 * 512) == [(8 * 512, 0), hole]


async def test_more_than_256_paths() -> None:
    legs = " ".join("7:0 0" for _ in range(300))
    table = await build(f"0 600 switch 300 1 0 {legs}", FakeDisk("7:0"))
    await say(table, "set_region_mappings 0:12b")
    await write(table, 0, b"x" * 512)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("", "number of paths is missing"),
        ("0 8 0", "number of paths: 0 is not in the range 1 to 65536"),
        ("1 0 0 7:0 0", "region size: 0 is not in the range 1 to 4294967295"),
        ("1 8 1 x 7:0 0", "number of optional words: 1 is not in the range 0 to 0"),
        ("2 8 0 7:0 0 7:0", "2 paths need 4 words of devices and starts, 3 given"),
        ("1 8 0 7:0 x", "start of path 0: 'x' is not a decimal number"),
        ("1 8 0 7:0 1020", "sectors 1020 to 1084 are beyond the end of disk7:0 (7:0), which has 1024"),
    ],
)
async def test_bad_words(words: str, complaint: str) -> None:
    disk = FakeDisk("7:0")
    with pytest.raises(InvalidArgument) as caught:
        await build(f"0 64 switch {words}", disk)
    assert caught.value.message == f"line 1: switch: {complaint}"
    assert disk.openers == 0


async def test_too_many_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switch, "MAX_REGIONS", 7)
    with pytest.raises(InvalidArgument, match="there would be 8 regions, more than 7"):
        await build("0 64 switch 1 8 0 7:0 0", FakeDisk("7:0"))

"""`nbdmap thin` against thin-provisioning-tools, over a pool with snapshots, discards and a metadata snapshot."""

import asyncio
import random
import subprocess
from pathlib import Path

import pytest

from nbdmap.cli.thin import main
from nbdmap.persist.space_map import Root
from nbdmap.targets.thin.superblock import Superblock
from tests.support.disks import write
from tests.support.thin import BLOCK, ThinSite, discard, thin_check


async def make(directory: Path) -> None:
    """A pool's metadata as directory/metadata; its snapshot is older than what follows."""
    rng = random.Random(5)
    made = await ThinSite(directory, data_blocks=64).open()
    await made.new("v0", 0)
    for number in range(1, 4):
        for _ in range(6):
            await write(made.devices[f"v{number - 1}"], rng.randrange(30) * BLOCK, b"x" * 2 * BLOCK)
        await made.snap(f"v{number}", number, f"v{number - 1}", number - 1)
        await discard(made.devices[f"v{number}"], rng.randrange(20) * BLOCK, 3 * BLOCK)
    await made.message("set_transaction_id 0 7")
    await made.message("reserve_metadata_snap")
    await write(made.devices["v3"], 0, b"y" * BLOCK)
    await made.message("create_thin 9")
    await made.close()
    made.save()


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    asyncio.run(make(tmp_path))
    return tmp_path / "metadata"


def theirs(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def ours(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ("dump",),
        ("ls",),
        ("ls", "--no-headers", "-o", "DEV,MAPPED,SHARED_BLOCKS,EXCLUSIVE,TRANSACTION"),
        ("ls", "-m", "-o", "DEV,MAPPED_BLOCKS,EXCLUSIVE_SECTORS,SHARED_BYTES,SHARED,SNAP_TIME"),
        ("delta", "--thin1", "0", "--thin2", "3"),
        ("delta", "--snap1", "2", "--snap2", "9"),
        ("rmap", "--region", "0..64"),
        ("rmap", "--region", "3..5", "--region", "9..20"),
    ],
    ids=" ".join,
)
def test_as_their_tools(metadata: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    found, wanted = ours(capsys, *words, metadata), theirs(f"thin_{words[0]}", *words[1:], metadata)
    if words[0] == "rmap":  # theirs has the volumes of one block in any order
        found, wanted = ("\n".join(sorted(text.splitlines())) for text in (found, wanted))
    assert found == wanted


def test_dump_of_the_metadata_snapshot(metadata: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ours(capsys, "dump", "-m", metadata)
    assert found == theirs("thin_dump", "-m", metadata)
    assert 'dev_id="9"' not in found


def test_dump_restore_dump(metadata: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = ours(capsys, "dump", metadata)
    (tmp_path / "pool.xml").write_text(before)
    for name, restore in (("a", None), ("b", "thin_restore")):
        (tmp_path / name).write_bytes(bytes(1 << 20))
        if restore:
            theirs(restore, "-q", "-i", tmp_path / "pool.xml", "-o", tmp_path / name)
        else:
            ours(capsys, "restore", "-i", tmp_path / "pool.xml", "-o", tmp_path / name)
        thin_check(tmp_path / name)
        assert ours(capsys, "check", tmp_path / name) == ""
        assert ours(capsys, "dump", tmp_path / name) == theirs("thin_dump", tmp_path / name) == before


@pytest.mark.parametrize("what", ["nothing", "data space map", "metadata space map", "a volume"])
def test_their_repair_of_ours(metadata: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    """Not with a damaged superblock or top of a tree: there thin_repair 0.9 of Debian 12 crashes, on Linux's metadata, too."""
    before = ours(capsys, "dump", metadata)
    data = bytearray(metadata.read_bytes())
    superblock = Superblock.read(bytes(data[:4096]))
    if what == "a volume":
        data[_roots(data, superblock.mapping_root)[9] * 4096 + 100] ^= 1
    elif what != "nothing":
        root = superblock.data_map if what == "data space map" else superblock.metadata_map
        data[Root.unpack(root[:32]).index_block * 4096 + 100] ^= 1
    (tmp_path / "bad").write_bytes(data)
    assert main(["check", str(tmp_path / "bad")]) == (what != "nothing")
    (tmp_path / "repaired").write_bytes(bytes(1 << 20))
    theirs("thin_repair", "-i", tmp_path / "bad", "-o", tmp_path / "repaired")
    thin_check(tmp_path / "repaired")
    capsys.readouterr()
    assert ours(capsys, "check", tmp_path / "repaired") == ""
    after = ours(capsys, "dump", tmp_path / "repaired")
    assert after == theirs("thin_dump", tmp_path / "repaired")
    if what == "a volume":
        assert after.count("<device") == before.count("<device")
        assert after.partition('dev_id="9"')[0] == before.partition('dev_id="9"')[0]
    else:
        assert after == before


def _roots(data: bytearray, node: int) -> dict[int, int]:
    """The entries of a leaf with values of 8 bytes."""
    words = memoryview(bytes(data[node * 4096 : (node + 1) * 4096])).cast("Q")
    entries, room = words[2] & 0xFFFFFFFF, words[2] >> 32
    return {words[4 + place]: words[4 + room + place] for place in range(entries)}


def test_check(metadata: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ours(capsys, "check", metadata) == ""
    broken = bytearray(metadata.read_bytes())
    broken[64 + 8] ^= 1  # the number of data blocks in use; the checksum is wrong, too
    metadata.write_bytes(broken)
    assert main(["check", str(metadata)]) == 1
    assert "checksum" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status", "complaint"),
    [
        (["dump", "nowhere"], 1, "nowhere"),
        (["delta", "--thin1", "0", "--thin2", "55"], 1, "no volume 55"),
        (["ls", "-o", "NOTHING"], 1, "unknown column 'NOTHING'"),
        (["rmap", "--region", "1-2"], 1, "region '1-2' is not FIRST..END"),
        (["bite"], 2, "invalid choice"),
    ],
)
def test_refusals(metadata: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, complaint: str) -> None:
    assert main(words if len(words) < 3 and words[0] in ("dump", "bite") else [*words, str(metadata)]) == status
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "<superblock/>", "<other/>", "<superblock time='1' transaction='x' data_block_size='128' nr_data_blocks='1'/>"]
)
def test_xml_that_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (tmp_path / "pool.xml").write_text(text)
    (tmp_path / "out").write_bytes(bytes(1 << 20))
    assert main(["restore", "-i", str(tmp_path / "pool.xml"), "-o", str(tmp_path / "out")]) == 1
    assert not any((tmp_path / "out").read_bytes())

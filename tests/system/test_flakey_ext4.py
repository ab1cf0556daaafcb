"""An ext4 on a flakey device that drops writes from one moment on: what was there by then is there, nothing else is.

    file -> flakey (drop_writes) -> nbdfuse -> losetup -> ext4

To the file system all stays well: it writes, syncs and unmounts. The disk must be, byte for byte, what it was at that moment;
after the journal is replayed the file system is whole, has every file that was synced before, and none that came later.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.clients import attempt, run
from tests.support.loop import loop_device
from tests.support.mounts import fuse_file, mounted
from tests.support.server import Server, serving

SECTORS: Final = 131072
TABLE: Final = f"0 {SECTORS} flakey a 0 {{}} 1 drop_writes"
WELL: Final = TABLE.format("1 0")
DOWN: Final = TABLE.format("0 1")
CONFIG: Final = f"""
disks: {{a: {{file: a.img, size: {SECTORS * 512}, create: true}}}}
devices: {{shaky: {{table: {WELL}}}}}
"""


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(CONFIG) as running:
        yield running


def swap(server: Server, table: str) -> None:
    """Puts another table under the clients' feet."""
    server.verb("load", "shaky", "--table", table)
    server.verb("resume", "shaky")


def put(root: Path, name: str, seed: int, *, sync: bool) -> None:
    """A directory with a few files of random bytes."""
    numbers = random.Random(seed)
    (root / name).mkdir()
    for number in range(12):
        with (root / name / str(number)).open("wb") as file:
            file.write(numbers.randbytes(numbers.randrange(200_000)))
            if sync:
                file.flush()
                os.fsync(file.fileno())
    if sync:
        run("sync", "-f", root)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def test_what_was_not_written_before_it_went_down_is_lost_and_nothing_else(server: Server, tmp_path: Path) -> None:
    image = server.directory / "a.img"
    wanted: dict[str, dict[str, bytes]] = {}
    with fuse_file(server.uri("shaky"), tmp_path) as disk, loop_device(disk) as loop:
        run("mkfs.ext4", "-q", loop)
        with mounted(loop, tmp_path, "-o", "commit=1000") as root:
            put(root, "synced", 1, sync=True)
            put(root, "written", 2, sync=False)
            wanted = {name: contents(root / name) for name in ("synced", "written")}
            swap(server, DOWN)
            at_that_moment = image.read_bytes()
            put(root, "late", 3, sync=True)
            (root / "synced" / "0").write_bytes(b"too late")
            (root / "synced" / "1").unlink()
            run("sync", "-f", root)
            assert len(contents(root / "late")) == 12
            assert server.verb("table", "shaky").split()[-2:] == ["1", "drop_writes"]
    assert image.read_bytes() == at_that_moment, "something came through, or was lost"
    swap(server, WELL)
    with fuse_file(server.uri("shaky"), tmp_path) as disk, loop_device(disk) as loop:
        with mounted(loop, tmp_path) as root:
            assert contents(root / "synced") == wanted["synced"]
            assert not (root / "late").exists()
            for name, data in contents(root / "written").items():
                assert wanted["written"][name].startswith(data.rstrip(b"\0")) or not data
        run("e2fsck", "-fn", loop)


def test_a_file_system_is_told_when_writes_fail(server: Server, tmp_path: Path) -> None:
    """With error_writes instead fsync fails, and what was synced before is there still."""
    with fuse_file(server.uri("shaky"), tmp_path) as disk, loop_device(disk) as loop:
        run("mkfs.ext4", "-q", loop)
        with mounted(loop, tmp_path) as root:
            put(root, "synced", 1, sync=True)
            wanted = contents(root / "synced")
            swap(server, f"0 {SECTORS} flakey a 0 0 1 1 error_writes")
            with pytest.raises(OSError, match=r"Input/output error|Read-only file system"):
                put(root, "late", 3, sync=True)
            swap(server, WELL)
    with fuse_file(server.uri("shaky"), tmp_path) as disk, loop_device(disk) as loop:
        assert attempt("e2fsck", "-fy", loop).returncode in (0, 1)
        with mounted(loop, tmp_path) as root:
            assert contents(root / "synced") == wanted

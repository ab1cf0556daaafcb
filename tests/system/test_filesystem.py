"""A real file system on an export: nbdfuse makes a file of it, a loop device a disk, and ext4 does the rest.

    nbdfuse -> losetup -> mkfs.ext4 -> mount -> a tree is copied -> umount -> e2fsck, and again after the server's restart
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients import run
from tests.support.loop import loop_device
from tests.support.mounts import fuse_file, mounted
from tests.support.server import REPOSITORY, Server, serving

CONFIG = """
disks:
  a: {file: a.img, size: 64MiB, create: true}
  b: {file: b.img, size: 64MiB, create: true}
  c: {file: c.img, size: 64MiB, create: true}
devices:
  fast: {table: 0 196608 striped 2 128 a 2048 b 2048}
  disk: {table: "0 196608 linear fast 0\\n196608 65536 linear c 1024"}
"""


def fill(root: Path) -> None:
    """Directories, many small files, links, a large file and one with holes."""
    run("cp", "-a", REPOSITORY / "nbdmap", root)
    numbers = random.Random(3)
    (root / "large").write_bytes(numbers.randbytes(8 << 20))
    with (root / "sparse").open("wb") as out:
        out.truncate(64 << 20)
        os.pwrite(out.fileno(), b"x" * 100000, 50 << 20)
    (root / "link").symlink_to("large")
    os.link(root / "large", root / "again")


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(CONFIG) as running:
        yield running


def test_ext4_on_an_export(server: Server, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    fill(tree)
    with fuse_file(server.uri("disk"), tmp_path) as disk, loop_device(disk) as loop:
        run("mkfs.ext4", "-q", "-E", "discard", loop)
        with mounted(loop, tmp_path) as root:
            run("cp", "-a", f"{tree}/.", root)
            run("diff", "-r", "--no-dereference", "--exclude=lost+found", tree, root)
            (root / "large").unlink()
            (root / "again").rename(root / "large")
            run("fstrim", root)
        run("e2fsck", "-fn", loop)
        (tree / "again").unlink()
        with mounted(loop, tmp_path, "-o", "ro") as root:
            run("diff", "-r", "--no-dereference", "--exclude=lost+found", tree, root)
    server.stop()
    server.start()
    copy = tmp_path / "copy.img"
    run("nbdcopy", server.uri("disk"), copy)
    run("e2fsck", "-fn", copy)
    with mounted(copy, tmp_path, "-o", "ro,loop") as root:
        run("diff", "-r", "--no-dereference", "--exclude=lost+found", tree, root)


def test_e2fsprogs_without_the_kernel(server: Server, tmp_path: Path) -> None:
    """What needs neither root nor FUSE: an image made elsewhere, copied in and out."""
    made = tmp_path / "made.img"
    run("truncate", "-s", "128M", made)
    run("mkfs.ext4", "-q", "-d", REPOSITORY / "nbdmap", made)
    run("nbdcopy", "--flush", made, server.uri("disk"))
    run("nbdcopy", "-C", "4", server.uri("disk"), tmp_path / "back.img")
    run("e2fsck", "-fn", tmp_path / "back.img")
    run("cmp", made, tmp_path / "back.img")

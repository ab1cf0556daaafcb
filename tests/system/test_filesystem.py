"""A real file system on an export: nbdfuse makes a file of it, a loop device a disk, and ext4 does the rest.

    nbdfuse -> losetup -> mkfs.ext4 -> mount -> a tree is copied -> umount -> e2fsck, and again after the server's restart
"""

import contextlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients import PACKAGES, environment, run, wait_until
from tests.support.loop import loop_device
from tests.support.programs import need
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


@contextlib.contextmanager
def fuse_file(uri: str, directory: Path) -> Iterator[Path]:
    """A file whose bytes are the export's."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("mounting by FUSE needs root and /dev/fuse")
    need("nbdfuse", PACKAGES["nbdfuse"])
    point, pidfile = directory / "fuse", directory / "fuse.pid"
    point.mkdir()
    pidfile.unlink(missing_ok=True)
    process = subprocess.Popen(
        ["nbdfuse", "-P", str(pidfile), f"{point}/disk", uri], env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: pidfile.exists() and (point / "disk").exists(), process)
        yield point / "disk"
        run("umount", point)
    except BaseException:
        process.terminate()  # it unmounts
        raise
    finally:
        _, said = process.communicate(timeout=10)
        point.rmdir()
    assert process.returncode == 0, said


@contextlib.contextmanager
def mounted(device: str | Path, directory: Path, *options: str) -> Iterator[Path]:
    """A mounted file system."""
    point = directory / "mnt"
    point.mkdir()
    run("mount", *options, device, point)
    try:
        yield point
    finally:
        run("umount", point)
        point.rmdir()


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

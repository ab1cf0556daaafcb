import errno
import os
import re
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdmap.block import file_open, syscalls
from nbdmap.block.file_open import OpenFile
from nbdmap.errors import AccessRefused, InvalidArgument, IoFailed, NotFound, Unsupported
from nbdmap.units import KIB, MIB, SECTOR
from tests.support.loop import loop_device

Fail = Callable[[str, int], None]


def open_file(
    path: Path | str,
    read_only: bool = False,
    direct: bool = False,
    create: bool = False,
    size: int | None = None,
) -> OpenFile:
    """As the real one, but closed at once."""
    opened = file_open.open_file(str(path), read_only=read_only, direct=direct, create=create, size=size)
    os.close(opened.fd)
    return opened


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.img"
    path.write_bytes(b"x" * 64 * KIB)
    return path


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """fail("pread", errno): that function of os (or syscalls) fails from now on."""

    def arm(name: str, number: int) -> None:
        def failing(*_arguments: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(syscalls if hasattr(syscalls, name) else os, name, failing)

    return arm


def test_an_existing_file(image: Path) -> None:
    opened = open_file(image)
    assert opened.size == 64 * KIB
    assert not opened.is_block_device
    assert opened.limits.logical_block == SECTOR
    assert opened.limits.zero
    assert opened.limits.sparse
    assert opened.limits.cache
    assert opened.limits.io_min == image.stat().st_blksize


def test_the_size_is_whole_sectors(image: Path) -> None:
    os.truncate(image, 1000)
    assert open_file(image).size == SECTOR
    assert image.stat().st_size == 1000
    os.truncate(image, 0)
    assert open_file(image).size == 0


def test_read_only_offers_no_changes(image: Path) -> None:
    limits = open_file(image, read_only=True).limits
    assert not limits.discard
    assert not limits.zero
    assert not limits.fast_zero
    assert limits.sparse


def test_looking_changes_nothing(image: Path) -> None:
    before = image.stat()
    open_file(image)
    after = image.stat()
    assert image.read_bytes() == b"x" * 64 * KIB
    assert (before.st_size, before.st_blocks) == (after.st_size, after.st_blocks)


def test_create_makes_a_sparse_file(tmp_path: Path) -> None:
    path = tmp_path / "new.img"
    assert open_file(path, create=True, size=64 * MIB).size == 64 * MIB
    status = path.stat()
    assert status.st_size == 64 * MIB
    assert status.st_blocks * SECTOR < MIB
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert open_file(path, create=True, size=64 * MIB).size == 64 * MIB  # the second time it is there
    assert open_file(path, create=True).size == 64 * MIB


def test_create_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_file("new.img", create=True, size=SECTOR).size == SECTOR


@pytest.mark.parametrize("create", [False, True])
def test_another_size_is_refused_naming_both(image: Path, create: bool) -> None:
    with pytest.raises(InvalidArgument, match=re.escape("a.img has 65536 bytes, not the 131072 asked for")):
        open_file(image, create=create, size=128 * KIB)
    assert image.stat().st_size == 64 * KIB


def test_sizes_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="size 1000 is not a multiple of 512"):
        open_file(tmp_path / "new.img", create=True, size=1000)
    with pytest.raises(InvalidArgument, match="to create it a size is needed"):
        open_file(tmp_path / "new.img", create=True)
    assert not (tmp_path / "new.img").exists()


def test_a_file_that_cannot_be_made_whole_is_removed(tmp_path: Path, fail: Fail) -> None:
    fail("ftruncate", errno.EFBIG)
    with pytest.raises(IoFailed, match=r"open of .*new.img: File too large") as caught:
        open_file(tmp_path / "new.img", create=True, size=SECTOR)
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{}, {"create": True, "read_only": True, "size": SECTOR}])
def test_a_missing_file(tmp_path: Path, options: dict[str, bool]) -> None:
    with pytest.raises(NotFound, match=r"none.img: no such file"):
        open_file(tmp_path / "none.img", **options)


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(IoFailed, match=r"open of .*none/new.img: No such file or directory"):
        open_file(tmp_path / "none" / "new.img", create=True, size=SECTOR)


def test_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.close()
    for path, kind in [
        (tmp_path, "a directory"),
        (Path("/dev/null"), "a character device"),
        (tmp_path / "fifo", "a FIFO"),
        (tmp_path / "socket", "a socket"),
    ]:
        with pytest.raises(InvalidArgument, match=re.escape(f"{path} is {kind}, not a file or a block device")):
            open_file(path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_what_cannot_be_written_is_refused_unless_read_only(image: Path, fail: Fail, number: int) -> None:
    fail("open", number)
    with pytest.raises(AccessRefused, match=r"a.img cannot be opened for writing: "):
        open_file(image)
    with pytest.raises(IoFailed) as caught:
        open_file(image, read_only=True)
    assert caught.value.errno == number


def test_without_o_direct(image: Path, fail: Fail) -> None:
    fail("open", errno.EINVAL)
    with pytest.raises(Unsupported, match="its file system does not support O_DIRECT"):
        open_file(image, direct=True)


def test_direct_reads_in_threads_and_has_no_page_cache(image: Path) -> None:
    opened = open_file(image, direct=True)
    assert opened.inline_read_flags is None
    assert opened.limits.logical_block in (512, 4096)
    assert not opened.limits.cache


@pytest.mark.parametrize(
    ("number", "in_memory", "flags"),
    [
        (errno.EAGAIN, False, os.RWF_NOWAIT),
        (errno.EIO, False, os.RWF_NOWAIT),
        (errno.EOPNOTSUPP, True, 0),
        (errno.EOPNOTSUPP, False, None),
    ],
)
def test_how_to_read_without_waiting(
    image: Path, fail: Fail, monkeypatch: pytest.MonkeyPatch, number: int, in_memory: bool, flags: int | None
) -> None:
    fail("preadv", number)
    monkeypatch.setattr(syscalls, "in_memory", lambda fd: in_memory)
    assert open_file(image).inline_read_flags == flags


@pytest.mark.parametrize(("number", "can"), [(errno.EOPNOTSUPP, False), (errno.EFBIG, True)])
def test_whether_holes_can_be_punched(image: Path, fail: Fail, number: int, can: bool) -> None:
    fail("fallocate", number)
    limits = open_file(image).limits
    assert (limits.discard, limits.zero, limits.fast_zero) == (can, True, can)


@pytest.mark.parametrize(("number", "sparse"), [(errno.EINVAL, False), (errno.ENXIO, True)])
def test_whether_holes_can_be_found(image: Path, fail: Fail, number: int, sparse: bool) -> None:
    fail("lseek", number)
    assert open_file(image).limits.sparse == sparse


@pytest.mark.parametrize("block", [512, 4096])
def test_a_block_device(image: Path, block: int) -> None:
    with loop_device(image, "--sector-size", str(block)) as path:
        opened = open_file(path, size=64 * KIB)
        assert opened.is_block_device
        assert opened.size == 64 * KIB
        assert opened.limits.logical_block == block
        assert opened.limits.discard
        assert opened.limits.zero
        assert opened.limits.fast_zero
        assert not opened.limits.sparse
        assert open_file(path, direct=True).limits.logical_block == block


def test_a_read_only_block_device(image: Path) -> None:
    with loop_device(image, "--read-only") as path:
        with pytest.raises(AccessRefused):
            open_file(path)
        limits = open_file(path, read_only=True).limits
        assert (limits.discard, limits.zero, limits.fast_zero) == (False, False, False)


def test_a_block_device_that_opens_but_is_read_only(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "is_read_only", lambda fd: True)
    with loop_device(image) as path, pytest.raises(AccessRefused, match="is a read-only block device"):
        open_file(path)


def test_a_partition_has_the_queue_of_its_disk(image: Path) -> None:
    with loop_device(image) as path:
        subprocess.run(["addpart", path, "1", "16", "64"], check=True)
        opened = open_file(path + "p1")
        subprocess.run(["delpart", path, "1"], check=True)
    assert opened.size == 64 * SECTOR
    assert opened.limits.discard


def test_a_queue_that_cannot_be_seen_promises_nothing(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loop_device(image) as path:
        monkeypatch.setattr(os.path, "realpath", lambda path: "/none")
        limits = open_file(path).limits
        assert (limits.discard, limits.zero, limits.fast_zero) == (False, True, False)

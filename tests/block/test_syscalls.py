import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdmap.block import syscalls
from nbdmap.units import KIB, SECTOR
from tests.support.loop import loop_device


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "a.img", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"x" * 64 * KIB, 0)
    yield fd
    os.close(fd)


def test_fallocate_punches(fd: int) -> None:
    syscalls.fallocate(fd, syscalls.PUNCH_HOLE | syscalls.KEEP_SIZE, 4096, 8192)
    assert os.pread(fd, 64 * KIB, 0) == b"x" * 4096 + bytes(8192) + b"x" * (64 * KIB - 12288)


def test_fallocate_raises_the_errno(fd: int) -> None:
    with pytest.raises(OSError, match="Invalid argument") as caught:
        syscalls.fallocate(fd, 0, 0, 0)
    assert caught.value.errno == errno.EINVAL


def test_fallocate_goes_on_after_a_signal(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(-1, errno.EINTR), (-1, errno.EINTR), (0, 0)]

    class Libc:
        def fallocate(self, *_arguments: int) -> int:
            result, number = answers.pop(0)
            ctypes.set_errno(number)
            return result

    monkeypatch.setattr(syscalls, "_libc", Libc())
    syscalls.fallocate(fd, 0, 0, 4096)
    assert answers == []


def test_a_memfd_is_in_memory() -> None:
    fd = os.memfd_create("nbdmap-test")
    assert syscalls.in_memory(fd)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        syscalls.in_memory(fd)


def test_proc_is_not_called_a_disk_of_memory() -> None:
    fd = os.open("/proc/self/status", os.O_RDONLY)
    assert not syscalls.in_memory(fd)
    os.close(fd)


def test_block_devices(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(b"x" * 64 * KIB)
    with loop_device(image) as path:
        fd = os.open(path, os.O_RDWR)
        try:
            assert syscalls.logical_block_size(fd) == SECTOR
            assert not syscalls.is_read_only(fd)
            io_min, io_opt = syscalls.preferred_sizes(fd)
            assert io_min >= SECTOR
            assert io_opt >= 0
            syscalls.discard_blocks(fd, 0, 8192)
            assert os.pread(fd, 64 * KIB, 0) == bytes(8192) + b"x" * (64 * KIB - 8192)
        finally:
            os.close(fd)


@pytest.mark.parametrize(("offset", "length"), [(0, SECTOR), (SECTOR, SECTOR), (4096 - SECTOR, 2 * SECTOR), (0, 64 * KIB)])
def test_sync_range(fd: int, offset: int, length: int) -> None:
    syscalls.sync_range(fd, offset, length)


def test_sync_range_raises_the_errno(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        mapped = 0

        def mmap(self, *_arguments: object) -> int:
            self.mapped += 1
            return 4096

        def munmap(self, *_arguments: object) -> int:
            self.mapped -= 1
            return 0

        def msync(self, *_arguments: object) -> int:
            ctypes.set_errno(errno.EIO)
            return -1

    libc = Libc()
    monkeypatch.setattr(syscalls, "_libc", libc)
    with pytest.raises(OSError, match="Input/output error"):
        syscalls.sync_range(fd, 0, SECTOR)
    assert libc.mapped == 0


def test_sync_range_of_what_cannot_be_mapped_syncs_the_file(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    write_only = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
    try:
        syscalls.sync_range(write_only, 0, SECTOR)
        assert synced == [write_only]
    finally:
        os.close(write_only)

"""Files and block devices that hold headers; and secrets that are wiped."""

import errno
import os
import stat
from pathlib import Path

import pytest

from nbdmap.errors import AccessRefused, Busy, InvalidArgument, IoFailed, NotFound
from nbdmap.luks.image import FileImage, read_exactly
from nbdmap.luks.secret import wipe, wiping


def test_reads_and_writes(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1000))
    with FileImage(str(path), write=True) as image:
        image.write(10, bytearray(b"hello"))
        image.flush()
        assert (image.size, image.read(9, 7), image.read(998, 10), image.read(2000, 5)) == (1000, b"\0hello\0", bytes(2), b"")
        image.write(1500, b"end")
        assert image.size == 1503
        with pytest.raises(IoFailed, match="the header at 1500 to 1600 is beyond the end of the disk, 1503"):
            read_exactly(image, 1500, 100, "the header")
    assert path.read_bytes()[10:15] == b"hello"
    image.close()


def test_what_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFound, match="no such file"):
        FileImage(str(tmp_path / "no"))
    with pytest.raises(InvalidArgument, match="neither a file nor a block device"):
        FileImage(str(tmp_path))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InvalidArgument, match="neither a file nor a block device"):
        FileImage(str(tmp_path / "fifo"))
    (tmp_path / "file").touch()

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(AccessRefused, match="cannot be opened for writing: Permission denied"):
        FileImage(str(tmp_path / "file"), write=True)


def test_created(tmp_path: Path) -> None:
    with FileImage(str(tmp_path / "new"), write=True, create=True) as image:
        image.write(0, b"x")
    assert (tmp_path / "new").read_bytes() == b"x"
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
    with FileImage(str(tmp_path / "new"), write=True, create=True) as image:
        assert image.size == 1


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    path = str(tmp_path / "file")
    with FileImage(path), FileImage(path), pytest.raises(Busy, match="another program is changing its header"):
        FileImage(path, write=True)
    with FileImage(path, write=True), pytest.raises(Busy):
        FileImage(path)


def test_a_block_device_that_is_in_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kernel tells, when it is asked for it alone."""
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr(stat, "S_ISBLK", lambda mode: True)
    seen: list[int] = []
    opened = os.open

    def asked(path: str, flags: int, mode: int = 0) -> int:
        seen.append(flags)
        if flags & os.O_EXCL:
            raise OSError(errno.EBUSY, "busy")
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", asked)
    with FileImage(str(tmp_path / "file"), write=True):
        assert not seen[0] & os.O_EXCL
    for create in (False, True):
        with pytest.raises(Busy, match="is in use: mounted, or part of another device"):
            FileImage(str(tmp_path / "file"), write=True, create=create, alone=True)
        assert not seen[-1] & os.O_CREAT


def test_a_full_disk() -> None:
    with pytest.raises(InvalidArgument):
        FileImage("/dev/full", write=True)


def test_secrets_are_wiped() -> None:
    secret = bytearray(b"secret")
    wipe(secret)
    assert secret == bytes(6)
    wipe(bytearray())
    with pytest.raises(ZeroDivisionError), wiping(bytearray(b"x")) as held:
        raise ZeroDivisionError
    assert held == b"\0"

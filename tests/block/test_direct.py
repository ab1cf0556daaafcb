import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdmap.block.direct import BUFFER, BounceBuffers, probe_logical_block
from nbdmap.errors import Unsupported


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "a.img"
    path.write_bytes(bytes(range(256)) * 32)
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        pytest.skip(f"no O_DIRECT on {tmp_path}: {error.strerror}")
    yield fd
    os.close(fd)


def test_reading_and_writing_any_memory(fd: int) -> None:
    bounce = BounceBuffers()
    unaligned = memoryview(bytearray(4097))[1:]
    assert bounce.read(fd, unaligned, 4096) == 4096
    assert unaligned == bytes(range(256)) * 16
    unaligned[:] = b"y" * 4096
    assert bounce.write(fd, unaligned, 0) == 4096
    assert Path(f"/proc/self/fd/{fd}").read_bytes() == b"y" * 4096 + bytes(range(256)) * 16


def test_one_call_moves_at_most_one_buffer(fd: int) -> None:
    bounce = BounceBuffers()
    data = memoryview(bytearray(b"z" * (BUFFER + 4096)))
    assert bounce.write(fd, data, 0) == BUFFER
    assert bounce.read(fd, data, 0) == BUFFER


def test_a_buffer_is_given_back_after_a_failure(fd: int) -> None:
    bounce = BounceBuffers()
    data = memoryview(bytearray(4096))
    for call in (bounce.read, bounce.write):
        with pytest.raises(OSError, match="Invalid argument"):
            call(fd, data, 1)
        assert len(bounce._free) == 1


@pytest.mark.parametrize(("failures", "block"), [([], 512), ([errno.EINVAL], 4096), ([errno.EIO], 512)])
def test_the_logical_block_is_the_smallest_that_is_taken(
    monkeypatch: pytest.MonkeyPatch, failures: list[int], block: int
) -> None:
    left = list(failures)

    def preadv(_fd: int, _buffers: object, _offset: int) -> int:
        if left:
            raise OSError(left.pop(0), "no")
        return 0

    monkeypatch.setattr(os, "preadv", preadv)
    assert probe_logical_block(-1, "a.img") == block


def test_no_block_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(_fd: int, _buffers: object, _offset: int) -> int:
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(Unsupported, match=r"a.img cannot be read with O_DIRECT in blocks of 512 or 4096 bytes"):
        probe_logical_block(-1, "a.img")

"""Opens the file or block device under a FileDisk and finds out what can be done with it. Everything here blocks.

Nothing is changed by finding out: the test for holes punches one behind the end of the file, where there is nothing.
"""

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdmap.block import syscalls
from nbdmap.block.device import Limits
from nbdmap.block.direct import probe_logical_block
from nbdmap.errors import AccessRefused, InvalidArgument, NotFound, Unsupported, from_os_error
from nbdmap.units import SECTOR, round_down, round_up

_KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a character device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open file: its descriptor, what the disk made of it is, and `inline_read_flags`.

    These are the preadv flags with which a read never waits for a disk; None: there are no such flags, ask a thread.
    """

    fd: int
    size: int
    limits: Limits
    is_block_device: bool
    inline_read_flags: int | None


def open_file(path: str, *, read_only: bool, direct: bool, create: bool, size: int | None) -> OpenFile:
    """Opens `path`; with `create` a file that is missing is made, sparse and of `size` bytes.

    Raises InvalidArgument when the size is not the one asked for, or the path is neither a file nor a block device,
    NotFound, and AccessRefused when it cannot be written and `read_only` is not set.
    """
    if size is not None and size % SECTOR:
        raise InvalidArgument(f"{path}: size {size} is not a multiple of {SECTOR}")
    created = False
    try:
        exists = _check_kind(path)
        if not exists and (read_only or not create):
            raise NotFound(f"{path}: no such file")
        flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR) | (os.O_DIRECT if direct else 0)
        if not exists:
            if size is None:
                raise InvalidArgument(f"{path}: to create it a size is needed")
            flags |= os.O_CREAT | os.O_EXCL
        fd = os.open(path, flags, 0o600)
        created = not exists
        try:
            if created and size is not None:
                _make_sparse(fd, path, size)
            return _examine(fd, path, read_only=read_only, direct=direct, size=size)
        except BaseException:
            os.close(fd)
            if created:
                os.unlink(path)
            raise
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not read_only:
            raise AccessRefused(f"{path} cannot be opened for writing: {error.strerror}") from error
        if error.errno == errno.EINVAL and direct:
            raise Unsupported(f"{path}: its file system does not support O_DIRECT") from error
        raise from_os_error(error, f"open of {path}") from error


def _check_kind(path: str) -> bool:
    """Whether the path exists; looked at before opening, as opening some devices does things."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        return False
    if kind not in (stat.S_IFREG, stat.S_IFBLK):
        raise InvalidArgument(f"{path} is {_KINDS[kind]}, not a file or a block device")
    return True


def _make_sparse(fd: int, path: str, size: int) -> None:
    """Gives a new file its size, and makes the file and its name durable."""
    os.ftruncate(fd, size)
    os.fsync(fd)
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _examine(fd: int, path: str, *, read_only: bool, direct: bool, size: int | None) -> OpenFile:
    status = os.fstat(fd)
    is_block_device = stat.S_ISBLK(status.st_mode)
    if is_block_device:
        if not read_only and syscalls.is_read_only(fd):
            raise AccessRefused(f"{path} is a read-only block device")
        limits = _block_device_limits(fd, status.st_rdev, read_only=read_only, direct=direct)
        real_size = os.lseek(fd, 0, os.SEEK_END)
    else:
        punch = not read_only and _can_punch(fd, status.st_size)
        limits = Limits(
            logical_block=probe_logical_block(fd, path) if direct else SECTOR,
            discard=punch,
            zero=not read_only,
            fast_zero=punch,
            cache=not direct,
            sparse=_can_seek_data(fd),
            io_min=status.st_blksize,
        )
        real_size = status.st_size
    real_size = round_down(real_size, limits.logical_block)
    if size is not None and size != real_size:
        raise InvalidArgument(f"{path} has {real_size} bytes, not the {size} asked for")
    inline_read_flags = None if direct else _inline_read_flags(fd)
    return OpenFile(fd, real_size, limits, is_block_device, inline_read_flags)


def _block_device_limits(fd: int, number: int, *, read_only: bool, direct: bool) -> Limits:
    """What the device's queue says of itself; a partition has its disk's queue."""
    device = Path(os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"))
    queue = device / "queue" if (device / "queue").exists() else device.parent / "queue"

    def setting(name: str) -> int:
        try:
            return int((queue / name).read_text())
        except OSError:  # a container may hide it
            return 0

    io_min, io_opt = syscalls.preferred_sizes(fd)
    return Limits(
        logical_block=syscalls.logical_block_size(fd),
        discard=not read_only and setting("discard_max_bytes") > 0,
        zero=not read_only,
        fast_zero=not read_only and setting("write_zeroes_max_bytes") > 0,
        cache=not direct,
        io_min=io_min,
        io_opt=io_opt,
        rotational=setting("rotational") > 0,
    )


def _can_punch(fd: int, size: int) -> bool:
    try:
        syscalls.fallocate(fd, syscalls.PUNCH_HOLE | syscalls.KEEP_SIZE, round_up(size, 4096), 4096)
    except OSError as error:
        return error.errno == errno.EFBIG  # a file of the largest size has nothing behind its end; trying will tell
    return True


def _can_seek_data(fd: int) -> bool:
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        return error.errno == errno.ENXIO  # it looked, and there is no data
    return True


def _inline_read_flags(fd: int) -> int | None:
    try:
        os.preadv(fd, (bytearray(1),), 0, os.RWF_NOWAIT)
    except OSError as error:  # EAGAIN and EIO speak of the data, not of the flag
        if error.errno == errno.EOPNOTSUPP:
            return 0 if syscalls.in_memory(fd) else None
    return os.RWF_NOWAIT

"""System calls on files and block devices that Python's `os` lacks: fallocate, a range's fdatasync, fstatfs, block ioctls.

All of them block and give up the GIL, so they belong in a thread. A failure is an OSError, as in `os`.
References: fallocate(2), msync(2), statfs(2), linux/fs.h, linux/falloc.h, linux/magic.h.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from typing import Final

KEEP_SIZE: Final = 0x01
PUNCH_HOLE: Final = 0x02
ZERO_RANGE: Final = 0x10

_BLKROGET: Final = 0x125E
_BLKSSZGET: Final = 0x1268
_BLKDISCARD: Final = 0x1277
_BLKIOMIN: Final = 0x1278
_BLKIOOPT: Final = 0x1279

_MEMORY_FILE_SYSTEMS: Final = {0x01021994, 0x858458F6, 0x958458F6}  # tmpfs and memfd, ramfs, hugetlbfs

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.mmap.restype = ctypes.c_void_p
_libc.msync.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MS_SYNC: Final = 4
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), repeated when a signal interrupts it."""
    while _libc.fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def sync_range(fd: int, offset: int, length: int) -> None:
    """fdatasync(2) of a range, which is what msync(2) is to a mapping of it; of the whole file where there are no mappings."""
    begin = offset & -mmap.PAGESIZE
    length += offset - begin
    address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, begin)
    if address == _MAP_FAILED:
        os.fdatasync(fd)
        return
    try:
        while _libc.msync(address, length, _MS_SYNC) != 0:
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))
    finally:
        _libc.munmap(address, length)


def in_memory(fd: int) -> bool:
    """Whether the file lives in a file system made of memory, so that reading it waits for no disk."""
    status = ctypes.create_string_buffer(256)  # struct statfs is 120 bytes or less; f_type is its first word
    if _libc.fstatfs(fd, status) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    magic: int = ctypes.c_ulong.from_buffer(status).value
    return magic & 0xFFFFFFFF in _MEMORY_FILE_SYSTEMS


def discard_blocks(fd: int, offset: int, length: int) -> None:
    """BLKDISCARD: the block device may forget the range."""
    fcntl.ioctl(fd, _BLKDISCARD, struct.pack("=QQ", offset, length))


def logical_block_size(fd: int) -> int:
    """The smallest unit of I/O of a block device."""
    return _integer(fd, _BLKSSZGET)


def preferred_sizes(fd: int) -> tuple[int, int]:
    """The smallest and the best request size of a block device, 0 = no preference."""
    return _integer(fd, _BLKIOMIN), _integer(fd, _BLKIOOPT)


def is_read_only(fd: int) -> bool:
    """Whether a block device refuses writes."""
    return _integer(fd, _BLKROGET) != 0


def _integer(fd: int, request: int) -> int:
    """What a block ioctl that gives one int answers."""
    (value,) = struct.unpack("=i", fcntl.ioctl(fd, request, bytes(4)))
    return int(value)

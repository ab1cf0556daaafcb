"""Where a LUKS header lies: what can be read and written by byte offset. Everything here blocks."""

import errno
import fcntl
import os
import stat
from types import TracebackType
from typing import Protocol, Self

from nbdmap.errors import AccessRefused, Busy, InvalidArgument, IoFailed, NotFound, from_os_error


class Image(Protocol):
    """A disk that holds a header, or data, or both. `size` is in bytes."""

    name: str
    size: int

    def read(self, offset: int, length: int) -> bytearray:
        """These bytes, fewer where the disk ends before. Raises IoFailed."""
        ...

    def write(self, offset: int, data: bytes | bytearray) -> None:
        """Writes all of `data`. Raises IoFailed."""
        ...

    def flush(self) -> None:
        """What was written is durable when it returns. Raises IoFailed."""
        ...


class FileImage:
    """A file or block device; with `create` a file that is missing is made, empty.

    A block device that is to be had `alone` must not be mounted or part of another. What is written is locked (flock), as
    cryptsetup does with files: two who change a header at the same time would each lose what the other did.
    """

    def __init__(self, path: str, *, write: bool = False, create: bool = False, alone: bool = False) -> None:
        self.name = path
        self._fd = -1
        try:
            flags = (os.O_RDWR if write else os.O_RDONLY) | (os.O_CREAT if create else 0) | os.O_CLOEXEC
            if not create or os.path.exists(path):
                mode = os.stat(path).st_mode  # looked at before opening, as opening some devices does things
                if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
                    raise InvalidArgument(f"{path} is neither a file nor a block device")
                if alone and stat.S_ISBLK(mode):
                    flags = (flags | os.O_EXCL) & ~os.O_CREAT
            self._fd = os.open(path, flags, 0o600)
            fcntl.flock(self._fd, (fcntl.LOCK_EX if write else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            self.close()
            if error.errno == errno.ENOENT:
                raise NotFound(f"{path}: no such file") from None
            if error.errno == errno.EBUSY:
                raise Busy(f"{path} is in use: mounted, or part of another device") from None
            if error.errno == errno.EWOULDBLOCK:
                raise Busy(f"{path}: another program is changing its header") from None
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                mode_name = "writing" if write else "reading"
                raise AccessRefused(f"{path} cannot be opened for {mode_name}: {error.strerror}") from None
            raise from_os_error(error, path) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file, if it is open."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, offset: int, length: int) -> bytearray:
        """As Image.read."""
        data = bytearray(max(0, min(length, self.size - offset)))
        view = memoryview(data)
        done = 0
        try:
            while done < len(data) and (count := os.preadv(self._fd, [view[done:]], offset + done)):
                done += count
        except OSError as error:
            raise from_os_error(error, f"read of {self.name} at {offset}") from error
        view.release()
        del data[done:]
        return data

    def write(self, offset: int, data: bytes | bytearray) -> None:
        """As Image.write; a file that ends before grows."""
        view = memoryview(data)
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], offset + done)
        except OSError as error:
            raise from_os_error(error, f"write of {self.name} at {offset}") from error
        self.size = max(self.size, offset + len(view))

    def flush(self) -> None:
        """As Image.flush."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise from_os_error(error, f"sync of {self.name}") from error


def read_exactly(image: Image, offset: int, length: int, what: str) -> bytearray:
    """`length` bytes. Raises IoFailed when the disk ends before, naming `what`."""
    data = image.read(offset, length)
    if len(data) != length:
        raise IoFailed(f"{image.name}: {what} at {offset} to {offset + length} is beyond the end of the disk, {image.size}")
    return data

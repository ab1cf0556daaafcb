"""Passphrases and volume keys in files.

A key file is taken as it is, to its last byte: an end of line is part of it. It may be a pipe.
"""

import os
from typing import Final, NamedTuple

from nbdmap.errors import InvalidArgument, from_os_error
from nbdmap.luks.secret import wipe

MAX_KEY_FILE: Final = 8 << 20
"""Bytes that are read when no size is given, as cryptsetup's."""


class KeyFile(NamedTuple):
    """`size` bytes (None: all that there are) of a file, from byte `offset` on."""

    path: str
    size: int | None = None
    offset: int = 0

    def read(self) -> bytearray:
        """Its bytes, the caller's to wipe. Raises IoFailed, and InvalidArgument when it is too short or too long."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return self._take(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise from_os_error(error, f"key file {self.path}") from None

    def _take(self, fd: int) -> bytearray:
        most = self.offset + (MAX_KEY_FILE if self.size is None else self.size)
        data = bytearray()
        try:
            while len(data) <= most and (piece := os.read(fd, min(65536, most + 1 - len(data)))):
                data += piece
                if self.size is not None and len(data) >= most:
                    break
            if self.size is None and len(data) > most:
                raise InvalidArgument(f"key file {self.path}: more than {MAX_KEY_FILE} bytes; give its size")
            if len(data) <= self.offset or (self.size is not None and len(data) < most):
                raise InvalidArgument(f"key file {self.path}: ends before what is asked of it")
            return data[self.offset : most]
        finally:
            wipe(data)

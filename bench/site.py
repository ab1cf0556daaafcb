"""Where a benchmark runs: a directory of its own with the files that are served, certificates, sockets and logs.

`data.img` is random and in the page cache; half of `sparse.img` is holes, in turns of CHUNK; `target.img` is all hole and
copied into.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Final

from nbdmap.units import GIB, MIB, SECTOR
from tests.support.certificates import make_certificates

CHUNK: Final = 8 * MIB


class Backing(StrEnum):
    """What is served."""

    DATA = "data.img"
    SPARSE = "sparse.img"
    TARGET = "target.img"
    MEMORY = "memory"
    STACK = "stack"
    """data.img, through a stack of targets."""
    LUKS = "luks.img"
    """LUKS 1, by qemu-img; as large as data.img inside."""
    THIN = "thin"
    """A new thin volume of its server's own kind, FIRST_TIMES as large as data.img."""
    SNAPSHOT = "snapshot"
    """What THIN was, now that it has a snapshot."""
    DELAY = "delay"
    """data.img, late."""


FIRST_TIMES: Final = 4
PASSPHRASE: Final = "bench"
LUKS_HEADER: Final = 2 * MIB
REPOSITORY: Final = Path(__file__).resolve().parent.parent


class Site:
    """The directory, and how large its files are. Files are made when first asked for."""

    def __init__(self, directory: Path, *, size: int = 256 * MIB, sparse_size: int = 4 * GIB) -> None:
        self.directory = directory
        self.size = size
        self.sparse_size = sparse_size
        self._count = 0

    @property
    def certificates(self) -> Path:
        """The directory of everybody's certificates; also where libnbd looks for them, if this is the home of its user.
        Root has no such place, and so believes every server and shows no certificate of its own."""
        directory = self.directory / ".pki" / "libnbd"
        return directory if directory.exists() else make_certificates(directory)

    def unique(self, name: str) -> Path:
        """A new path for a socket, a log or the like."""
        self._count += 1
        return self.directory / f"{self._count}-{name}"

    def file(self, backing: Backing) -> Path:
        """The file behind what is served."""
        name = Backing.DATA if backing in (Backing.STACK, Backing.DELAY) else backing
        path = self.directory / name
        if not path.exists():
            if name == Backing.LUKS:
                _make_luks(path, self.size)
            elif name == Backing.DATA:
                _fill(path, self.size, every=1)
            elif name == Backing.SPARSE:
                _fill(path, self.sparse_size, every=2)
            else:
                self.clear_target()
        return path

    def size_of(self, backing: Backing) -> int:
        """How large the export is."""
        if backing in (Backing.THIN, Backing.SNAPSHOT):
            return self.size * FIRST_TIMES
        return self.sparse_size if backing in (Backing.SPARSE, Backing.TARGET) else self.size

    def clear_target(self) -> None:
        """Makes target.img a single hole, whatever a server has written to it."""
        with (self.directory / Backing.TARGET).open("ab") as file:
            file.truncate(0)
            file.truncate(self.sparse_size)

    def settle(self, backing: Backing) -> None:
        """Writes back what the last client left dirty, so that the next one does not pay for it."""
        if backing in (Backing.DATA, Backing.STACK, Backing.LUKS):
            descriptor = os.open(self.file(backing), os.O_RDONLY)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)

    def warm(self, backing: Backing) -> None:
        """Reads the file once, so that it is in the page cache."""
        if backing not in (Backing.MEMORY, Backing.THIN, Backing.TARGET):
            with self.file(backing).open("rb", buffering=0) as file:
                buffer = bytearray(MIB)
                while file.readinto(buffer):
                    pass

    def read_anew(self, path: Path) -> None:
        """Writes a file back, drops it from the page cache, and reads as much of its beginning as it has on the disk."""
        with path.open("rb", buffering=0) as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            left = os.fstat(file.fileno()).st_blocks * 512
            buffer = bytearray(MIB)
            while left > 0 and (count := file.readinto(buffer)):
                left -= count


def _fill(path: Path, size: int, every: int) -> None:
    """Random bytes in one CHUNK of `every`; holes in the others."""
    noise = os.urandom(min(CHUNK, size))
    with path.open("wb", buffering=0) as file:
        file.truncate(size)
        for number, start in enumerate(range(0, size, CHUNK * every)):
            file.seek(start)
            file.write((number.to_bytes(8, "big") + noise[8:])[: size - start])
        os.fdatasync(file.fileno())


def _make_luks(path: Path, size: int) -> None:
    """AES-256-XTS in sectors of 512 bytes, with random bytes all over."""
    with path.open("wb") as file:
        file.truncate(LUKS_HEADER + size)
    how = ["-q", "-M", "luks1", "-i", "200", "-o", str(LUKS_HEADER // SECTOR), "-d", "-"]
    command = [sys.executable, "-m", "nbdmap", "luks", "format", *how, str(path)]
    subprocess.run(command, check=True, input=PASSPHRASE.encode(), cwd=REPOSITORY)
    noise = os.urandom(min(CHUNK, size))
    with path.open("r+b", buffering=0) as file:
        for start in range(LUKS_HEADER, LUKS_HEADER + size, len(noise)):
            file.seek(start)
            file.write(noise)
        os.fdatasync(file.fileno())


@contextlib.contextmanager
def site(parent: Path | None = None, *, size: int = 256 * MIB, sparse_size: int = 4 * GIB) -> Iterator[Site]:
    """A site for the length of a block; its name is short enough for the paths of Unix sockets."""
    directory = Path(tempfile.mkdtemp(prefix="nbdmap-bench-", dir=parent))
    try:
        directory.chmod(0o755)
        yield Site(directory, size=size, sparse_size=sparse_size)
    finally:
        shutil.rmtree(directory)

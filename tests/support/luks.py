"""LUKS disks in memory, cheap to make, and cryptsetup, which says whether they are right."""

from functools import cache
from pathlib import Path
from typing import Final

from nbdmap.errors import IoFailed
from nbdmap.luks import luks1, luks2, volume
from nbdmap.luks.kdf import Argon2, Kdf, Pbkdf2
from nbdmap.luks.luks1 import Luks1, Wanted1
from nbdmap.luks.luks2 import Luks2, Wanted2
from tests.support.clients import attempt

UUID: Final = "6c7083e7-8854-4234-bea6-09164338c040"
KEY: Final = bytes(range(64))
SALT: Final = bytes(range(32))
CHEAP: Final = Pbkdf2("sha256", 1000, SALT)
"""The cheapest that cryptsetup takes."""
KDFS: Final[dict[str, Kdf]] = {
    "pbkdf2": CHEAP, "argon2i": Argon2("argon2i", 4, 64, 1, SALT), "argon2id": Argon2("argon2id", 4, 64, 1, SALT),
}  # fmt: skip
SMALL: Final = {"header_size": 16384, "keyslots_size": 4 * 258048}
"""Four key slots: enough for most tests, and 1 MiB instead of 16."""


class Torn(Exception):
    """The power failed."""


class MemoryImage:
    """An image in memory. `writes_left`: the power fails in the middle of the write after so many."""

    def __init__(self, size: int = 2 << 20, name: str = "disk") -> None:
        self.name = name
        self.size = size
        self.bytes = bytearray(size)
        self.log: list[tuple[str, int, int]] = []
        self.writes_left: int | None = None
        self.torn_at = 512

    def read(self, offset: int, length: int) -> bytearray:
        return self.bytes[offset : min(offset + length, self.size)]

    def write(self, offset: int, data: bytes | bytearray) -> None:
        if offset + len(data) > self.size:
            raise IoFailed(f"{self.name}: write beyond the end")
        self.log.append(("write", offset, len(data)))
        if self.writes_left is not None:
            self.writes_left -= 1
            if self.writes_left < 0:
                self.bytes[offset : offset + self.torn_at] = data[: self.torn_at]
                raise Torn
        self.bytes[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.log.append(("flush", 0, 0))


    def copy(self) -> "MemoryImage":
        """The same bytes."""
        other = MemoryImage(0, self.name)
        other.size, other.bytes = self.size, self.bytes[:]
        return other


@cache
def _template(version: int) -> MemoryImage:
    image = (new_luks1() if version == 1 else new_luks2()).image
    assert isinstance(image, MemoryImage)
    return image


def made(version: int) -> MemoryImage:
    """A disk with the passphrase "secret" in slot 0, the same each time."""
    return _template(version).copy()


def disk_file(path: Path, version: int = 2, data_size: int = 1 << 20) -> Path:
    """A file with the disk of `made` and place for data."""
    with path.open("wb") as file:
        file.write(made(version).bytes[: 2 << 20])
        file.truncate((2 << 20) + data_size)
    return path


def passphrase(text: str) -> bytearray:
    return bytearray(text.encode())


def new_luks1(image: MemoryImage | None = None, encryption: str = "aes-xts-plain64", key: bytes = KEY, hash_name: str = "sha256",
              detached: bool = False) -> Luks1:  # fmt: skip
    """One with the passphrase "secret" in slot 0."""
    image = image or MemoryImage((2 << 20) + 4096)
    header = luks1.create(image, Wanted1(encryption, len(key), hash_name, UUID, 1000, detached=detached), bytearray(key))
    header.erase()
    header.add_key(bytearray(key), passphrase("secret"), Pbkdf2(hash_name, 1000, SALT))
    return header


def new_luks2(image: MemoryImage | None = None, kdf: Kdf = CHEAP, sector_size: int = 512, key: bytes = KEY,
              encryption: str = "aes-xts-plain64", **more: object) -> Luks2:  # fmt: skip
    """One with the passphrase "secret" in slot 0."""
    image = image or MemoryImage()
    wanted = Wanted2(encryption, sector_size, "sha256", UUID, "a label", "", 1000, **{**SMALL, **more})  # type: ignore[arg-type]
    header = luks2.create(image, wanted, bytearray(key))
    header.erase()
    header.add_key(bytearray(key), passphrase("secret"), kdf)
    return header


def opens(image: MemoryImage, text: str, slot: int | None = None) -> int:
    """The slot that this passphrase opens, after the header was read again; the key is KEY."""
    unlocked = volume.read(image).unlock(passphrase(text), slot)
    assert unlocked.key == KEY[: len(unlocked.key)]
    return unlocked.slot


def cryptsetup(*words: str | Path, stdin: str = "") -> tuple[int, str]:
    """Debian's cryptsetup: its status and what it said."""
    done = attempt("cryptsetup", *words, stdin=stdin)
    return done.returncode, done.stdout + done.stderr

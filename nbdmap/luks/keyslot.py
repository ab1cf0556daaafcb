"""What LUKS 1 and 2 have in common: a key slot's area gives the volume key to who knows its passphrase, and a digest tells
whether that is the key.

    passphrase -KDF-> area key -cipher-> stripes -merge-> volume key -PBKDF2-> digest
"""

import hmac
import os
from dataclasses import dataclass
from typing import Final, NamedTuple

from nbdmap.errors import NoKey, NotFound, PassphraseRefused
from nbdmap.luks import af
from nbdmap.luks.area import decrypt, encrypt
from nbdmap.luks.image import Image, read_exactly
from nbdmap.luks.kdf import Kdf, Pbkdf2
from nbdmap.luks.secret import wipe, wiping
from nbdmap.units import SECTOR, round_up

STRIPES: Final = 4000
IGNORED, NORMAL, PREFERRED = 0, 1, 2
"""Priorities. An ignored slot is tried only when it is named."""
MAX_KEY: Final = 512
"""Bytes of a volume key, as cryptsetup's."""


@dataclass(frozen=True)
class KeySlot:
    """A slot that is in use; `offset` is where its area lies on the header's disk. All sizes in bytes."""

    number: int
    kdf: Kdf
    key_size: int
    stripes: int
    af_hash: str
    encryption: str
    area_key_size: int
    offset: int
    priority: int = NORMAL

    @property
    def material_size(self) -> int:
        """What of the area is used: whole sectors."""
        return round_up(self.key_size * self.stripes, SECTOR)

    def recover(self, image: Image, passphrase: bytearray) -> bytearray:
        """What the volume key is if this is the passphrase; the caller's to wipe."""
        stored = read_exactly(image, self.offset, self.material_size, f"key slot {self.number}")
        with wiping(stored) as material, wiping(self.kdf.derive(passphrase, self.area_key_size)) as area_key:
            decrypt(self.encryption, area_key, material)
            with wiping(material[: self.key_size * self.stripes]) as striped:
                return af.merge(striped, self.stripes, self.af_hash)

    def store(self, image: Image, passphrase: bytearray, key: bytearray) -> None:
        """Writes the area so that `passphrase` gives `key`, and makes it durable."""
        with (
            wiping(af.split(key, self.stripes, self.af_hash, os.urandom)) as material,
            wiping(self.kdf.derive(passphrase, self.area_key_size)) as area_key,
        ):
            material.extend(bytes(self.material_size - len(material)))
            encrypt(self.encryption, area_key, material)
            image.write(self.offset, material)
        image.flush()


def destroy(image: Image, offset: int, size: int) -> None:
    """Overwrites a slot's area, so that no passphrase gives the key any more."""
    image.write(offset, os.urandom(size))
    image.flush()


@dataclass(frozen=True)
class Digest:
    """What tells the volume key from others."""

    kdf: Pbkdf2
    digest: bytes

    def matches(self, key: bytearray) -> bool:
        """Whether `key` is the one."""
        return hmac.compare_digest(self.kdf.derive(key, len(self.digest)), self.digest)


class Segment(NamedTuple):
    """What is encrypted, and how: the words of a crypt target but for its key. Bytes; `size` None is up to the disk's end."""

    encryption: str
    offset: int
    size: int | None
    iv_offset_sectors: int
    sector_size: int
    options: tuple[str, ...]
    """Of the crypt target, as the header asks for them: allow_discards and the like."""


class Unlocked(NamedTuple):
    """A volume key, and the slot it came from. Whoever has it wipes the key."""

    slot: int
    key: bytearray


def unlock(
    image: Image, slots: dict[int, KeySlot], digest: Digest, passphrase: bytearray, only: int | None = None
) -> Unlocked:
    """Tries the passphrase on the slot `only`, or on all but the ignored: preferred ones first, then by number.

    Raises PassphraseRefused when it fits none, NotFound when the slot that is named is not in use, and NoKey when there is
    none to be tried.
    """
    if only is not None and only not in slots:
        raise NotFound(f"{image.name}: key slot {only} is not in use")
    chosen = [slot for slot in slots.values() if (slot.priority > IGNORED if only is None else slot.number == only)]
    if not chosen:
        raise NoKey(f"{image.name}: no key slot can be used")
    for slot in sorted(chosen, key=lambda slot: (-slot.priority, slot.number)):
        key = slot.recover(image, passphrase)
        if digest.matches(key):
            return Unlocked(slot.number, key)
        wipe(key)
    where = "" if only is None else f" in key slot {only}"
    raise PassphraseRefused(f"{image.name}: no key available with this passphrase{where}")

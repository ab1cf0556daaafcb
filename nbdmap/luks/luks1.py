"""LUKS 1: one header of 592 bytes at the start of the disk, eight key slots behind it, big-endian throughout.

    0 LUKS BA BE | version 1 | aes | xts-plain64 | sha256 | payload sector | key bytes | digest | uuid | 8 slots of 48 bytes

Specification: LUKS On-Disk Format 1.2.3. A slot's area lies at its own sector, encrypted as the payload is, with sectors
counted from the start of the area. There is one copy of the header only: a slot's area is durable before the header tells
of it, and destroyed before the header forgets it, so that a torn write of the header can spoil only the slot it changes.
"""

import os
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Final

from nbdmap.errors import Busy, CorruptMetadata, InvalidArgument, NotFound
from nbdmap.layout import Record
from nbdmap.luks import keyslot
from nbdmap.luks.image import Image, read_exactly
from nbdmap.luks.kdf import Argon2, Kdf, Pbkdf2, check_hash
from nbdmap.luks.keyslot import MAX_KEY, STRIPES, Digest, KeySlot, Segment, Unlocked
from nbdmap.luks.secret import wiping
from nbdmap.units import SECTOR, round_up

MAGIC: Final = b"LUKS\xba\xbe"
SLOTS: Final = 8
DIGEST_SIZE: Final = 20
SALT_SIZE: Final = 32
ENABLED: Final = 0x00AC71F3
DISABLED: Final = 0x0000DEAD
HEADER_SIZE: Final = 1024
SLOT_ALIGNMENT: Final = 4096
"""Bytes: of the first area, and between areas."""

CIPHER_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_:()\-.,]*")
UUID: Final = re.compile(r"[0-9A-Za-z-]{1,39}")


@dataclass(frozen=True)
class Header(Record, order=">"):
    """The first 208 bytes; `payload_sectors` is where the encrypted data begins, 0 for a detached header."""

    magic: Annotated[bytes, "6s"]
    version: Annotated[int, "H"]
    cipher_name: Annotated[bytes, "32s"]
    cipher_mode: Annotated[bytes, "32s"]
    hash_name: Annotated[bytes, "32s"]
    payload_sectors: Annotated[int, "I"]
    key_size: Annotated[int, "I"]
    digest: Annotated[bytes, "20s"]
    digest_salt: Annotated[bytes, "32s"]
    digest_iterations: Annotated[int, "I"]
    uuid: Annotated[bytes, "40s"]


@dataclass(frozen=True)
class SlotRecord(Record, order=">"):
    """One of the eight entries behind it."""

    active: Annotated[int, "I"]
    iterations: Annotated[int, "I"]
    salt: Annotated[bytes, "32s"]
    start_sectors: Annotated[int, "I"]
    stripes: Annotated[int, "I"]


class Luks1:
    """A header that was read and checked, or was just made."""

    version: Final = 1

    def __init__(self, image: Image, header: Header, entries: list[SlotRecord], rest: bytes = b"") -> None:
        self.image = image
        self.header = header
        self.entries = entries
        self._rest = rest
        self.uuid = _text(image, "uuid", header.uuid)
        name, mode = (_text(image, what, raw) for what, raw in
                      (("cipher name", header.cipher_name), ("cipher mode", header.cipher_mode)))  # fmt: skip
        self.encryption = f"{name}-{mode}"
        self.hash = check_hash(_text(image, "hash", header.hash_name))
        self._check()
        self.digest = Digest(Pbkdf2(self.hash, header.digest_iterations, header.digest_salt), header.digest)
        self.slots = {number: self._slot(number) for number, entry in enumerate(entries) if entry.active == ENABLED}

    @classmethod
    def read(cls, image: Image) -> "Luks1":
        """The header of `image`. Raises CorruptMetadata naming what is wrong, and InvalidArgument for an unknown hash."""
        data = read_exactly(image, 0, HEADER_SIZE, "the LUKS1 header")
        entries = [SlotRecord.unpack(data, Header.layout.size + number * SlotRecord.layout.size) for number in range(SLOTS)]
        used = Header.layout.size + SLOTS * SlotRecord.layout.size
        return cls(image, Header.unpack(data), entries, bytes(data[used:]))

    def _check(self) -> None:
        header, where = self.header, f"{self.image.name}: LUKS1 header"
        if not 1 <= header.key_size <= MAX_KEY:
            raise CorruptMetadata(f"{where}: a key of {header.key_size} bytes is not in the range 1 to {MAX_KEY}")
        if CIPHER_WORD.fullmatch(self.encryption) is None:
            raise CorruptMetadata(f"{where}: cipher {self.encryption!r}")
        if UUID.fullmatch(self.uuid) is None:
            raise CorruptMetadata(f"{where}: uuid {self.uuid!r}")
        areas = []
        for number, entry in enumerate(self.entries):
            if entry.active not in (ENABLED, DISABLED):
                raise CorruptMetadata(f"{where}: key slot {number} is neither enabled nor disabled, but {entry.active:#010x}")
            if not 1 <= entry.stripes <= 2 * STRIPES:
                raise CorruptMetadata(f"{where}: key slot {number} has {entry.stripes} stripes")
            start = entry.start_sectors * SECTOR
            end = start + self.area_size(entry)
            if start < HEADER_SIZE or (header.payload_sectors and end > header.payload_sectors * SECTOR):
                raise CorruptMetadata(f"{where}: the area of key slot {number}, {start} to {end}, is not where it should be")
            areas.append((start, end, number))
        areas.sort()
        for (_, end, number), (start, _, other) in pairwise(areas):
            if start < end:
                raise CorruptMetadata(f"{where}: the areas of key slots {number} and {other} overlap")

    def area_size(self, entry: SlotRecord) -> int:
        """Bytes that a slot's area takes."""
        return round_up(self.header.key_size * entry.stripes, SECTOR)

    def _slot(self, number: int, kdf: Pbkdf2 | None = None) -> KeySlot:
        entry, size = self.entries[number], self.header.key_size
        return KeySlot(
            number, kdf or Pbkdf2(self.hash, entry.iterations, entry.salt), size, entry.stripes, self.hash,
            self.encryption, size, entry.start_sectors * SECTOR,
        )  # fmt: skip

    def segment(self) -> Segment:
        """Where the data is, and how it is encrypted."""
        return Segment(self.encryption, self.header.payload_sectors * SECTOR, None, 0, SECTOR, ())

    def unlock(self, passphrase: bytearray, slot: int | None = None, without: int | None = None) -> Unlocked:
        """As keyslot.unlock, as if the slot `without` were not there."""
        slots = {number: one for number, one in self.slots.items() if number != without}
        return keyslot.unlock(self.image, slots, self.digest, passphrase, slot)

    def is_key(self, key: bytearray) -> bool:
        """Whether `key` is the volume key."""
        return len(key) == self.header.key_size and self.digest.matches(key)

    def add_key(self, key: bytearray, passphrase: bytearray, kdf: Kdf, slot: int | None = None) -> int:
        """Makes `passphrase` another one of the volume key `key`, in `slot` or the first that is free; the slot's number.

        `kdf` is a PBKDF2 with the header's hash. Raises Busy when the slot is, or all are, in use.
        """
        if isinstance(kdf, Argon2) or kdf.hash != self.hash or len(kdf.salt) != SALT_SIZE:
            raise InvalidArgument(f"{self.image.name}: LUKS1 takes pbkdf2 with the hash of its header, {self.hash}, only")
        if slot is None:
            slot = next((number for number in range(SLOTS) if number not in self.slots), None)
        if slot is None:
            raise Busy(f"{self.image.name}: all {SLOTS} key slots are in use")
        if not 0 <= slot < SLOTS:
            raise InvalidArgument(f"{self.image.name}: LUKS1 has the key slots 0 to {SLOTS - 1}, no {slot}")
        if slot in self.slots:
            raise Busy(f"{self.image.name}: key slot {slot} is in use")
        new = self._slot(slot, kdf)
        new.store(self.image, passphrase, key)
        self.entries[slot] = replace(self.entries[slot], active=ENABLED, iterations=kdf.iterations, salt=kdf.salt)
        self.slots[slot] = new
        self.write()
        return slot

    def check_slot(self, slot: int) -> None:
        """Raises NotFound when the slot is not in use."""
        if slot not in self.slots:
            raise NotFound(f"{self.image.name}: key slot {slot} is not in use")

    def remove_key(self, slot: int) -> None:
        """Destroys a key slot. Raises NotFound when it is not in use."""
        self.check_slot(slot)
        keyslot.destroy(self.image, self.slots.pop(slot).offset, self.area_size(self.entries[slot]))
        self.entries[slot] = replace(self.entries[slot], active=DISABLED, iterations=0, salt=bytes(SALT_SIZE))
        self.write()

    def erase(self) -> None:
        """Overwrites the place of a new header and its key slots: what was there is gone before the new comes."""
        end = max(entry.start_sectors * SECTOR + self.area_size(entry) for entry in self.entries)
        self.image.write(0, bytes(SLOT_ALIGNMENT))
        self.image.flush()
        self.image.write(SLOT_ALIGNMENT, os.urandom(end - SLOT_ALIGNMENT))
        self.image.flush()

    def write(self) -> None:
        """Writes the header and makes it durable."""
        data = self.header.pack() + b"".join(entry.pack() for entry in self.entries)
        self.image.write(0, data + self._rest)
        self.image.flush()


@dataclass(frozen=True)
class Wanted1:
    """What a new LUKS1 is to be; `data_offset` None is behind the key slots, at a whole MiB."""

    encryption: str
    key_size: int
    hash: str
    uuid: str
    digest_iterations: int
    data_offset: int | None = None
    detached: bool = False


def create(image: Image, wanted: Wanted1, key: bytearray) -> Luks1:
    """A new header without a key, not yet on the disk. Raises InvalidArgument when it cannot be so."""
    name, _, mode = wanted.encryption.partition("-")
    for what, text in (("cipher name", name), ("cipher mode", mode), ("hash", wanted.hash)):
        if not 0 < len(text) < 32:
            raise InvalidArgument(f"{image.name}: the {what} {text!r} has no place in a LUKS1 header: 1 to 31 bytes")
    pitch = round_up(wanted.key_size * STRIPES, SLOT_ALIGNMENT)
    end = SLOT_ALIGNMENT + SLOTS * pitch
    offset = wanted.data_offset if wanted.data_offset is not None else 0 if wanted.detached else round_up(end, 1 << 20)
    if not wanted.detached and offset < end:
        raise InvalidArgument(f"{image.name}: the data cannot begin at byte {offset}, the key slots end at {end}")
    if offset % SECTOR or offset // SECTOR >= 1 << 32:
        raise InvalidArgument(f"{image.name}: the data cannot begin at byte {offset}")
    salt = os.urandom(SALT_SIZE)
    with wiping(Pbkdf2(wanted.hash, wanted.digest_iterations, salt).derive(key, DIGEST_SIZE)) as digest:
        header = Header(
            MAGIC, 1, name.encode(), mode.encode(), wanted.hash.encode(), offset // SECTOR, wanted.key_size,
            bytes(digest), salt, wanted.digest_iterations, wanted.uuid.encode(),
        )  # fmt: skip
    entries = [
        SlotRecord(DISABLED, 0, bytes(SALT_SIZE), (SLOT_ALIGNMENT + number * pitch) // SECTOR, STRIPES) for number in range(SLOTS)
    ]
    header = Header.unpack(header.pack())  # with its texts as long as they are on disk
    return Luks1(image, header, entries, bytes(HEADER_SIZE - Header.layout.size - SLOTS * SlotRecord.layout.size))


def _text(image: Image, what: str, raw: bytes) -> str:
    """The text of a field that a NUL ends."""
    text, end, _ = raw.partition(b"\0")
    if not end or not text.isascii() or not text.decode().isprintable():
        raise CorruptMetadata(f"{image.name}: LUKS1 header: the {what} is {raw[:40]!r}")
    return text.decode()

"""LUKS 2: a binary header of 4096 bytes and JSON behind it, both twice, then the areas of the key slots.

    0 LUKS BA BE | version 2 | size | seqid | label | sha256 | salt | uuid | offset | checksum       4096 JSON
    size SKUL BA BE ...

Specification: LUKS2 On-Disk Format 1.0.0. Each copy has a checksum over all of it; of two good ones that with the higher
seqid counts, and a disk whose first copy is lost is found by its second one, at any of the places that one can have.

A change is written with the next seqid to the copy that is not relied on, made durable, then to the other: whenever that is
cut off, one good copy is there. A key slot's area is durable before the headers tell of it.
"""

import base64
import hashlib
import json
import os
from dataclasses import dataclass, replace
from typing import Annotated, Final, NamedTuple

from nbdmap.errors import Busy, CorruptMetadata, InvalidArgument, IoFailed, NotFound
from nbdmap.layout import Record
from nbdmap.luks import defaults, keyslot, metadata
from nbdmap.luks.image import Image
from nbdmap.luks.kdf import Kdf, Pbkdf2
from nbdmap.luks.keyslot import STRIPES, KeySlot, Segment, Unlocked
from nbdmap.luks.luks1 import UUID
from nbdmap.luks.metadata import MAX_SLOTS, Metadata, kdf_json
from nbdmap.luks.secret import wiping
from nbdmap.units import round_up

MAGICS: Final = (b"LUKS\xba\xbe", b"SKUL\xba\xbe")
"""Of the first and of the second copy."""
BINARY: Final = 4096
SIZES: Final = tuple(1 << shift for shift in range(14, 23))
"""Of a copy: 16 KiB to 4 MiB; so the places that a second copy can have, too."""
AREA_ALIGNMENT: Final = 4096
CHECKSUMS: Final = ("sha1", "sha224", "sha256", "sha384", "sha512")
ERASED_AT_ONCE: Final = 1 << 20
_CHECKSUM_AT: Final = slice(448, 512)


@dataclass(frozen=True)
class Header(Record, order=">"):
    """The binary header, the first 512 bytes of which are in use. Sizes and offsets in bytes."""

    magic: Annotated[bytes, "6s"]
    version: Annotated[int, "H"]
    size: Annotated[int, "Q"]
    seqid: Annotated[int, "Q"]
    label: Annotated[bytes, "48s"]
    checksum_name: Annotated[bytes, "32s"]
    salt: Annotated[bytes, "64s"]
    uuid: Annotated[bytes, "40s"]
    subsystem: Annotated[bytes, "48s"]
    offset: Annotated[int, "Q184x"]
    checksum: Annotated[bytes, "64s3584x"]


class AreaChoice(NamedTuple):
    """How a new key slot's area is to be; "" and 0: as the data."""

    hash: str
    encryption: str = ""
    key_size: int = 0


class Copy:
    """One copy that was read, and whose checksum is right."""

    def __init__(self, image: Image, offset: int) -> None:
        self.offset = offset
        where = f"{image.name}: LUKS2 header at {offset}"
        start = image.read(offset, BINARY)
        self.header = header = Header.unpack(start)
        if header.magic != MAGICS[offset > 0] or header.version != 2:
            raise CorruptMetadata(f"{where}: there is none")
        if header.offset != offset or header.size not in SIZES or (offset and header.size != offset):
            raise CorruptMetadata(f"{where}: its size, {header.size}, or place, {header.offset}, is wrong")
        name = header.checksum_name.partition(b"\0")[0].decode("latin-1")
        if name not in CHECKSUMS:
            raise CorruptMetadata(f"{where}: the checksum {name!r} is unknown")
        data = start + image.read(offset + BINARY, header.size - BINARY)
        if len(data) < header.size:
            raise CorruptMetadata(f"{where}: the disk ends before it")
        checksum = hashlib.new(name)
        data[_CHECKSUM_AT] = bytes(64)
        checksum.update(data)
        if header.checksum[: checksum.digest_size] != checksum.digest():
            raise CorruptMetadata(f"{where}: the checksum is wrong")
        self.metadata = Metadata(metadata.parse(bytes(data[BINARY:]), where), 2 * header.size)


def find(image: Image) -> tuple[Copy, list[str]]:
    """The copy that counts, and what is wrong with the other. Raises CorruptMetadata when there is none."""
    copies: list[Copy] = []
    problems: list[str] = []

    def attempt(offset: int) -> None:
        try:
            copies.append(Copy(image, offset))
        except (CorruptMetadata, IoFailed) as error:
            problems.append(error.message)

    attempt(0)
    if copies:
        attempt(copies[0].header.size)
    else:
        for offset in SIZES:
            if image.read(offset, len(MAGICS[1])) == MAGICS[1]:
                attempt(offset)
            if copies:
                break
    if not copies:
        raise CorruptMetadata("; ".join(problems))
    newest = max(copies, key=lambda copy: copy.header.seqid)  # the first, when they are alike
    if len(copies) == 2 and copies[0].header.seqid != copies[1].header.seqid:
        other = next(copy for copy in copies if copy is not newest)
        problems.append(f"{image.name}: LUKS2 header at {other.offset}: older than the other")
    return newest, problems


class Luks2:
    """A header that was read and checked, or was just made. `problems`: what is wrong with the copy that was not used."""

    version: Final = 2

    def __init__(self, image: Image, header: Header, content: Metadata, relied_on: int, problems: list[str]) -> None:
        self.image = image
        self.header = header
        self.metadata = content
        self.problems = problems
        self._relied_on = relied_on
        where = f"{image.name}: LUKS2 header"
        texts = {}
        for what, raw in (("uuid", header.uuid), ("label", header.label), ("subsystem", header.subsystem)):
            text, end, _ = raw.partition(b"\0")
            if not end:
                raise CorruptMetadata(f"{where}: the {what} has no end")
            texts[what] = text.decode(errors="replace")
        self.uuid, self.label, self.subsystem = texts.values()
        if UUID.fullmatch(self.uuid) is None:
            raise CorruptMetadata(f"{where}: uuid {self.uuid!r}")

    @classmethod
    def read(cls, image: Image) -> "Luks2":
        """The header of `image`. Raises CorruptMetadata naming what is wrong with both copies."""
        copy, problems = find(image)
        return cls(image, copy.header, copy.metadata, copy.offset, problems)

    def segment(self) -> Segment:
        """Where the data is, and how it is encrypted. Raises Unsupported when only the kernel can tell."""
        self.metadata.check_requirements()
        return self.metadata.segment()[1]

    def _digest(self) -> tuple[int, keyslot.Digest, list[int]]:
        self.metadata.check_requirements()
        return self.metadata.digest_of_segment(self.metadata.segment()[0])

    def key_description(self) -> str:
        """What cryptsetup calls the volume key in the kernel's keyring."""
        return f"cryptsetup:{self.uuid}-d{self._digest()[0]}"

    @property
    def slots(self) -> dict[int, KeySlot]:
        """Those that hold the key of the data and can be opened here."""
        return {number: self.metadata.slots[number] for number in self._digest()[2] if number in self.metadata.slots}

    def unlock(self, passphrase: bytearray, slot: int | None = None, without: int | None = None) -> Unlocked:
        """As keyslot.unlock, as if the slot `without` were not there."""
        if slot in self.metadata.unusable:
            raise InvalidArgument(f"{self.image.name}: key slot {slot}: {self.metadata.unusable[slot]}")
        slots = {number: one for number, one in self.slots.items() if number != without}
        return keyslot.unlock(self.image, slots, self._digest()[1], passphrase, slot)

    def is_key(self, key: bytearray) -> bool:
        """Whether `key` is the volume key."""
        return self._digest()[1].matches(key)

    def add_key(
        self, key: bytearray, passphrase: bytearray, kdf: Kdf, slot: int | None = None, area: "AreaChoice | None" = None
    ) -> int:
        """Makes `passphrase` another one of the volume key `key`, in `slot` or the first that is free; the slot's number.

        The area is encrypted as the data unless told otherwise by `area`. Raises Busy when the slot is in use, or when
        there is no place for another area.
        """
        content = self.metadata
        if slot is None:
            slot = next((number for number in range(MAX_SLOTS) if number not in content.keyslots), None)
        if slot is None:
            raise Busy(f"{self.image.name}: all {MAX_SLOTS} key slots are in use")
        if not 0 <= slot < MAX_SLOTS:
            raise InvalidArgument(f"{self.image.name}: LUKS2 has the key slots 0 to {MAX_SLOTS - 1}, no {slot}")
        if slot in content.keyslots:
            raise Busy(f"{self.image.name}: key slot {slot} is in use")
        number, _, _ = self._digest()
        area = area or AreaChoice("sha256")
        size = round_up(len(key) * STRIPES, AREA_ALIGNMENT)
        entry = {
            "type": "luks2",
            "key_size": len(key),
            "af": {"type": "luks1", "stripes": STRIPES, "hash": area.hash},
            "area": {
                "type": "raw", "offset": str(self._free_area(size)), "size": str(size),
                "encryption": area.encryption or self.segment().encryption, "key_size": area.key_size or len(key),
            },
            "kdf": kdf_json(kdf),
        }  # fmt: skip
        plain = json.loads(json.dumps(content.root.plain))
        plain["keyslots"][str(slot)] = entry
        names = plain["digests"][str(number)]["keyslots"]
        plain["digests"][str(number)]["keyslots"] = sorted([*names, str(slot)], key=int)
        changed = self._checked(plain)
        changed.slots[slot].store(self.image, passphrase, key)
        self._commit(changed)
        return slot

    def _free_area(self, size: int) -> int:
        """Where `size` bytes are free among the areas."""
        content = self.metadata
        start = round_up(content.headers, AREA_ALIGNMENT)
        for begin, end in sorted(map(content.area, content.keyslots)):
            if start + size <= begin:
                break
            start = round_up(end, AREA_ALIGNMENT)
        if start + size > content.headers + content.keyslots_size:
            raise Busy(f"{self.image.name}: there is no room for another key slot of {size} bytes")
        return start

    def check_slot(self, slot: int) -> None:
        """Raises NotFound when the slot is not in use."""
        if slot not in self.metadata.keyslots:
            raise NotFound(f"{self.image.name}: key slot {slot} is not in use")

    def remove_key(self, slot: int) -> None:
        """Destroys a key slot; tokens that name it stay and name it no longer. Raises NotFound when it is not in use."""
        self.metadata.check_requirements()
        self.check_slot(slot)
        plain = json.loads(json.dumps(self.metadata.root.plain))
        del plain["keyslots"][str(slot)]
        for one in (*plain["digests"].values(), *plain["tokens"].values()):
            if "keyslots" in one:
                one["keyslots"] = [name for name in one["keyslots"] if name != str(slot)]
        changed = self._checked(plain)
        start, end = self.metadata.area(slot)
        keyslot.destroy(self.image, start, end - start)
        self._commit(changed)

    def _checked(self, plain: object) -> Metadata:
        """`plain`, if it can be written. Raises Busy when the JSON area is too small for it."""
        if len(_text(plain)) >= self.header.size - BINARY:
            raise Busy(f"{self.image.name}: the JSON area is full")
        return Metadata(metadata.Node(plain, self.metadata.root.where), self.metadata.headers)

    def _commit(self, changed: Metadata) -> None:
        self.metadata = changed
        self.header = replace(self.header, seqid=self.header.seqid + 1)
        self.write()

    def erase(self) -> None:
        """Overwrites the place of a new header and its key slots: what was there is gone before the new comes."""
        end = self.metadata.headers + self.metadata.keyslots_size
        self.image.write(0, bytes(self.metadata.headers))
        self.image.flush()
        for start in range(self.metadata.headers, end, ERASED_AT_ONCE):
            self.image.write(start, os.urandom(min(ERASED_AT_ONCE, end - start)))
        self.image.flush()

    def write(self) -> None:
        """Writes both copies, first that which is not relied on, and makes each durable."""
        second = self.header.size
        for offset in (second, 0) if self._relied_on == 0 else (0, second):
            self.image.write(offset, self._copy(offset))
            self.image.flush()  # the other copy is touched only when this one is good
        self._relied_on = 0
        self.problems = []

    def _copy(self, offset: int) -> bytes:
        header = replace(
            self.header, magic=MAGICS[offset > 0], offset=offset, salt=os.urandom(64), checksum=b"",
            checksum_name=b"sha256",
        )  # fmt: skip
        text = _text(self.metadata.root.plain).ljust(header.size - BINARY, b"\0")
        checksum = hashlib.sha256(header.pack() + text).digest()
        return replace(header, checksum=checksum).pack() + text


def _text(plain: object) -> bytes:
    return json.dumps(plain, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Wanted2:
    """What a new LUKS2 is to be; bytes. `data_offset` None is behind the key slots."""

    encryption: str
    sector_size: int
    hash: str
    uuid: str
    label: str
    subsystem: str
    digest_iterations: int
    header_size: int = defaults.HEADER_SIZE
    keyslots_size: int | None = None
    data_offset: int | None = None
    detached: bool = False


DATA_OFFSET: Final = 16 << 20
"""Where the data begins as a rule, in bytes; the key slots have all that is before."""
MAX_KEYSLOTS_SIZE: Final = 128 << 20


def create(image: Image, wanted: Wanted2, key: bytearray) -> Luks2:
    """A new header without a key slot, not yet on the disk. Raises InvalidArgument when it cannot be so."""
    where = image.name
    if wanted.header_size not in SIZES:
        raise InvalidArgument(f"{where}: a header of {wanted.header_size} bytes; it can have {', '.join(map(str, SIZES))}")
    headers = 2 * wanted.header_size
    keyslots_size = wanted.keyslots_size
    if keyslots_size is None:
        end = wanted.data_offset if wanted.data_offset and not wanted.detached else DATA_OFFSET
        keyslots_size = min(end - headers, MAX_KEYSLOTS_SIZE) // AREA_ALIGNMENT * AREA_ALIGNMENT
    offset = wanted.data_offset
    if offset is None:
        offset = 0 if wanted.detached else round_up(headers + keyslots_size, 1 << 20)
    if keyslots_size % AREA_ALIGNMENT or not 0 <= keyslots_size <= MAX_KEYSLOTS_SIZE:
        raise InvalidArgument(f"{where}: {keyslots_size} bytes for key slots are not 0 to {MAX_KEYSLOTS_SIZE}, in steps of 4096")
    if offset % wanted.sector_size or (not wanted.detached and offset < headers + keyslots_size):
        raise InvalidArgument(f"{where}: the data cannot begin at byte {offset}, the key slots end at {headers + keyslots_size}")
    salt = os.urandom(32)
    with wiping(Pbkdf2(wanted.hash, wanted.digest_iterations, salt).derive(key, 32)) as digest:
        plain = {
            "keyslots": {},
            "tokens": {},
            "segments": {"0": {
                "type": "crypt", "offset": str(offset), "size": "dynamic", "iv_tweak": "0",
                "encryption": wanted.encryption, "sector_size": wanted.sector_size,
            }},
            "digests": {"0": {
                "type": "pbkdf2", "keyslots": [], "segments": ["0"], "hash": wanted.hash,
                "iterations": wanted.digest_iterations, "salt": base64.b64encode(salt).decode(),
                "digest": base64.b64encode(digest).decode(),
            }},
            "config": {"json_size": str(wanted.header_size - BINARY), "keyslots_size": str(keyslots_size)},
        }  # fmt: skip
    for what, text, most in (("label", wanted.label, 47), ("subsystem", wanted.subsystem, 47), ("uuid", wanted.uuid, 39)):
        if len(text.encode()) > most or "\0" in text:
            raise InvalidArgument(f"{where}: the {what} {text!r} has more than {most} bytes")
    header = Header(
        MAGICS[0], 2, wanted.header_size, 1, wanted.label.encode(), b"sha256", b"", wanted.uuid.encode(),
        wanted.subsystem.encode(), 0, b"",
    )  # fmt: skip
    header = Header.unpack(header.pack())  # with its texts as long as they are on disk
    return Luks2(image, header, Metadata(metadata.Node(plain, f"{where}: LUKS2 header"), headers), 0, [])

"""A LUKS volume, whichever version: its header, and the line of the crypt target that opens it.

    header = read(image); unlocked = header.unlock(passphrase)
    0 32768 crypt aes-xts-plain64 :64:logon:cryptsetup:<uuid>-d0 0 sda 32768 1 sector_size:4096

A header that lies on another disk than the data is `detached`: then `image` is that disk.
"""

from typing import Final

from nbdmap.errors import CorruptMetadata, InvalidArgument, Unsupported
from nbdmap.luks import luks2
from nbdmap.luks.image import Image
from nbdmap.luks.keyslot import Segment
from nbdmap.luks.luks1 import MAGIC, Luks1
from nbdmap.luks.luks2 import Luks2
from nbdmap.units import SECTOR

Header = Luks1 | Luks2

_REENCRYPTED_1: Final = b"LUKS\xde\xad"
"""What cryptsetup-reencrypt makes of the magic of a LUKS1 header that it has not finished."""


def read(image: Image) -> Header:
    """The header on `image`. Raises InvalidArgument when there is none, CorruptMetadata when it is damaged, Unsupported."""
    start = image.read(0, 8)
    if start[:6] == _REENCRYPTED_1:
        raise Unsupported(f"{image.name}: a reencryption is in progress; end it with `cryptsetup reencrypt` first")
    version = int.from_bytes(start[6:8], "big")
    if start[:6] == MAGIC and version == 1:
        return Luks1.read(image)
    try:
        return Luks2.read(image)  # by its second copy, when the first is lost
    except CorruptMetadata:
        if start[:6] == MAGIC and version != 2:
            raise Unsupported(f"{image.name}: LUKS version {version} is unknown") from None
        if start[:6] != MAGIC and not any(image.read(offset, 6) == luks2.MAGICS[1] for offset in luks2.SIZES):
            raise InvalidArgument(f"{image.name} is not a LUKS disk") from None
        raise


def data_size(segment: Segment, disk_name: str, disk_size: int, *, detached: bool) -> int:
    """Bytes of the data. Raises InvalidArgument when the disk is too small, or not whole sectors of the encryption."""
    if segment.offset == 0 and not detached:
        raise InvalidArgument(f"{disk_name} holds a header only: name the disk with the data, and this one as its header")
    if segment.offset >= disk_size:
        raise InvalidArgument(f"{disk_name} has {disk_size} bytes; the data begins at {segment.offset}")
    size = disk_size - segment.offset if segment.size is None else segment.size
    if segment.offset + size > disk_size:
        raise InvalidArgument(f"{disk_name} has {disk_size} bytes; the data ends at {segment.offset + size}")
    if size % segment.sector_size:
        raise InvalidArgument(f"{disk_name}: {size} bytes of data are not whole sectors of {segment.sector_size} bytes")
    return size


def table_line(segment: Segment, size: int, key: str, disk: str, options: tuple[str, ...] = ()) -> str:
    """The line of a crypt target over `size` bytes; `key` and `disk` are the words for them, `options` more of its options."""
    chosen = list(dict.fromkeys((*segment.options, *options)))
    if segment.sector_size != SECTOR:
        chosen.append(f"sector_size:{segment.sector_size}")
    words = ["0", str(size // SECTOR), "crypt", segment.encryption, key, str(segment.iv_offset_sectors),
             disk.replace("\\", "\\\\").replace(" ", "\\ "), str(segment.offset // SECTOR)]  # fmt: skip
    if chosen:
        words += [str(len(chosen)), *chosen]
    return " ".join(words)

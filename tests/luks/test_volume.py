"""What a disk is taken for, where its data is, and the table line that opens it."""

import pytest

from nbdmap.errors import CorruptMetadata, InvalidArgument, Unsupported
from nbdmap.luks import volume
from nbdmap.luks.keyslot import Segment
from nbdmap.luks.luks2 import SIZES
from tests.support.luks import MemoryImage, new_luks1, new_luks2

SEGMENT = Segment("aes-xts-plain64", 4096, None, 0, 512, ())


def test_versions() -> None:
    assert volume.read(new_luks1().image).version == 1
    assert volume.read(new_luks2().image).version == 2


@pytest.mark.parametrize(
    ("start", "said", "kind"),
    [
        (b"", "is not a LUKS disk", InvalidArgument),
        (b"LUKS\xba\xbe\0\3", "LUKS version 3 is unknown", Unsupported),
        (b"LUKS\xba\xbe\0\2", "LUKS2 header at 0", CorruptMetadata),
        (b"LUKS\xde\xad\0\1", "a reencryption is in progress", Unsupported),
        (b"LUKS", "is not a LUKS disk", InvalidArgument),
    ],
)
def test_no_header(start: bytes, said: str, kind: type[Exception]) -> None:
    image = MemoryImage()
    image.bytes[: len(start)] = start
    with pytest.raises(kind, match=said):
        volume.read(image)


def test_an_empty_disk() -> None:
    with pytest.raises(InvalidArgument, match="disk is not a LUKS disk"):
        volume.read(MemoryImage(0))


@pytest.mark.parametrize("size", SIZES)
def test_the_second_copy_is_found_wherever_it_can_be(size: int) -> None:
    image = MemoryImage(16 << 20)
    new_luks2(image, header_size=size, keyslots_size=258048)
    image.bytes[:4096] = bytes(4096)
    header = volume.read(image)
    assert header.version == 2
    assert header.unlock(bytearray(b"secret")).slot == 0


@pytest.mark.parametrize(
    ("segment", "size", "wanted"),
    [
        (SEGMENT, 8192, 4096),
        (SEGMENT._replace(size=512), 8192, 512),
        (SEGMENT._replace(sector_size=4096), 8192, 4096),
    ],
)
def test_sizes(segment: Segment, size: int, wanted: int) -> None:
    assert volume.data_size(segment, "sda", size, detached=False) == wanted


@pytest.mark.parametrize(
    ("segment", "size", "said"),
    [
        (SEGMENT._replace(offset=0), 8192, "sda holds a header only"),
        (SEGMENT, 4096, "the data begins at 4096"),
        (SEGMENT._replace(size=8192), 8192, "the data ends at 12288"),
        (SEGMENT, 8191, "not whole sectors of 512"),
        (SEGMENT._replace(sector_size=4096), 8704, "4608 bytes of data are not whole sectors of 4096"),
    ],
)
def test_sizes_that_cannot_be(segment: Segment, size: int, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        volume.data_size(segment, "sda", size, detached=False)


def test_table_lines() -> None:
    assert volume.table_line(SEGMENT, 4096, "KEY", "sda") == "0 8 crypt aes-xts-plain64 KEY 0 sda 8"
    large = SEGMENT._replace(sector_size=4096, iv_offset_sectors=16, options=("allow_discards",))
    assert volume.table_line(large, 8192, ":64:logon:x", "/srv/my disk\\", ("allow_discards", "same_cpu_crypt")) == (
        r"0 16 crypt aes-xts-plain64 :64:logon:x 16 /srv/my\ disk\\ 8 3 allow_discards same_cpu_crypt sector_size:4096"
    )
    assert volume.data_size(SEGMENT._replace(offset=0), "sda", 512, detached=True) == 512

"""Records of two byte orders, with padding, read and written."""

from dataclasses import dataclass, replace
from typing import Annotated

import pytest

from nbdmap.errors import CorruptMetadata
from nbdmap.layout import Record


@dataclass(frozen=True)
class Big(Record, order=">"):
    """One with text and padding."""

    magic: Annotated[bytes, "6s"]
    version: Annotated[int, "H4x"]
    offset: Annotated[int, "Q"]


@dataclass(frozen=True)
class Little(Record, order="<"):
    """One whose fields no compiler would leave unaligned."""

    kind: Annotated[int, "B"]
    block: Annotated[int, "Q"]


def test_reads_and_writes() -> None:
    data = b"LUKS\xba\xbe\x00\x02\0\0\0\0" + (1 << 40).to_bytes(8, "big")
    assert Big.unpack(data) == Big(b"LUKS\xba\xbe", 2, 1 << 40)
    assert Big.unpack(data).pack() == data
    assert Big.layout.size == 20
    assert Little(1, 2).pack() == b"\x01\x02" + bytes(7)
    assert Little.unpack(b"xx\x05\x07" + bytes(7), 2) == Little(5, 7)


def test_padding_is_not_kept_and_short_bytes_are_filled() -> None:
    record = Big.unpack(b"abcdef\x00\x01zzzz" + bytes(8))
    assert replace(record, magic=b"ab").pack() == b"ab\0\0\0\0\x00\x01" + bytes(12)


@pytest.mark.parametrize(("length", "offset", "there"), [(19, 0, 19), (20, 1, 19), (0, 0, 0), (20, 30, 0)])
def test_what_ends_too_early(length: int, offset: int, there: int) -> None:
    with pytest.raises(CorruptMetadata, match=f"Big: 20 bytes are needed, {there} are there"):
        Big.unpack(bytes(length), offset)

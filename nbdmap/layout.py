"""An on-disk record, declared once: the fields of a dataclass, each annotated with its `struct` format.

    @dataclass(frozen=True)
    class Slot(Record, order=">"):
        active: Annotated[int, "I"]
        salt: Annotated[bytes, "32s4x"]    # and four bytes of padding

    Slot.unpack(sector, 208).salt

`order` is "<" or ">", so nothing is aligned but by "x", which reads as anything and is written as zeroes. What the values
mean is checked by whoever reads them.
"""

from struct import Struct
from typing import Annotated, ClassVar, Self, get_args, get_origin, get_type_hints

from nbdmap.errors import CorruptMetadata


class Record:
    """Base of records; subclasses are dataclasses."""

    layout: ClassVar[Struct]
    """`layout.size` is its length on disk."""

    def __init_subclass__(cls, *, order: str) -> None:
        super().__init_subclass__()
        hints = get_type_hints(cls, include_extras=True)
        formats = [get_args(hint)[1] for hint in hints.values() if get_origin(hint) is Annotated]
        cls.layout = Struct(order + "".join(formats))

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview, offset: int = 0) -> Self:
        """The record at byte `offset` of `data`. Raises CorruptMetadata when `data` ends before it does."""
        if offset + cls.layout.size > len(data):
            raise CorruptMetadata(f"{cls.__name__}: {cls.layout.size} bytes are needed, {max(0, len(data) - offset)} are there")
        return cls(*cls.layout.unpack_from(data, offset))

    def pack(self) -> bytes:
        """As it stands on disk; shorter bytes are padded with zeroes."""
        return self.layout.pack(*vars(self).values())

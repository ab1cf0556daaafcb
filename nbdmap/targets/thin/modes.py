"""What a pool was asked to be, and how it is doing (reference h.1, h.6)."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from nbdmap.dm.args import Args
from nbdmap.errors import InvalidArgument

MAX_FEATURES: Final = 4


class Mode(IntEnum):
    """From good to bad."""

    WRITE = 0
    OUT_OF_DATA = 1
    OUT_OF_METADATA = 2
    READ_ONLY = 3
    FAIL = 4


MODE_WORDS: Final = {
    Mode.WRITE: "rw", Mode.OUT_OF_DATA: "out_of_data_space", Mode.OUT_OF_METADATA: "ro", Mode.READ_ONLY: "ro",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Features:
    """The words at the end of a thin-pool's table line, in the order in which they are printed."""

    skip_block_zeroing: bool = False
    ignore_discard: bool = False
    no_discard_passdown: bool = False
    read_only: bool = False
    error_if_no_space: bool = False

    @classmethod
    def parse(cls, args: Args) -> "Features":
        """Reads `[<count> <word>...]`; upper and lower case are the same, and what follows the last word is not looked at."""
        group = args.group("pool features", MAX_FEATURES)
        found: set[str] = set()
        while group:
            word = group.word("pool feature").lower()
            if word not in cls.__slots__:
                raise InvalidArgument(f"unknown pool feature {word!r}")
            found.add(word)
        return cls(**dict.fromkeys(found, True))

    def __str__(self) -> str:
        words = [name for name in self.__slots__ if getattr(self, name)]
        return " ".join([str(len(words)), *words])

"""The words of a crypt table line (dm-reference b.1), checked with the kernel's rules.

    0 2048 crypt aes-xts-plain64 :64:logon:home 0 /dev/sda 4096 2 allow_discards sector_size:4096
"""

from dataclasses import dataclass
from typing import Final

from nbdmap.dm.args import Args, parse_number
from nbdmap.errors import InvalidArgument
from nbdmap.units import SECTOR

MAX_OPTIONS: Final = 9
MAX_SECTOR: Final = 4096

_FLAGS: Final = (
    "allow_discards",
    "same_cpu_crypt",
    "high_priority",
    "submit_from_crypt_cpus",
    "no_read_workqueue",
    "no_write_workqueue",
)
"""In the order in which they are printed. All but the first say where the kernel's threads run: kept, without effect."""


@dataclass(frozen=True, slots=True)
class Options:
    """The optional words; `sector_size` in bytes."""

    flags: frozenset[str] = frozenset()
    sector_size: int = SECTOR
    large_sectors: bool = False

    @property
    def allow_discards(self) -> bool:
        return "allow_discards" in self.flags

    def words(self) -> str:
        """` <n> <option>...` as the kernel prints it, or nothing."""
        words: list[str] = [flag for flag in _FLAGS if flag in self.flags]
        if self.sector_size != SECTOR:
            words.append(f"sector_size:{self.sector_size}")
        if self.large_sectors:
            words.append("iv_large_sectors")
        return f" {len(words)} {' '.join(words)}" if words else ""


def parse_options(args: Args, length: int) -> Options:
    """The optional group at the end of a line for a target of `length` bytes."""
    group = args.group("options", MAX_OPTIONS)
    flags: set[str] = set()
    sector_size, large_sectors = SECTOR, False
    while group:
        word = group.word("option")
        name, colon, value = word.partition(":")
        if word in _FLAGS:
            flags.add(word)
        elif word == "iv_large_sectors":
            large_sectors = True
        elif name == "sector_size" and colon:
            sector_size = parse_number(value, "sector_size", SECTOR, MAX_SECTOR)
            if sector_size.bit_count() != 1:
                raise InvalidArgument(f"sector_size: {sector_size} is not a power of two")
        elif name in ("integrity", "integrity_key_size") and colon:
            raise InvalidArgument(f"option {word!r}: integrity metadata is not supported")
        else:
            raise InvalidArgument(f"unknown option {word!r}")
    if length % sector_size:
        raise InvalidArgument(f"length {length // SECTOR} is not a multiple of sector_size {sector_size}")
    return Options(frozenset(flags), sector_size, large_sectors)

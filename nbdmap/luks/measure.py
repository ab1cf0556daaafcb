"""How hard a new key slot's KDF is to be: so that this machine takes a given time for it, as cryptsetup chooses.

    choose_kdf(Cost("argon2id", "sha256", time_ms=2000, memory_kib=1 << 20), 64)

argon2 gets as much memory as it may and its least number of passes, then more passes while there is time left, or less
memory when there is not. The clock is handed in; what is measured is the KDF itself.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nbdmap.errors import InvalidArgument
from nbdmap.luks import defaults
from nbdmap.luks.kdf import MAX_MEMORY_KIB, U32, Argon2, Kdf, Pbkdf2, check_hash
from nbdmap.luks.secret import wipe

SALT_SIZE: Final = 32
MIN_ITERATIONS: Final = 1000
MIN_TIME: Final = 4
MIN_MEMORY_KIB: Final = 32
MAX_LANES: Final = 4
DEFAULT_MEMORY_KIB: Final = 1 << 20
"""At most; and never more than half of the machine's."""
DIGEST_TIME_MS: Final = 125
"""Of the digest of the volume key."""
_ENOUGH_MS: Final = 150
"""A measurement that took this long is good enough."""
_FIRST_MEMORY_KIB: Final = 32 << 10


@dataclass(frozen=True)
class Cost:
    """What is asked for: `time_ms` milliseconds of this machine, or exactly `iterations` (passes, with argon2)."""

    kind: str
    hash: str
    time_ms: int = defaults.TIME_MS
    memory_kib: int | None = None
    lanes: int | None = None
    iterations: int | None = None

    def check(self) -> None:
        """Raises InvalidArgument naming what cannot be."""
        if self.kind not in defaults.KDFS:
            raise InvalidArgument(f"there is no KDF {self.kind!r} (there are: {', '.join(defaults.KDFS)})")
        check_hash(self.hash)
        pbkdf2 = self.kind == "pbkdf2"
        if pbkdf2 and (self.memory_kib is not None or self.lanes is not None):
            raise InvalidArgument("pbkdf2 has neither memory nor threads")
        for what, value, low, high in (
            ("the time (ms)", self.time_ms, 1, 3_600_000),
            ("the memory (KiB)", self.memory_kib, MIN_MEMORY_KIB, MAX_MEMORY_KIB),
            ("the number of threads", self.lanes, 1, MAX_LANES),
            ("the iterations", self.iterations, MIN_ITERATIONS if pbkdf2 else MIN_TIME, U32),
        ):
            if value is not None and not low <= value <= high:
                raise InvalidArgument(f"{what}, {value}, should be in the range {low} to {high}")


def choose_kdf(cost: Cost, key_size: int, clock: Callable[[], float] = time.perf_counter) -> Kdf:
    """A KDF with a fresh salt that costs what is asked for. Takes about a quarter of a second or more. Raises InvalidArgument."""
    cost.check()
    salt = os.urandom(SALT_SIZE)
    if cost.kind == "pbkdf2":
        iterations = cost.iterations or pbkdf2_iterations(cost.hash, key_size, cost.time_ms, clock)
        return Pbkdf2(cost.hash, iterations, salt)
    lanes = cost.lanes or min(MAX_LANES, os.cpu_count() or 1)
    most = cost.memory_kib or min(DEFAULT_MEMORY_KIB, _half_of_memory_kib())
    most = max(most, 8 * lanes)
    if cost.iterations:
        return Argon2(cost.kind, cost.iterations, most, lanes, salt)
    passes, memory = _argon2(cost, key_size, most, lanes, clock)
    return Argon2(cost.kind, passes, memory, lanes, salt)


def pbkdf2_iterations(hash_name: str, key_size: int, time_ms: int, clock: Callable[[], float] = time.perf_counter) -> int:
    """How many iterations take so long, MIN_ITERATIONS at least."""
    iterations = MIN_ITERATIONS
    while True:
        took_ms = _measure(Pbkdf2(hash_name, iterations, bytes(SALT_SIZE)), key_size, clock)
        if took_ms >= _ENOUGH_MS or iterations > U32 // 16:
            return min(max(MIN_ITERATIONS, int(iterations * time_ms / max(took_ms, 0.001))), U32)
        iterations *= 16 if took_ms < _ENOUGH_MS / 16 else 2


def _argon2(cost: Cost, key_size: int, most_kib: int, lanes: int, clock: Callable[[], float]) -> tuple[int, int]:
    """(passes, memory in KiB)."""
    memory, passes = min(_FIRST_MEMORY_KIB, most_kib), MIN_TIME
    while (took_ms := _measure(Argon2(cost.kind, passes, memory, lanes, bytes(SALT_SIZE)), key_size, clock)) < _ENOUGH_MS:
        if memory < most_kib:
            memory = min(most_kib, memory * 4)
        elif passes < U32 // 4:
            passes *= 4
        else:
            break
    budget = int(memory * passes * cost.time_ms / max(took_ms, 0.001))  # KiB of all passes
    memory = max(min(most_kib, budget // MIN_TIME), MIN_MEMORY_KIB, 8 * lanes)
    return min(max(MIN_TIME, budget // memory), U32), memory


def _measure(kdf: Kdf, key_size: int, clock: Callable[[], float]) -> float:
    """Milliseconds."""
    start = clock()
    wipe(kdf.derive(bytearray(b"a passphrase to measure with"), key_size))
    return (clock() - start) * 1000


def _half_of_memory_kib() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2048

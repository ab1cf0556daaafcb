"""`python -m bench.ciphers`: what a sector cipher costs, by itself, beside a context of `cryptography` for each sector.

CPU time of the thread, the best of several runs, so that a busy machine counts little.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final

from bench.report import markdown_table
from nbdmap.ciphers.cipher import SectorCipher
from nbdmap.ciphers.spec import CipherSpec
from nbdmap.units import KIB, MIB, SECTOR

SPECS: Final = (("aes-xts-plain64", 64), ("aes-cbc-essiv:sha256", 32), ("serpent-xts-plain64", 64))
SIZES: Final = (SECTOR, 4 * KIB, 64 * KIB, MIB)
BATCHES: Final = (1, 4, 32)
RUN_SECONDS: Final = 0.02
REPEATS: Final = 19


def seconds(call: Callable[..., object], *arguments: object) -> float:
    """CPU time of one call: the best of several runs."""
    best, count = float("inf"), 1
    call(*arguments)
    for _ in range(REPEATS):
        start = time.thread_time()
        for _ in range(count):
            call(*arguments)
        took = time.thread_time() - start
        if took < RUN_SECONDS / 2:
            count *= 2
        else:
            best = min(best, took / count)
    return best


def context_for_each_sector(key: bytes, source: bytes, target: bytearray) -> None:
    """AES-XTS the plain way: 512-byte sectors, a context for each."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    out = bytearray(SECTOR + 16)
    for number in range(len(source) // SECTOR):
        cipher = Cipher(algorithms.AES(key), modes.XTS(number.to_bytes(16, "little"))).encryptor()
        cipher.update_into(source[number * SECTOR : (number + 1) * SECTOR], out)
        target[number * SECTOR : (number + 1) * SECTOR] = out[:SECTOR]


def single() -> str:
    """One request at a time, MB/s."""
    lines: list[list[str]] = []
    for name, key_size in SPECS:
        for sector_size in (SECTOR, 4 * KIB):
            cipher = SectorCipher(CipherSpec.parse(name), os.urandom(key_size), sector_size=sector_size)
            for way, crypt in (("encrypt", cipher.encrypt), ("decrypt", cipher.decrypt)):
                cells = []
                for size in SIZES:
                    source, target = os.urandom(size), bytearray(size)
                    if size < sector_size:
                        cells.append("")
                        continue
                    cells.append(f"{size / seconds(crypt, 0, source, target) / 1e6:.0f}")
                lines.append([f"{name}, {sector_size}, {way}", *cells])
    plain = []
    for size in SIZES:
        took = seconds(context_for_each_sector, bytes(range(64)), os.urandom(size), bytearray(size))
        plain.append(f"{size / took / 1e6:.0f}")
    lines.append(["aes-xts-plain64, 512, a context for each sector", *plain])
    return markdown_table(["MB/s, cipher, sector, way", *(f"{size} B" for size in SIZES)], lines)


def batches() -> str:
    """Requests of 4 KiB that are encrypted together, us for each."""
    lines = []
    for name, key_size in SPECS[:2]:
        cipher = SectorCipher(CipherSpec.parse(name), os.urandom(key_size))
        for way, crypt in (("encrypt", cipher.encrypt_joined), ("decrypt", cipher.decrypt_joined)):
            cells = []
            for count in BATCHES:
                sectors, sources = range(0, 8 * count, 8), [bytes(4 * KIB) for _ in range(count)]
                took = seconds(crypt, sectors, sources, memoryview(bytearray(4 * KIB * count)))
                cells.append(f"{took / count * 1e6:.2f}")
            lines.append([f"{name}, {way}", *cells])
    return markdown_table(["us for each 4 KiB, together:", *map(str, BATCHES)], lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.ciphers", description="what sector ciphers cost by themselves")
    parser.parse_args(arguments)
    print(single(), batches(), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""crypt in Debian's kernel and here: what one encrypted the other decrypts, in both directions, and both refuse the same.

Every spec has a range of its own on two images: nbdmap writes it on the first, the kernel reads that and writes the same
plaintext to the second, from which nbdmap reads it. One boot of each kernel for all.
"""

import hashlib
import os
import random
import shlex
from pathlib import Path
from typing import Final

from nbdmap.errors import NbdmapError
from tests.support.disks import FakeDisk, build, read, write
from tests.vm.harness import Kernel

SECTORS: Final = 64
LINES: Final = [line for line in (Path(__file__).parent / "crypt_tables.txt").read_text().splitlines() if line[0] != "#"]
SPECS: Final = [line.split("|") for line in LINES if "|" in line]
"""Cipher, key bytes, iv_offset, options."""
BAD: Final = [line for line in LINES if "|" not in line]
"""Words of tables; {n} is a key of n bytes, {d} the disk."""
FORMERLY: Final = dict.fromkeys(
    (
        "blowfish-xts-plain64 {32} 0 {d} 0",
        "cast5-lrw-benbi {32} 0 {d} 0",
        "cipher_null-ctr-plain - 0 {d} 0",
        "xchacha12,aes-adiantum-essiv:sha256 {32} 0 {d} 0",
        "capi:authenc(hmac(sha256),xts(aes))-random {96} 0 {d} 0",
    ),
    "No such file or directory",
)
"""What 6.1 said where 6.12, which nbdmap follows, says that the argument is invalid."""


def key(size: int) -> str:
    return random.Random(size).randbytes(size).hex() or "-"


def table(number: int, device: str) -> str:
    cipher, size, iv_offset, options = SPECS[number]
    return f"0 {SECTORS} crypt {cipher} {key(int(size))} {iv_offset} {device} {number * SECTORS} {options}".strip()


def plain(number: int) -> bytes:
    return random.Random(number).randbytes(SECTORS * 512)


def bad_table(words: str, device: str) -> str:
    sizes = {str(size): key(size) for size in (16, 31, 32, 33, 40, 60, 64, 96, 130, 2048)}
    for size, value in sizes.items():
        words = words.replace(f"{{{size}}}", value)
    return f"0 {SECTORS} crypt {words.replace('{d}', device)}"


async def refusal(words: str) -> str:
    """The text of the errno with which nbdmap refuses a table; empty if it takes it."""
    try:
        built = await build(bad_table(words, "7:0"), FakeDisk("7:0", SECTORS))
    except NbdmapError as error:
        return os.strerror(error.errno)
    await built.close()
    return ""


async def test_both_directions_and_what_is_refused(kernel: Kernel, tmp_path: Path) -> None:
    await compare(kernel, tmp_path, FORMERLY)


async def test_the_newer_kernel_agrees(newer: Kernel, tmp_path: Path) -> None:
    await compare(newer, tmp_path, {})


async def compare(kernel: Kernel, tmp_path: Path, formerly: dict[str, str]) -> None:
    images = [tmp_path / name for name in ("a.img", "b.img")]
    ours = FakeDisk("7:0", len(SPECS) * SECTORS)
    for number in range(len(SPECS)):
        built = await build(table(number, "7:0"), ours)
        await write(built, 0, plain(number))
        await built.close()
    images[0].write_bytes(ours.bytes)
    images[1].write_bytes(bytes(len(ours.bytes)))
    devices = [
        (f"{name}{number}", table(number, disk))
        for number in range(len(SPECS))
        for name, disk in (("a", "/dev/vdb"), ("b", "/dev/vdc"))
    ]
    concise = ";".join(f"{name},,,rw,{line.replace(',', chr(92) + ',')}" for name, line in devices)
    refused = "\n".join(
        f"section bad{number}; dmsetup create bad --table {shlex.quote(bad_table(words, '/dev/vdb'))} 2>&1 && dmsetup remove bad"
        for number, words in enumerate(BAD)
    )
    job = f"""modprobe dm-crypt; dmsetup create --concise <<'T'
{concise}
T
        section read; cd /dev/mapper; sha256sum a*
        section table; dmsetup table --showkeys | sort
        section copy; for one in a*; do cat $one > b${{one#a}}; done; sync
        {refused}
        true"""
    sections = kernel.run(job, images).sections()
    sums = {name: digest for digest, name in (line.split() for line in sections["read"].splitlines())}
    tables = {name: words for name, *words in (line.split() for line in sections["table"].splitlines())}
    theirs = FakeDisk("7:0", len(SPECS) * SECTORS)
    theirs.bytes[:] = images[1].read_bytes()
    wrong: list[tuple[object, ...]] = []
    for number, spec in enumerate(SPECS):
        built = await build(table(number, "7:0"), theirs)
        if sums[f"a{number}"] != hashlib.sha256(plain(number)).hexdigest():
            wrong.append((spec, "the kernel reads other bytes than nbdmap wrote"))
        if await read(built, 0, SECTORS * 512) != plain(number):
            wrong.append((spec, "nbdmap reads other bytes than the kernel wrote"))
        words, mine = tables[f"b{number}:"][3:], built.table_lines()[0].params.split()
        if words[:3] + words[4:] != mine[:3] + mine[4:]:
            wrong.append((spec, str(words), str(mine)))
        await built.close()
    differ = []
    for number, bad in enumerate(BAD):
        text = sections[f"bad{number}"].strip()
        refused_with = await refusal(bad)
        kernels = text.splitlines()[0].rpartition("failed: ")[2] if text else ""
        if refused_with != kernels and (kernels, refused_with) != (formerly.get(bad), "Invalid argument"):
            differ.append((bad, "kernel", text[:150], "nbdmap", refused_with))
    print(*wrong, *differ, sep="\n")
    assert not wrong
    assert not differ

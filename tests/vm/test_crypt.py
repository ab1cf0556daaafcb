"""crypt in Debian's kernel and here: what one encrypted the other decrypts, in both directions, and both refuse the same.

Every spec has a range of its own on two images: nbdmap writes it on the first, the kernel reads that and writes the same
plaintext to the second, from which nbdmap reads it. One boot for all.
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
SPECS: Final = [
    # cipher, key bytes, iv_offset, options
    *(("aes", 16, 0, ""), ("aes", 32, 9, ""), ("aes-plain", 24, 1, ""), ("aes-ecb", 32, 0, "")),
    *(("aes-cbc-plain", 32, 4294967290, ""), ("aes-cbc-plain64", 24, 4294967290, ""), ("aes-cbc-plain64be", 16, 3, "")),
    *(("aes-cbc-null", 16, 0, ""), ("aes-cbc-benbi", 32, 1 << 40, ""), ("blowfish-cbc-essiv:sha1", 16, 0, "")),
    *(("aes-cbc-essiv:sha256", 32, 77, "1 allow_discards"), ("blowfish-cbc-essiv:sha384", 32, 0, ""), ("aes-cbc-essiv:md5", 16, 0, "")),
    *(("aes-xts-plain", 32, 0, ""), ("aes-xts-plain64", 64, (1 << 63) + 5, ""), ("aes-xts-plain64be", 64, 7, "")),
    *(("aes-xts-plain64", 48, 0, ""), ("aes-xts-essiv:sha256", 64, 3, ""), ("aes-xts-benbi", 64, 3, ""), ("aes-xts-eboiv", 64, 3, "")),
    *(("aes-xts-plain64", 64, 8, "1 sector_size:1024"), ("aes-xts-plain64", 64, 8, "2 sector_size:2048 iv_large_sectors")),
    *(("aes-xts-plain64", 32, 8, "1 sector_size:4096"), ("aes-cbc-essiv:sha256", 32, 8, "2 sector_size:4096 iv_large_sectors")),
    *(("aes-lrw-benbi", 48, 5, ""), ("aes-lrw-plain64", 32, 0, ""), ("aes-ctr-plain64", 32, 0, ""), ("aes-ctr-plain64be", 16, 9, "")),
    *(("aes:64-cbc-lmk", 1024, 3, ""), ("aes:64-cbc-lmk", 2080, 3, ""), ("capi:cbc(aes)-lmk", 2080, 3, "")),
    *(("aes-cbc-tcw", 64, 3, ""), ("aes-cbc-eboiv", 32, 8, "1 sector_size:4096"), ("aes-cbc-elephant", 64, 3, "")),
    *(("aes-cbc-elephant", 32, 8, "1 sector_size:4096"), ("aes:4-cbc-plain64", 128, 3, ""), ("aes:2-xts-plain64", 128, 3, "")),
    *(("aes:2-cbc-essiv:sha256", 64, 3, ""), ("aes:2-cbc-eboiv", 64, 3, ""), ("aes:2-cbc-elephant", 64, 3, "")),
    *(("aes:8-cbc-plain64", 256, 8, "1 sector_size:4096"), ("aes:2-cbc-tcw", 96, 3, "")),
    *(("serpent-xts-plain64", 64, 0, ""), ("serpent-cbc-essiv:sha256", 32, 0, ""), ("serpent-lrw-benbi", 48, 0, "")),
    *(("twofish-xts-plain64", 64, 0, ""), ("twofish-cbc-essiv:sha256", 32, 0, ""), ("twofish-ecb", 16, 0, "")),
    *(("camellia-xts-plain64", 64, 0, ""), ("camellia-cbc-plain64", 24, 0, ""), ("camellia-ctr-plain64", 16, 0, "")),
    *(("cast5-cbc-plain64", 16, 0, ""), ("cast5-cbc-plain64", 12, 0, ""), ("cast5-ctr-benbi", 16, 0, "")),
    *(("blowfish-cbc-plain64", 16, 0, ""), ("blowfish-cbc-essiv:sha256", 32, 0, ""), ("blowfish-cbc-benbi", 56, 0, "")),
    *(("des-cbc-plain", 8, 0, ""), ("des", 8, 0, ""), ("des3_ede-cbc-plain64", 24, 0, ""), ("des3_ede-cbc-plain64be", 24, 1, "")),
    *(("capi:xts(aes)-plain64", 64, 0, ""), ("capi:essiv(cbc(aes),sha256)-plain64", 32, 0, ""), ("capi:cbc(aes)-essiv:sha256", 32, 1, "")),
    *(("blowfish-cbc-tcw", 40, 3, ""), ("des3_ede-cbc-eboiv", 24, 3, ""), ("aes:2-cbc-lmk", 32, 3, "")),
    *(("cipher_null-ecb", 0, 0, ""), ("cipher_null", 0, 250, ""), ("cipher_null-cbc-plain64be", 0, 0, "")),
]
BAD: Final = [
    # not here: an odd last digit of a key, which the kernel ignores, and a capi: mode without its IV, which it leaves unset

    "aes:3-cbc-plain {16} 0 {d} 0",
    "aes-xts {64} 0 {d} 0",
    "aes-cbc-essiv {32} 0 {d} 0",
    "aes-cbc-nonsense {32} 0 {d} 0",
    "aes-nomode-plain {32} 0 {d} 0",
    "nocipher-cbc-plain {32} 0 {d} 0",
    "aes-cbc-essiv:nohash {32} 0 {d} 0",
    "aes-cbc-essiv:sha1 {32} 0 {d} 0",
    "aes-cbc-random {32} 0 {d} 0",
    "xts(aes)-plain64 {64} 0 {d} 0",
    "capi:nomode(aes)-plain {32} 0 {d} 0",
    "aes-cbc-plain {31} 0 {d} 0",
    "aes-xts-plain64 {31} 0 {d} 0",
    "aes-xts-plain64 {33} 0 {d} 0",
    "aes-xts-plain64 - 0 {d} 0",
    "cipher_null-ecb {16} 0 {d} 0",
    "aes-cbc-plain 00112233445566778899aabbccddeefg 0 {d} 0",
    "aes-cbc-plain 00112233445566778899aabbccddeef 0 {d} 0",
    "aes-cbc-plain :16:logon:nbdmap:none 0 {d} 0",
    "aes-cbc-plain :16:user:nbdmap:none 0 {d} 0",
    "aes-cbc-plain :16:other:nbdmap 0 {d} 0",
    "aes-cbc-plain :x:logon:nbdmap 0 {d} 0",
    "aes-cbc-plain :16:logon: 0 {d} 0",
    "aes-cbc-plain :16:logon 0 {d} 0",
    "aes-cbc-plain {16}",
    "aes-cbc-plain {16} 0 {d}",
    "aes-cbc-plain {16} x {d} 0",
    "aes-cbc-plain {16} 0 {d} x",
    "aes-cbc-plain {16} 0 {d} 0 1",
    "aes-cbc-plain {16} 0 {d} 0 1 nonsense",
    "aes-cbc-plain {16} 0 {d} 0 1 sector_size:1000",
    "aes-cbc-plain {16} 0 {d} 0 1 sector_size:8192",
    "aes-cbc-plain {16} 0 {d} 0 1 sector_size:256",
    "aes-cbc-plain {16} 1 {d} 0 1 sector_size:4096",
    "aes-cbc-plain {16} 0 {d} 0 10 a a a a a a a a a a",
    "aes-cbc-plain {16} 0 {d} 1000000000",
    "aes:64-cbc-lmk {2048} 0 {d} 0 1 sector_size:4096",
    "aes-cbc-tcw {64} 0 {d} 0 1 sector_size:4096",
    "aes-cbc-tcw {32} 0 {d} 0",
    "aes-cbc-elephant {96} 0 {d} 0",
    "aes-cbc-elephant {40} 0 {d} 0",
    "aes:4-cbc-plain {130} 0 {d} 0",
    "aes:4-cbc-plain {60} 0 {d} 0",
    "blowfish-xts-plain64 {32} 0 {d} 0",
    "cast5-lrw-benbi {32} 0 {d} 0",
    "aes-ctr-eboiv {16} 0 {d} 0",
    "aes-lrw-benbi {16} 0 {d} 0",
    "capi:authenc(hmac(sha256),xts(aes))-random {96} 0 {d} 0",
    "aes-cbc-plain {16} 0 {d} 0 1 integrity:16:aead",
]


def key(size: int) -> str:
    return random.Random(size).randbytes(size).hex() or "-"


def table(number: int, device: str) -> str:
    cipher, size, iv_offset, options = SPECS[number]
    return f"0 {SECTORS} crypt {cipher} {key(size)} {iv_offset} {device} {number * SECTORS} {options}".strip()


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
    images = [tmp_path / name for name in ("a.img", "b.img")]
    ours = FakeDisk("7:0", len(SPECS) * SECTORS)
    for number in range(len(SPECS)):
        built = await build(table(number, "7:0"), ours)
        await write(built, 0, plain(number))
        await built.close()
    images[0].write_bytes(ours.bytes)
    images[1].write_bytes(bytes(len(ours.bytes)))
    devices = [(f"{name}{number}", table(number, disk)) for number in range(len(SPECS)) for name, disk in (("a", "/dev/vdb"), ("b", "/dev/vdc"))]
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
        section copy; for one in a*; do cat $one > b${{one#a}}; done; sync; dmsetup remove_all
        {refused}
        true"""
    sections = kernel.run(job, images).sections()
    sums = {name: digest for digest, name in (line.split() for line in sections["read"].splitlines())}
    tables = {name: words for name, *words in (line.split() for line in sections["table"].splitlines())}
    theirs = FakeDisk("7:0", len(SPECS) * SECTORS)
    theirs.bytes[:] = images[1].read_bytes()
    wrong = []
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
    for number, words in enumerate(BAD):
        text = sections[f"bad{number}"].strip()
        mine = await refusal(words)
        kernels = text.splitlines()[0].rpartition("failed: ")[2] if text else ""
        if mine != kernels:
            differ.append((words, "kernel", text[:150], "nbdmap", mine))
    print(*wrong, *differ, sep="\n")
    assert not wrong
    assert not differ

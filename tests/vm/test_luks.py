"""LUKS disks with a file system, by cryptsetup in Debian's kernel and by nbdmap: what one made and wrote the other reads.

In one boot: disks that nbdmap has formatted and filled are opened, mounted, read and written in the guest, and the guest formats
others, LUKS 1 and 2, with other ciphers, KDFs and sector sizes, which nbdmap opens afterwards.
"""

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from nbdmap.cli.main import main
from tests.support.clients import run
from tests.support.server import PROGRAM, REPOSITORY
from tests.vm.harness import Kernel

SIZE: Final = 40 << 20
PBKDF2: Final = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
PBKDF2_1: Final = ("--pbkdf-force-iterations", "1000")
ARGON2: Final = ("--pbkdf-memory", "64", "--pbkdf-parallel", "1", "--pbkdf-force-iterations", "4")

OURS: Final = (
    ("--type", "luks1", *PBKDF2),
    ("--type", "luks2", "--sector-size", "512", *PBKDF2),
    ("--type", "luks2", "--sector-size", "4096", "--pbkdf", "argon2id", *ARGON2),
    ("--type", "luks2", "--sector-size", "2048", "--pbkdf", "argon2i", "-c", "aes-cbc-essiv:sha256", "-s", "256", *ARGON2),
)
"""What nbdmap formats."""
THEIRS: Final = (
    ("--type", "luks1", "-c", "aes-cbc-essiv:sha256", "-s", "256", "-h", "sha512", *PBKDF2_1),
    ("--type", "luks1", "-c", "serpent-xts-plain64", "-s", "512", "-h", "ripemd160", *PBKDF2_1),
    ("--type", "luks2", "--sector-size", "512", "--pbkdf", "argon2i", *ARGON2),
    ("--type", "luks2", "--sector-size", "4096", "-c", "twofish-xts-plain64", "-s", "512", *PBKDF2),
    ("--type", "luks2", "--sector-size", "4096", "--pbkdf", "argon2id", "--label", "home", *ARGON2),
    ("--type", "luks2", "-c", "cipher_null-ecb", "-s", "256", *PBKDF2),
)
"""What cryptsetup formats in the guest."""


def names(count: int, first: int = 0) -> list[str]:
    return [f"/dev/vd{chr(ord('b') + first + number)}" for number in range(count)]


def through_nbdmap(image: Path, command: str) -> None:
    environment = {"PYTHONPATH": str(REPOSITORY)}
    run(*PROGRAM, "luks", "open", image, "--key-file", image.parent / "key", "--run", command, extra=environment)


def make_file_system(image: Path, plain: Path, size: int, content: bytes) -> None:
    """An ext4 with the file `ours`, written to the disk through nbdmap."""
    folder = image.parent / "folder"
    folder.mkdir(exist_ok=True)
    (folder / "ours").write_bytes(content)
    plain.unlink(missing_ok=True)
    os.truncate(os.open(plain, os.O_CREAT | os.O_RDWR), size)
    run("mkfs.ext4", "-q", "-F", "-b", "4096", "-d", folder, plain)
    through_nbdmap(image, f'nbdcopy --flush {plain} "$uri"')


def read_file(image: Path, name: str) -> bytes:
    """A file of the ext4 on the disk, read through nbdmap; the file system is found to be whole."""
    plain = image.parent / "plain"
    plain.unlink(missing_ok=True)
    through_nbdmap(image, f'nbdcopy "$uri" {plain}')
    run("e2fsck", "-f", "-n", plain)
    out = image.parent / "out"
    run("debugfs", "-R", f"dump /{name} {out}", plain)
    return out.read_bytes()


def job(theirs: Sequence[tuple[str, ...]]) -> str:
    open_ours = "".join(
        f"""
        section ours{number}
        cryptsetup open --key-file /tmp/key {device} o{number} && mount /dev/mapper/o{number} /mnt && sha256sum < /mnt/ours
        section table{number}
        dmsetup table o{number}; dmsetup info -c --noheadings -o uuid o{number}
        seq {number} 200000 > /mnt/theirs; umount /mnt; cryptsetup close o{number}
        """
        for number, device in enumerate(names(len(OURS)))
    )
    make_theirs = "".join(
        f"""
        section theirs{number}
        cryptsetup luksFormat -q {device} --key-file /tmp/key {" ".join(words)}
        cryptsetup open --key-file /tmp/key {device} t{number} && mkfs.ext4 -q -b 4096 /dev/mapper/t{number}
        mount /dev/mapper/t{number} /mnt && seq {number} 200000 > /mnt/theirs; umount /mnt; dmsetup table t{number}
        cryptsetup close t{number}
        """
        for number, (device, words) in enumerate(zip(names(len(theirs), len(OURS)), theirs, strict=True))
    )
    modules = "for module in dm-crypt serpent_generic twofish_generic; do modprobe $module; done"
    return f"{modules}; printf secret > /tmp/key\n{open_ours}{make_theirs}"


def test_both_directions(kernel: Kernel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text("secret")
    images = [tmp_path / f"{number}.img" for number in range(len(OURS) + len(THEIRS))]
    content = random.Random(7).randbytes(300000)
    for image in images:
        os.truncate(os.open(image, os.O_CREAT | os.O_RDWR), SIZE)
    for image, words in zip(images, OURS, strict=False):
        assert main(["luks", "format", str(image), "--key-file", str(tmp_path / "key"), *words]) == 0
        make_file_system(image, tmp_path / "plain", SIZE - (16 << 20), content)
    result = kernel.run(job(THEIRS), images)
    sections = result.sections()
    assert result.status == 0, result
    (tmp_path / "content").write_bytes(content)
    wanted = run("sha256sum", tmp_path / "content").split()[0]
    wrong = []
    for number, image in enumerate(images):
        mine = number < len(OURS)
        first = number if mine else number - len(OURS)
        if mine and sections[f"ours{number}"].split()[:1] != [wanted]:
            wrong.append((image, sections[f"ours{number}"]))
        elif read_file(image, "theirs") != "".join(f"{line}\n" for line in range(first, 200001)).encode():
            wrong.append((image, "what the guest wrote is not what nbdmap reads"))
    assert not wrong, (wrong, sections)
    check_tables(sections, tmp_path, images)


def check_tables(sections: dict[str, str], directory: Path, images: list[Path]) -> None:
    """The guest's tables of our disks and nbdmap's are the same, but for the disk, and the key of LUKS1."""
    for number in range(len(OURS)):
        line, uuid = sections[f"table{number}"].split("\n")[:2]
        environment = {"PYTHONPATH": str(REPOSITORY)}
        said = run(
            *PROGRAM, "luks", "open", images[number], f"o{number}", "--key-file", directory / "key", "--run",
            f"{PROGRAM[0]} -m nbdmap table o{number}; {PROGRAM[0]} -m nbdmap info -c --noheadings -o uuid o{number}",
            extra=environment,
        ).splitlines()  # fmt: skip
        theirs, ours = line.split(), said[0].split()
        if number == 0:
            theirs[4] = ours[4] = "key"
        theirs[6] = ours[6] = "disk"
        assert (ours, said[1]) == (theirs, uuid)

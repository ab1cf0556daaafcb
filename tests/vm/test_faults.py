"""delay, flakey, log-writes, switch and unstriped: the same tables, requests and messages in Linux 6.12 and in nbdmap.

Every case has a slice of each disk to itself. Compared are: what each request gave, the lines of `table` and `status`, and
every byte of the disks in the end.
"""

import asyncio
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from nbdmap.block.io import DISCARD, FLUSH, READ, WRITE, Io
from nbdmap.dm.device import MappedDevice
from nbdmap.dm.table import parse_table
from nbdmap.errors import NbdmapError
from nbdmap.targets import TARGETS
from nbdmap.targets.log_writes import Flag, Logged
from tests.crash.logwrites import load
from tests.support.disks import FakeDisk, FakeOpener, Uevents
from tests.vm.harness import Kernel

DISKS: Final = 4
SECTORS: Final = 16384
SLICE: Final = 256
"""Of each disk for a case."""
PATHS: Final = tuple(f"/dev/vd{letter}" for letter in "bcde")
REST: Final = 12288
"""Where on every disk what comes after the cases begins."""


class Step(NamedTuple):
    """r and w: `sectors` from `at` on, with the byte `value`; d: a discard; f: a flush; m: a message. Numbers are multiples
    of 8: busybox' dd does the rest past O_DIRECT, in pages."""

    kind: str
    at: int = 0
    sectors: int = 0
    value: str = ""


class Case(NamedTuple):
    """`{0}` and so on are disks, `{s}` the first sector of the slice."""

    name: str
    table: str
    steps: tuple[Step, ...]


def R(at: int, sectors: int) -> Step:
    return Step("r", at, sectors)


def W(at: int, sectors: int, value: str) -> Step:
    return Step("w", at, sectors, value)


def M(text: str) -> Step:
    return Step("m", value=text)


D: Final = Step("d", 32, 8)
F: Final = Step("f")
EVERYTHING: Final = (R(0, 8), W(8, 16, "x"), F, R(8, 16), D, R(32, 8), W(64, 8, "y"), R(56, 24), F)


def cases() -> Iterator[Case]:
    """All of them."""
    flakey = "0 128 flakey {0} {s} "
    for name, words in {
        "well": "1 0 1 drop_writes",
        "default": "0 1",
        "drop": "0 1 1 drop_writes",
        "error_writes": "0 1 1 error_writes",
        "error_reads": "0 1 1 error_reads",
        "both": "0 1 2 error_reads drop_writes",
        "spoil_r": "0 1 5 corrupt_bio_byte 32 r 1 0",
        "spoil_w": "0 1 5 corrupt_bio_byte 512 w 2 0",
        "spoil_far": "0 1 5 corrupt_bio_byte 600 w 3 0",
        "spoil_writes_only": "0 1 5 corrupt_bio_byte 1 w 4 1",
        "spoil_no_read": "0 1 5 corrupt_bio_byte 1 r 5 1",
        "spoil_no_fua": "0 1 5 corrupt_bio_byte 1 w 6 131072",
        "spoil_drop": "0 1 6 drop_writes corrupt_bio_byte 2 r 7 0",
        "random_none": "0 1 4 random_read_corrupt 0 random_write_corrupt 0",
    }.items():
        yield Case(name, flakey + words, EVERYTHING)
    yield Case("delay3", "0 128 delay {0} {s} 20", EVERYTHING)
    yield Case("delay6", "0 128 delay {0} {s} 0 {1} {s} 20", EVERYTHING)
    yield Case("delay9", "0 128 delay {0} {s} 5 {1} {s} 0 {2} {s} 5", EVERYTHING)
    mapped = (R(0, 128), M("set_region_mappings 0:1 :1 :0 :2 R3,5 F:0"), R(0, 128), W(8, 56, "s"), F, R(0, 128))
    yield Case("switch", "0 128 switch 3 8 0 {0} {s} {1} {s} {2} {s}", mapped)
    yield Case("switch24", "0 96 switch 2 24 0 {0} {s} {1} {s}", (R(0, 96), W(16, 64, "t"), R(8, 80)))
    for chunk in (8, 24):
        text = f"0 {96} unstriped 2 {chunk} 1 {{0}} {{s}}"
        yield Case(f"unstriped{chunk}", text, (R(0, 96), W(16, 40, "u"), F, R(8, 88), W(88, 8, "v")))


def place(case: int) -> int:
    return case * SLICE


def disk_bytes(number: int) -> bytes:
    return random.Random(number).randbytes(SECTORS * 512)


GUEST: Final = """
modprobe dm-unstripe
r() { if dd if=/dev/mapper/$1 of=/tmp/read bs=$(($3 * 512)) iflag=direct,skip_bytes skip=$(($2 * 512)) count=1 2>/dev/null
      then sha256sum </tmp/read | cut -c 1-16; else echo failed; fi; }
w() { head -c $(($3 * 512)) /dev/zero | tr '\\0' $4 >/tmp/write
      dd if=/tmp/write of=/dev/mapper/$1 bs=$(($3 * 512)) oflag=direct,seek_bytes seek=$(($2 * 512)) count=1 conv=notrunc \\
         2>/dev/null && echo ok || echo failed; }
d() { blkdiscard -f -o $(($2 * 512)) -l $(($3 * 512)) /dev/mapper/$1 2>/dev/null && echo ok || echo failed; }
f() { dd if=/dev/null of=/dev/mapper/$1 count=0 conv=fsync,notrunc 2>/dev/null && echo ok || echo failed; }
m() { _name=$1; shift; dmsetup message $_name 0 "$*" && echo ok || echo failed; }
"""


def guest_job() -> str:
    """The commands for the guest, where disk N is /dev/vd[b-e]."""
    job = GUEST + "section numbers\nfor path in " + " ".join(PATHS) + "; do cat /sys/block/${path#/dev/}/dev; done\n"
    for number, case in enumerate(cases()):
        table = case.table.format(*PATHS, s=place(number))
        job += f"section {case.name}\ndmsetup create {case.name} --table '{table}'\n"
        for step in case.steps:
            place_words = "" if step.kind == "m" else f"{step.at} {step.sectors}"
            job += f"{step.kind} {case.name} {place_words} {step.value}\n"
        job += f"dmsetup table {case.name}; dmsetup status {case.name}; dmsetup remove {case.name}\n"
    return job


async def do(device: MappedDevice, step: Step) -> str:
    """As the guest's functions."""
    data = bytearray(step.value.encode() * step.sectors * 512 if step.kind == "w" else step.sectors * 512)
    op = {"r": READ, "w": WRITE, "d": DISCARD, "f": FLUSH}.get(step.kind)
    try:
        if op is None:
            await device.message(0, step.value.split())
        elif op in (READ, WRITE):
            await device.submit(Io(op, len(data), memoryview(data)), step.at * 512)
        else:
            await device.submit(Io(op, step.sectors * 512), step.at * 512)
    except NbdmapError:
        return "failed"
    return hashlib.sha256(data).hexdigest()[:16] if op is READ else "ok"


async def here(disks: list[FakeDisk]) -> dict[str, str]:
    """What nbdmap answers: as the sections of the guest's."""
    found: dict[str, str] = {}
    numbers = [disk.number for disk in disks]
    for number, case in enumerate(cases()):
        device = MappedDevice(case.name, "", "254:0", TARGETS, Uevents())
        await device.load(parse_table(case.table.format(*numbers, s=place(number))), FakeOpener(*disks), read_only=False)
        await device.resume()
        lines = [await do(device, step) for step in case.steps]
        assert device.live is not None
        lines += [
            f"{line.start_sectors} {line.length_sectors} {line.type_name} {line.params}"
            for line in (*device.live.table_lines(), *device.live.status_lines())
        ]
        await device.suspend()
        await device.close()
        found[case.name] = "\n".join(lines)
    return found


TIMES: Final = f"""
section delaying
dmsetup create slow --table '0 128 delay /dev/vdb {REST} 1500 /dev/vdc {REST} 1000'
r slow 0 8 >/tmp/r1 & r slow 8 8 >/tmp/r2 & w slow 0 8 z >/tmp/w1 & usleep 400000
dmsetup status slow; wait; cat /tmp/w1; dmsetup status slow
section suspending
dmsetup load slow --table '0 128 delay /dev/vdb {REST} 3000000'; dmsetup resume slow
r slow 0 8 >/tmp/r1 & r slow 8 8 >/tmp/r2 & usleep 400000
dmsetup status slow; dmsetup suspend slow; wait; dmsetup status slow; dmsetup resume slow; dmsetup remove slow
section cycle
dmsetup create cycle --table '0 128 flakey /dev/vdb {REST} 3 2 1 error_reads'
for seconds in 1 3 2; do sleep $seconds; r cycle 0 8 | sed 's/^[0-9a-f]*$/well/'; done; dmsetup remove cycle
"""
LOGGING: Final = f"""
section logging
dmsetup create data --table '0 128 linear /dev/vdd {REST}'
dmsetup create entries --table '0 2048 linear /dev/vde {REST}'
dmsetup create log --table '0 128 log-writes /dev/mapper/data /dev/mapper/entries'
w log 0 8 a; w log 8 8 b; dmsetup message log 0 mark one; f log; w log 8 16 c; d log 32 8; f log; w log 96 8 d; r log 0 8
dmsetup table log; dmsetup status log; dmsetup remove log entries data
section versions
dmsetup targets
"""
LOGGED: Final = (
    W(0, 8, "a"), W(8, 8, "b"), M("mark one"), F, W(8, 16, "c"), D, F, W(96, 8, "d"), R(0, 8)
)  # fmt: skip


def test_the_kernel_does_the_same(newer: Kernel, tmp_path: Path) -> None:
    images = [tmp_path / f"disk{number}" for number in range(DISKS)]
    for number, image in enumerate(images):
        image.write_bytes(disk_bytes(number))
    sections = newer.run(guest_job() + TIMES + LOGGING, images, seconds=600).sections()
    disks = [FakeDisk(number, SECTORS) for number in sections["numbers"].split()]
    for number, disk in enumerate(disks):
        disk.bytes[:] = disk_bytes(number)
    answers = asyncio.run(here(disks))
    for name, answer in answers.items():
        assert answer == sections[name].rstrip("\n"), name
    for number, (disk, image) in enumerate(zip(disks, images, strict=True)):
        slices = len(answers) * SLICE * 512
        theirs = image.read_bytes()
        different = [at // 512 for at in range(0, slices, 512) if theirs[at : at + 512] != disk.bytes[at : at + 512]]
        assert not different, f"disk {number}, sectors {different}"
    assert sections["delaying"].splitlines() == ["0 128 delay 2 1 0", "ok", "0 128 delay 0 0 0"]
    assert sections["suspending"].splitlines() == ["0 128 delay 2 0 0", "0 128 delay 0 0 0"]
    assert sections["cycle"].split() == ["well", "failed", "well"]    # after 1, 4 and 6 s of 3 up, 2 down
    assert asyncio.run(logged_here(sections["logging"])) == load(images[3].read_bytes()[REST * 512 :])
    versions = dict(line.split() for line in sections["versions"].splitlines())
    for name in ("delay", "flakey", "log-writes", "switch", "unstriped"):
        assert versions[name] == "v" + ".".join(map(str, TARGETS[name].version)), name


async def logged_here(answers: str) -> list[Logged]:
    """The log that nbdmap writes of the same requests, which must give the same answers."""
    data, entries = FakeDisk("254:0", 128), FakeDisk("254:1", 2048)
    data.bytes[:] = disk_bytes(2)[REST * 512 :][: data.size]
    device = MappedDevice("log", "", "254:2", TARGETS, Uevents())
    await device.load(parse_table("0 128 log-writes 254:0 254:1"), FakeOpener(data, entries), read_only=False)
    await device.resume()
    lines = [answer for step in LOGGED if (answer := await do(device, step)) and step.kind != "m"]
    assert device.live is not None
    lines += ["0 128 log-writes 254:0 254:1", f"0 128 log-writes {device.live.status_lines()[0].params}"]
    assert lines == answers.splitlines()
    await device.suspend()
    await device.close()
    found = load(bytes(entries.bytes))
    assert [entry.flags for entry in found].count(Flag.MARK) == 2
    return found

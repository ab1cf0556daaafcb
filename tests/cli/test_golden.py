"""The command line against what Debian's dmsetup answered on Debian's kernel (6.1): every transcript, step by step.

Standard output must be equal, byte for byte; the exit status must be zero where dmsetup's is; and where dmsetup's first
line on standard error is "device-mapper: ...", ours begins with it (and goes on with the reason).
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cli.replay import Answer, World, world
from tests.vm.transcripts import GOLDEN, Step, as_on_6_12, parse


class Difference(NamedTuple):
    """A step that is meant to be different. `nth` counts equal commands of a file (none: each of them); `instead` are
    commands to be done in its place, so that what follows is the same again."""

    file: str
    command: str
    reason: str
    nth: tuple[int, ...] = ()
    instead: tuple[str, ...] | None = None


OWN_NAMES = "nbdmap refuses names that cannot be a file's in /dev/mapper; dmsetup makes a broken device"
READ_AHEAD = "--readahead is accepted and does nothing: the client's kernel has its own"
LIKE_6_12 = "targets and driver are those of Linux 6.12; the transcripts are of 6.1"
UNMANGLED = "nbdmap keeps names unmangled, so a name of --manglename none is the same name and breaks no listing"
AT_LOAD = "a table that does not fit the disks is refused when it is loaded, not when it is resumed"
READ_ONLY = "a writable table over something read-only is refused; in Linux only its writes fail"
STRICT = "numbers are decimal and whole; Linux reads 07:00 and 7:0:0 as 7:0, and cuts 2^64 (or 2^32) to 0"
FILES = "paths are those of files, too, and unknown ones are ENOENT, as in Linux 6.12"
WORDS = "a backslash in a table takes the next character as it is, also in front of an o"
NUMBER_RANGE = "a number that is taken is EBUSY, one that cannot be is EINVAL; Linux says ENXIO to both"
ONE_MAJOR = "mapped devices have major 254, whatever --major says; in Linux another one leaves a half-made device"
RENAME_UUID = "rename finds a device by its uuid; Linux does not"
OWN_HELP = "--help and --version are nbdmap's own, on standard output"
OWN_STATS = "stats prints what devices have done; it has none of dmstats' regions"
ALL_FIELDS = "without the statistics columns, for which dmsetup finds no row"
BLKDEVNAME = "a device that has had no table has an empty block device name; dmsetup fails"
MANGLE = "mangle finds the device that is named; dmsetup does not, when its name is mangled"
ITSELF = "a table that would make a device stand on itself is refused; Linux loads it"
DEVICE_FIRST = "a device that is not there is told before a uuid that is taken"
AS_ON_6_12 = ("target-flakey",)
"""Compared with what 6.12 answers: 6.1 prints every line of the target's otherwise."""
EMPTY_MESSAGE = "MAPPER: a message to a device without a table is dropped; Linux 6.1 refuses (EINVAL)"
SAME_USE = "the metadata snapshot is in another block: nbdmap gives out as many blocks, but not in the same order"
TRIM = "the trim message of the 2011 document, which Linux never had"
DOCUMENTS = "without queue_mode bio repeat counts are obeyed and waiting requests counted, as in the kernel's documents"
EACH_PATH = "each path that fails or comes back is an event; Linux counts those of one message once"

_LINEAR = "dmsetup create d --table '0 8 linear 7:0 0'"
DIFFERENT = (
    Difference("concise", "dmsetup create --concise 'bad,,x,rw,0 8 zero'", STRICT),
    Difference("create-errors", "dmsetup create third -j 254 --minor 0 --table '0 8 zero'", NUMBER_RANGE),
    Difference("create-errors", "dmsetup create third -j 254 --minor 1048576 --table '0 8 zero'", NUMBER_RANGE),
    Difference("create-errors", "dmsetup create . --table '0 8 zero'", OWN_NAMES),
    Difference("create-errors", "dmsetup create .. --table '0 8 zero'", OWN_NAMES),
    Difference("create-errors", "dmsetup create control --table '0 8 zero'", OWN_NAMES),
    Difference("create-errors", "dmsetup remove . .. control", OWN_NAMES),
    Difference(
        "create", "dmsetup create minor1 --major 99 --minor 41 --table '0 8 zero'", ONE_MAJOR,
        instead=("dmsetup create minor1 -j 254 -m 41 --notable", "dmsetup load minor1 --table '0 8 zero'"),
    ),
    Difference("create", "dmsetup info -c -o name,read_ahead ra", READ_AHEAD),
    Difference("create", "dmsetup info -c -o name,read_ahead ra2", READ_AHEAD),
    Difference("create", "dmsetup info -c -o name,read_ahead ra3", READ_AHEAD),
    Difference("events-messages", "dmsetup message n 0 hello", EMPTY_MESSAGE),
    Difference(
        "info", "dmsetup info -c -o name,major,minor,devno,blkdevname,attr,tables_loaded,suspended,readonly,open,segments,"
        "events,read_ahead", BLKDEVNAME,
    ),
    Difference("info", "dmsetup info -c -o all lin", ALL_FIELDS),
    Difference("linear", "dmsetup create d --table '0 8 linear 7:0 18446744073709551616'", STRICT, instead=(_LINEAR,)),
    Difference("linear", "dmsetup create d --table '0 8 linear 7:0:0 0'", STRICT, instead=(_LINEAR,)),
    Difference("linear", "dmsetup create d --table '0 8 linear 07:00 0'", STRICT, instead=(_LINEAR,)),
    Difference("linear", "dmsetup create d --table '0 8 linear 7:99999999 0'", STRICT),
    Difference("linear", "dmsetup create d --table '0 8 linear 99999:0 0'", STRICT),
    Difference("linear", "dmsetup create d --table '0 8 linear /dev/no 0'", FILES),
    Difference("linear", "dmsetup create d --table '0 8 linear no 0'", FILES),
    Difference("linear", "dmsetup create d --table '0 8 linear loop0 0'", FILES),
    Difference("linear", "dmsetup create d --table '0 8 linear /etc/mke2fs.conf 0'", FILES, instead=()),
    Difference("linear", "dmsetup create d --table '0 8 linear /dev/null 0'", FILES),
    Difference("linear", "dmsetup create d --table '0 8 linear /dev 0'", FILES),
    Difference("linear", "dmsetup create d --table '0 8 linear /dev/mapper/d 0'", FILES),
    Difference("linear", "dmsetup create d --table '0 8 linear /dev/loop-control 0'", FILES, instead=()),
    Difference("linear", "dmsetup create d --table '0 8 linear /dev/lo\\op0 0'", WORDS, instead=()),
    Difference("striped", "dmsetup create d --table '0 64 striped 2 16 7:0 0 /dev/no 0'", FILES),
    Difference("load-resume", "dmsetup info d", READ_AHEAD, (16, 17)),
    Difference("load-resume", "dmsetup load d --table '0 8 linear 254:0 0'", ITSELF),
    Difference("load-resume", "dmsetup table --inactive d", ITSELF, (5,)),
    Difference("load-resume", "dmsetup load d --table '0 2049 linear 7:4 0'", AT_LOAD),
    Difference("load-resume", "dmsetup load d --table '0 4 linear 7:6 0'", AT_LOAD),
    Difference("load-resume", "dmsetup info -c d", AT_LOAD, (4, 5, 7)),
    Difference("load-resume", "dmsetup resume d", AT_LOAD, (11, 13)),
    Difference("misc", "dmsetup targets", LIKE_6_12),
    Difference("misc", "dmsetup target-version zero", LIKE_6_12),
    Difference("misc", "dmsetup target-version error", LIKE_6_12),
    Difference("misc", "dmsetup stats list", OWN_STATS),
    Difference("multipath", "dmsetup message rr 0 fail_path 7:99", LIKE_6_12),
    Difference("multipath", "dmsetup message rr 0 fail_path /dev/none", FILES),
    Difference("multipath", "dmsetup info -c -o name,events twice", EACH_PATH),
    Difference("multipath", "dmsetup table request", DOCUMENTS),
    Difference("multipath", "dmsetup status request", DOCUMENTS),
    Difference("names", "dmsetup mangle 'star*'", MANGLE),
    Difference("names", "dmsetup ls", UNMANGLED, (5,)),
    Difference("names", "dmsetup info -c", UNMANGLED, (2,)),
    Difference("names", "dmsetup table", UNMANGLED, (2,)),
    Difference("names", "dmsetup ls --manglename none", UNMANGLED, (2,)),
    Difference("names", "dmsetup remove 'nonemode x'", UNMANGLED),
    Difference("names", "dmsetup remove --manglename none 'nonemode x'", UNMANGLED),
    *(
        Difference("readonly", f"dmsetup create {name} --table '{table}'", READ_ONLY, (),
                   (f"dmsetup create -r {name} --table '{table}'",))
        for name, table in (
            ("overrodisk", "0 100 linear 7:5 0"),
            ("overrodm", "0 50 linear /dev/mapper/ro 0"),
            ("stripedoverro", "0 64 striped 2 16 7:0 0 7:5 0"),
            ("mixedoverro", "0 64 zero\n64 8 linear 7:5 0"),
        )
    ),
    Difference("readonly", "dmsetup info -c", READ_ONLY, (1,)),
    Difference("rename", "dmsetup rename --uuid ub bb", RENAME_UUID, instead=()),
    Difference("rename", "dmsetup rename bb --setuuid uc", DEVICE_FIRST),
    Difference("rename", "dmsetup rename s control", OWN_NAMES),
    Difference("rename", "dmsetup ls", OWN_NAMES, (1,)),
    Difference("stack", "dmsetup load base --table '0 8 linear /dev/mapper/base 0'", ITSELF),
    Difference("stack", "dmsetup load base --table '0 8 linear /dev/mapper/mid 0'", ITSELF),
    Difference("stack", "dmsetup table --inactive base", ITSELF),
    Difference("target-flakey", "dmsetup create d --table '0 8 flakey 7:0 0 4294967296 1'", STRICT,
               instead=("dmsetup create d --table '0 8 flakey 7:0 0 0 1'",)),
    Difference("target-flakey", "dmsetup create d --table '0 8 flakey 7:0 0 1 1 5 corrupt_bio_byte 1 r 1 4294967296'", STRICT,
               instead=("dmsetup create d --table '0 8 flakey 7:0 0 1 1 5 corrupt_bio_byte 1 r 1 0'",)),
    Difference("target-switch", "dmsetup message d 0 set_region_mappings 10000000000000000:1", STRICT),
    Difference("thin-messages", "dmsetup status pool", SAME_USE, (5,)),
    Difference("thin-messages", "dmsetup message pool 0 trim 0 0", TRIM),
    Difference("thin-table", "dmsetup create t2 --table '0 2048 thin /dev/mapper/nosuch 0'", FILES),
    Difference("usage", "dmsetup --help", OWN_HELP),
    Difference("usage", "dmsetup -h", OWN_HELP),
    Difference("usage", "dmsetup --version", OWN_HELP),
    Difference("usage", "dmsetup version", LIKE_6_12),
    Difference("zero-error", "dmsetup deps e2", LIKE_6_12),
)  # fmt: skip


def differs(step: Step, answer: Answer) -> list[str]:
    """What is not as recorded."""
    first = step.stderr.partition("\n")[0]
    found = [] if answer.stdout == step.stdout else [f"stdout:\n{step.stdout}but is:\n{answer.stdout}"]
    if (answer.status == 0) != (step.status == 0):
        found.append(f"status: {step.status} but is {answer.status} ({answer.stderr.strip()})")
    if first.startswith("device-mapper: ") and not answer.stderr.startswith(first):
        found.append(f"stderr: {first}\nbut is: {answer.stderr}")
    if answer.status and answer.stderr.count("\n") != 1:
        found.append(f"not one line on stderr: {answer.stderr}")
    return found


def replay(made: World, steps: list[Step], known: list[Difference]) -> tuple[list[str], set[Difference]]:
    """What is different without being known, and what of the known is."""
    complaints: list[str] = []
    seen: Counter[str] = Counter()
    met: set[Difference] = set()
    for step in steps:
        if step.kind != "$":
            made.step(step)
            continue
        seen[step.text] += 1
        candidates = (one for one in known if one.command == step.text and (not one.nth or seen[step.text] in one.nth))
        difference = next(candidates, None)
        if difference is not None and difference.instead is not None:
            for command in difference.instead:
                made.step(Step("$", command))
            met.add(difference)
            continue
        answer = made.step(step)
        found = differs(step, answer) if answer else []
        if found and difference is not None:
            met.add(difference)
        elif found:
            complaints.append("\n".join([f"$ {step.text} ({seen[step.text]})", *found]))
    return complaints, met


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.txt")), ids=lambda path: path.stem)
def test_transcript(path: Path, tmp_path: Path) -> None:
    steps, _ = parse(as_on_6_12(path.name) if path.stem in AS_ON_6_12 else path.read_text())
    known = [one for one in DIFFERENT if one.file == path.stem]
    with world(tmp_path) as made:
        complaints, met = replay(made, steps, known)
    assert not complaints, "\n\n".join(complaints)
    assert met == set(known), f"no longer different: {[one.command for one in known if one not in met]}"

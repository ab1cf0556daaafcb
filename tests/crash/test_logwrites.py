"""dm-log-writes' format: written and read again here, and by replay-log where it is installed."""

import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from nbdmap.errors import CorruptMetadata
from nbdmap.targets.log_writes import END, MAGIC, Flag
from tests.crash.clock import run
from tests.crash.explore import Explorer, Recording, Where, record
from tests.crash.log import WriteLog
from tests.crash.logwrites import dump, entries_of, load, replay
from tests.crash.stacks import SCENARIOS


def recorded(name: str, seed: int) -> Recording:
    scenario = SCENARIOS[name]()
    scenario.faults = lambda rng: []  # type: ignore[method-assign]
    where = Where(name, seed, "", Explorer(scenario))
    return run(record(scenario, scenario.first_images(where.rng()), where.rng("record"), fresh=True))


def last_images(recording: Recording) -> list[bytearray]:
    """What the disks hold in the end: everything, in the order in which it ended."""
    images = [bytearray(image) for image in recording.images]
    for entry in sorted((one for one in recording.log.entries if one.kind != "flush"), key=lambda one: one.completed or 0):
        data = entry.data if entry.kind == "write" else bytes(entry.length)
        images[entry.disk][entry.offset : entry.offset + entry.length] = data
    return images


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("seed", range(3))
def test_the_log_read_again_and_replayed_gives_the_disk(name: str, seed: int) -> None:
    recording = recorded(name, seed)
    for disk, wanted in enumerate(last_images(recording)):
        raw = dump(recording.log, disk)
        entries = load(raw)
        assert entries == list(entries_of(recording.log, disk))
        assert len(raw) == 512 + sum(len(entry.encode()) for entry in entries)
        image = bytearray(recording.images[disk])
        replay(entries, image)
        assert image == wanted


def test_the_bytes() -> None:
    log = WriteLog()
    plain = log.submit(0, "write", 4096, 512, b"p" * 512)
    log.complete(plain)
    log.mark("asked")
    durable = log.submit(0, "write", 512, 1024, b"f" * 1024, fua=True)
    log.complete(durable)
    flush = log.submit(0, "flush", 0, 0)
    late = log.submit(0, "discard", 2048, 512)
    log.complete(late)
    log.complete(flush)
    log.complete(log.submit(1, "write", 0, 512, b"o" * 512))
    raw = dump(log, 0)
    assert raw[:28] == struct.pack("<QQQI", MAGIC, 1, 6, 512)
    assert raw[512 : 512 + 37] == struct.pack("<QQQQ", 0, 0, 8, 5) + b"asked"
    assert raw[1024 : 1024 + 32] == struct.pack("<QQQQ", 1, 2, 2, 0)
    assert raw[1536 : 1536 + 1024] == b"f" * 1024
    kinds = [(entry.flags, entry.sector) for entry in load(raw)]
    assert kinds == [(Flag.MARK, 0), (Flag.FUA, 1), (Flag(0), 8), (Flag.FLUSH, 0), (Flag.DISCARD, 4), (Flag.MARK, 0)]
    assert load(raw)[-1].data == END.encode()


def test_what_a_fua_write_overlaps_stands_before_it() -> None:
    log = WriteLog()
    for sector, sectors, fua in ((9, 1, False), (1, 2, False), (2, 3, False), (4, 1, True)):
        log.complete(log.submit(0, "write", sector * 512, sectors * 512, bytes(sectors * 512), fua=fua))
    assert [entry.sector for entry in entries_of(log, 0)][:-1] == [1, 2, 4, 9]


@pytest.mark.parametrize("damage", [b"\0", struct.pack("<QQQI", MAGIC, 2, 0, 512), struct.pack("<QQQI", MAGIC, 1, 1, 512)])
def test_what_is_no_log_is_refused(damage: bytes) -> None:
    with pytest.raises(CorruptMetadata):
        load(damage.ljust(512, b"\0"))


@pytest.mark.parametrize("name", ["linear", "striped-files"])
def test_replay_log_reads_it(name: str, tmp_path: Path) -> None:
    program = shutil.which("replay-log")
    if program is None:
        pytest.skip("replay-log (josefbacik/log-writes, xfstests) is not installed")
    recording = recorded(name, random.Random(name).randrange(100))
    for disk, wanted in enumerate(last_images(recording)):
        (tmp_path / "log").write_bytes(dump(recording.log, disk))
        (tmp_path / "disk").write_bytes(recording.images[disk])
        subprocess.run([program, "--log", tmp_path / "log", "--replay", tmp_path / "disk"], check=True, timeout=20)
        assert (tmp_path / "disk").read_bytes() == wanted

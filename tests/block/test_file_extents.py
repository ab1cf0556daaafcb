import errno
import os
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from nbdmap.block import file_extents
from nbdmap.block.device import HOLE, ZERO
from nbdmap.block.file_extents import GRANULE, MAX_EXTENTS, MAX_REMEMBERED, KnownData, find_extents
from nbdmap.units import GIB, KIB, MAX_SIZE, MIB, SECTOR

ABSENT = HOLE | ZERO


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file of 8 MiB with data in [1 MiB, 3 MiB) and [5 MiB, 5 MiB + 64 KiB)."""
    fd = os.open(tmp_path / "a.img", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 8 * MIB)
    os.pwrite(fd, b"x" * 2 * MIB, MIB)
    os.pwrite(fd, b"x" * 64 * KIB, 5 * MIB)
    yield fd
    os.close(fd)


def test_known_data_against_a_set() -> None:
    rng = random.Random(1)
    known = KnownData()
    model: set[int] = set()
    for _ in range(3000):
        begin = rng.randrange(400 * MIB)
        end = begin + rng.choice([SECTOR, MIB, 3 * MIB, 150 * MIB])
        touched = set(range(begin // GRANULE, -(-end // GRANULE)))
        match rng.randrange(4):
            case 0:
                known.add(begin, end)
                model |= set(range(-(-begin // GRANULE), end // GRANULE))
            case 1:
                known.remove(begin, end)
                model -= touched
            case _:
                assert known.covers(begin, end) == (touched <= model)


def test_known_data_of_a_huge_disk() -> None:
    known = KnownData()
    known.add(MAX_SIZE - MIB, MAX_SIZE + SECTOR)
    known.add(0, GIB)
    assert known.covers(MAX_SIZE - SECTOR, MAX_SIZE)
    known.remove(GIB // 2, MAX_SIZE)
    assert not known.covers(MAX_SIZE - SECTOR, MAX_SIZE)
    assert known.covers(0, GIB // 2)
    assert not known.covers(GIB // 2, GIB)
    known.add(0, MAX_SIZE)
    assert known.covers(0, MAX_REMEMBERED)
    assert not known.covers(MAX_REMEMBERED, MAX_REMEMBERED + 1)


def test_extents_of_the_whole_file(fd: int) -> None:
    found, runs = find_extents(fd, 0, 8 * MIB, SECTOR)
    assert found == [
        (MIB, ABSENT),
        (2 * MIB, 0),
        (2 * MIB, ABSENT),
        (64 * KIB, 0),
        (3 * MIB - 64 * KIB, ABSENT),
    ]
    assert runs == [(MIB, 3 * MIB), (5 * MIB, 5 * MIB + 64 * KIB)]


def test_a_part_learns_about_all_of_the_run_it_lies_in(fd: int) -> None:
    assert find_extents(fd, MIB + 4 * KIB, MIB + 8 * KIB, SECTOR) == ([(4 * KIB, 0)], [(MIB, 3 * MIB)])


def test_the_start_of_the_granule_is_left_out_when_it_has_a_hole(fd: int) -> None:
    os.pwrite(fd, b"x" * 4 * KIB, 16 * KIB)
    assert find_extents(fd, 16 * KIB, 24 * KIB, SECTOR) == (
        [(4 * KIB, 0), (4 * KIB, ABSENT)],
        [(16 * KIB, 20 * KIB)],
    )


def test_a_hole_alone(fd: int) -> None:
    assert find_extents(fd, 3 * MIB + SECTOR, 4 * MIB, SECTOR) == ([(MIB - SECTOR, ABSENT)], [])
    assert find_extents(fd, 7 * MIB, 8 * MIB, SECTOR) == ([(MIB, ABSENT)], [])


def test_what_lies_behind_the_end_is_data(fd: int) -> None:
    os.truncate(fd, 4 * MIB)
    assert find_extents(fd, 2 * MIB, 8 * MIB, SECTOR)[0] == [(MIB, 0), (MIB, ABSENT), (4 * MIB, 0)]
    assert find_extents(fd, 6 * MIB, 8 * MIB, SECTOR)[0] == [(2 * MIB, 0)]
    os.truncate(fd, 2 * MIB)
    assert find_extents(fd, MIB, 8 * MIB, SECTOR)[0] == [(7 * MIB, 0)]


def test_the_number_of_extents_is_bounded(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_extents, "MAX_EXTENTS", 4)
    assert find_extents(fd, 0, 8 * MIB, SECTOR)[0] == [(MIB, ABSENT), (2 * MIB, 0), (2 * MIB, ABSENT), (64 * KIB, 0)]
    assert MAX_EXTENTS > 4


def test_a_file_that_changes_meanwhile_never_stalls_the_search(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a file system answers, in whatever order, the answer covers the range, in whole blocks."""
    rng = random.Random(3)

    def seek(_fd: int, offset: int, whence: int) -> int:
        if rng.randrange(6) == 0:
            raise OSError(errno.ENXIO, "no more")
        return offset + rng.choice([0, 0, 1, 100, SECTOR, 3 * MIB])

    monkeypatch.setattr(os, "lseek", seek)
    for _ in range(300):
        offset = SECTOR * rng.randrange(12000)
        end = offset + SECTOR * rng.randint(1, 4000)
        found, runs = find_extents(fd, offset, end, SECTOR)
        assert sum(length for length, _ in found) == end - offset or len(found) >= MAX_EXTENTS - 1
        assert all(length > 0 and length % SECTOR == 0 for length, _ in found)
        assert all(begin % SECTOR == stop % SECTOR == 0 and begin < stop for begin, stop in runs)
        assert all(left[1] != right[1] for left, right in pairwise(found))


def test_another_failure_is_raised(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(OSError, match="Illegal seek"):
            find_extents(reading, 0, SECTOR, SECTOR)
    finally:
        os.close(reading)
        os.close(writing)

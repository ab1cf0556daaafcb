"""The profile and the soak, very small."""

import subprocess
import sys

import pytest

from bench import ciphers, profile, soak
from tests.support.programs import need
from tests.support.server import REPOSITORY, private_directory


def test_profile_has_every_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(profile, "RUN_SECONDS", 0.0002)
    monkeypatch.setattr(profile, "REPEATS", 2)
    with private_directory() as directory:
        assert profile.main(["--directory", str(directory)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 11 + 3
    for line in lines[2:]:
        name, *numbers = line.strip("| ").split(" | ")
        assert name
        assert all(float(number) >= 0 for number in numbers)


def test_ciphers_has_every_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ciphers, "RUN_SECONDS", 0.0)
    monkeypatch.setattr(ciphers, "REPEATS", 1)
    assert ciphers.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 13 + 1 + 2 + 4
    assert all(float(cell) > 0 for line in lines[2:15] for cell in line.strip("| ").split(" | ")[1:] if cell)


@pytest.mark.system
def test_soak_reports_growth() -> None:
    need("fio", "fio")
    need("nbdcopy", "libnbd-bin")
    with private_directory() as directory:
        command = [sys.executable, "-m", "bench.soak", "1", "--directory", str(directory)]
        said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False)
        assert said.returncode == 0, said.stdout + said.stderr
        assert list(directory.iterdir()) == []
    rows = {line.split(" | ")[0].strip("| "): line for line in said.stdout.splitlines()[2:]}
    assert list(rows) == ["rss MiB", "descriptors", "threads", "tasks", "objects"]


def test_growth_is_counted_from_the_first_silence() -> None:
    mib = 1 << 20
    samples = [soak.Held(10 * mib, 5, 1, 3, 100), soak.Held(30 * mib, 5, 2, 3, 300), soak.Held(12 * mib, 6, 1, 3, 200)]
    lines = soak.table(samples).splitlines()
    assert lines[2:4] == ["| rss MiB | 10.0 | 30.0 | 12.0 | 2.00 |", "| descriptors | 5.00 | 6.00 | 6.00 | 1.00 |"]

"""bench.paths: its figures are those of the selectors."""

import sys

import pytest

from bench import paths


async def test_selectors_that_look_at_the_queue_gain() -> None:
    found = await paths.one_slow_path(0.3, 8)
    assert set(found) == set(paths.TABLES)
    assert found["round-robin"][1] == pytest.approx(0.5, abs=0.1)
    for name in ("queue-length", "service-time 10:1", "historical-service-time"):
        assert found[name][1] < 0.4
        assert found[name][0] > found["round-robin"][0]


async def test_costs() -> None:
    found = await paths.cost(200)
    assert list(found) == ["linear", *paths.TABLES]
    assert all(0 < one < 1000 for one in found.values())


def test_it_prints_both(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["paths", "--seconds", "0.1", "--depth", "2"])
    paths.main()
    printed = capsys.readouterr().out
    assert printed.count("reads a second") == len(paths.TABLES)
    assert printed.count("us of CPU") == len(paths.TABLES) + 1

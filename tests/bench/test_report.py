"""Tables, verdicts and the picture, of made-up results."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.__main__ import main
from bench.measure import Outcome, Result
from bench.picture import svg

FACTS: dict[str, Any] = {
    "date": "2026-01-02T03:04:05+00:00", "cores": 2, "cpu": "a CPU", "memory": 8 << 30, "kernel": "6.1", "python": "3.11",
    "versions": {"nbdmap": "0.1", "nbd-server": None}, "load_before": [0.1, 0, 0], "load_after": [0.5, 0, 0],
}  # fmt: skip
OPTIONS: dict[str, Any] = {"rounds": 3, "seconds": 2.0}


def speed(ours: float | None, theirs: float | None, at_least: float | None, text: str = "4 KiB <read>") -> Result:
    result = Result(
        "unix/read", "unix", text, "IOPS", "request", True, "nbdmap", "nbdkit", at_least, None, ["nbdkit", "nbdmap", "qemu-nbd"]
    )
    for name, value in (("nbdmap", ours), ("nbdkit", theirs)):
        if value is not None:
            result.outcomes[name] = Outcome([value], value, 12.345, {"p99_us": 3.0})
    result.notes["qemu-nbd"] = "failed: it is ill\nat length"
    return result


def share(value: float) -> Result:
    result = Result("unix/x", "unix", "a share", "%", "", False, "nbdmap", "nbdkit", None, 3.0, ["nbdmap"])
    result.outcomes["nbdmap"] = Outcome([value], value, None, {"loaded_us": 120.0})
    return result


@pytest.mark.parametrize(
    ("result", "reached"),
    [
        (speed(300, 100, 3.0), True), (speed(299, 100, 3.0), False), (speed(1, 100, None), None),
        (speed(1, None, 3.0), None), (speed(None, 1, 3.0), None), (share(3.0), True), (share(3.1), False),
    ],
)  # fmt: skip
def test_verdicts(result: Result, reached: bool | None) -> None:
    assert result.reached is reached
    assert Result.from_json(result.to_json()) == result


def test_tables() -> None:
    text = report.tables([speed(299, 100, 3.0), speed(12.5, None, None), share(2)])
    lines = text.splitlines()
    assert lines[0] == "| over unix |  | nbdmap | nbdkit | qemu-nbd | x nbdkit | x qemu-nbd | at least |  |"
    assert lines[2] == ("| 4 KiB <read> | IOPS | 299 (12.3) | 100 (12.3) | failed | 2.99 | - | 3 | **not reached** |")
    assert lines[3] == "| 4 KiB <read> | IOPS | 12.5 (12.3) | - | failed | - | - |  |  |"
    assert "| a share | nbdmap | 2.00 | % | 3 | reached | loaded us 120 |" in lines
    assert lines[-1] == "- qemu-nbd, unix/read: failed: it is ill"


def test_one_line() -> None:
    assert report.short(speed(299, 100, 3.0)) == "unix/read: nbdmap 299, nbdkit 100; x nbdkit 2.99 **not reached**"
    assert report.short(speed(299, None, 3.0)) == "unix/read: nbdmap 299"
    assert report.short(share(2)) == "unix/x: nbdmap 2.00"


def test_what_is_kept_can_be_shown_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    results = [speed(299, 100, 3.0), share(2)]
    report.save(path, FACTS, OPTIONS, results)
    before = path.read_text()
    assert main(["--show", str(path)]) == 0
    assert capsys.readouterr().out == report.full(FACTS, OPTIONS, results)
    assert path.read_text() == before
    assert "nbd-server (not installed)" in report.full(FACTS, OPTIONS, results)


def test_the_picture() -> None:
    rows = [speed(330, 100, 3.0), speed(50, 100, None, "slow & steady"), speed(None, 1, None), share(2)]
    text = svg(rows)
    root = ElementTree.fromstring(text)
    bars = root.findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 2
    assert float(bars[0].attrib["width"]) == pytest.approx(6.6 * float(bars[1].attrib["width"]), abs=1)
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"3.30", "0.50", "slow & steady", "4 KiB <read>"} <= set(words)
    assert "background" not in text


def test_a_picture_of_nothing() -> None:
    ElementTree.fromstring(svg([]))

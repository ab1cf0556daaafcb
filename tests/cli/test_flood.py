"""The log does not grow with what clients do."""

import logging

from nbdmap.cli.flood import BURST, FloodGate


def test_a_burst_then_one_a_second_and_a_count() -> None:
    now = 0.0
    gate = FloodGate(lambda: now)

    def said(text: str, level: int = logging.INFO, *arguments: object) -> str:
        record = logging.LogRecord("x", level, "x", 1, text, arguments, None)
        return record.getMessage() if gate.filter(record) else ""

    assert [said("%s: bad", logging.INFO, n) for n in range(BURST)] == [f"{n}: bad" for n in range(BURST)]
    assert {said("%s: bad", logging.INFO, n) for n in range(10_000)} == {""}
    assert said("%s: other", logging.INFO, 1) == "1: other"
    assert said("%s: bad", logging.WARNING, 1) == "1: bad"
    now = 1.0
    assert said("%s: bad", logging.INFO, 7) == "7: bad (10000 more such lines were left out)"
    assert said("%s: bad", logging.INFO, 7) == ""
    now = 1000.0
    assert said("%s: bad", logging.INFO, 7) == "7: bad (1 more such lines were left out)"
    assert [said("%s: bad", logging.INFO, n) for n in range(BURST)] == [f"{n}: bad" for n in range(BURST - 1)] + [""]

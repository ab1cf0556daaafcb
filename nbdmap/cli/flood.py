"""Keeps what clients do from flooding the log: a few lines of one kind at once, then one a second, and how many were left out.

A kind is the text before its arguments are put in. Warnings and errors always pass.
"""

import logging
import time
from collections.abc import Callable
from typing import Final

BURST: Final = 50
"""Lines of one kind that may follow each other at once."""
SECONDS_EACH: Final = 1.0
"""After that: the time between two of them."""


class FloodGate(logging.Filter):
    """A filter for the logger of a module whose lines clients can cause at will."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._kinds: dict[str, tuple[float, int]] = {}  # text: (when its burst is whole again, lines left out)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written; the first after some that were not says how many."""
        if record.levelno >= logging.WARNING or not isinstance(record.args, tuple):
            return True
        now = self._clock()
        kind = str(record.msg)
        whole, left_out = self._kinds.get(kind, (now, 0))
        whole = max(whole, now) + SECONDS_EACH
        if whole > now + BURST * SECONDS_EACH:
            self._kinds[kind] = (whole - SECONDS_EACH, left_out + 1)
            return False
        self._kinds[kind] = (whole, 0)
        if left_out:
            record.msg = f"{kind} (%d more such lines were left out)"
            record.args = (*record.args, left_out)
        return True

"""What one measurement gives."""

from collections.abc import Callable
from dataclasses import dataclass, field

from bench.servers import Server


@dataclass(frozen=True)
class Sample:
    """One measurement: the value in the row's unit, the server's CPU time for each of `count`, and details."""

    value: float
    cpu_seconds: float = 0.0
    count: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)


Work = Callable[[Server, float], Sample]
"""Runs on a server for about so many seconds."""

"""The path checker: what multipathd is beside Linux's multipath target.

    multipath: {polling_interval: 5s}

It has every live multipath target check its paths in turn, so that a path whose server has come back is used again, and one
that is dead is known before a request meets it.
"""

import asyncio

from nbdmap.control.mapper import Mapper
from nbdmap.targets.multipath import Multipath

IDLE_SECONDS = 1.0
"""Without an interval: how often it is looked whether there is one now."""


class PathChecker:
    """Checks paths every `interval_s` seconds; 0 is never. It may be changed."""

    def __init__(self, mapper: Mapper, interval_s: float) -> None:
        self.interval_s = interval_s
        self._mapper = mapper

    async def run(self) -> None:
        """Checks until it is cancelled."""
        while True:
            await asyncio.sleep(self.interval_s or IDLE_SECONDS)
            if self.interval_s:
                self.check(asyncio.get_running_loop().time())

    def check(self, now: float) -> None:
        """Begins one round of checks; `now` is in seconds."""
        for device in self._mapper.devices.values():
            for target in device.live.targets if device.live else ():
                if isinstance(target, Multipath):
                    target.check_paths(now)

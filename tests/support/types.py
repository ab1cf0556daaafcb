"""Target types for tests: they wait and fail where a test wants them to."""

import asyncio
from collections.abc import Mapping
from typing import ClassVar, Final, Self

from nbdmap.dm.args import Args
from nbdmap.dm.target import Spec, Target
from nbdmap.errors import IoFailed
from nbdmap.targets import TARGETS
from nbdmap.targets.linear import Linear


class Stop:
    """A place where a coroutine waits until the test lets it go on."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()

    async def wait(self) -> None:
        self.reached.set()
        await self.go_on.wait()


class Slow(Linear):
    """A linear target that stops, where `stops` has an entry, and fails, where `failing` has one: after its device is open
    (construct), while it is suspended (presuspend), when it gets ready (preresume) and when it ends (close)."""

    type_name = "slow"
    stops: ClassVar[dict[str, Stop]] = {}
    failing: ClassVar[set[str]] = set()
    closed: ClassVar[int] = 0

    @classmethod
    async def construct(cls, spec: Spec, args: Args) -> Self:
        made = await super().construct(spec, args)
        await cls._at("construct")
        return made

    @classmethod
    async def _at(cls, place: str) -> None:
        if place in cls.stops:
            await cls.stops[place].wait()
        if place in cls.failing:
            raise IoFailed(f"{place} fails")

    async def presuspend(self, noflush: bool) -> None:
        await self._at("presuspend")

    async def preresume(self) -> None:
        await self._at("preresume")

    async def close(self) -> None:
        await self._at("close")
        type(self).closed += 1


def types(slow: type[Slow]) -> Mapping[str, type[Target]]:
    """All target types and a slow one."""
    return {**TARGETS, "slow": slow}


def fresh() -> type[Slow]:
    """A slow type of a test's own."""
    return type("Fresh", (Slow,), {"stops": {}, "failing": set(), "closed": 0})


SLOW_LINE: Final = "0 8 slow {} 0"

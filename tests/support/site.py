"""A mapper, its exports and configurations for them, in this process; and a client that counts what it reads."""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import pytest

from nbdmap.block.remote import RemoteDisk
from nbdmap.control.apply import Applied
from nbdmap.control.config import BadConfig, parse
from nbdmap.control.events import Events
from nbdmap.control.exports import Exports
from nbdmap.control.mapper import Mapper
from nbdmap.dm.args import Args
from nbdmap.errors import InvalidArgument, NbdmapError
from nbdmap.targets import TARGETS
from nbdmap.targets.zero import Zero
from nbdmap.units import SECTOR
from tests.support.disks import read

DISKS: Final = "disks:\n  d0: {memory: 1M}\n  d1: {memory: 1M}\n"


class Pool(Zero):
    """Takes messages as a pool does: each name once, and some not at all."""

    type_name = "pool"

    async def message(self, args: Args) -> str:
        word = args.word("message")
        if word == "bad":
            raise InvalidArgument("bad is refused")
        if word == "old":
            error = NbdmapError("old is there already")
            error.errno = errno.EEXIST
            raise error
        self.heard = [*getattr(self, "heard", []), word]
        return ""


TYPES: Final = {**TARGETS, "pool": Pool}


class Site:
    """A mapper with its exports, and configurations for it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mapper = Mapper(TYPES, Events(lambda: 0.0))
        self.exports = Exports(self.mapper)
        self.applied = Applied(self.mapper, self.exports)

    def config(self, text: str) -> Any:
        return parse(text.encode(), str(self.directory / "c.yaml"), TYPES)

    async def start(self, text: str) -> None:
        await self.applied.start(self.config(text))

    async def fail(self, text: str) -> list[str]:
        """What a start complains about, without the path of the file."""
        with pytest.raises(BadConfig) as caught:
            await self.start(text)
        return [line.removeprefix(f"{self.directory}/") for line in caught.value.problems]

    async def reload(self, text: str) -> list[str]:
        problems = await self.applied.reload(self.config(text))
        return [line.removeprefix(f"{self.directory}/") for line in problems]

    def table(self, name: str) -> list[str]:
        live = self.mapper.find(name).live
        return [f"{line.type_name} {line.params}".strip() for line in live.table_lines()] if live else []

    def exported(self) -> list[str]:
        return [name for name, _ in self.exports.list()]

    def heard(self, name: str) -> list[str]:
        live = self.mapper.find(name).live
        assert live is not None
        heard: list[str] = getattr(live.targets[0], "heard", [])
        return heard


class Client:
    """Reads the first sector of an export over a real connection, again and again, and counts."""

    def __init__(self, disk: RemoteDisk) -> None:
        self.disk = disk
        self.count = 0
        self.seen: dict[bytes, int] = {}
        self._counted = asyncio.Event()
        self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        while True:
            first = (await read(self.disk, 0, SECTOR))[:1]
            self.seen[first] = self.seen.get(first, 0) + 1
            self.count += 1
            self._counted.set()

    async def more(self, number: int = 50) -> None:
        """Waits for that many reads more."""
        wanted = self.count + number
        async with asyncio.timeout(10):
            while self.count < wanted:
                if self._task.done():
                    self._task.result()
                self._counted.clear()
                await self._counted.wait()

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait((self._task,))
        await self.disk.close()


Connect = Callable[[str], Awaitable[Client]]

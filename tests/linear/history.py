"""Histories: what sixteen clients of one export asked and were answered, and the check of each sector's share of them.

Each write puts a stamp (client, number) that is never used again into its sectors, eight bytes many times over. The first and
the last eight bytes of a sector are a register each; all that lies between must be equal where a sector is atomic.
"""

import asyncio
import random
import struct
from dataclasses import dataclass, field
from typing import Final

from nbdmap.nbd.constants import Cmd
from nbdmap.units import SECTOR
from tests.linear.checker import Act, fault
from tests.support.nbd import Client

CLIENTS: Final = 16
DEPTH: Final = 2
"""How many requests a client has under way at most."""
_CELL: Final = struct.Struct("<Q")
_FUA: Final = 1


@dataclass(slots=True)
class History:
    """One history: about `sectors` sectors from `first` on, which held `initial` stamps before."""

    first: int
    initial: list[int]
    atomic: bool
    acts: list[tuple[list[Act], list[Act]]] = field(default_factory=list)
    """For each sector the acts on its first and its last eight bytes."""
    moment: int = 0
    torn: str = ""

    def __post_init__(self) -> None:
        self.acts = [([], []) for _ in self.initial]

    def tick(self) -> int:
        """The next moment."""
        self.moment += 1
        return self.moment

    def wrote(self, sector: int, count: int, value: int, sent: int, answered: int | None) -> None:
        """A write of `value`."""
        for index in range(sector, sector + count):
            for acts in self.acts[index]:
                acts.append(Act(True, value, sent, answered))

    def saw(self, sector: int, data: bytes, sent: int, answered: int) -> None:
        """A read that gave `data`."""
        for index in range(len(data) // SECTOR):
            content = data[index * SECTOR : (index + 1) * SECTOR]
            if self.atomic and content != content[:8] * (SECTOR // 8):
                self.torn = f"sector {self.first + sector + index} was torn: {content[:8].hex()} ... {content[-8:].hex()}"
            for acts, cell in zip(self.acts[sector + index], (content[:8], content[-8:]), strict=True):
                acts.append(Act(False, _CELL.unpack(cell)[0], sent, answered))

    def fault(self) -> str:
        """Why it is not linearizable; "" if it is."""
        for index, registers in enumerate(self.acts):
            for acts in registers:
                if found := fault(acts, self.initial[index]):
                    return f"sector {self.first + index}: {found}"
        return self.torn


class Party:
    """Sixteen connections, used for one history after another."""

    def __init__(self, clients: list[Client], size: int, seed: int, *, atomic: bool) -> None:
        self._clients = clients
        self._rng = random.Random(seed)
        self._sectors = size // SECTOR
        self._atomic = atomic
        self._stamp = 0
        self._cookie = 0

    @classmethod
    async def connect(cls, path: str, seed: int, *, atomic: bool = True) -> "Party":
        """Connects and reads the size."""
        clients = [await (await Client.connect(path)).greet() for _ in range(CLIENTS)]
        sizes = {(await client.go())[0] for client in clients}
        return cls(clients, sizes.pop(), seed, atomic=atomic)

    async def play(self, sectors: int = 4, acts: int = 4) -> History:
        """One history about `sectors` sectors: each client does about `acts` things there."""
        first = self._rng.randrange(self._sectors - sectors)
        history = History(first, await self._now_in(first, sectors), self._atomic)
        seeds = [self._rng.getrandbits(64) for _ in self._clients]
        await asyncio.gather(
            *(self._act(client, history, random.Random(seed), acts) for client, seed in zip(self._clients, seeds, strict=True))
        )
        end = await self._read(self._clients[0], history, 0, sectors)
        assert end is not None
        return history

    async def _now_in(self, first: int, sectors: int) -> list[int]:
        """What stands there; something that was written whole, so it is written first where that is not known."""
        values = []
        for sector in range(first, first + sectors):
            self._stamp += 1
            values.append(self._stamp)
            assert await self._ask(self._clients[0], Cmd.WRITE, sector, 1, _CELL.pack(self._stamp) * (SECTOR // 8)) is not None
        return values

    async def _act(self, client: Client, history: History, rng: random.Random, acts: int) -> None:
        """A client's part: a few requests in flight, answered in any order."""
        under_way: dict[int, tuple[bool, int, int, int, int]] = {}
        for _ in range(acts):
            count = rng.choice((1, 1, 2, len(history.initial)))
            sector = rng.randrange(len(history.initial) - count + 1)
            writes = rng.random() < 0.5
            self._stamp += 1
            self._cookie += 1
            payload = _CELL.pack(self._stamp) * (count * SECTOR // 8) if writes else b""
            sent = history.tick()
            offset = (history.first + sector) * SECTOR
            flags = _FUA if writes and rng.random() < 0.3 else 0
            client.ask(Cmd.WRITE if writes else Cmd.READ, self._cookie, offset, count * SECTOR, flags, payload)
            under_way[self._cookie] = (writes, sector, count, self._stamp, sent)
            if len(under_way) >= DEPTH:
                await self._answer(client, history, under_way)
        while under_way:
            await self._answer(client, history, under_way)

    async def _answer(self, client: Client, history: History, under_way: dict[int, tuple[bool, int, int, int, int]]) -> None:
        error, cookie, _ = await client.simple()
        writes, sector, count, value, sent = under_way.pop(cookie)
        data = b"" if writes or error else await client.reader.readexactly(count * SECTOR)
        answered = history.tick()
        if writes:
            history.wrote(sector, count, value, sent, None if error else answered)
        elif not error:
            history.saw(sector, data, sent, answered)

    async def _read(self, client: Client, history: History, sector: int, count: int) -> bytes | None:
        sent = history.tick()
        data = await self._ask(client, Cmd.READ, history.first + sector, count)
        if data is not None:
            history.saw(sector, data, sent, history.tick())
        return data

    async def _ask(self, client: Client, command: int, sector: int, count: int, payload: bytes = b"") -> bytes | None:
        """One request, alone; None when it fails."""
        self._cookie += 1
        client.ask(command, self._cookie, sector * SECTOR, count * SECTOR, 0, payload)
        error, cookie, data = await client.simple(count * SECTOR if command == Cmd.READ else 0)
        assert cookie == self._cookie
        return None if error else data

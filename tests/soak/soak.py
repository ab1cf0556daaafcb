"""Clients write, zero and flush; the server is killed with SIGKILL at a seeded moment and started again; all is compared.

Each client has a part of a device for itself, and keeps writes that overlap from being in flight together, so that the order
of writes to a sector is known. What must be there is what the journal says, and nothing else.
"""

import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from nbdmap.nbd import constants as nbd
from nbdmap.nbd.constants import Cmd
from tests.hostile.wire import Raw, request
from tests.soak.journal import ANSWERED, DURABLE, FLUSH_SENT, FLUSHED, SECTOR, SENT, Journal, content
from tests.support.server import Server

CONFIG: Final = """
disks:
  a: {file: a.img, size: 4MiB, create: true}
  b: {file: b.img, size: 4MiB, create: true}
  c: {file: c.img, size: 4MiB, create: true}
devices:
  linear: {table: 0 8192 linear a 0}
  striped: {table: 0 16384 striped 2 16 b 0 c 0}
"""
EXPORTS: Final = {"linear": 8192, "striped": 16384}
CLIENTS: Final = 2
"""For each export."""
DEPTH: Final = 16
LONGEST: Final = 32
"""Sectors of one write."""
BASE: Final = 1 << 20
"""Sectors of the journal between two exports."""


@dataclass
class Result:
    """What a soak has done, and what was wrong."""

    kills: int = 0
    writes: int = 0
    flushes: int = 0
    compared: int = 0
    unfinished: int = 0
    """Sectors that showed a write which no flush had covered."""
    lost: list[str] = field(default_factory=list)


class Writer(threading.Thread):
    """One connection. Ends when the server is gone."""

    def __init__(self, number: int, server: Server, journal: Journal, seed: int, result: Result) -> None:
        super().__init__(daemon=True)
        names = list(EXPORTS)
        self.number = number
        self.answered = 0
        self.trouble = ""
        self._base = number % len(names) * BASE
        share = EXPORTS[names[number % len(names)]] // CLIENTS
        self._first = number // len(names) * share
        self._share = share
        self._journal, self._result = journal, result
        self._random = random.Random(seed * 1000 + number)
        self._client = Raw(server.socket).go(names[number % len(names)])

    def run(self) -> None:
        try:
            while True:
                if self._random.random() < 0.3:
                    self._flush()
                else:
                    self._batch()
        except OSError:
            pass  # killed
        except AssertionError as error:  # it has closed, or said what it should not
            self.trouble = str(error) if "has closed" not in str(error) else ""
        finally:
            self._client.socket.close()

    def _batch(self) -> None:
        """Up to DEPTH writes that do not overlap, in one go."""
        numbers, journal = self._random, self._journal
        flying: dict[int, tuple[int, int, int, int]] = {}
        taken: set[int] = set()
        words = []
        for cookie in range(numbers.randint(1, DEPTH)):
            count = numbers.randint(1, LONGEST)
            first = self._first + numbers.randrange(self._share - count)
            if not taken.isdisjoint(range(first, first + count)):
                continue
            taken.update(range(first, first + count))
            zeroes, fua = numbers.random() < 0.15, int(numbers.random() < 0.1)
            sequence = journal.next(zeroes=zeroes)
            journal.note(SENT, self.number, sequence, self._base + first, count)
            flying[cookie] = sequence, first, count, fua
            payload = b"" if zeroes else b"".join(content(sequence, self._base + n) for n in range(first, first + count))
            command = Cmd.WRITE_ZEROES if zeroes else Cmd.WRITE
            words.append(request(command, cookie, first * SECTOR, count * SECTOR, fua * nbd.CMD_FLAG_FUA, payload))
        self._client.socket.sendall(b"".join(words))
        while flying:
            error, cookie, _ = self._client.simple()
            assert not error, f"a write fails with {error}"
            sequence, first, count, fua = flying.pop(cookie)
            kind = DURABLE if fua else ANSWERED
            journal.note(kind, self.number, sequence, self._base + first, count, sync=bool(fua))
            if fua:
                journal.note(ANSWERED, self.number, sequence, self._base + first, count)
            self.answered += 1
            self._result.writes += 1

    def _flush(self) -> None:
        self._journal.note(FLUSH_SENT, self.number)
        self._client.socket.sendall(request(Cmd.FLUSH, 99))
        error, cookie, _ = self._client.simple()
        assert (error, cookie) == (0, 99), f"a flush fails with {error}"
        self._journal.note(FLUSHED, self.number, sync=True)
        self._result.flushes += 1


def compare(server: Server, journal: Journal, result: Result) -> None:
    """Reads everything and holds it against the journal; then what is there counts as written."""
    allowed, now = journal.replay(), {}
    for number, (name, sectors) in enumerate(EXPORTS.items()):
        base = number * BASE
        with Raw(server.socket) as client:
            client.go(name)
            data = b"".join(client.read(at * SECTOR, 2048 * SECTOR) for at in range(0, sectors, 2048))
        for sector in range(sectors):
            found = data[sector * SECTOR : (sector + 1) * SECTOR]
            may = allowed.get(base + sector, [0])
            result.compared += 1
            seen = next((one for one in reversed(may) if content(one, base + sector) == found), None)
            if seen is None:
                result.lost.append(f"{name}: sector {sector} holds {found[:16].hex()}, may hold {may}")
                continue
            result.unfinished += seen != may[0]
            if seen:
                now[base + sector] = seen
    journal.settle(now)


def soak(server: Server, directory: Path, seed: int, seconds: float = 0, kills: int = 0) -> Result:
    """Kills and compares for so long, or so often. `server` runs, and runs again at the end."""
    numbers, result = random.Random(seed), Result()
    journal = Journal(directory / "journal")
    end = time.monotonic() + seconds
    try:
        while (result.kills < kills if kills else time.monotonic() < end) and not result.lost:
            once(server, journal, numbers, result)
    finally:
        journal.close()
    return result


def once(server: Server, journal: Journal, numbers: random.Random, result: Result) -> None:
    """Load, kill, start, compare."""
    seed, wanted = numbers.randrange(1 << 30), int(numbers.expovariate(1 / 400))
    writers = [Writer(number, server, journal, seed, result) for number in range(CLIENTS * len(EXPORTS))]
    for writer in writers:
        writer.start()
    while sum(writer.answered for writer in writers) < wanted and any(writer.is_alive() for writer in writers):
        threading.Event().wait(0.001)
    server.kill()
    for writer in writers:
        writer.join(20)
        assert not writer.is_alive(), "a client hangs though its server is dead"
        assert not writer.trouble, writer.trouble
    server.start()
    result.kills += 1
    compare(server, journal, result)

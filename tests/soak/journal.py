"""What clients have asked for and been told, in a file: the only witness after a crash.

Every write is noted before it is sent and after it is answered; a flush, and a write with FUA, when it is answered, and then
the file is synced. Replayed, it says of each sector what it must hold: the last write that a flush covered, or any write sent
after that (one that was not answered may be there or not). Sectors stand alone: a write may be there in part.

Each record is 21 bytes: kind, client, sequence number, first sector, sectors. A sector's content follows from the sequence
number. After a comparison the journal begins anew with what was found.
"""

import os
import struct
import threading
from pathlib import Path
from typing import Final

RECORD: Final = struct.Struct(">BIQII")
SENT, ANSWERED, FLUSH_SENT, FLUSHED, DURABLE, SEEN = range(6)
SECTOR: Final = 512
ZEROES: Final = bytes(SECTOR)
_STAMP: Final = struct.Struct(">QQ")


def content(sequence: int, sector: int) -> bytes:
    """What a write puts into a sector; sequence 0, and those of write-zeroes, which are odd, are zeroes."""
    return ZEROES if sequence % 2 or not sequence else _STAMP.pack(sequence, sector) * (SECTOR // _STAMP.size)


class Journal:
    """The file, appended by many threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._lock = threading.Lock()
        self._sequence = 0

    def close(self) -> None:
        os.close(self._file)

    def next(self, *, zeroes: bool) -> int:
        """A new sequence number; odd ones are zeroes."""
        with self._lock:
            self._sequence += 2
            return self._sequence + zeroes

    def note(self, kind: int, client: int, sequence: int = 0, sector: int = 0, sectors: int = 0, *, sync: bool = False) -> None:
        os.write(self._file, RECORD.pack(kind, client, sequence, sector, sectors))
        if sync:
            os.fdatasync(self._file)

    def settle(self, found: dict[int, int]) -> None:
        """Begins anew: each sector shows this."""
        os.ftruncate(self._file, 0)
        os.write(self._file, b"".join(RECORD.pack(SEEN, 0, one, sector, 1) for sector, one in found.items()))
        os.fdatasync(self._file)

    def replay(self) -> dict[int, list[int]]:
        """For each sector that was ever written, the sequence numbers that it may show; the first is the oldest."""
        allowed: dict[int, list[int]] = {}
        answered: dict[int, dict[int, int]] = {}  # by client: sector -> the last answered write
        covered: dict[int, dict[int, int]] = {}  # those that the client's flush under way will cover
        data = self._path.read_bytes()
        for kind, client, sequence, first, count in RECORD.iter_unpack(data):
            sectors = range(first, first + count)
            if kind == SENT:
                for sector in sectors:
                    allowed.setdefault(sector, [0]).append(sequence)
            elif kind == ANSWERED:
                answered.setdefault(client, {}).update(dict.fromkeys(sectors, sequence))
            elif kind == FLUSH_SENT:
                covered[client] = dict(answered.get(client, {}))
            elif kind == FLUSHED:
                for sector, last in covered.pop(client, {}).items():
                    _drop_before(allowed[sector], last)
            elif kind == DURABLE:
                for sector in sectors:
                    _drop_before(allowed[sector], sequence)
            else:  # SEEN after a crash: that is what it is now
                for sector in sectors:
                    allowed[sector] = [sequence]
        return allowed


def _drop_before(sequences: list[int], last: int) -> None:
    if last in sequences:
        del sequences[: sequences.index(last)]

"""A soak of a few kills; and that its judge sees what it should."""

import random
from pathlib import Path

from tests.soak.journal import ANSWERED, DURABLE, FLUSH_SENT, FLUSHED, SECTOR, SEEN, SENT, Journal, content
from tests.soak.soak import CONFIG, Result, compare, once, soak
from tests.support.server import serving


def test_nothing_that_was_flushed_is_lost() -> None:
    with serving(CONFIG) as server:
        result = soak(server, server.directory, seed=1, kills=6)
        assert not result.lost, result.lost[:20]
        assert result.writes > 100
        assert result.flushes > 10


def test_a_lost_sector_is_seen() -> None:
    """One sector that a flush had covered is as it was before it: in each device the judge finds exactly that one."""
    for name in ("a", "b"):
        with serving(CONFIG) as server:
            journal, result = Journal(server.directory / "journal"), Result()
            try:
                once(server, journal, random.Random(4), result)
                assert not result.lost
                image = server.directory / f"{name}.img"
                written = [n for n, stamps in journal.replay().items() if stamps[0] % 2 == 0 and stamps[0]]
                assert written
                server.kill()
                data = bytearray(image.read_bytes())
                at = next(at for at in range(0, len(data), SECTOR) if any(data[at : at + SECTOR]))
                data[at : at + SECTOR] = bytes(SECTOR)
                image.write_bytes(data)
                server.start()
                compare(server, journal, result)
                assert len(result.lost) == 1
            finally:
                journal.close()


def test_what_the_journal_allows(tmp_path: Path) -> None:
    """The rules, one by one."""
    journal = Journal(tmp_path / "j")
    try:
        for sequence in (2, 4, 6):
            journal.note(SENT, 1, sequence, 10, 2)
        assert journal.replay() == {10: [0, 2, 4, 6], 11: [0, 2, 4, 6]}
        journal.note(ANSWERED, 1, 4, 10, 2)
        journal.note(FLUSH_SENT, 1)
        journal.note(ANSWERED, 1, 6, 10, 1)
        assert journal.replay()[10] == [0, 2, 4, 6]
        journal.note(FLUSHED, 1)
        assert journal.replay() == {10: [4, 6], 11: [4, 6]}
        journal.note(FLUSHED, 2)  # another's covers nothing of it here
        journal.note(DURABLE, 1, 6, 11, 1)
        assert journal.replay() == {10: [4, 6], 11: [6]}
        journal.note(SEEN, 0, 4, 10, 1)
        assert journal.replay() == {10: [4], 11: [6]}
        assert content(7, 1) == content(0, 1) == bytes(SECTOR)
        assert content(8, 1) != content(8, 2)
    finally:
        journal.close()

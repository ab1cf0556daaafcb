"""nbdmap.ciphers: the kernel's known answers of dm-reference b.6, each whole, in pieces, in batches, and decrypted again."""

import hashlib
import random
from pathlib import Path
from typing import NamedTuple

import pytest

from nbdmap.ciphers.cipher import SectorCipher
from nbdmap.ciphers.spec import CipherSpec

PLAIN = bytes((7 * i + 13 * (i // 512)) % 256 for i in range(16384))

class Answer(NamedTuple):
    spec: str
    key_size: int
    iv_offset: int
    options: str
    first: str
    second: str
    digest: str

def read_answers() -> list[Answer]:
    found = []
    for line in (Path(__file__).parent / "answers.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        spec, key_size, iv_offset, *rest = line.split("|")
        found.append(Answer(spec, int(key_size), int(iv_offset), *rest))
    return found


ANSWERS = read_answers()
NAMES = ["-".join((answer.spec, str(answer.key_size), str(answer.iv_offset), answer.options)) for answer in ANSWERS]


def cipher(answer: Answer) -> SectorCipher:
    return SectorCipher(
        CipherSpec.parse(answer.spec),
        bytes(i % 256 for i in range(answer.key_size)),
        sector_size=4096 if "sector_size:4096" in answer.options else 512,
        iv_offset=answer.iv_offset,
        large_sectors="iv_large_sectors" in answer.options,
    )

def test_the_plaintext() -> None:
    digest = hashlib.sha256(PLAIN).hexdigest()
    assert digest.startswith("83f04134")
    assert digest.endswith("24f1")

@pytest.mark.parametrize("answer", ANSWERS, ids=NAMES)
def test_known_answer(answer: Answer) -> None:
    crypt, target = cipher(answer), bytearray(len(PLAIN))
    crypt.encrypt(0, PLAIN, target)
    assert target[:16].hex() == answer.first
    assert target[512:528].hex() == answer.second
    assert hashlib.sha256(target).hexdigest()[:16] == answer.digest
    crypt.decrypt(0, target, target)
    assert target == PLAIN

@pytest.mark.parametrize("answer", ANSWERS, ids=NAMES)
def test_pieces_and_batches(answer: Answer) -> None:
    """The same bytes however they are cut, and in whatever order; sources are left as they were."""
    crypt, rng = cipher(answer), random.Random(answer.digest)
    sectors, step = len(PLAIN) // 512, crypt.sector_size // 512
    whole = bytearray(len(PLAIN))
    crypt.encrypt(0, PLAIN, whole)
    for size in (1, 3, 4):
        starts = list(range(0, sectors, size * step))
        rng.shuffle(starts)
        spans = [slice(start * 512, (start + size * step) * 512) for start in starts]
        encrypted, decrypted, source = memoryview(bytearray(len(PLAIN))), memoryview(bytearray(len(PLAIN))), bytes(PLAIN)
        crypt.encrypt_joined(starts, [memoryview(source)[span] for span in spans], encrypted)
        crypt.decrypt_joined(starts, [memoryview(whole)[span] for span in spans], decrypted)
        assert encrypted == b"".join(whole[span] for span in spans)
        assert decrypted == b"".join(PLAIN[span] for span in spans)
        assert source == PLAIN

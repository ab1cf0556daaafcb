"""A fast, seeded mutator: inputs are lists of pieces (a field, a word, a line), which are changed, moved and mixed.

The pieces come from the seeds of each target, so that most inputs get past the first check; a piece is changed in the ways
that break parsers: lengths, borders of integers, lost, doubled and strange bytes. Same seed, same inputs.
"""

import random
from collections.abc import Callable, Sequence
from typing import Final

MAX_PIECES: Final = 64
MAX_INPUT: Final = 1 << 16
BORDERS: Final = sorted({
    0, 1, 2, 3, 7, 8, 511, 512, 513, 4095, 4096, 4097, 65535, 65536, 1 << 20, (1 << 25) - 1, 1 << 25, (1 << 25) + 1,
    (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 32) - 512, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 512, (1 << 64) - 1,
})  # fmt: skip
STRANGE: Final = (
    b"", b"\0", b"\xff", b"\n", b"\\", b" ", b"\t", b"-1", b"+1", b"0x10", b"1e9", b"\xc3\xa9", b"\xed\xa0\x80", b"\xe2\x80\xa8",
    b"%s", b"'", b'"', b"{", b"}", b"[", b"]", b":", b"#", b"&", b"*", b"!", b"|", b"\xf0\x9f\x98\x80", b"\x85", b"\xef\xbb\xbf",
    b"9" * 19, b"9" * 30, b"18446744073709551615", b"18446744073709551616", b"A" * 300,
)  # fmt: skip

Pieces = list[bytes]


class Mutator:
    """Makes inputs of the `seeds` of a target; `words` are what its language has. `keep` adds a seed while it runs."""

    def __init__(self, seeds: Sequence[Pieces], words: Sequence[bytes], seed: int) -> None:
        self.pool = [list(one) for one in seeds]
        self._words = [*words, *STRANGE]
        self._random = random.Random(seed).random
        self._ways: list[Callable[[Pieces], None]] = [
            self._flip, self._border, self._number, self._word, self._drop, self._double, self._swap, self._cut, self._mix,
            self._insert,
        ]  # fmt: skip

    def below(self, limit: int) -> int:
        return int(self._random() * limit)

    def next(self) -> Pieces:
        """An input; about one in 30 is a seed as it is."""
        pieces = list(self.pool[self.below(len(self.pool))])
        for _ in range(self.below(5) if self._random() < 0.9 else 30):
            self._ways[self.below(len(self._ways))](pieces)
        del pieces[MAX_PIECES:]
        return pieces

    def keep(self, pieces: Pieces) -> None:
        """Remembers an input that did something new; of many, a random one goes."""
        if sum(map(len, pieces)) <= 4096:
            if len(self.pool) < 2000:
                self.pool.append(pieces)
            else:
                self.pool[self.below(2000)] = pieces

    # --- ways ----------------------------------------------------------------------------------------------------------

    def _at(self, pieces: Pieces) -> int:
        return self.below(len(pieces))

    def _flip(self, pieces: Pieces) -> None:
        if pieces and (piece := pieces[at := self._at(pieces)]):
            place = self.below(len(piece))
            pieces[at] = piece[:place] + bytes([piece[place] ^ (1 << self.below(8))]) + piece[place + 1 :]

    def _border(self, pieces: Pieces) -> None:
        """A binary integer of 1, 2, 4 or 8 bytes somewhere in a piece."""
        if pieces and (piece := pieces[at := self._at(pieces)]):
            size = 1 << self.below(4)
            place = self.below(max(1, len(piece) - size + 1))
            number = (BORDERS[self.below(len(BORDERS))] + self.below(3) - 1) % (1 << 8 * size)
            pieces[at] = piece[:place] + number.to_bytes(size, "big") + piece[place + size :]

    def _number(self, pieces: Pieces) -> None:
        """A decimal number in the place of a piece."""
        if pieces:
            pieces[self._at(pieces)] = str(BORDERS[self.below(len(BORDERS))] + self.below(3) - 1).encode()

    def _word(self, pieces: Pieces) -> None:
        if pieces:
            pieces[self._at(pieces)] = self._words[self.below(len(self._words))]

    def _insert(self, pieces: Pieces) -> None:
        pieces.insert(self.below(len(pieces) + 1), self._words[self.below(len(self._words))])

    def _drop(self, pieces: Pieces) -> None:
        if pieces:
            del pieces[self._at(pieces)]

    def _double(self, pieces: Pieces) -> None:
        if pieces:
            at = self._at(pieces)
            pieces[at:at] = pieces[at : at + 1 + self.below(4)]

    def _swap(self, pieces: Pieces) -> None:
        if pieces:
            one, two = self._at(pieces), self._at(pieces)
            pieces[one], pieces[two] = pieces[two], pieces[one]

    def _cut(self, pieces: Pieces) -> None:
        if pieces:
            at = self._at(pieces)
            pieces[at] = pieces[at][: self.below(len(pieces[at]) + 1)]
            if self._random() < 0.3:
                del pieces[at + 1 :]

    def _mix(self, pieces: Pieces) -> None:
        """The end of another input."""
        other = self.pool[self.below(len(self.pool))]
        pieces[self.below(len(pieces) + 1) :] = other[self.below(len(other) + 1) :]

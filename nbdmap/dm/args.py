"""Words of a table line or message, read one after another with the kernel's rules.

Words are split at white space; a backslash takes the next character as it is and is dropped itself; there are no other
quotes. A number is unsigned decimal digits and nothing else (`0x10`, `+1` and `8k` are refused). An optional group is a
count of *words* followed by that many words. Every complaint names the argument and the word.
"""

from collections.abc import Sequence
from typing import Final

from nbdmap.errors import InvalidArgument
from nbdmap.units import MAX_SIZE, SECTOR

_SPACE: Final = frozenset(" \t\n\v\f\r")
MAX_SHOWN: Final = 30
MAX_NUMBER: Final = (1 << 64) - 1


def split_words(text: str) -> list[str]:
    """The words of `text`.

    >>> split_words(r"7:0 /srv/my\\ disk.img  0")
    ['7:0', '/srv/my disk.img', '0']
    """
    words: list[str] = []
    word: list[str] | None = None
    characters = iter(text)
    for character in characters:
        if character in _SPACE:
            if word is not None:
                words.append("".join(word))
                word = None
            continue
        if character == "\\":
            character = next(characters, "\\")
        if word is None:
            word = []
        word.append(character)
    if word is not None:
        words.append("".join(word))
    return words


def shown(word: str) -> str:
    """A word for an error's text; one so long that it may be a key is only told of."""
    return repr(word) if len(word) <= MAX_SHOWN else f"a word of {len(word)} characters"


def parse_number(word: str, what: str, low: int = 0, high: int = MAX_NUMBER) -> int:
    """The value of a decimal word. Raises InvalidArgument naming `what` when it is no number or outside low..high."""
    if not (word.isascii() and word.isdigit()):
        raise InvalidArgument(f"{what}: {shown(word)} is not a decimal number")
    if len(word) > 20 or not low <= (value := int(word)) <= high:
        raise InvalidArgument(f"{what}: {word} is not in the range {low} to {high}")
    return value


class Args:
    """The words that are still to be read."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self._next = 0

    def __len__(self) -> int:
        return len(self._words) - self._next

    def word(self, what: str) -> str:
        """The next word; `what` names it when it is missing."""
        if self._next == len(self._words):
            raise InvalidArgument(f"{what} is missing")
        self._next += 1
        return self._words[self._next - 1]

    def number(self, what: str, low: int = 0, high: int = MAX_NUMBER) -> int:
        """The next word as a number in low..high."""
        return parse_number(self.word(what), what, low, high)

    def start(self, what: str = "start sector") -> int:
        """The next word, a number of sectors, in bytes."""
        return self.number(what, 0, MAX_SIZE // SECTOR) * SECTOR

    def group(self, what: str, most: int) -> "Args":
        """An optional group at the end: a count and that many words; empty when nothing is left."""
        if not self:
            return Args(())
        count = self.number(f"number of {what}", 0, most)
        if count > len(self):
            raise InvalidArgument(f"number of {what}: {count} announced, {len(self)} given")
        return Args([self.word(what) for _ in range(count)])

    def end(self) -> None:
        """Checks that every word was read."""
        if self:
            raise InvalidArgument(f"unexpected word {shown(self._words[self._next])}")

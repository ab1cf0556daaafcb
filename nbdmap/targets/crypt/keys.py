"""Where the keys of crypt tables come from, and the process's keyring.

A key in a table is hexadecimal; `-`, for a cipher without one; or `:<bytes>:<type>:<description>`, a key of the keyring: then it
stands in no table. The keyring is this process's own, one as the kernel's is: the configuration's `keyring:` section says in
which file the key of a type (user or logon) and description is, and the file is read when a table is loaded.

No message of an error says more of a key than its length, wherever in a line it stands.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from nbdmap.errors import InvalidArgument, NoKey, from_os_error

MAX_KEY: Final = 4096
"""Bytes of the longest key: 64 keys of 32 bytes and a seed need 2080."""
TYPES: Final = ("user", "logon")
_OTHER_TYPES: Final = ("encrypted", "trusted")
_LIKE_A_KEY: Final = re.compile(r"(?<![\w/-])[0-9a-fA-F]{16,}(?![\w-])")


class Keyring:
    """The files that keys are in, by "type:description", and keys that are held while a table is loaded."""

    def __init__(self) -> None:
        self._files: Mapping[str, str] = {}
        self._held: dict[str, list[bytearray]] = {}

    @contextmanager
    def holding(self, name: str, key: bytearray) -> Iterator[None]:
        """Inside the block `key` is in the keyring as "type:description", whatever the files say; the caller wipes it."""
        self._held.setdefault(name, []).append(key)
        try:
            yield
        finally:
            left = [one for one in self._held.pop(name) if one is not key]
            if left:
                self._held[name] = left

    def replace(self, files: Mapping[str, str]) -> None:
        """From now on these. Tables that are loaded keep the keys they have."""
        self._files = dict(files)

    def read(self, name: str, size: int) -> bytearray:
        """The key of "type:description". Raises NoKey (ENOKEY), IoFailed, or InvalidArgument when it has not `size` bytes."""
        if held := self._held.get(name):
            if len(held[-1]) != size:
                raise InvalidArgument(f"key {name!r} has {len(held[-1])} bytes, not {size}")
            return held[-1][:]
        path = self._files.get(name)
        if path is None:
            raise NoKey(f"there is no key {name!r} in the keyring section of the configuration")
        key = bytearray(size + 1)
        try:
            with open(path, "rb", buffering=0, opener=_open_at_once) as file:
                read = file.readinto(key) or 0
                length = os.fstat(file.fileno()).st_size
        except OSError as error:
            wipe(key)
            raise from_os_error(error, f"key {name!r}: {path}") from None
        if read != size:
            wipe(key)
            raise InvalidArgument(f"key {name!r}: {path} has {length} bytes, not {size}")
        del key[size:]
        return key


KEYRING: Final = Keyring()


def _open_at_once(path: str, flags: int) -> int:
    """Does not wait for somebody who writes to a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def wipe(key: bytearray) -> None:
    """Overwrites a key with zeroes."""
    key[:] = bytes(len(key))


def without_keys(text: str) -> str:
    """`text`, of a message, with all that may be a key replaced: a word of it in the wrong place would be quoted."""
    return _LIKE_A_KEY.sub(lambda found: f"({len(found[0])} hexadecimal digits)", text)


class KeyWord:
    """The key's word of a table or message, checked. `size` in bytes; `reference` is the word itself if it names a key."""

    def __init__(self, word: str) -> None:
        """Raises InvalidArgument, without the key, when it is none."""
        self.reference = ""
        self._name = ""
        self._hex = ""
        if word.startswith(":"):
            self.size, self._name = _parse_reference(word)
            self.reference = word
        elif word == "-":
            self.size = 0
        else:
            if not word.isascii() or not all(digit in "0123456789abcdefABCDEF" for digit in word):
                raise InvalidArgument("the key is not hexadecimal")
            if len(word) % 2:
                raise InvalidArgument(f"the key has an odd number of hexadecimal digits, {len(word)}")
            self.size = len(word) // 2
            self._hex = word
        if self.size > MAX_KEY:
            raise InvalidArgument(f"a key of {self.size} bytes is longer than {MAX_KEY}")

    def read(self) -> bytearray:
        """The key itself; the caller wipes it."""
        return KEYRING.read(self._name, self.size) if self._name else bytearray.fromhex(self._hex)

    def __repr__(self) -> str:
        return f"KeyWord({self.size} bytes)"


def _parse_reference(word: str) -> tuple[int, str]:
    """The bytes and "type:description" of `:<bytes>:<type>:<description>`."""
    size, _, name = word[1:].partition(":")
    if not (size.isascii() and size.isdigit() and len(size) < 10) or not name.partition(":")[2]:
        raise InvalidArgument(f"key {word!r} is not ':<bytes>:<type>:<description>'")
    return int(size), check_key_name(name)


def check_key_name(name: str) -> str:
    """`name`, if it is "type:description". Raises InvalidArgument."""
    kind, _, description = name.partition(":")
    if not description:
        raise InvalidArgument(f"key {name!r} is not '<type>:<description>'")
    if any(character.isspace() for character in name):
        raise InvalidArgument(f"key {name!r} has a blank in it")
    if kind in _OTHER_TYPES:
        raise InvalidArgument(f"key {name!r}: keys of type {kind} are the kernel's own (possible: {', '.join(TYPES)})")
    if kind not in TYPES:
        raise InvalidArgument(f"key {name!r}: unknown type {kind!r} (possible: {', '.join(TYPES)})")
    return name

"""Where the passphrases of `nbdmap luks` come from: a key file, the terminal, or standard input; as cryptsetup takes them.

A key file is taken to its last byte; so is standard input when the key file is "-". What is typed, without an echo, or stands
on standard input otherwise, ends with the line and has at most MAX_TYPED bytes. All are bytearrays, the caller's to wipe.
"""

import argparse
import os
import sys
import termios
from typing import Final

from nbdmap.cli.errors import CommandFailed
from nbdmap.errors import PassphraseRefused
from nbdmap.luks.keyfile import KeyFile
from nbdmap.luks.keyslot import Unlocked
from nbdmap.luks.secret import wipe, wiping
from nbdmap.luks.volume import Header

MAX_TYPED: Final = 512
TERMINAL: Final = "/dev/tty"
TRIES: Final = 3
"""Of a passphrase that is typed."""


def ask(prompt: str, *, verify: bool = False) -> bytearray:
    """A passphrase from the terminal, or a line of standard input when that is no terminal. Raises CommandFailed."""
    if not sys.stdin.isatty():
        return _line(sys.stdin.fileno())
    typed = _typed(prompt)
    if verify:
        again = _typed("Verify passphrase: ")
        same = again == typed
        wipe(again)
        if not same:
            wipe(typed)
            raise CommandFailed("Passphrases do not match.")
    return typed


def _typed(prompt: str) -> bytearray:
    fd = os.open(TERMINAL, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        before = termios.tcgetattr(fd)
        quiet = [*before]
        quiet[3] &= ~termios.ECHO
        try:
            termios.tcsetattr(fd, termios.TCSAFLUSH, quiet)
            os.write(fd, prompt.encode())
            return _line(fd)
        finally:
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
            os.write(fd, b"\n")
    finally:
        os.close(fd)


def _line(fd: int) -> bytearray:
    """Byte by byte: what follows the line is another's."""
    line = bytearray()
    while (byte := os.read(fd, 1)) and byte != b"\n":
        line += byte
        if len(line) > MAX_TYPED:
            wipe(line)
            raise CommandFailed(f"A passphrase that is typed has at most {MAX_TYPED} bytes.")
    if not line and not byte:
        raise CommandFailed("Nothing to read on input.")
    return line


def confirmed(warning: str) -> bool:
    """Whether the user, if there is a terminal to ask, wants it."""
    if not sys.stdin.isatty():
        return True
    sys.stderr.write(f"\nWARNING!\n========\n{warning}\n\nAre you sure? (Type 'yes' in capital letters): ")
    sys.stderr.flush()
    return sys.stdin.readline() == "YES\n"


# --- what the commands need ------------------------------------------------------------------------------------------------


def key_file(path: str, size: int | None = None, offset: int = 0) -> bytearray:
    """What is in a key file; `-` is standard input."""
    return KeyFile("/dev/stdin" if path == "-" else path, size, offset).read()


def old_key(args: argparse.Namespace, what: str = "passphrase") -> bytearray:
    """What --key-file says, or `what` is asked for."""
    if args.key_file is not None:
        return key_file(args.key_file, args.keyfile_size, args.keyfile_offset)
    return ask(f"Enter {what} for {args.image}: ")


def new_key(path: str | None, size: int | None, offset: int, image: str, kind: str = "") -> bytearray:
    """A passphrase that is to be: a file's, or typed twice."""
    if path is not None:
        return key_file(path, size, offset)
    return ask(f"Enter {kind}passphrase for {image}: ", verify=True)


class Attempts:
    """How often a wrong passphrase may be followed by another: TRIES times in all when they are typed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._left = TRIES if args.key_file is None and sys.stdin.isatty() else 1

    def failed(self, error: PassphraseRefused) -> None:
        """Says so, or raises `error` when it was the last attempt."""
        self._left -= 1
        if not self._left:
            raise error
        print(error.message, file=sys.stderr)


def unlock(args: argparse.Namespace, header: Header, slot: int | None, what: str = "passphrase") -> Unlocked:
    """The volume key by a passphrase. Raises PassphraseRefused."""
    attempts = Attempts(args)
    while True:
        with wiping(old_key(args, what)) as passphrase:
            try:
                return header.unlock(passphrase, slot)
            except PassphraseRefused as error:
                attempts.failed(error)

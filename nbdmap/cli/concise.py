r"""The concise form of `create --concise`: `name,uuid,minor,flags,line[,line...]`, devices separated by semicolons.

    lin,,,rw,0 8 zero;two,UUID-two,7,ro,0 8 zero,8 8 error

Blanks behind the commas between fields and behind a semicolon do not count; a backslash takes the next character as it is.
"""

from collections.abc import Iterator
from typing import NamedTuple

from nbdmap.cli.errors import CommandFailed


class ConciseDevice(NamedTuple):
    """One device to make; `minor` is None for the first free one."""

    name: str
    uuid: str
    minor: int | None
    read_only: bool
    table: str


def parse_concise(text: str) -> Iterator[ConciseDevice]:
    """The devices of `text`, one after another, so that those before a mistake are made. Raises CommandFailed at a mistake."""
    fields = [""]
    characters = iter(text)
    skipping = False
    for character in characters:
        if skipping and character.isspace():
            continue
        skipping = False
        if character == "\\":
            quoted = next(characters, None)
            if quoted is None:
                raise CommandFailed("Backslash must be followed by another character at end of string.")
            fields[-1] += quoted
        elif character == "," and len(fields) < 5:
            fields.append("")
            skipping = True
        elif character == ",":
            fields[-1] += "\n"
        elif character == ";":
            yield _device(fields)
            fields = [""]
            skipping = True
        else:
            fields[-1] += character
    if fields != [""]:
        yield _device(fields)


def _device(fields: list[str]) -> ConciseDevice:
    if len(fields) != 5:
        raise CommandFailed(
            f"Five comma-separated fields are required for each device, {len(fields)} are given: {','.join(fields)[:80]}"
        )
    name, uuid, minor, flags, table = fields
    if flags not in ("", "rw", "ro"):
        raise CommandFailed(f"Invalid flags parameter '{flags}' must be 'ro' or 'rw' or empty.")
    if minor and not (minor.isascii() and minor.isdigit() and len(minor) < 10):
        raise CommandFailed(f"Invalid minor number '{minor}' of {name}.")
    return ConciseDevice(name, uuid, int(minor) if minor else None, flags == "ro", table)

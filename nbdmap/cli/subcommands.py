"""What the command lines with commands of their own, `nbdmap luks` and `nbdmap thin`, have in common."""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any, Final

FILES: Final = {"bash": "_shtab_compgen_files"}


def add_commands(
    parser: argparse.ArgumentParser, dest: str, commands: Mapping[str, tuple[str, str]]
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Adds `commands`, each with its summary and an example; gives the name and the parser of each, for its arguments."""
    added = parser.add_subparsers(title="commands", metavar="COMMAND", dest=dest, required=True)
    for name, (summary, example) in commands.items():
        one = added.add_parser(
            name, help=summary, description=summary, epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        yield name, one


def takes_file(action: Any) -> None:
    """The shell completes the argument with names of files."""
    action.complete = FILES

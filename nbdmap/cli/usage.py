"""The command line as argparse knows it: for --help, for shell completion, and to read that of `serve`."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, Final

from nbdmap.cli.grammar import OPTIONS, VERBS, Verb
from nbdmap.cli.subcommands import FILES

_ALWAYS: Final = ("socket", "manglename", "help")
_BY_NAME: Final = {option.long: option for option in OPTIONS}
_WORDS: Final = {
    "DEVICE": "NAME or /dev/mapper/NAME", "NAME": "a device's name", "TABLE_FILE": "a file with the table",
    "EVENT": "the number to wait beyond", "TYPE": "a target type", "WORD": "the words of the message",
    "SECTOR": "where the target is in the device, 0 for the first", "NEW_NAME": "the new name, or with --setuuid the uuid",
    "SUBSYSTEM": "who made the name (default: LVM)",
}  # fmt: skip
DEVICES: Final = {"bash": "_nbdmap_devices"}
TYPES: Final = {"bash": "_nbdmap_types"}
PREAMBLE: Final = """\
_nbdmap_devices() {
  compgen -W "$(nbdmap info -c --noheadings -o name 2>/dev/null)" -- "$1"
}
_nbdmap_types() {
  compgen -W "$(nbdmap targets 2>/dev/null | cut -d ' ' -f 1)" -- "$1"
}
"""


def build_parser() -> argparse.ArgumentParser:
    """nbdmap's parser with a sub-parser for each verb."""
    parser = argparse.ArgumentParser(
        "nbdmap",
        description="Linux's device mapper in user space, served over NBD. Commands and output are those of dmsetup.",
        epilog="example:\n  nbdmap serve & nbdmap ls --tree",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    _add_options(parser, ("help", "version", "socket"))
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    add_serve(commands.add_parser("serve", help="Run the server.", description="Run the server in the foreground."))
    add_luks(commands.add_parser("luks", help="LUKS disks: info, open, format, add-key, remove-key."))
    add_thin(commands.add_parser("thin", help="Metadata of thin pools: check, dump, restore, ls, delta, rmap."))
    for name, verb in VERBS.items():
        one = commands.add_parser(
            name,
            help=verb.summary,
            usage=f"nbdmap {name} [OPTION...] {verb.arguments}".rstrip(),
            description=verb.summary,
            epilog=f"example:\n  {verb.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
        )
        _add_options(one, (*verb.options, *_ALWAYS))
        _add_words(one, name, verb)
    return parser


def _add_options(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    for name in sorted(set(names)):
        option = _BY_NAME[name]
        flags = [*(f"-{letter}" for letter in option.short), f"--{name}"]
        if not option.value:
            parser.add_argument(*flags, action="store_true", help=option.help)
            continue
        added: Any = parser.add_argument(*flags, metavar=option.value, help=option.help)
        if name == "target":
            added.complete = TYPES
        elif name == "socket":
            added.complete = FILES


def _add_words(parser: argparse.ArgumentParser, name: str, verb: Verb) -> None:
    """One argument for each word of the verb's usage."""
    for word in verb.arguments.split():
        plain = word.strip("[].")
        if name == "completion":
            parser.add_argument("shell", choices=["bash"], help="the shell")
            continue
        many = {"nargs": "*"} if "..." in word else {"nargs": "?"} if word.startswith("[") else {}
        added: Any = parser.add_argument(plain.lower(), metavar=plain, help=_WORDS.get(plain, ""), **many)  # type: ignore[arg-type]
        if plain == "DEVICE":
            added.complete = DEVICES
        elif plain == "TYPE":
            added.complete = TYPES
        elif plain == "TABLE_FILE":
            added.complete = FILES


def add_serve(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds what `serve` takes."""
    from nbdmap.cli.serve import add_arguments

    add_arguments(parser)
    if parser.epilog is None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = "example:\n  nbdmap serve --device lin='0 2048 linear /srv/disk.img 0'"
    return parser


def add_luks(parser: argparse.ArgumentParser) -> None:
    """Adds what `luks` takes."""
    from nbdmap.cli.luks_arguments import add_arguments

    add_arguments(parser)


def add_thin(parser: argparse.ArgumentParser) -> None:
    """Adds what `thin` takes."""
    from nbdmap.cli.thin_arguments import add_arguments

    add_arguments(parser)


def help_text(verb: str = "") -> str:
    """The help of a verb, or of all."""
    parser = build_parser()
    if not verb:
        return parser.format_help()
    commands = next(one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    chosen: argparse.ArgumentParser = commands.choices.get(verb, parser)
    return chosen.format_help()


def serve(arguments: Sequence[str]) -> int:
    """`nbdmap serve ARGUMENTS`."""
    from nbdmap.cli.serve import run

    try:
        parsed = add_serve(argparse.ArgumentParser("nbdmap serve")).parse_args(arguments)
    except SystemExit as stop:  # help, or a usage error that argparse has printed
        return stop.code if isinstance(stop.code, int) else 2
    status = run(parsed)
    sys.stdout.flush()
    return status


def bash_completion() -> str:
    """The completion for bash, made by shtab, which is needed only where this is called: see tests/cli/test_completion.py."""
    import shtab

    return str(shtab.complete(build_parser(), shell="bash", preamble=PREAMBLE))

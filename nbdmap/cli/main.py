"""The command `nbdmap`: finds the verb and runs it.

    nbdmap create lin --table '0 2048 linear /srv/disk.img 0' && nbdmap ls

Exit status: 0; 1 for a command that was refused, with one line on standard error; 2 for a command line that cannot be; that
of `serve`; 130 when it is interrupted.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import nbdmap
from nbdmap.cli import changing, reading
from nbdmap.cli.errors import CommandFailed, UsageError
from nbdmap.cli.grammar import Command, Verb, check_words, parse
from nbdmap.cli.rpc_client import Connection, Server
from nbdmap.cli.session import Session, Surroundings
from nbdmap.control.admin_path import admin_path

INTERRUPTED: Final = 130

Whole = Callable[[Session, Sequence[str]], None]
Each = Callable[[Session, str | None], None]

WHOLE: Final[Mapping[str, Whole]] = {
    "create": changing.create, "remove_all": changing.remove_all, "load": changing.load, "reload": changing.load,
    "rename": changing.rename, "message": changing.message, "setgeometry": changing.setgeometry, "wait": changing.wait,
    "export": changing.export, "mknodes": changing.nothing, "udevcomplete": changing.nothing,
    "udevcomplete_all": changing.nothing, "udevreleasecookie": changing.nothing, "info": reading.info, "ls": reading.ls,
    "targets": reading.targets, "target-version": reading.target_version, "version": reading.version,
    "splitname": reading.splitname, "mangle": reading.mangle, "udevcookies": reading.udevcookies, "events": reading.events,
    "stats": reading.stats, "dump-config": reading.dump_config, "completion": reading.completion, "help": reading.help_verbs,
}  # fmt: skip
"""Verbs that take all their words at once."""
EACH: Final[Mapping[str, Each]] = {
    "remove": changing.remove, "suspend": changing.suspend, "resume": changing.resume, "clear": changing.clear,
    "wipe_table": changing.wipe_table, "unexport": changing.unexport,
}  # fmt: skip
"""Verbs that are done for one word after another."""
NAMED: Final[Mapping[str, Callable[[Session, Sequence[str], bool], None]]] = {
    "table": reading.table, "status": reading.status, "deps": reading.deps, "measure": reading.measure,
}  # fmt: skip
"""Verbs whose lines may have names in front."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "serve":
        from nbdmap.cli.usage import serve

        return serve(arguments[1:])
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        directory = os.getcwd()
    except FileNotFoundError:  # it was removed
        directory = "/"
    try:
        if arguments and arguments[0] == "luks":
            from nbdmap.cli.luks import main as luks

            status = luks(arguments[1:])
        elif arguments and arguments[0] == "thin":
            from nbdmap.cli.thin import main as thin

            status = thin(arguments[1:])
        else:
            status = run(arguments, Connection, Surroundings(sys.stdin, sys.stdout, sys.stderr, os.environ, directory))
        sys.stdout.flush()
    except BrokenPipeError:  # `nbdmap events | head`: who read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return status


def run(arguments: Sequence[str], connect: Callable[[str], Server], around: Surroundings) -> int:
    """Does one command line; `connect` makes a server of the path of its socket. Returns the exit status."""
    try:
        command = parse(arguments)
        if "help" in command.options:
            from nbdmap.cli.usage import help_text

            around.stdout.write(help_text(command.verb))
            return 0
        if "version" in command.options:
            around.stdout.write(f"nbdmap {nbdmap.__version__}\n")
            return 0
        verb = check_words(command)
        server = connect(command.options.get("socket") or admin_path(around.environment))
        try:
            _do(command, verb, Session(server, command.options, around))
        finally:
            server.close()
    except CommandFailed as error:
        around.stdout.flush()
        around.stderr.write(_one_line(error.line) + (" (see `nbdmap --help`)" * isinstance(error, UsageError)) + "\n")
        return error.status
    return 0


def _one_line(text: str) -> str:
    return " ".join(text.split("\n"))


def _do(command: Command, verb: Verb, session: Session) -> None:
    words: Sequence[str] = command.words
    multiple = False
    if "select" in command.options and verb.selects:
        words = reading.select(session, words)
        multiple = True
        if not words:
            return
    if whole := WHOLE.get(command.verb):
        whole(session, words)
    elif named := NAMED.get(command.verb):
        named(session, words, multiple)
    else:
        each: Any = EACH[command.verb]
        chosen: Sequence[str | None] = words or [None]
        for word in chosen:
            each(session, word)

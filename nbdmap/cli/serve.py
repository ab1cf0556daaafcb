"""`nbdmap serve`: its command line. The server itself is in `nbdmap.cli.server`, which is imported when it is needed.

    nbdmap serve c.yaml
    nbdmap serve --device a='0 2048 linear /tmp/disk.img 0' --run 'nbdinfo "$uri"'
"""

import argparse
import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from typing import Final

EXIT_USAGE: Final = 2
_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    config: str | None = None
    content: str | None = None
    """A configuration as text, instead of a file."""
    tables: tuple[tuple[str, str], ...] = ()
    listen: tuple[str, ...] = ()
    read_only: bool = False
    command: str | None = None
    pidfile: str | None = None
    check: bool = False
    admin: str | None = None
    verbose: bool = False
    quiet: bool = False
    log: str = "stderr"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `nbdmap serve`."""
    parser.description = (
        "Serves the devices of CONFIG.yaml, or of --device, over NBD, in the foreground. With neither it serves a demo "
        "made of memory disks. SIGTERM stops it, SIGHUP reads CONFIG.yaml again."
    )
    add = parser.add_argument
    add("config", nargs="?", metavar="CONFIG.yaml", help="the configuration (see docs/configuration.md)")
    add("--device", action="append", default=[], metavar="NAME=TABLE", help="a device; ';' separates the lines of its table")
    add("--listen", action="append", default=[], metavar="URI", help="nbd://HOST:PORT, nbds://, nbd+unix:///?socket=PATH")
    add("-r", "--read-only", action="store_true", help="nothing can be written, whatever the configuration says")
    add("--run", dest="command", metavar="COMMAND", help="serve one shell command, on a private socket: $uri, $unixsocket")
    add("--pidfile", metavar="PATH", help="written when the server is ready")
    add("--check", action="store_true", help="check the configuration and exit")
    add("--admin", metavar="PATH", help="the admin socket")
    add("--exit-with-parent", action="store_true", help="stop when the process that started this one ends")
    add("-v", "--verbose", action="store_true", help="log more")
    add("-q", "--quiet", action="store_true", help="log only what is wrong")
    add("--log", choices=("stderr", "json"), default="stderr", help="lines for people, or one JSON object a line")


def run(args: argparse.Namespace) -> int:
    """Runs the server until it is stopped; the exit status."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
    tables: dict[str, str] = {}
    for word in args.device:
        name, equals, table = word.partition("=")
        if not equals or not name or name in tables:
            return usage(f"--device {word!r}: " + ("given twice" if name in tables else "is not NAME=TABLE"))
        tables[name] = table.replace(";", "\n")
    if args.command is not None and args.listen:
        return usage("--run serves on a private socket and does not go together with --listen")
    if args.verbose and args.quiet:
        return usage("--verbose and --quiet do not go together")
    if args.exit_with_parent and not _end_with_parent():
        return 0
    options = Options(
        config=args.config, tables=tuple(tables.items()), listen=tuple(args.listen), read_only=args.read_only,
        command=args.command, pidfile=args.pidfile, check=args.check,
        admin=os.path.abspath(args.admin) if args.admin else None,
        verbose=args.verbose, quiet=args.quiet, log=args.log,
    )  # fmt: skip
    from nbdmap.cli import server

    return server.main(options)


def usage(text: str) -> int:
    """Says what is wrong with the command line; the exit status."""
    print(f"nbdmap serve: {text}", file=sys.stderr)
    return EXIT_USAGE


def _end_with_parent() -> bool:
    """Asks for SIGTERM when the parent ends; False if it has ended already."""
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    return os.getppid() == parent != 1

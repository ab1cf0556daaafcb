"""`nbdmap luks`: headers of files and block devices, shown, made and changed; and LUKS disks opened.

    nbdmap luks format disk.img && nbdmap luks open disk.img home
    nbdmap luks open disk.img --run 'qemu-img info "$uri"'

`open NAME` asks the running server, which reads the disk itself; the passphrase goes to it through the admin socket. All other
commands need no server. Exit status: 0; 1 for what cannot be; 2 for a wrong passphrase or command line.
"""

import argparse
import base64
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from nbdmap.cli.errors import CommandFailed, UsageError
from nbdmap.cli.luks_arguments import add_arguments
from nbdmap.cli.luks_changing import add_key, make, remove_key
from nbdmap.cli.luks_secrets import Attempts, old_key, unlock
from nbdmap.cli.rpc_client import Connection, Refused
from nbdmap.control.admin_path import admin_path
from nbdmap.errors import InvalidArgument, NbdmapError, PassphraseRefused
from nbdmap.luks import volume
from nbdmap.luks.dump import dump
from nbdmap.luks.image import FileImage
from nbdmap.luks.luks1 import Luks1
from nbdmap.luks.luks2 import Luks2
from nbdmap.luks.secret import wipe, wiping


def main(arguments: Sequence[str]) -> int:
    """`nbdmap luks ARGUMENTS`; the exit status."""
    parser = argparse.ArgumentParser("nbdmap luks")
    add_arguments(parser)
    try:
        args = parser.parse_args(arguments)
    except SystemExit as stop:  # help, or a usage error that argparse has printed
        return stop.code if isinstance(stop.code, int) else 2
    try:
        return COMMANDS[args.luks_command](args)
    except PassphraseRefused as error:
        line, status = error.message, 2
    except NbdmapError as error:
        line, status = error.message, 1
    except CommandFailed as error:
        line, status = error.line, error.status
    sys.stdout.flush()
    print(f"nbdmap luks {args.luks_command}: {line}", file=sys.stderr)
    return status


def info(args: argparse.Namespace) -> int:
    """Prints a header."""
    with FileImage(args.header or args.image) as image:
        header = volume.read(image)
        if args.json:
            if isinstance(header, Luks1):
                raise InvalidArgument(f"{image.name}: a LUKS1 header has no JSON")
            print(json.dumps(header.metadata.root.plain, indent=2))
        else:
            sys.stdout.write(dump(header))
        if isinstance(header, Luks2):
            for problem in header.problems:
                print(f"warning: {problem}", file=sys.stderr)
    return 0


def open_(args: argparse.Namespace) -> int:
    """Opens a disk: on the server, at once, or only to see whether the passphrase is right."""
    if args.test_passphrase:
        with FileImage(args.header or args.image) as image:
            wipe(unlock(args, volume.read(image), args.key_slot).key)
        return 0
    if args.listen or args.run_command is not None:
        return _serve(args)
    if args.name is None:
        raise UsageError("NAME is missing (or --run, or --listen)")
    _ask_server(args)
    return 0


def _ask_server(args: argparse.Namespace) -> None:
    """The verb luks_open of the running server."""
    params: dict[str, Any] = {
        "name": args.name, "disk": args.image, "header": args.header or "", "directory": os.getcwd(),
        "key_slot": args.key_slot, "read_only": args.readonly, "allow_discards": args.allow_discards,
        "export": not args.noexport,
    }  # fmt: skip
    attempts = Attempts(args)
    with Connection(args.socket or admin_path(os.environ)) as server:
        while True:
            with wiping(old_key(args)) as passphrase:
                try:
                    server.call("luks_open", params | {"passphrase": base64.b64encode(passphrase).decode()})
                    return
                except Refused as error:
                    if error.errno != PassphraseRefused.errno:
                        raise CommandFailed(error.message) from None
                    attempts.failed(PassphraseRefused(error.message))


def _serve(args: argparse.Namespace) -> int:
    """Serves the one device. The volume key goes to the server in a file that is in memory and has no name."""
    from nbdmap.cli import serve, server

    if args.listen and args.run_command is not None:
        raise UsageError("--run serves on a private socket and does not go together with --listen")
    with FileImage(args.header or args.image) as image:
        unlocked = unlock(args, volume.read(image), args.key_slot)
    key_fd = os.memfd_create("nbdmap luks")
    with wiping(unlocked.key) as key:
        os.write(key_fd, key)
    entry: dict[str, Any] = {"disk": os.path.abspath(args.image), "volume_key_file": f"/proc/self/fd/{key_fd}"}
    if args.header:
        entry["header"] = os.path.abspath(args.header)
    if args.allow_discards:
        entry["allow_discards"] = True
    content = {"devices": {args.name or "luks": {"luks": entry, "read_only": args.readonly, "export": not args.noexport}}}
    return server.main(serve.Options(content=json.dumps(content), listen=tuple(args.listen), command=args.run_command))


COMMANDS: Final[Mapping[str, Callable[[argparse.Namespace], int]]] = {
    "info": info, "open": open_, "format": make, "add-key": add_key, "remove-key": remove_key,
}  # fmt: skip

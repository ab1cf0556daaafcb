"""The command line of `nbdmap thin`: its commands; options are called as thin-provisioning-tools call them."""

import argparse
from typing import Final

from nbdmap.cli.subcommands import add_commands, takes_file

_COMMANDS: Final = {
    "check": ("Look for what is wrong with metadata.", "nbdmap thin check meta.img"),
    "dump": ("Write metadata as XML.", "nbdmap thin dump meta.img > pool.xml"),
    "restore": ("Make metadata of XML.", "nbdmap thin restore -i pool.xml -o new.img"),
    "ls": ("List volumes.", "nbdmap thin ls meta.img"),
    "delta": ("Show what two volumes have in common.", "nbdmap thin delta --thin1 0 --thin2 3 meta.img"),
    "rmap": ("Show which volumes have which data blocks.", "nbdmap thin rmap --region 0..64 meta.img"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `nbdmap thin`."""
    parser.description = "Metadata of thin pools: what thin-provisioning-tools do. It must not be in use, but with -m."
    for name, one in add_commands(parser, "thin_command", _COMMANDS):
        add = one.add_argument
        if name == "restore":
            takes_file(add("-i", "--input", metavar="FILE", required=True, help="XML, as dump writes it"))
            takes_file(add("-o", "--output", metavar="FILE", required=True, help="the file or device to write"))
            continue
        takes_file(add("metadata", metavar="METADATA", help="a file or block device"))
        if name in ("dump", "ls", "delta"):
            add("-m", "--metadata-snap", action="store_true", help="the metadata snapshot of a live pool")
        if name == "delta":
            add("--thin1", "--snap1", type=int, metavar="N", required=True, help="a volume")
            add("--thin2", "--snap2", type=int, metavar="N", required=True, help="the other")
        if name == "ls":
            add("--no-headers", action="store_true", help="without the names of the columns")
            add("-o", "--format", metavar="COLUMNS", default="DEV,MAPPED,CREATE_TIME,SNAP_TIME", help="default: %(default)s")
        if name == "rmap":
            add("--region", metavar="FIRST..END", action="append", default=[], help="data blocks; all, without one")

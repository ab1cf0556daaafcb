"""The command line of `nbdmap luks`: its five commands; options are called as cryptsetup calls them."""

import argparse
from typing import Final

from nbdmap.cli.subcommands import add_commands, takes_file
from nbdmap.luks import defaults

_COMMANDS: Final = {
    "info": ("Show a header, as cryptsetup luksDump does.", "nbdmap luks info disk.img"),
    "open": (
        "Make the decrypted device NAME on the server; or serve it at once with --run or --listen.",
        "nbdmap luks open disk.img home --key-file home.key",
    ),
    "format": ("Make a LUKS disk of a file or block device.", "nbdmap luks format disk.img --key-file home.key"),
    "add-key": ("Add a passphrase; an old one is needed.", "nbdmap luks add-key disk.img new.key --key-file home.key"),
    "remove-key": ("Remove a passphrase, or the key slot that is named.", "nbdmap luks remove-key disk.img new.key"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `nbdmap luks`."""
    parser.description = "LUKS 1 and 2: disks that cryptsetup and qemu open, and the other way round."
    for name, one in add_commands(parser, "luks_command", _COMMANDS):
        add = one.add_argument
        takes_file(add("image", metavar="IMAGE", help="a file or block device" + _or_disk(name)))
        takes_file(add("--header", metavar="FILE", help="where the header is, if it is not on IMAGE" + _or_disk(name)))
        {"info": _info, "open": _open, "format": _format, "add-key": _add_key, "remove-key": _remove_key}[name](one)


def _or_disk(command: str) -> str:
    return ", or a disk or device of the server" if command == "open" else ""


def _info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the JSON of a LUKS2 header")


def _open(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="what the device is to be called")
    _key(parser)
    add("-S", "--key-slot", type=int, metavar="N", help="try this key slot only")
    add("-r", "--readonly", action="store_true", help="read-only")
    add("--allow-discards", action="store_true", help="discards reach the disk: who sees it learns what is free")
    add("--test-passphrase", action="store_true", help="only say whether the passphrase is right")
    add("--noexport", action="store_true", help="do not export the new device")
    add("--socket", metavar="PATH", help="the server's admin socket (default: $NBDMAP_SOCKET)")
    add("--listen", action="append", default=[], metavar="URI", help="serve at once, without another server, on this address")
    add("--run", dest="run_command", metavar="COMMAND", help="serve at once, one shell command, as nbdmap serve --run")


def _format(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-M", "--type", choices=("luks1", "luks2", "luks"), default="luks2", help="the version (luks2)")
    add("-c", "--cipher", default=defaults.CIPHER, metavar="SPEC", help=f"the cipher ({defaults.CIPHER})")
    add("-s", "--key-size", type=int, metavar="BITS", help="of the volume key (256; with xts 512)")
    add("--sector-size", type=int, choices=(512, 1024, 2048, 4096), help="of the encryption, LUKS2 only (4096 where it fits)")
    add("--uuid", help="the disk's uuid (a random one)")
    add("--label", default="", help="a label, LUKS2 only")
    add("--subsystem", default="", help="a subsystem, LUKS2 only")
    add("-o", "--offset", type=int, metavar="SECTORS", help="where the data begins, in sectors of 512 bytes")
    add("--luks2-metadata-size", type=int, default=defaults.HEADER_SIZE, metavar="BYTES",
        help=f"of one copy of the header ({defaults.HEADER_SIZE})")
    add("--luks2-keyslots-size", type=int, metavar="BYTES", help="of all key slots (what is left before the data)")
    add("--keyslot-cipher", default="", metavar="SPEC", help="of the key slot's area, LUKS2 only (as the data)")
    add("--keyslot-key-size", type=int, default=0, metavar="BITS", help="of the key slot's area, LUKS2 only (as the data)")
    add("-S", "--key-slot", type=int, metavar="N", help="the key slot (0)")
    add("--volume-key-file", metavar="FILE", help="the volume key (a random one)")
    _key(parser)
    _cost(parser)
    add("-q", "--batch-mode", action="store_true", help="do not ask for confirmation")


def _add_key(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    takes_file(add("new_key_file", nargs="?", metavar="NEW_KEY_FILE", help="the new passphrase"))
    add("--new-keyfile-size", type=int, metavar="BYTES", help="how much of it")
    add("--new-keyfile-offset", type=int, default=0, metavar="BYTES", help="from where on (0)")
    add("--volume-key-file", metavar="FILE", help="the volume key, instead of an old passphrase")
    add("-S", "--key-slot", type=int, metavar="N", help="the new key slot (the first that is free)")
    _key(parser)
    _cost(parser)


def _remove_key(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    takes_file(add("old_key_file", nargs="?", metavar="KEY_FILE", help="the passphrase to remove"))
    add("-S", "--key-slot", type=int, metavar="N", help="remove this key slot; another passphrase is needed, unless with -q")
    _key(parser)
    add("-q", "--batch-mode", action="store_true", help="do not ask for confirmation")


def _key(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    takes_file(add("-d", "--key-file", metavar="FILE", help="the passphrase is this file, '-' is standard input (the terminal)"))
    add("-l", "--keyfile-size", type=int, metavar="BYTES", help="how much of it (all)")
    add("--keyfile-offset", type=int, default=0, metavar="BYTES", help="from where on (0)")


def _cost(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--hash", default="sha256", help="of PBKDF2, digests and splitter (sha256)")
    add("--pbkdf", choices=defaults.KDFS, help="the key derivation of the key slot (argon2id; LUKS1 has pbkdf2 only)")
    add("-i", "--iter-time", type=int, default=defaults.TIME_MS, metavar="MS", help=f"how long it takes ({defaults.TIME_MS})")
    add("--pbkdf-memory", type=int, metavar="KIB", help="how much memory it is to take (1 GiB, at most half of the machine's)")
    add("--pbkdf-parallel", type=int, metavar="THREADS", help="how many threads (one for each processor, at most 4)")
    add("--pbkdf-force-iterations", type=int, metavar="N", help="exactly so many iterations instead")

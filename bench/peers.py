"""Targets beside what does the same in other servers: crypt, thin, delay."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench.clients import lean
from bench.sample import Sample, Work
from bench.servers import EXPORT, Contestant, Place, Server, serving
from bench.site import PASSPHRASE, Backing
from nbdmap.units import KIB, MIB, SECTOR

DELAY_MS: Final = 2
MOST_SECONDS: Final = 60.0
"""First writes end by themselves."""


def _nbdmap(disks: str, devices: str) -> Callable[[Place], list[str]]:
    """A command made of the disks and devices of a configuration, in which {file} and kin are filled in."""

    def command(place: Place) -> list[str]:
        sectors = place.site.size_of(place.backing) // SECTOR
        state = _state(place, "nbdmap")
        snapshot = ", create_snap 1 0" if place.backing is Backing.SNAPSHOT else ""
        values = {
            "file": place.file, "sectors": sectors, "export": EXPORT, "key": _key_file(place), "state": state,
            "meta": 64 * MIB, "data": sectors * SECTOR * 2, "pool": sectors * 2, "snapshot": snapshot, "ms": DELAY_MS,
        }  # fmt: skip
        config = place.site.unique("nbdmap.yaml")
        config.write_text(
            f"listen: ['nbd+unix:///?socket={place.socket}']\nadmin: {place.admin}\n"
            f"disks:\n{disks.format_map(values)}devices:\n{devices.format_map(values)}"
        )
        return [sys.executable, "-m", "nbdmap", "serve", "-q", str(config)]

    return command


def _key_file(place: Place) -> Path:
    path = place.site.directory / "key"
    path.write_text(PASSPHRASE)
    return path


def _state(place: Place, program: str) -> Path:
    """Where a server keeps what THIN writes and SNAPSHOT finds; new for THIN."""
    path = place.site.directory / f"thin-{program}"
    if place.backing is Backing.THIN:
        shutil.rmtree(path, ignore_errors=True)
    path.mkdir(exist_ok=True)
    return path


def data_file(place: Place, program: str) -> Path:
    """Where the bytes are that a server serves from a file of its own, or from one that is everybody's."""
    if place.backing is not Backing.THIN:
        return place.site.file(place.backing)
    return place.site.directory / f"thin-{program}" / ("data" if program == "nbdmap" else "disk.qcow2")


def _nbdkit_luks(place: Place) -> list[str]:
    what = ["file", place.file, f"passphrase={PASSPHRASE}"]
    return ["nbdkit", "-f", "-e", EXPORT, "-U", str(place.socket), "--filter=luks", *what]


def _nbdkit_delay(place: Place) -> list[str]:
    what = ["file", place.file, f"rdelay={DELAY_MS}ms"]
    return ["nbdkit", "-f", "-e", EXPORT, "-U", str(place.socket), "--filter=delay", *what]


def _qemu(*arguments: str) -> list[str]:
    return ["qemu-nbd", "--cache=writeback", "-t", "-e", "16", "-x", EXPORT, *arguments]


def _qemu_luks(place: Place) -> list[str]:
    image = f"driver=luks,key-secret=key,file.driver=file,file.filename={place.file}"
    secret = f"secret,id=key,data={PASSPHRASE}"
    return _qemu("-k", str(place.socket), "--object", secret, "--image-opts", image)


def _qcow2(place: Place) -> list[str]:
    image = str(_state(place, "qemu-nbd") / "disk.qcow2")
    if place.backing is Backing.THIN:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(place.site.size_of(place.backing))], check=True)
    else:
        subprocess.run(["qemu-img", "snapshot", "-c", "before", image], check=True)
    return _qemu("-k", str(place.socket), "-f", "qcow2", image)


_LUKS = _nbdmap("  back: {{file: {file}}}\n", "  {export}: {{luks: {{disk: back, key_file: {key}}}}}\n")
_THIN = _nbdmap(
    "  meta: {{file: {state}/meta, size: {meta}, create: true}}\n  data: {{file: {state}/data, size: {data}, create: true}}\n",
    "  pool: {{table: 0 {pool} thin-pool meta data 128 0, messages: [create_thin 0{snapshot}], export: false}}\n"
    "  {export}: {{table: 0 {sectors} thin pool 0}}\n",
)
_DELAY = _nbdmap("  back: {{file: {file}}}\n", "  {export}: {{table: 0 {sectors} delay back 0 {ms}}}\n")

LUKS: Final = (
    Contestant("nbdmap, luks", "nbdmap", command=_LUKS),
    Contestant("nbdkit, luks filter", "nbdkit", command=_nbdkit_luks),
    Contestant("qemu-nbd, luks", "qemu-nbd", command=_qemu_luks),
)
THIN: Final = (
    Contestant("nbdmap, thin", "nbdmap", Backing.THIN, _THIN),
    Contestant("qemu-nbd, qcow2", "qemu-nbd", Backing.THIN, _qcow2),
)
DELAY: Final = (
    Contestant("nbdmap, delay", "nbdmap", Backing.DELAY, _DELAY),
    Contestant("nbdkit, delay filter", "nbdkit", Backing.DELAY, _nbdkit_delay),
)


def first_writes(*, snapshot: bool) -> Work:
    """How many clusters a second get their first 4 KiB, on a volume that is new or, with `snapshot`, shared in full."""

    def run(server: Server, seconds: float) -> Sample:
        place = server.place
        fresh = Contestant(server.contestant.name, server.contestant.program, command=server.contestant.command)
        for backing in (Backing.THIN, Backing.SNAPSHOT)[: 1 + snapshot]:
            with serving(place.site, fresh, place.transport, backing) as one:
                before = one.process.cpu_seconds()
                rate, done = lean(one, "first", 4 * KIB, 32, MOST_SECONDS)
                used = one.process.cpu_seconds() - before
        return Sample(rate, used, done)

    return run

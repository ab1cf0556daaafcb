"""The same work on the same pools in Debian's kernel and in nbdmap, and then each goes on with what the other has left.

There are two sets of images of every pool. In each turn the kernel works on one and nbdmap on the other: writes, discards, a
snapshot, a deletion, the metadata snapshot. Then the sha256 of every volume, the status lines and thin_dump's XML of both are
the same, thin_check is content, `nbdmap thin dump` writes what thin_dump does; and they change places. One boot a turn.
"""

import hashlib
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from tests.support.clients import run
from tests.support.server import Server, serving
from tests.support.thin import thin_check
from tests.vm.harness import Kernel

MIB: Final = 1 << 20
METADATA, DATA, ORIGIN, VOLUME = 2 * MIB, 40 * MIB, 3 * MIB, 4 * MIB
BUSY: Final = 4 * MIB
"""The part of a volume that is written."""
TURNS: Final = 3
PAGE: Final = 4096


@dataclass(frozen=True)
class Request:
    """A write of one letter, or a discard if there is none."""

    volume: int
    offset: int
    length: int
    letter: str

    def in_linux(self, device: str) -> str:
        if not self.letter:
            return f"blkdiscard -o {self.offset} -l {self.length} {device}"
        size = next(size for size in (1 << 16, PAGE) if self.offset % size == self.length % size == 0)
        blocks = f"bs={size} seek={self.offset // size} count={self.length // size}"
        return f"tr '\\0' {self.letter} </dev/zero | dd of={device} {blocks} iflag=fullblock conv=notrunc,fsync 2>/dev/null"

    @property
    def in_qemu_io(self) -> str:
        if not self.letter:
            return f"discard {self.offset} {self.length}"
        return f"write -P {ord(self.letter)} {self.offset} {self.length}"


@dataclass
class World:
    """One pool: two sets of its images, what should be in it, and what is done with it."""

    name: str
    block: int
    features: str
    directory: Path
    volumes: dict[int, str] = field(default_factory=dict)
    """Number -> external origin, or ""."""
    sets: list[list[Path]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.name)
        for which in ("one", "other"):
            paths = [self.directory / f"{self.name}-{which}-{what}" for what in ("metadata", "data", "origin")]
            for path, size in zip(paths, (METADATA, DATA, ORIGIN), strict=True):
                path.write_bytes(random.Random(7).randbytes(size) if size == ORIGIN else b"")
                with path.open("r+b") as file:
                    file.truncate(size)
            self.sets.append(paths)

    def pool(self, metadata: str, data: str) -> str:
        count = len(self.features.split())
        words = f" {count} {self.features}" if count else ""
        return f"0 {DATA // self.block * self.block // 512} thin-pool {metadata} {data} {self.block // 512} 0{words}"

    def thin(self, number: int, pool: str, origin: str) -> str:
        return f"0 {VOLUME // 512} thin {pool} {number}{' ' + origin if self.volumes[number] else ''}"

    def requests(self) -> list[Request]:
        """One turn's, volume by volume; of whole blocks where new blocks are not zeroed."""
        rng, unit = self.rng, self.block if "skip_block_zeroing" in self.features else PAGE
        work = []
        for number in self.volumes:
            for _ in range(6):
                length = -(-rng.choice((4096, 16384, 65536, 192 << 10, 400 << 10)) // unit) * unit
                offset = rng.randrange((BUSY - length) // unit) * unit
                work.append(Request(number, offset, length, rng.choice(("", *"abcdefghijk"))))
        return work


@dataclass
class Turn:
    """What is done with a world: the requests, then a snapshot `new` of `origin`, one volume deleted, messages."""

    world: World
    created: list[int]
    requests: list[Request]
    origin: int
    new: int
    deleted: int | None
    messages: list[str]


@dataclass
class Seen:
    """What one side says in the end."""

    sums: dict[int, str]
    status: list[str]


def plan(world: World, turn: int) -> Turn:
    created = []
    if not turn:
        created = [0, 1]
        world.volumes = {0: "", 1: "origin"}
    requests = world.requests()
    origin = world.rng.choice(sorted(world.volumes))
    new = max(world.volumes) + 1
    deleted = world.rng.choice(sorted(set(world.volumes) - {origin, 0})) if turn == 2 else None
    messages = [f"set_transaction_id {turn} {turn + 1}", *[["reserve_metadata_snap"], [], ["release_metadata_snap"]][turn]]
    return Turn(world, created, requests, origin, new, deleted, messages)


def after(turn: Turn) -> None:
    """The volumes there are when it is done."""
    turn.world.volumes[turn.new] = turn.world.volumes[turn.origin]
    if turn.deleted is not None:
        del turn.world.volumes[turn.deleted]


def in_linux(turn: Turn, disks: list[str]) -> list[str]:
    """The lines of a job."""
    world, name = turn.world, turn.world.name
    metadata, data, origin = disks

    def thin(number: int) -> str:
        return f"dmsetup create {name}{number} --table '{world.thin(number, f'/dev/mapper/{name}', origin)}'"

    volumes = dict(world.volumes)
    job = [f"dmsetup create {name} --table '{world.pool(metadata, data)}'"]
    job += [f'dmsetup message {name} 0 "create_thin {number}"' for number in turn.created]
    job += [thin(number) for number in volumes]
    job += [request.in_linux(f"/dev/mapper/{name}{request.volume}") for request in turn.requests]
    job.append(f"dmsetup suspend {name}{turn.origin}")
    job.append(f"dmsetup message {name} 0 'create_snap {turn.new} {turn.origin}'")
    job.append(f"dmsetup resume {name}{turn.origin}")
    world.volumes[turn.new] = volumes[turn.origin]
    job.append(thin(turn.new))
    del world.volumes[turn.new]
    if turn.deleted is not None:
        job += [f"dmsetup remove {name}{turn.deleted}", f"dmsetup message {name} 0 'delete {turn.deleted}'"]
    job += [f"dmsetup message {name} 0 '{text}'" for text in turn.messages]
    left = [number for number in (*volumes, turn.new) if number != turn.deleted]
    job.append("sync; echo 3 > /proc/sys/vm/drop_caches")
    job.append(f"section {name}")
    job += [f"sha256sum /dev/mapper/{name}{number}" for number in left]
    job.append(f"section status-{name}; dmsetup status | grep '^{name}' | sort")
    return [*job, *[f"dmsetup remove {name}{number}" for number in left], f"dmsetup remove {name}"]


def linux_turns(kernel: Kernel, turns: list[Turn], which: int) -> list[Seen]:
    """All worlds in one boot."""
    job = ["mkdir -p /dev/mapper"]
    images: list[Path] = []
    for turn in turns:
        first = len(images)
        images += turn.world.sets[which]
        job += in_linux(turn, [f"/dev/vd{chr(ord('b') + first + place)}" for place in range(3)])
    result = kernel.run("set -e\n" + "\n".join(job), images)
    assert result.status == 0, result.stdout
    sections, found = result.sections(), []
    for turn in turns:
        name = turn.world.name
        lines = [line.split() for line in sections[name].splitlines() if line]
        sums = {int(path.rpartition("/")[2].removeprefix(name)): digest for digest, path in lines}
        found.append(Seen(sums, sections[f"status-{name}"].splitlines()))
    return found


def nbdmap_turn(turn: Turn, images: list[Path]) -> Seen:
    """The same in nbdmap."""
    world, name = turn.world, turn.world.name
    metadata, data, origin = images
    config = (
        f"disks:\n  metadata: {{file: {metadata}}}\n  data: {{file: {data}}}\n  origin: {{file: {origin}}}\n"
        f"devices:\n  {name}: {{table: '{world.pool('metadata', 'data')}', export: false}}\n"
    )
    with serving(config) as server:
        for number in turn.created:
            server.verb("message", name, "0", f"create_thin {number}")
        for number in world.volumes:
            server.verb("create", f"{name}{number}", "--table", world.thin(number, name, "origin"))
        for number in world.volumes:
            words = [word for one in turn.requests if one.volume == number for word in ("-c", one.in_qemu_io)]
            run("qemu-io", "-f", "raw", "-d", "unmap", *words, "-c", "flush", server.uri(f"{name}{number}"))
        server.verb("suspend", f"{name}{turn.origin}")
        server.verb("message", f"/dev/mapper/{name}", "0", f"create_snap {turn.new} {turn.origin}")
        server.verb("resume", f"{name}{turn.origin}")
        after(turn)
        server.verb("create", f"{name}{turn.new}", "--table", world.thin(turn.new, name, "origin"))
        if turn.deleted is not None:
            server.verb("remove", f"{name}{turn.deleted}")
            server.verb("message", name, "0", f"delete {turn.deleted}")
        for text in turn.messages:
            server.verb("message", name, "0", text)
        return Seen({number: digest(server, f"{name}{number}") for number in world.volumes}, sorted(status(server)))


def status(server: Server) -> list[str]:
    return server.verb("status").splitlines()


def digest(server: Server, name: str) -> str:
    copy = server.directory / "copy"
    run("nbdcopy", server.uri(name), copy)
    found = hashlib.sha256(copy.read_bytes()).hexdigest()
    copy.unlink()
    return found


def comparable(lines: list[str]) -> list[list[str]]:
    """Status lines without how many metadata blocks are used and where the metadata snapshot lies, which are each side's own."""
    found = []
    for words in (line.split() for line in lines):
        if "thin-pool" in words:
            words[5] = words[5].partition("/")[2]
            words[7] = words[7] if words[7] == "-" else "held"
        found.append(words)
    return found


def canonical(xml: str) -> list[str]:
    """thin_dump's XML, one line for each block, with the data blocks counted in the order in which they are met."""
    root = ElementTree.fromstring(xml)
    seen: dict[int, int] = {}
    lines = [str(sorted(root.items()))]
    for device in root:
        lines.append(str(sorted(device.items())))
        for one in device:
            length, begin = int(one.get("length", "1")), int(one.get("origin_begin", one.get("origin_block", "")))
            data = int(one.get("data_begin", one.get("data_block", "")))
            for place in range(length):
                block = seen.setdefault(data + place, len(seen))
                lines.append(f"{begin + place} -> {block} at {one.get('time')}")
    return lines


def dump(metadata: Path) -> list[str]:
    """Both checks are content, both dumps are the same."""
    thin_check(metadata)
    theirs = subprocess.run(["thin_dump", metadata], check=True, capture_output=True, text=True).stdout
    ours = subprocess.run([sys.executable, "-m", "nbdmap", "thin", "dump", metadata], capture_output=True, text=True, check=True)
    assert ours.stdout == theirs
    subprocess.run([sys.executable, "-m", "nbdmap", "thin", "check", metadata], check=True)
    return canonical(theirs)


def test_by_turns(kernel: Kernel, tmp_path: Path) -> None:
    worlds = [
        World("plain", 64 << 10, "", tmp_path),
        World("odd", 192 << 10, "", tmp_path),
        World("bare", 64 << 10, "skip_block_zeroing no_discard_passdown", tmp_path),
    ]
    for number in range(TURNS):
        turns = [plan(world, number) for world in worlds]
        linux = number % 2
        there = linux_turns(kernel, turns, linux)
        for turn, theirs in zip(turns, there, strict=True):
            world = turn.world
            ours = nbdmap_turn(turn, world.sets[1 - linux])
            where = f"{world.name}, turn {number}"
            assert ours.sums == theirs.sums, where
            assert comparable(ours.status) == comparable(theirs.status), where
            assert dump(world.sets[1 - linux][0]) == dump(world.sets[linux][0]), where
            assert len(world.volumes) >= 3

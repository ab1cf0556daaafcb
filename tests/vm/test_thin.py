"""One pool, by turns in Debian's kernel and in nbdmap: volumes, thin_dump and status are the same on both sides.

Each turn writes at random, discards, takes snapshots and deletes; then the other side reads everything and goes on.
"""

import hashlib
import random
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.clients import run
from tests.support.server import serving
from tests.support.thin import thin_check
from tests.vm.harness import Kernel

METADATA, DATA, ORIGIN = 8 << 20, 96 << 20, 3 << 20
VOLUME = 24 << 20
MIB = 1 << 20


@dataclass
class World:
    """The images of one pool and what should be in it."""

    directory: Path
    block: int
    features: str
    rng: random.Random
    volumes: dict[int, str] = field(default_factory=dict)
    """Number -> external origin, or ""."""
    sums: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, size in (("metadata", METADATA), ("data", DATA), ("origin", ORIGIN)):
            path = self.directory / name
            with path.open("wb") as file:
                file.truncate(size)
        (self.directory / "origin").write_bytes(random.Random(7).randbytes(ORIGIN))

    @property
    def images(self) -> list[Path]:
        return [self.directory / name for name in ("metadata", "data", "origin")]

    def pool(self, metadata: str, data: str) -> str:
        count = len(self.features.split())
        words = f" {count} {self.features}" if count else ""
        return f"0 {DATA // self.block * self.block // 512} thin-pool {metadata} {data} {self.block // 512} 0{words}"

    def thin(self, number: int, origin: str) -> str:
        return f"0 {VOLUME // 512} thin pool {number}{' ' + origin if self.volumes[number] else ''}"

    def writes(self) -> list[tuple[str, int, int, int]]:
        """(what, volume, offset, length): one turn's work; whole 4 KiB."""
        rng = self.rng
        work = []
        for number in self.volumes:
            for _ in range(12):
                kind = rng.choice(("write", "write", "write", "discard"))
                length = rng.choice((4096, 16384, 65536, 192 << 10, 400 << 10))
                offset = rng.randrange(0, (6 * MIB - length) // 4096) * 4096
                work.append((kind, number, offset, length))
        return work


def kernel_turn(kernel: Kernel, world: World, generation: int) -> dict[str, str]:
    """Linux makes snapshots and writes; what it says of everything."""
    job = ["mkdir -p /dev/mapper"]
    job += ["dmsetup create pool --table '" + world.pool("/dev/vdb", "/dev/vdc") + "'"]
    if generation == 0:
        for number, origin in ((0, ""), (1, "origin")):
            world.volumes[number] = origin
            job.append(f'dmsetup message pool 0 "create_thin {number}"')
    table = {number: world.thin(number, "/dev/vdd").replace("thin pool", "thin /dev/mapper/pool") for number in world.volumes}
    job += [f"dmsetup create v{number} --table '{line}'" for number, line in table.items()]
    for number in world.volumes:
        job.append(f"section before{number}; sha256sum /dev/mapper/v{number}")
    job.append("section status; dmsetup status | sort")
    job.append("section written")
    for what, number, offset, length in world.writes():
        if what == "write":
            letter = chr(ord("a") + world.rng.randrange(26))
            job.append(
                f"yes {letter}{generation} | head -c {length} | "
                f"dd of=/dev/mapper/v{number} bs=4096 seek={offset // 4096} conv=notrunc 2>/dev/null"
            )
        else:
            job.append(f"blkdiscard -o {offset} -l {length} /dev/mapper/v{number}")
    job.append("sync")
    of = world.rng.choice(sorted(world.volumes))
    new = max(world.volumes) + 1
    job.append(f"dmsetup suspend v{of}; dmsetup message pool 0 'create_snap {new} {of}'; dmsetup resume v{of}")
    world.volumes[new] = world.volumes[of]
    job.append(f"dmsetup create v{new} --table '{world.thin(new, '/dev/vdd').replace('thin pool', 'thin /dev/mapper/pool')}'")
    job.append(f"dmsetup message pool 0 'set_transaction_id {2 * generation} {2 * generation + 1}'")
    job.append("dmsetup message pool 0 reserve_metadata_snap" if generation == 0 else ":")
    job.append("echo 3 > /proc/sys/vm/drop_caches")
    for number in world.volumes:
        job.append(f"section after{number}; sha256sum /dev/mapper/v{number}")
    job.append("section end; dmsetup status | sort")
    job += [f"dmsetup remove v{number}" for number in world.volumes] + ["dmsetup remove pool"]
    result = kernel.run("\n".join(job), world.images)
    assert result.status == 0, result
    return result.sections()


def nbdmap_turn(world: World, generation: int) -> tuple[dict[int, str], list[str], dict[int, str], list[str]]:
    """The same in nbdmap: sums and status before, sums and status after."""
    config = (
        "disks:\n" + "".join(f"  {path.name}: {{file: {path}}}\n" for path in world.images) + "devices:\n"
        "  pool: {table: '" + world.pool("metadata", "data") + "', export: false}\n"
        + "".join(f"  v{number}: {{table: '{world.thin(number, 'origin')}'}}\n" for number in world.volumes)
    )  # fmt: skip
    with serving(config) as server:

        def sums() -> dict[int, str]:
            found = {}
            for number in world.volumes:
                copy = world.directory / "copy"
                run("nbdcopy", server.uri(f"v{number}"), copy)
                found[number] = hashlib.sha256(copy.read_bytes()).hexdigest()
                copy.unlink()
            return found

        before, status = sums(), sorted(server.verb("status").splitlines())
        commands: dict[int, list[str]] = {number: [] for number in world.volumes}
        for what, number, offset, length in world.writes():
            pattern = world.rng.randrange(1, 256)
            commands[number].append(f"write -P {pattern} {offset} {length}" if what == "write" else f"discard {offset} {length}")
        for number, lines in commands.items():
            words = [word for line in lines for word in ("-c", line)]
            run("qemu-io", "-f", "raw", "-d", "unmap", *words, "-c", "flush", server.uri(f"v{number}"))
        origin = world.rng.choice(sorted(world.volumes))
        new = max(world.volumes) + 1
        verbs: list[tuple[str, ...]] = [
            ("suspend", f"v{origin}"),
            ("message", "/dev/mapper/pool", "0", f"create_snap {new} {origin}"),
            ("resume", f"v{origin}"),
            ("message", "pool", "0", f"set_transaction_id {2 * generation + 1} {2 * generation + 2}"),
        ]
        for verb in verbs:
            server.verb(*verb)
        world.volumes[new] = world.volumes[origin]
        server.verb("create", f"v{new}", "--table", world.thin(new, "origin"))
        if generation == 1:
            server.verb("message", "pool", "0", "release_metadata_snap")
        return before, status, sums(), sorted(server.verb("status").splitlines())


def dump(world: World) -> str:
    """thin_dump of the metadata; thin_check is content with it."""
    thin_check(world.directory / "metadata")
    return subprocess.run(["thin_dump", world.directory / "metadata"], check=True, capture_output=True, text=True).stdout


def first(text: str) -> str:
    return text.split()[0]


@pytest.mark.parametrize(
    ("block", "features"), [(64 << 10, ""), (192 << 10, ""), (64 << 10, "skip_block_zeroing no_discard_passdown")]
)
def test_by_turns(kernel: Kernel, tmp_path: Path, block: int, features: str) -> None:
    world = World(tmp_path, block, features, random.Random(block + len(features)))
    status: list[str] = []
    for generation in range(3):
        there = kernel_turn(kernel, world, generation)
        if generation:
            assert {number: first(there[f"before{number}"]) for number in world.sums} == world.sums
            assert used(there["status"].splitlines()) == used(status)
        seen = {number: first(there[f"after{number}"]) for number in world.volumes}
        from_kernel = dump(world)
        assert from_kernel.count("<device ") == len(world.volumes)
        before, at_first, world.sums, status = nbdmap_turn(world, generation)
        assert before == seen
        assert used(at_first) == used(there["end"].splitlines())
        dump(world)


def used(lines: list[str]) -> list[list[str]]:
    """Status lines, without what depends on where blocks lie."""
    return [[*line.split()[:4], *line.split()[4:]] for line in lines]

"""The same tables over the same disks, in Debian's kernel and in nbdmap: what one wrote the other reads, both ways."""

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.support.clients import run
from tests.support.server import Server, serving
from tests.vm.harness import Kernel

DISKS: Final = 5
SECTORS: Final = 40960
"""Of each disk; a table takes a slice of it, so that all are on the same few images."""
CHUNKS: Final = (8, 24, 128, 2048)
STRIPES: Final = (2, 3, 5)


def tables() -> Iterator[tuple[str, str]]:
    """(name, table) with disk N written as {N}. No two share a sector."""
    free = 0
    for chunk in CHUNKS:
        rows = {8: 40, 24: 20, 128: 6, 2048: 2}[chunk]
        for stripes in STRIPES:
            legs = " ".join(f"{{{number}}} {free}" for number in range(stripes))
            yield f"striped{stripes}x{chunk}", f"0 {stripes * rows * chunk} striped {stripes} {chunk} {legs}"
            free += rows * chunk
    yield "linear", f"0 3000 linear {{4}} {free}"
    yield "joined", f"0 1000 linear {{0}} {free + 1000}\n1000 500 linear {{1}} {free}\n1500 700 linear {{0}} {free}"
    mixed = f"0 100 linear {{2}} {free}\n100 960 striped 2 24 {{2}} {free + 100} {{3}} {free + 100}\n1060 40 zero"
    yield "mixed", mixed
    assert free + 3000 <= SECTORS, free


def on(table: str, names: list[str]) -> str:
    return table.format(*names)


def served(images: list[Path]) -> str:
    """The configuration that serves all tables from these images."""
    disks = "".join(f"  disk{number}: {{file: {path}}}\n" for number, path in enumerate(images))
    names = [f"disk{number}" for number in range(DISKS)]
    devices = "".join(
        f"  {name}:\n    table: |\n" + "".join(f"      {line}\n" for line in on(table, names).splitlines())
        for name, table in tables()
    )
    return f"disks:\n{disks}devices:\n{devices}"


def guest_tables() -> str:
    """The commands that load all tables in the guest, where image N is /dev/vd[b-f]."""
    names = [f"/dev/vd{letter}" for letter in "bcdef"]
    return "".join(f"dmsetup create {name} <<'T'\n{on(table, names)}\nT\n" for name, table in tables())


def sums(server: Server) -> dict[str, str]:
    """The sha256 of every device, as a client reads it."""
    found = {}
    for name, _ in tables():
        copy = server.directory / "copy.img"
        run("nbdcopy", server.uri(name), copy)
        found[name] = hashlib.sha256(copy.read_bytes()).hexdigest()
        copy.unlink()
    return found


def guest_sums(text: str) -> dict[str, str]:
    return {line.split()[1].rpartition("/")[2]: line.split()[0] for line in text.splitlines()}


def make_images(directory: Path, seed: int) -> list[Path]:
    images = [directory / f"disk{number}.img" for number in range(DISKS)]
    for number, image in enumerate(images):
        image.write_bytes(random.Random(seed + number).randbytes(SECTORS * 512))
    return images


def test_both_directions(kernel: Kernel, tmp_path: Path) -> None:
    images = make_images(tmp_path, 1)
    wanted: dict[str, str] = {}
    with serving(served(images)) as server:
        for number, (name, _) in enumerate(tables()):
            size = int(run("nbdinfo", "--size", server.uri(name)))
            data = random.Random(100 + number).randbytes(size)
            (tmp_path / "data").write_bytes(data)
            run("nbdcopy", "--flush", tmp_path / "data", server.uri(name))
            if name == "mixed":
                data = data[: 1060 * 512] + bytes(40 * 512)
            wanted[name] = hashlib.sha256(data).hexdigest()
        assert sums(server) == wanted
        lines = server.verb("table")
    # what nbdmap wrote, the kernel reads; then the kernel writes the same devices with other bytes
    job = f"""{guest_tables()}
        section read; sha256sum /dev/mapper/[a-z]*[!l]
        section table; dmsetup table
        for name in $(dmsetup ls | cut -f1); do
          size=$(blockdev --getsize64 /dev/mapper/$name)
          openssl_less() {{ seq 100000000 | sed "s/^/$name /" | head -c $size; }}
          openssl_less | dd of=/dev/mapper/$name bs=64k conv=fsync 2>/dev/null || echo "$name failed"
        done
        echo 3 > /proc/sys/vm/drop_caches
        section written; sha256sum /dev/mapper/[a-z]*[!l]
    """
    result = kernel.run(job, images)
    assert result.status == 0, result
    sections = result.sections()
    assert guest_sums(sections["read"]) == wanted
    assert without_numbers(sections["table"]) == without_numbers(lines)
    with serving(served(images)) as server:
        assert sums(server) == guest_sums(sections["written"])


def without_numbers(text: str) -> list[list[str]]:
    """Table lines with the numbers of disks told by their order only: the guest's disks have others than ours."""
    order: dict[str, str] = {}

    def shown(word: str) -> str:
        number = ":" in word and not word.endswith(":")
        return order.setdefault(word, f"disk {len(order)}") if number else word

    return [[shown(word) for word in line.split()] for line in text.splitlines()]

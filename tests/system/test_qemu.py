"""qemu-img and qemu-io: raw and qcow2 images on exports, maps, patterns, discard and write zeroes, and a benchmark's load."""

import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import attempt, run
from tests.support.server import Server, serving

MIB = 1 << 20

CONFIG = """
disks:
  a: {file: a.img, size: 32MiB, create: true}
  b: {file: b.img, size: 32MiB, create: true}
  ram: {memory: 64MiB}
devices:
  lin: {table: 0 65536 linear a 0}
  str: {table: 0 131072 striped 2 256 a 0 b 0}
  mem: {table: 0 131072 linear ram 0}
  ro: {table: 0 131072 linear ram 0, read_only: true}
  bad: {table: "0 65536 linear ram 0\\n65536 2048 error"}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(CONFIG, listen=["nbd://127.0.0.1:0"]) as running:
        yield running


def qemu_io(uri: str, *commands: str, options: tuple[str, ...] = ()) -> str:
    """What qemu-io prints; it ends with 0 even when a read finds the wrong pattern."""
    words = [word for command in commands for word in ("-c", command)]
    said = run("qemu-io", "-f", "raw", "-d", "unmap", *options, *words, uri)
    assert "failed" not in said, said
    assert "error" not in said, said
    return said


def image(path: Path, size: int, seed: int) -> Path:
    """A raw image with data here and there."""
    numbers = random.Random(seed)
    with path.open("wb") as out:
        out.truncate(size)
        for _ in range(20):
            os.pwrite(out.fileno(), numbers.randbytes(128 << 10), numbers.randrange(0, size - MIB, 4096))
    return path


# --- qemu-img --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["str", "mem"])
def test_convert_to_an_export_and_compare(server: Server, tmp_path: Path, name: str) -> None:
    raw = image(tmp_path / "a.raw", 64 * MIB, seed=1)
    qcow2 = tmp_path / "a.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", raw, qcow2)
    run("qemu-img", "convert", "-n", "-W", "-m", "16", "-f", "qcow2", "-O", "raw", qcow2, server.uri(name))
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, server.uri(name))
    assert "identical" in run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", qcow2, server.tcp(name))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.uri(name), tmp_path / "b.qcow2")
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, tmp_path / "b.qcow2")


def test_compare_finds_one_byte(server: Server, tmp_path: Path) -> None:
    raw = image(tmp_path / "a.raw", 64 * MIB, seed=2)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", raw, server.uri("mem"))
    with raw.open("r+b") as out:
        os.pwrite(out.fileno(), b"\x55", 60 * MIB + 7)
    different = attempt("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, server.uri("mem"))
    assert (different.returncode, "mismatch at offset" in different.stdout) == (1, True)


def test_info(server: Server) -> None:
    info = json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", server.tcp("lin")))
    assert info["virtual-size"] == 32 * MIB


def test_map(server: Server) -> None:
    qemu_io(server.uri("str"), "discard 0 64M", "write -P 1 256k 128k", "write -P 2 40M 64k", "flush")
    extents: list[dict[str, Any]] = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", server.uri("str")))
    assert [(one["start"], one["length"], one["zero"]) for one in extents] == [
        (0, 256 << 10, True),
        (256 << 10, 128 << 10, False),
        (384 << 10, 40 * MIB - (384 << 10), True),
        (40 * MIB, 64 << 10, False),
        (40 * MIB + (64 << 10), 24 * MIB - (64 << 10), True),
    ]


def test_qcow2_on_an_export(server: Server, tmp_path: Path) -> None:
    """An image format on a mapped device: qemu's own metadata, with its flushes, in the export."""
    raw = image(tmp_path / "a.raw", 48 * MIB, seed=3)
    run("qemu-img", "create", "-f", "qcow2", server.uri("mem"), "48M")
    run("qemu-img", "convert", "-n", "-W", "-f", "raw", "-O", "qcow2", raw, server.uri("mem"))
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, server.uri("mem"))
    run("qemu-img", "snapshot", "-c", "before", server.uri("mem"))
    words = [word for command in ("write -P 7 1M 1M", "discard 8M 8M", "flush") for word in ("-c", command)]
    run("qemu-io", "-f", "qcow2", "-d", "unmap", *words, server.uri("mem"))
    assert "No errors" in run("qemu-img", "check", "-f", "qcow2", server.uri("mem"))
    run("qemu-img", "snapshot", "-a", "before", server.uri("mem"))
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, server.uri("mem"))
    overlay = tmp_path / "overlay.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-F", "qcow2", "-b", server.uri("mem"), overlay)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 64k", overlay)
    run("qemu-img", "commit", "-f", "qcow2", overlay)
    said = run("qemu-io", "-f", "qcow2", "-c", "read -P 9 0 64k", server.uri("mem"))
    assert "verification failed" not in said


@pytest.mark.parametrize("name", ["lin", "str", "mem"])
@pytest.mark.parametrize("write", [True, False], ids=["write", "read"])
def test_bench(server: Server, name: str, write: bool) -> None:
    options = ("-w", "--flush-interval=100") if write else ()
    said = run("qemu-img", "bench", *options, "-f", "raw", "-c", "2000", "-d", "32", "-s", "4096", server.tcp(name))
    assert re.search(r"Run completed in [0-9.]+ seconds", said)


# --- qemu-io ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lin", "str", "mem"])
def test_patterns(server: Server, name: str) -> None:
    qemu_io(
        server.uri(name),
        "discard 0 32M",
        "write -P 0xaa 1M 64k",
        "write -P 0xbb 1M 4k",
        "write -z -u 3M 64k",
        "write -P 0xcc 6M 3M",
        "discard 7M 1M",
        "write -z 8M 64k",
        "write -f -P 0xdd 5M 64k",
        "read -P 0xbb 1M 4k",
        "read -P 0xaa 1028k 60k",
        "read -P 0 3M 64k",
        "read -P 0xcc 6M 1M",
        "read -P 0 7M 1M",
        "read -P 0 8M 64k",
        "read -P 0xcc 8256k 960k",
        "read -P 0xdd 5M 64k",
        "read -P 0 10M 16M",
        "aio_write -P 1 12M 1M",
        "aio_write -P 2 13M 1M",
        "aio_write -z 14M 1M",
        "aio_flush",
        "aio_read -P 1 12M 1M",
        "aio_read -P 2 13M 1M",
        "aio_read -P 0 14M 1M",
        "aio_flush",
        "flush",
    )


def test_unaligned_requests_of_a_guest(server: Server) -> None:
    """qemu rounds them to the block size that it was told, reading what surrounds them."""
    qemu_io(
        server.uri("str"),
        "write -P 0x11 0 8k",
        "write -P 0x22 100 1000",
        "read -P 0x11 0 100",
        "read -P 0x22 100 1000",
        "read -P 0x11 1100 2000",
    )


def test_vectors_over_chunk_borders(server: Server) -> None:
    qemu_io(
        server.uri("str"),
        "writev -P 0x31 130560 512 512 4k 128k",
        "readv -P 0x31 130560 4k 512 128k 512",
        "writev -P 0x32 0 16M 16M",
        "readv -P 0x32 0 32M",
        "read -P 0 32M 64k",
    )


def test_errors_are_the_clients(server: Server) -> None:
    failed = attempt("qemu-io", "-f", "raw", "-c", "read 32M 64k", server.uri("bad"))
    assert "Input/output error" in failed.stdout + failed.stderr
    failed = attempt("qemu-io", "-f", "raw", "-c", "write 0 64k", server.uri("ro"))
    assert failed.returncode == 1
    assert "Permission denied" in failed.stderr or "read-only" in failed.stderr.lower()

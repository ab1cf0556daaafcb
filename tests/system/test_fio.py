"""fio's nbd engine: random loads over four connections at once, every block verified by checksum.

fio 3.33 makes one connection a job; each job has a share of its own, so what it reads back is what it wrote.
"""

import json
from collections.abc import Iterator

import pytest

from tests.support.clients import run
from tests.support.server import Server, serving

CONFIG = """
disks:
  a: {file: a.img, size: 64MiB, create: true}
  b: {file: b.img, size: 64MiB, create: true}
  c: {memory: 64MiB}
devices:
  linear: {table: 0 131072 linear a 0}
  striped: {table: 0 262144 striped 2 128 a 0 b 0}
  stripes: {table: 0 131040 striped 3 16 a 2048 b 4096 c 512}
  lower: {table: "0 40000 linear b 8\\n40000 50000 linear a 1000\\n90000 10000 linear c 5000"}
  stacked: {table: "0 99328 striped 2 64 /dev/mapper/lower 0 a 65536\\n99328 10000 linear lower 70000", export: true}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(CONFIG, listen=["nbd://127.0.0.1:0"]) as running:
        yield running


def fio(uri: str, *options: str) -> list[dict[str, object]]:
    """Runs four jobs, each on a quarter of `uri`; fio fails when a checksum is wrong."""
    words = (
        "--name=v", "--ioengine=nbd", f"--uri={uri}", "--iodepth=32", "--numjobs=4", "--group_reporting=0", "--thread",
        "--verify=crc32c", "--verify_state_save=0", "--do_verify=1", "--verify_fatal=1", "--randrepeat=1", "--output-format=json",
    )  # fmt: skip
    said = run("fio", *words, *options)
    jobs: list[dict[str, object]] = json.loads(said[said.index("{") :])["jobs"]  # the engine talks before it
    assert len(jobs) == 4
    assert [job["error"] for job in jobs] == [0] * 4
    return jobs


@pytest.mark.parametrize("name", ["linear", "striped", "stripes", "stacked"])
def test_random_writes_are_read_back(server: Server, name: str) -> None:
    shares = ("--size=8m", "--offset_increment=12m")
    fio(server.uri(name), *shares, "--rw=randwrite", "--bs=4k", "--number_ios=2000")
    fio(server.tcp(name), *shares, "--rw=randrw", "--bsrange=512-64k", "--blockalign=512", "--number_ios=1000", "--fsync=50")


@pytest.mark.parametrize("name", ["linear", "striped"])
def test_large_requests_and_trims(server: Server, name: str) -> None:
    """fio would send a trim and a write of the same block side by side, which promises nothing, but for serialize_overlap."""
    shares = ("--size=12m", "--offset_increment=16m")
    fio(server.uri(name), *shares, "--rw=write", "--bs=1m", "--iodepth=8", "--end_fsync=1")
    fio(server.uri(name), *shares, "--rw=randtrimwrite", "--bs=64k", "--number_ios=400", "--serialize_overlap=1")

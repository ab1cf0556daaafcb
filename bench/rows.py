"""What is measured: one Row a line of the table. Names are TRANSPORT/WORK, as `unix/read-4k-d32`.

A row's work is run on each of its contestants in turn and gives one Sample. `at_least` is the ratio to `baseline` that issue
3 asks for, `at_most` the largest value that may come out.
"""

from dataclasses import dataclass
from typing import Final

from bench import peers
from bench.clients import Load, background, fio, lean, nbdcopy, requests_of, rss_with_idle_clients
from bench.sample import Sample, Work
from bench.servers import ALL, NBDKIT, NBDMAP, STACKED, WITH_PURE, Contestant, Server, Transport
from bench.site import Backing
from nbdmap.units import GIB, KIB, MIB

IDLE_CLIENTS: Final = 1000
FULL_SECONDS: Final = 1.0
"""Runs shorter than this are trials: fewer idle clients."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    transport: Transport
    work: str
    text: str
    unit: str
    run: Work
    backing: Backing = Backing.DATA
    contestants: tuple[Contestant, ...] = ALL
    subject: str = NBDMAP.name
    baseline: str | None = NBDKIT.name
    """None is the best of the others."""
    at_least: float | None = None
    at_most: float | None = None
    per: str = "request"
    speed: bool = True
    """More is better, and ratios say something."""
    dirties: bool = False
    prepare: Work | None = None
    rounds: int | None = None
    usual: bool = True
    """Measured without being asked for."""

    @property
    def name(self) -> str:
        """What --rows names."""
        return f"{self.transport}/{self.work}"


def _loaded(load: Load, *, bytes_a_second: bool = False) -> Work:
    """fio's requests, or MiB, a second."""

    def run(server: Server, seconds: float) -> Sample:
        before = server.process.cpu_seconds()
        jobs = fio(server, load, seconds)
        used = server.process.cpu_seconds() - before
        rate = sum(job.per_second for job in jobs)
        extra = {"p99_us": max(job.p99_us for job in jobs)}
        return Sample(rate * load.block / MIB if bytes_a_second else rate, used, requests_of(jobs), extra)

    return run


def _lean(way: str, depth: int) -> Work:
    """Requests of 4 KiB a second of a client that costs next to nothing."""

    def run(server: Server, seconds: float) -> Sample:
        before = server.process.cpu_seconds()
        rate, done = lean(server, way, 4 * KIB, depth, seconds)
        return Sample(rate, server.process.cpu_seconds() - before, done)

    return run


def _copy(inwards: bool) -> Work:
    """nbdcopy from the export to nowhere, or from a file into the export."""

    def run(server: Server, seconds: float) -> Sample:
        site = server.place.site
        source, destination = server.uri, "null:"
        if inwards:
            site.clear_target()
            source, destination = str(site.file(Backing.SPARSE)), server.uri
        before = server.process.cpu_seconds()
        took = nbdcopy(server, source, destination)
        used = server.process.cpu_seconds() - before
        if inwards:
            site.clear_target()
        return Sample(site.sparse_size / GIB / took, used, site.sparse_size / MIB)

    return run


def _mixed(server: Server, seconds: float) -> Sample:
    """4 KiB reads at depth 1 from one half, alone and while 1 MiB writes stream into the other: by how much p99 grows."""
    half = server.place.site.size // 2
    reads = Load("randread", 4 * KIB, 1, size=half)
    writes = Load("write", MIB, 4, offset=half, size=half)
    quiet = fio(server, reads, seconds)[0].p99_us
    with background(server, writes, 3 * seconds + 20):
        loaded = fio(server, reads, seconds)[0].p99_us
    return Sample(loaded / quiet if quiet else 0.0, extra={"quiet_us": quiet, "loaded_us": loaded})


def _fairness(server: Server, seconds: float) -> Sample:
    """Two clients at depth 128: the percentage that the slower one gets."""
    first, second = sorted(job.per_second for job in fio(server, Load("randread", 4 * KIB, 128, jobs=2), seconds))
    total = first + second
    return Sample(100 * first / total, extra={"slower": first, "faster": second})


def _memory(server: Server, seconds: float) -> Sample:
    """How many MiB idle connections cost."""
    count = IDLE_CLIENTS if seconds >= FULL_SECONDS else IDLE_CLIENTS // 10
    before, after = rss_with_idle_clients(server, count)
    return Sample((after - before) / MIB, extra={"clients": count, "idle_mib": before / MIB, "with_clients_mib": after / MIB})


def _fill(server: Server, seconds: float) -> Sample:
    """Writes a memory disk once: memory that was never written to is read too fast."""
    fio(server, Load("write", MIB, 4), max(0.5, seconds))
    return Sample(0.0)


def _copy_in(server: Server, seconds: float) -> Sample:
    """Fills the beginning of a new volume with data.img. Then the file behind the server is read into the page cache anew,
    whichever it is: pages that were written lie in smaller folios than pages that were read, and cost a reader more."""
    place = server.place
    if place.backing is Backing.THIN:
        nbdcopy(server, str(place.site.file(Backing.DATA)), server.uri)
    place.site.read_anew(peers.data_file(place, server.contestant.program))
    return Sample(0.0)


def _mapped(server: Server, seconds: float) -> Sample:
    """4 KiB reads of as many bytes as data.img has."""
    return _loaded(Load("randread", 4 * KIB, 32, size=server.place.site.size))(server, seconds)


def _size(block: int) -> tuple[str, str]:
    return (f"{block // MIB}m", f"{block // MIB} MiB") if block >= MIB else (f"{block // KIB}k", f"{block // KIB} KiB")


def _speeds(transport: Transport) -> list[Row]:
    """fio's rows: every size, direction and depth."""
    sizes = [(4 * KIB, depth, 1) for depth in (1, 8, 32, 128)] + [(64 * KIB, 16, 1), (MIB, 4, 1), (4 * KIB, 32, 4)]
    asked = {
        ("read", 4 * KIB, 32, 1): 3.0, ("write", 4 * KIB, 32, 1): 1.5, ("read", 4 * KIB, 1, 1): 1.0,
        ("read", MIB, 4, 1): 1.4, ("write", MIB, 4, 1): 1.2, ("read", 4 * KIB, 32, 4): 1.6,
    } if transport is Transport.UNIX else {}  # fmt: skip
    rows = []
    for block, depth, jobs in sizes:
        for way in ("read", "write"):
            short, long = _size(block)
            sequential = block >= MIB
            text = f"{long} {'' if sequential else 'random '}{way}, depth {depth}" + f", {jobs} connections" * (jobs > 1)
            rows.append(
                Row(
                    transport, f"{way}-{short}-d{depth}" + f"-x{jobs}" * (jobs > 1), text,
                    "MiB/s" if sequential else "IOPS",
                    _loaded(Load(way if sequential else f"rand{way}", block, depth, jobs), bytes_a_second=sequential),
                    at_least=asked.get((way, block, depth, jobs)), dirties=way == "write",
                    contestants=WITH_PURE if (way, block, depth, jobs) in asked else ALL,
                    usual=transport is Transport.UNIX or (depth in (1, 32) and jobs == 1) or sequential,
                )
            )  # fmt: skip
    synced = _loaded(Load("randwrite", 4 * KIB, 1, sync=True))
    rows.append(Row(transport, "fsync", "4 KiB random write, each with a flush", "IOPS", synced, dirties=True))
    return rows


def _copies(transport: Transport) -> list[Row]:
    return [
        Row(transport, "copy-out", "nbdcopy, half holes, to null:", "GiB/s", _copy(False), Backing.SPARSE, per="MiB"),
        Row(transport, "copy-in", "nbdcopy, half holes, from a file", "GiB/s", _copy(True), Backing.TARGET, per="MiB"),
    ]


def _lean_rows() -> list[Row]:
    """What the servers can do where the client is not what bounds them."""
    asked = {("read", 32): 3.0, ("write", 32): 1.5, ("read", 1): 1.0}
    return [
        Row(
            Transport.UNIX, f"lean-{way}-4k-d{depth}", f"lean client: 4 KiB random {way}, depth {depth}", "IOPS",
            _lean(way, depth), at_least=asked.get((way, depth)), dirties=way == "write",
            contestants=WITH_PURE,
        )
        for way in ("read", "write") for depth in (1, 32)
    ]  # fmt: skip


def _pairs() -> list[Row]:
    """Rows of fewer servers."""
    rows = []
    for way, at_least in (("read", 0.85), ("write", None)):
        load = Load(f"rand{way}", 4 * KIB, 32)
        rows.append(
            Row(
                Transport.UNIX, f"stack-{way}-4k-d32", f"striped on linears on linears: 4 KiB random {way}, depth 32", "IOPS",
                _loaded(load), contestants=(STACKED, NBDMAP), subject=STACKED.name, baseline=NBDMAP.name,
                at_least=at_least, dirties=load.writes,
            )
        )  # fmt: skip
    for way, block, depth in (("read", 4 * KIB, 32), ("write", 4 * KIB, 32), ("read", MIB, 4), ("write", MIB, 4)):
        large = block >= MIB
        load = Load(way if large else f"rand{way}", block, depth)
        short, long = _size(block)
        text = f"{long} {'' if large else 'random '}{way}, depth {depth}"
        rows.append(
            Row(
                Transport.UNIX, f"memory-{way}-{short}-d{depth}", f"memory disk: {text}", "MiB/s" if large else "IOPS",
                _loaded(load, bytes_a_second=large), Backing.MEMORY, (NBDMAP, NBDKIT), prepare=_fill,
            )
        )  # fmt: skip
    return rows


def _peers() -> list[Row]:
    """The targets beside what does the same in other servers."""
    unix = Transport.UNIX
    rows = []
    for way, block, depth, at_least in (
        ("read", 4 * KIB, 32, 1.5), ("write", 4 * KIB, 32, 1.5), ("read", 64 * KIB, 16, None), ("write", 64 * KIB, 16, None),
        ("read", MIB, 4, 1.3), ("write", MIB, 4, 1.3),
    ):  # fmt: skip
        large = block >= MIB
        short, long = _size(block)
        load = Load(way if large else f"rand{way}", block, depth)
        rows.append(
            Row(
                unix, f"luks-{way}-{short}-d{depth}", f"LUKS: {long} {'' if large else 'random '}{way}, depth {depth}",
                "MiB/s" if large else "IOPS", _loaded(load, bytes_a_second=large), Backing.LUKS, peers.LUKS,
                peers.LUKS[0].name, None, at_least, dirties=load.writes,
            )
        )  # fmt: skip
    ours, qcow2 = peers.THIN[0].name, peers.THIN[-1].name
    rows += [
        Row(unix, "thin-read-4k-d32", "thin, mapped blocks: 4 KiB random read, depth 32", "IOPS", _mapped,
            contestants=(peers.THIN[0], NBDMAP, peers.THIN[1]), subject=ours, baseline=NBDMAP.name, at_least=0.85,
            prepare=_copy_in),
        Row(unix, "thin-first", "first 4 KiB write into each 64 KiB of a new thin volume, depth 32", "IOPS",
            peers.first_writes(snapshot=False), Backing.THIN, peers.THIN, ours, qcow2, 1.5),
        Row(unix, "thin-snapshot", "the same after a snapshot of a full one", "IOPS",
            peers.first_writes(snapshot=True), Backing.THIN, peers.THIN, ours, qcow2, 1.5),
        Row(unix, "delay", "4 KiB random read, each 2 ms late, depth 128", "IOPS", _loaded(Load("randread", 4 * KIB, 128)),
            contestants=peers.DELAY, subject=peers.DELAY[0].name, baseline=peers.DELAY[1].name),
    ]  # fmt: skip
    return rows


def _figures() -> list[Row]:
    unix = Transport.UNIX
    return [
        Row(unix, "mixed", "p99 of 4 KiB reads beside 1 MiB writes, to its quiet value", "times", _mixed, at_most=3.0,
            speed=False, dirties=True),
        Row(unix, "fairness", "two clients at depth 128: share of the slower", "%", _fairness, speed=False),
        Row(unix, "idle", f"memory of {IDLE_CLIENTS} idle connections", "MiB", _memory, contestants=(NBDMAP,), at_most=64.0,
            speed=False, rounds=1),
    ]  # fmt: skip


def all_rows() -> list[Row]:
    """Every row there is, in the order of the report."""
    rows = []
    for transport in Transport:
        rows += _speeds(transport) + _copies(transport)
        if transport is Transport.UNIX:
            rows += _lean_rows() + _pairs() + _peers()
    return rows + _figures()

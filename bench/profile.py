"""`python -m bench.profile`: where the time of one 4 KiB request goes inside the server, at depth 32, step by step.

In one process and without sockets: the steps are called as the server calls them, and the whole is a real Connection that
is handed 32 requests in one wake-up. Counted in CPU time of the thread (time.thread_time), the best of several runs, so
that a busy machine counts little. What the kernel must do at least for the same request stands above it.
"""

import argparse
import asyncio
import cProfile
import os
import pstats
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import uvloop

from bench.processes import Failed, ended_by_signals
from bench.report import markdown_table
from bench.site import Backing, Site, site
from nbdmap.block.buffers import Buffers
from nbdmap.block.io import READ, WRITE, Continued, Io, Pending
from nbdmap.control.events import Events
from nbdmap.control.exports import Exports
from nbdmap.control.mapper import Mapper
from nbdmap.control.verbs import Verbs
from nbdmap.nbd import constants as nbd
from nbdmap.nbd.handshake import Session, TlsMode
from nbdmap.nbd.transmission import Replies, RequestReader
from nbdmap.server.connection import Connection
from nbdmap.server.door import Door
from nbdmap.server.serving import Serving
from nbdmap.server.shared import Shared
from nbdmap.targets import TARGETS
from nbdmap.units import KIB, MIB, SECTOR

BLOCK: Final = 4 * KIB
DEPTH: Final = 32
REPEATS: Final = 9
MAX_RUNS: Final = 300
RUN_SECONDS: Final = 0.01
PAUSE_SECONDS: Final = 0.002
SIZE: Final = 16 * MIB
OFFSETS: Final = tuple(range(0, SIZE, SIZE // DEPTH))

Call = Callable[[], int]
"""Does a step for DEPTH requests; how many of them had to wait for a thread, as the page cache now and then demands."""
Line = tuple[str, float, float]
"""A step, and its microseconds for each read and write."""


class Submits(Protocol):
    """A device, or a table of one."""

    def submit(self, io: Io, offset: int) -> Pending: ...


async def microseconds(call: Call) -> float:
    """CPU time of the step for one request: the best of REPEATS runs in which none had to wait."""
    best, runs, count = float("inf"), 0, 1
    for _ in range(MAX_RUNS):
        await asyncio.sleep(PAUSE_SECONDS)  # for those that did
        start = time.thread_time()
        clean = not any(call() for _ in range(count))
        took = time.thread_time() - start
        if not clean:
            continue
        if took < RUN_SECONDS / 2:
            count *= 2
            continue
        best, runs = min(best, took / count), runs + 1
        if runs == REPEATS:
            break
    if not runs:
        raise Failed("requests have to wait for threads: is the file in the page cache?")
    return best / DEPTH * 1e6


def each(step: Callable[[Any], object], things: Sequence[Any]) -> Call:
    """A step that never waits, for DEPTH things."""

    def call() -> int:
        for one in things:
            step(one)
        return 0

    return call


def eagerly(start: Callable[[Any], Pending], things: Sequence[Any], waiting: set[asyncio.Task[None]]) -> Call:
    """A step that is a coroutine, for DEPTH things; those that wait go on in tasks."""

    def call() -> int:
        waited = 0
        for one in things:
            pending = start(one)
            try:
                yielded = pending.send(None)
            except StopIteration:
                continue
            waited += 1
            task: asyncio.Task[None] = asyncio.get_running_loop().create_task(Continued(pending, yielded))
            waiting.add(task)
            task.add_done_callback(waiting.discard)
        return waited

    return call


def requests(command: nbd.Cmd) -> bytes:
    """DEPTH requests as a client sends them."""
    payload = bytes(BLOCK) if command == nbd.Cmd.WRITE else b""
    return b"".join(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, command, at, at, BLOCK) + payload for at in OFFSETS)


class Sink(asyncio.Transport):
    """A transport whose client takes everything at once, and counts the buffers: one is one reply."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def write(self, data: Any) -> None:
        """The handshake's."""

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        """Replies."""
        self.count += len(list(list_of_data))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """There are none."""

    def get_write_buffer_size(self) -> int:
        """Nothing waits."""
        return 0

    def is_closing(self) -> bool:
        """Never."""
        return False

    def pause_reading(self) -> None:
        """As it likes."""

    def resume_reading(self) -> None:
        """As it likes."""

    def close(self) -> None:
        """Nothing to close."""

    def abort(self) -> None:
        """A profile of a connection that refuses is worth nothing."""
        raise AssertionError("the connection gave up")


class Client:
    """A real Connection to an export, in transmission with structured replies, as libnbd has it."""

    def __init__(self, exports: Exports, export: str) -> None:
        self.transport = Sink()
        self.connection = Connection(exports, TlsMode.OFF, None, Shared())
        self.connection.connection_made(self.transport)
        name = export.encode()
        go = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self._give(struct.pack(">I", nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES))
        self._give(nbd.OPTION.pack(nbd.OPTION_MAGIC, nbd.Opt.STRUCTURED_REPLY, 0))
        self._give(nbd.OPTION.pack(nbd.OPTION_MAGIC, nbd.Opt.GO, len(go)) + go)

    def _give(self, data: bytes) -> None:
        self.connection.get_buffer(-1)[: len(data)] = data
        self.connection.buffer_updated(len(data))

    def wake_up(self, message: bytes) -> Call:
        """The message has come, whole. It still lies in the receive buffer as a rule: the copy is the kernel's work."""
        placed: object = None
        asked = self.transport.count

        def call() -> int:
            nonlocal placed, asked
            if self.transport.count < asked:
                return 1  # some of the last ones still wait, and what they came in is not free
            asked += DEPTH
            buffer = self.connection.get_buffer(-1)
            if buffer.obj is not placed:
                buffer[: len(message)] = message
                placed = buffer.obj
            self.connection.buffer_updated(len(message))
            return asked - self.transport.count

        return call


async def _devices(verbs: Verbs, path: Path) -> None:
    """base: linear on the file; upper: linear on base; stack: striped over linears over linears; secret: crypt on base."""
    whole = SIZE // SECTOR
    half = whole // 2
    await verbs.create("base", f"0 {whole} linear {path} 0")
    await verbs.create("upper", f"0 {whole} linear base 0")
    for name, below in (("left0", "base 0"), ("right0", f"base {half}"), ("left1", "left0 0"), ("right1", "right0 0")):
        await verbs.create(name, f"0 {half} linear {below}")
    await verbs.create("stack", f"0 {whole} striped 2 128 left1 0 right1 0")
    await verbs.create("secret", f"0 {whole} crypt aes-xts-plain64 {bytes(range(64)).hex()} 0 base 0")
    for name in ("base", "stack", "secret"):
        await verbs.export(name)


def _transfer(size: int) -> tuple[float, float]:
    """Microseconds, for each of DEPTH, of sending `size` bytes on a Unix socket, and of receiving them."""
    data, room = memoryview(bytes(size)), bytearray(size)
    best_send = best_receive = float("inf")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for _ in range(50 * REPEATS):
            sending = receiving = 0.0
            done = 0
            while done < size:
                start = time.thread_time()
                count = ours.send(data[done:], socket.MSG_DONTWAIT)
                middle = time.thread_time()
                while count:
                    received = theirs.recv_into(room)
                    count -= received
                    done += received
                sending += middle - start
                receiving += time.thread_time() - middle
            best_send, best_receive = min(best_send, sending), min(best_receive, receiving)
    return best_send / DEPTH * 1e6, best_receive / DEPTH * 1e6


async def _kernel(path: Path, read: bytes, write: bytes) -> list[Line]:
    """What is left when all of the server's own work is taken away."""
    buffer = bytearray(BLOCK)
    descriptor = os.open(path, os.O_RDWR)
    try:
        reads = await microseconds(each(lambda at: os.preadv(descriptor, (buffer,), at), OFFSETS))
        writes = await microseconds(each(lambda at: os.pwritev(descriptor, (buffer,), at), OFFSETS))
    finally:
        os.close(descriptor)
    return [
        (f"kernel: receive {DEPTH} requests, each", _transfer(len(read))[1], _transfer(len(write))[1]),
        ("kernel: preadv, pwritev of the page cache", reads, writes),
        (f"kernel: send {DEPTH} replies, each", _transfer(DEPTH * (28 + BLOCK))[0], _transfer(DEPTH * 16)[0]),
    ]


def _parse(message: bytes) -> Call:
    reader = RequestReader(False)
    placed: object = None

    def call() -> int:
        nonlocal placed
        buffer = reader.get_buffer()
        if buffer.obj is not placed:
            buffer[: len(message)] = message
            placed = buffer.obj
        reader.advance(len(message))
        while reader.next() is not None:
            pass
        return 0

    return call


async def _column(mapper: Mapper, exports: Exports, command: nbd.Cmd, functions: bool) -> list[tuple[str, float]]:
    """Every step of reads, or of writes, from the small to the whole."""
    base, upper = mapper.devices["base"], mapper.devices["upper"]
    table = base.live
    assert table is not None
    write = command == nbd.Cmd.WRITE
    message = requests(command)
    reader = RequestReader(False)
    reader.feed(message)
    found = list(iter(reader.next, None))
    session = Session(exports.find("base"), True, False, {})
    door, replies, serving = Door(session), Replies(True, False), Serving(base, session, Buffers().take)
    io = Io(WRITE if write else READ, BLOCK, memoryview(bytearray(BLOCK)))
    waiting: set[asyncio.Task[None]] = set()

    def device(one: Submits) -> Call:
        return eagerly(lambda offset: one.submit(io, offset), OFFSETS, waiting)

    steps: list[tuple[str, Call]] = [
        ("parse", _parse(message)),
        ("door", each(door.check, found)),
        ("reply buffer", each(replies.done if write else replies.read, found)),
        ("device: the file", device(table.devices[0])),
        ("device: and a table of one linear", device(table)),
        ("device: and the mapped device", device(base)),
        ("device: and a second one over it", device(upper)),
        ("serve: reply buffer and device together", eagerly(lambda request: serving.serve(request, []), found, waiting)),
        (f"a wake-up of {DEPTH}, each", Client(exports, "base").wake_up(message)),
        (f"a wake-up of {DEPTH}, each, through a striped stack", Client(exports, "stack").wake_up(message)),
        (f"a wake-up of {DEPTH}, each, through crypt (aes-xts-plain64)", Client(exports, "secret").wake_up(message)),
    ]
    if functions:
        _print_functions(steps[-3][1])
    return [(name, await microseconds(call)) for name, call in steps]


async def profile(where: Site, functions: bool = False) -> list[Line]:
    """Measures every step; with `functions` cProfile's view of the wake-ups is printed, too."""
    path = where.file(Backing.DATA)
    where.warm(Backing.DATA)
    mapper = Mapper(TARGETS, Events(time.time))
    exports = Exports(mapper)
    await _devices(Verbs(mapper, exports), path)
    reads = await _column(mapper, exports, nbd.Cmd.READ, functions)
    writes = await _column(mapper, exports, nbd.Cmd.WRITE, functions)
    lines = [(name, read, write) for (name, read), (_, write) in zip(reads, writes, strict=True)]
    return lines + await _kernel(path, requests(nbd.Cmd.READ), requests(nbd.Cmd.WRITE))


def _print_functions(call: Call) -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(2000):
        call()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(18)


def table(lines: Sequence[Line]) -> str:
    """The lines, in Markdown."""
    head = [f"{BLOCK // KIB} KiB at depth {DEPTH}, us for each request", "read", "write"]
    return markdown_table(head, [[name, *(f"{us:.2f}" for us in pair)] for name, *pair in lines])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description="the steps of one request, in us")
    parser.add_argument("--functions", action="store_true", help="print cProfile's view of the wake-ups, too")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where the file that is served is made (/tmp)")
    chosen = parser.parse_args(arguments)
    with ended_by_signals(), site(chosen.directory, size=SIZE) as where:
        print(table(uvloop.run(profile(where, chosen.functions))))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

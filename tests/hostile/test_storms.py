"""N13, N14, CVE-2015-0847: storms of signals and of connects, and a process without descriptors, under load."""

import json
import os
import random
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pytest

from nbdmap.nbd.constants import Cmd
from tests.hostile.wire import CONFIG, MIB, Raw, cpu_seconds, openers, request, serves, tcp
from tests.support.clients import wait_until
from tests.support.server import Server, serving

SPARE: Final = 40
"""Descriptors beyond those that the server has at rest."""


class Load(threading.Thread):
    """A client that writes, reads back, flushes and counts until it is told to stop, or the server leaves."""

    def __init__(self, server: Server, seed: int) -> None:
        super().__init__(daemon=True)
        self._client = Raw(server.socket).go("img")
        self._numbers = random.Random(seed)
        self._base = seed * MIB
        self.count = 0
        self.wrong = 0
        self.allowed: dict[int, list[bytes]] = {}
        """What may stand in the file: what was flushed, and what was written over it since."""
        self.over = threading.Event()

    def run(self) -> None:
        written: dict[int, bytes] = {}
        client = self._client
        try:
            while not self.over.is_set():
                at, data = self._base + 512 * self._numbers.randrange(256), self._numbers.randbytes(512)
                written[at] = data
                if at in self.allowed:
                    self.allowed[at].append(data)
                client.socket.sendall(request(Cmd.WRITE, 1, at, 512, payload=data))
                client.simple()
                self.wrong += client.read(at) != data
                self.count += 1
                if self.count % 16 == 0:
                    client.socket.sendall(request(Cmd.FLUSH, 2))
                    if client.simple()[:2] == (0, 2):
                        self.allowed = {at: [data] for at, data in written.items()}
        except (OSError, AssertionError):
            pass  # the server has stopped
        finally:
            client.socket.close()


@contextmanager
def under_load(server: Server, clients: int = 3) -> Iterator[list[Load]]:
    loads = [Load(server, seed) for seed in range(clients)]
    for load in loads:
        load.start()
    try:
        wait_until(lambda: all(load.count > 10 for load in loads))
        yield loads
    finally:
        for load in loads:
            load.over.set()
            load.join(10)
        assert not any(load.is_alive() for load in loads)
        assert not any(load.wrong for load in loads)


def test_cve_2015_0847_storm_of_reloads_under_load() -> None:
    """CVE-2015-0847: 3,000 SIGHUPs, SIGCHLDs and SIGCONTs while three clients write: nobody is dropped, none deadlocks."""
    with serving(CONFIG) as server, under_load(server) as loads:
        before = [load.count for load in loads]
        for _ in range(1000):
            for number in (signal.SIGHUP, signal.SIGCHLD, signal.SIGCONT):
                os.kill(server.process.pid, number)
        wait_until(lambda: all(load.count > count + 100 for load, count in zip(loads, before, strict=True)))
        assert all(load.is_alive() for load in loads)
        wait_until(lambda: "reloaded" in server.log())
        serves(server)


@pytest.mark.parametrize("kinds", [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)])
def test_n13_storm_of_stops_under_load(kinds: tuple[signal.Signals, ...]) -> None:
    """N13, CVE-2015-0847: hundreds of SIGTERMs at once under load end it once, in 2 s; what was flushed is in the file."""
    with serving(CONFIG) as server:
        with under_load(server) as loads:
            begun = time.monotonic()
            for number in range(200):
                os.kill(server.process.pid, kinds[number % len(kinds)])
                if server.process.poll() is not None:
                    break
            server.process.wait(10)
            assert time.monotonic() - begun < 2.0
        image = (server.directory / "a.img").read_bytes()
        for load in loads:
            for at, allowed in load.allowed.items():
                assert image[at : at + 512] in allowed, at
        assert any(load.allowed for load in loads)


def test_n14_without_descriptors() -> None:
    """N14: accept fails with EMFILE: it does not spin, those it has are served, and it takes new ones when it can again."""
    with serving(CONFIG, listen=["nbd://127.0.0.1:0"]) as server, Raw(server.socket) as good:
        good.go("ram").read()
        limit = len(os.listdir(f"/proc/{server.process.pid}/fd")) + SPARE
        _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (limit, hard))
        where = tcp(server)
        crowd = []
        for _ in range(4 * SPARE):
            one = socket.socket()
            one.settimeout(10)
            one.connect(where)
            crowd.append(one)
        used, begun = cpu_seconds(server), time.monotonic()
        while time.monotonic() - begun < 1.5:
            good.read()
            threading.Event().wait(0.05)
        busy = (cpu_seconds(server) - used) / (time.monotonic() - begun)
        for one in crowd:
            one.close()
        wait_until(lambda: takes(server))
        assert busy < 0.5, f"it spins: {busy:.0%} of a CPU"
        wait_until(lambda: openers(server)["ram"] <= 1)
        assert len(server.log().splitlines()) < 300


def takes(server: Server) -> bool:
    try:
        with Raw(tcp(server), 1) as client:
            client.go("ram").read()
            return True
    except (OSError, AssertionError):
        return False


def test_n14_storm_of_connects() -> None:
    """N14: 8,000 connects as fast as four threads can, some of them served, while a good client goes on."""
    with serving(CONFIG, listen=["nbd://127.0.0.1:0"]) as server, Raw(server.socket) as good:
        good.go("ram").read()
        where = tcp(server)
        rates = []

        def storm(seed: int) -> None:
            numbers = random.Random(seed)
            begun = time.monotonic()
            for _ in range(2000):
                with Raw(where) as client:
                    way = numbers.randrange(20)
                    if way == 0:
                        client.go("ram").read()
                    elif way < 5:
                        client.reset()
            rates.append(2000 / (time.monotonic() - begun))

        threads = [threading.Thread(target=storm, args=(seed,)) for seed in range(4)]
        slowest = 0.0
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            begun = time.monotonic()
            good.read()
            slowest = max(slowest, time.monotonic() - begun)
        for thread in threads:
            thread.join()
        print(f"{sum(rates):.0f} connects/s, a good client waited {slowest * 1000:.1f} ms at most")
        assert len(rates) == 4
        assert slowest < 1.0
        wait_until(lambda: openers(server)["ram"] == 1)


def test_n1_the_admin_socket_is_bounded() -> None:
    """N1, N3 for the admin socket: silent clients, lines without an end and garbage leave room for the next."""
    with serving(CONFIG) as server:
        silent = [Raw(server.admin) for _ in range(40)]
        for one in silent:
            one.send(b'{"jsonrpc": "2.0", "method": "version", "id": 1')
        for one in silent[32:]:
            assert b"as many as may be" in one.rest()
        silent[0].send(b" " * (17 * MIB))
        assert b"longer than" in silent[0].rest()
        silent[1].send(b"}\n" + b"\xff\n[]\n{}\nnull\n[[[[\n" + b"[" * 100_000 + b"\n")
        silent[1].socket.shutdown(socket.SHUT_WR)
        answers = [json.loads(line) for line in silent[1].rest().splitlines()]
        assert "result" in answers[0]
        assert {answer["error"]["code"] for answer in answers[1:]} == {-32700, -32600}
        for one in silent:
            one.socket.close()
        wait_until(lambda: server.try_verb("version").returncode == 0)

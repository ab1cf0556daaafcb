"""N1, N13, CVE-2024-7409: clients that hold a connection and say nothing, too little, or too slowly.

One test waits for the true deadline of 10 seconds with 10,000 silent clients; the others have a shorter one.
"""

import select
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from nbdmap.nbd.constants import Opt
from nbdmap.server.connection import HANDSHAKE_SECONDS
from tests.hostile.wire import (
    CONFIG,
    Raw,
    descriptors,
    hasty,
    openers,
    raise_descriptor_limit,
    resident,
    tcp,
)
from tests.support.clients import wait_until
from tests.support.handshake import BOTH, option
from tests.support.server import Server, serving

CROWD: Final = 10_000
MEMORY_EACH: Final = 64 << 10
SERVED_SECONDS: Final = 0.1
STOP_SECONDS: Final = 2.0
HALF: Final = BOTH + option(Opt.INFO, bytes(100))[:60]


class Crowd:
    """Many connections of this process. `poll` sees when the server drops them."""

    def __init__(self) -> None:
        self.sockets: dict[int, socket.socket] = {}
        self.begun: dict[int, float] = {}
        self.held: list[float] = []
        """Seconds from each connect to the server's close."""
        self._poll = select.epoll()

    def gather(self, server: Server, count: int, say: bytes = b"") -> None:
        """Connects; waits for each greeting, so that each is really accepted."""
        where = tcp(server)
        for _ in range(count):
            one = socket.socket(socket.AF_INET)
            one.settimeout(20)
            one.connect(where)
            number = one.fileno()
            self.sockets[number], self.begun[number] = one, time.monotonic()
            if say:
                one.sendall(say)
        for number, one in self.sockets.items():
            assert len(one.recv(18, socket.MSG_WAITALL)) == 18
            one.setblocking(False)
            self._poll.register(number, select.EPOLLIN | select.EPOLLRDHUP)

    def until_dropped(self, seconds: float, each_second: bytes = b"") -> None:
        """Until the server has closed every one; AssertionError after `seconds`."""
        end = time.monotonic() + seconds
        next_words = time.monotonic()
        while self.sockets:
            now = time.monotonic()
            assert now < end, f"{len(self.sockets)} are still connected"
            if each_second and now >= next_words:
                next_words = now + 1
                for one in self.sockets.values():
                    try:
                        one.send(each_second)
                    except OSError:
                        pass  # it is dropped already, as epoll will say
            for number, _ in self._poll.poll(min(0.1, end - now), 2048):
                self._poll.unregister(number)
                self.sockets.pop(number).close()
                self.held.append(now - self.begun.pop(number))

    def disperse(self) -> None:
        for one in self.sockets.values():
            one.close()
        self.sockets.clear()
        self._poll.close()


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    raise_descriptor_limit(CROWD + 2_000)
    made = Crowd()
    yield made
    made.disperse()


def serving_times(server: Server, times: int = 20) -> list[float]:
    """Seconds from the connect of a good client to its first data."""
    found = []
    for _ in range(times):
        begun = time.monotonic()
        with Raw(tcp(server)) as client:
            client.go("ram").read()
            found.append(time.monotonic() - begun)
    return found


def test_10000_silent_clients(crowd: Crowd, record_property: Callable[[str, object], None]) -> None:
    """N1, N13, CVE-2024-7409: 10,000 clients that never speak, the true deadline, and a stop with all connected."""
    with serving(CONFIG, listen=["nbd://127.0.0.1:0"]) as server:
        serving_times(server)
        before = resident(server)
        crowd.gather(server, CROWD)
        assert descriptors(server) >= CROWD
        each = (resident(server) - before) / CROWD
        times = serving_times(server)
        crowd.until_dropped(20)
        longest, shortest = max(crowd.held), min(crowd.held)
        after = serving_times(server, 1)[0]
        crowd.gather(server, CROWD)
        begun = time.monotonic()
        server.process.terminate()
        assert server.process.wait(10) == 0
        stopped = time.monotonic() - begun
        figures = {
            "memory each": f"{each / 1024:.1f} KiB", "served within": f"{max(times) * 1000:.1f} ms",
            "median": f"{statistics.median(times) * 1000:.1f} ms", "dropped after": f"{shortest:.1f} to {longest:.1f} s",
            "stopped with all connected after": f"{stopped:.2f} s", "served afterwards within": f"{after * 1000:.1f} ms",
        }  # fmt: skip
        print(figures)
        for name, value in figures.items():
            record_property(name, value)
        assert each <= MEMORY_EACH
        # alone on the machine: 0.6 ms, 10.1 s and 0.7 s; other tests run beside this one
        assert statistics.median(times) < SERVED_SECONDS
        assert HANDSHAKE_SECONDS == 10
        assert shortest > 9
        assert longest <= HANDSHAKE_SECONDS + 3.0
        assert stopped < 3 * STOP_SECONDS


@pytest.mark.parametrize(
    ("say", "each_second"),
    [
        pytest.param(BOTH + b"IHAVE", b"", id="half-an-option"),
        pytest.param(HALF[:10], HALF[10:11], id="slowloris"),
    ],
)
def test_10000_that_speak_too_little(crowd: Crowd, say: bytes, each_second: bytes) -> None:
    """N1: half-open handshakes, and one byte a second, do not put the deadline off."""
    deadline = 3.0
    with hasty(deadline, listen=["nbd://127.0.0.1:0"]) as server:
        serving_times(server)
        before = resident(server)
        crowd.gather(server, CROWD, say)
        each = (resident(server) - before) / CROWD
        crowd.until_dropped(deadline + 8, each_second)
        assert max(crowd.held) < deadline + 5
        assert each <= MEMORY_EACH
        assert descriptors(server) < 100
        assert set(openers(server).values()) == {0}


def test_connect_and_close_10000(record_property: Callable[[str, object], None]) -> None:
    """N14, CVE-2017-9524, CVE-2019-14850: a port scan leaves nothing behind, and opens no device."""
    with hasty(30, listen=["nbd://127.0.0.1:0"]) as server:
        where = tcp(server)
        serving_times(server)
        opened = descriptors(server)
        begun = time.monotonic()
        for _ in range(CROWD):
            Raw(where).reset()
        rate = CROWD / (time.monotonic() - begun)
        slowest = max(serving_times(server, 5))
        record_property("connects a second", round(rate))
        assert slowest < 5
        wait_until(lambda: descriptors(server) <= opened + 1)
        assert set(openers(server).values()) == {0}

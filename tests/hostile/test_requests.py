"""N7 to N10 and the CVEs of transmission: requests that lie, that never end, and clients that do not read."""

import random
import socket
import struct
import time
from collections.abc import Iterator
from typing import Final

import pytest

from nbdmap.nbd import constants as nbd
from nbdmap.nbd.constants import MAX_PAYLOAD, Chunk, Cmd, Error, Opt
from nbdmap.server.connection import MAX_BYTES, MAX_UNSENT
from tests.hostile.wire import CONFIG, MIB, Raw, cpu_seconds, openers, request, resident, serves
from tests.support.clients import wait_until
from tests.support.server import Server, serving

SIZE: Final = 64 * MIB
HOLE: Final = 8 << 40
EINVAL, ENOSPC, OVERFLOW = Error.EINVAL, Error.ENOSPC, Error.EOVERFLOW
FAIR_SECONDS: Final = 0.5


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(CONFIG) as running:
        yield running
        serves(running)
        wait_until(lambda: set(openers(running).values()) == {0})


# --- N7 ------------------------------------------------------------------------------------------------------------------

LIES: Final = [
    # command, offset, length, flags, the error
    *((Cmd.READ, 0, length, 0, EINVAL) for length in (MAX_PAYLOAD + 1, 2**31, 2**32 - 1)),
    *((Cmd.READ, offset, 512, 0, EINVAL) for offset in (SIZE, SIZE - 511, 2**63 - 512, 2**63, 2**64 - 512, 2**64 - 1)),
    *((Cmd.WRITE_ZEROES, offset, 512, 0, ENOSPC) for offset in (SIZE, SIZE - 1, 2**63 - 1, 2**63, 2**64 - 1)),
    *((Cmd.TRIM, offset, 2**32 - 1, 0, EINVAL) for offset in (0, SIZE, 2**63, 2**64 - 1)),
    *((Cmd.CACHE, offset, 512, 0, EINVAL) for offset in (SIZE, 2**63, 2**64 - 1)),
    *((Cmd.READ, 0, 512, flag, EINVAL) for flag in (2, 4, 8, 16, 32, 64, 2**15)),
    *((Cmd.TRIM, 0, 512, flag, EINVAL) for flag in (2, 4, 8, 16, 32, 2**15)),
    *((Cmd.FLUSH, 0, 0, flag, EINVAL) for flag in (2, 8, 2**14)),
    *((command, 0, 0, 0, EINVAL) for command in (Cmd.BLOCK_STATUS, Cmd.RESIZE, 9, 255, 2**16 - 1)),
]


def test_n7_lengths_offsets_flags_and_commands(server: Server) -> None:
    """N7, CVE-2005-3534, CVE-2011-0530: each lie is told its error, and the stream stays in step."""
    with Raw(server.socket) as client:
        client.go("ram")
        for cookie, (command, offset, length, flags, wanted) in enumerate(LIES):
            client.send(request(command, cookie, offset, length, flags))
            assert client.simple() == (wanted, cookie, b""), (command, offset, length, flags)
        for command in (Cmd.READ, Cmd.TRIM, Cmd.WRITE_ZEROES, Cmd.CACHE, Cmd.WRITE):
            client.send(request(command, 9, 1024, 0))
            assert client.simple() == (0, 9, b"")
        assert client.read() == bytes(512)


@pytest.mark.parametrize("length", [MAX_PAYLOAD + 1, 40 * MIB])
def test_n7_writes_that_are_too_long(server: Server, length: int) -> None:
    """N7, CVE-2005-3534: the payload is dropped, not kept: memory does not grow; the next request is served."""
    with Raw(server.socket) as client:
        client.go("ram")
        before = resident(server)
        client.send(request(Cmd.WRITE, 1, 0, length) + b"\xee" * length)
        client.send(request(Cmd.WRITE, 2, 2**64 - 512, 512, payload=b"\xee" * 512))
        assert client.simple()[:2] == (EINVAL, 1)
        assert client.simple()[:2] == (ENOSPC, 2)
        assert resident(server) - before < 2 * MIB
        assert client.read() == bytes(512)


def test_n7_the_largest_request_is_served(server: Server) -> None:
    """N7: payloads of 2^25 bytes are no attack."""
    with Raw(server.socket) as client:
        client.go("img")
        data = random.Random(7).randbytes(MAX_PAYLOAD)
        client.send(request(Cmd.WRITE, 1, SIZE - MAX_PAYLOAD, MAX_PAYLOAD, payload=data))
        assert client.simple() == (0, 1, b"")
        assert client.read(SIZE - MAX_PAYLOAD, MAX_PAYLOAD) == data
        client.send(request(Cmd.WRITE_ZEROES, 1, 0, SIZE))
        assert client.simple() == (0, 1, b"")
        assert client.read(SIZE - MAX_PAYLOAD, MAX_PAYLOAD) == bytes(MAX_PAYLOAD)


@pytest.mark.parametrize("extended", [False, True])
def test_cve_2025_47711_47712_block_status_at_the_borders(server: Server, extended: bool) -> None:
    """CVE-2025-47711, CVE-2025-47712: block status of 2^32-1 bytes, and of odd ranges, over a hole of 8 TiB: never more
    than was asked for, and never more than 32 bits can say."""
    options = (Opt.EXTENDED_HEADERS if extended else Opt.STRUCTURED_REPLY, Opt.SET_META_CONTEXT)
    with Raw(server.socket) as client:
        client.go("zero", options)
        block = 1 if extended else 512
        for offset in (0, 512, 4096, 2**32 - 512, 2**32, 2**40, HOLE - 2**32, HOLE - 512):
            for length in (512, 1024, 65536, 2**31, 2**32 - 512, 2**32 - 1):
                length -= length % 512 if offset + length > HOLE or block == 512 else 0
                length = min(length, HOLE - offset)
                for flags in (0, nbd.CMD_FLAG_REQ_ONE):
                    if extended:
                        head = struct.pack(">IHHQQQ", nbd.EXTENDED_REQUEST_MAGIC, flags, Cmd.BLOCK_STATUS, 5, offset, length)
                        client.send(head)
                        *_, kind, cookie, _, size = nbd.EXTENDED_REPLY.unpack(client.exactly(32))
                        body = client.exactly(size)
                        assert cookie == 5
                        if length % 512:
                            assert kind & 2**15
                            continue
                        found = [one for one, _ in struct.iter_unpack(">QQ", body[8:])]
                    else:
                        client.send(request(Cmd.BLOCK_STATUS, 5, offset, length, flags))
                        _, _, kind, cookie, size = nbd.STRUCTURED_REPLY.unpack(client.exactly(20))
                        body = client.exactly(size)
                        assert (kind, cookie) == (Chunk.BLOCK_STATUS, 5)
                        found = [one for one, _ in struct.iter_unpack(">II", body[4:])]
                    assert all(one > 0 for one in found)
                    assert 0 < sum(found) <= length


# --- N8 ------------------------------------------------------------------------------------------------------------------


def test_n8_writes_whose_body_never_comes(server: Server) -> None:
    """N8: 200 clients announce 32 MiB and send a little of it: what is not sent costs no memory and is not written."""
    with Raw(server.socket) as good:
        good.go("img")
        before = resident(server)
        clients = [Raw(server.socket).go("img") for _ in range(200)]
        for client in clients:
            client.send(request(Cmd.WRITE, 1, 0, MAX_PAYLOAD) + b"\xee" * 5000)
        for client in clients:
            client.socket.settimeout(0.001)
        assert good.read(0, 65536) == bytes(65536)
        assert resident(server) - before < 200 * (64 << 10) + 4 * MIB
        for client in clients:
            client.socket.close()
        wait_until(lambda: openers(server)["img"] == 1)
        assert good.read(0, 65536) == bytes(65536)


# --- N9 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("export", ["ram", "img", "zero"])
def test_n9_a_client_that_never_reads(server: Server, export: str) -> None:
    """N9: 16,384 reads of 32 MiB, 512 GiB in all, of which nothing is read: memory stays bounded, others are served."""
    with Raw(server.socket) as client, Raw(server.socket) as good:
        good.go("ram").read()
        client.go(export)
        before = resident(server)
        client.socket.setblocking(False)
        flood = b"".join(request(Cmd.READ, cookie, 0, MAX_PAYLOAD) for cookie in range(16384))
        try:
            while flood:
                flood = flood[client.socket.send(flood) :]
        except BlockingIOError:
            pass
        begun = time.monotonic()
        for _ in range(20):
            good.read()
        assert time.monotonic() - begun < 20 * FAIR_SECONDS
        assert resident(server) - before <= MAX_BYTES + MAX_PAYLOAD + MAX_UNSENT
        used = cpu_seconds(server)
        good.read()
        assert cpu_seconds(server) - used < 0.5, "it spins"


def test_n9_a_reset_with_replies_under_way(server: Server) -> None:
    """nbdkit 9d82aa4f: what a client that vanished was to get goes to nobody else, whatever descriptor is used again."""
    with Raw(server.socket) as good:
        good.go("ram")
        for _ in range(50):
            bad = Raw(server.socket).go("zero")
            bad.send(b"".join(request(Cmd.READ, cookie, 0, 65536) for cookie in range(64)))
            bad.socket.close()
            with Raw(server.socket) as next_one:  # on the descriptor that was the other's
                next_one.go("ram")
                assert next_one.read(0, 1024) == bytes(1024)
            assert good.read() == bytes(512)


# --- N10 -----------------------------------------------------------------------------------------------------------------


def test_n10_duplicate_cookies(server: Server) -> None:
    """N10: a cookie means nothing to the server: each request gets one answer, in whatever order."""
    with Raw(server.socket) as client:
        client.go("ram")
        client.send(request(Cmd.READ, 7, 0, 512) * 50 + request(Cmd.FLUSH, 7) * 50 + request(Cmd.READ, 8, SIZE, 512))
        answers = bytearray(client.exactly(50 * (16 + 512) + 51 * 16))
        assert answers.count(struct.pack(">IIQ", nbd.SIMPLE_REPLY_MAGIC, 0, 7)) == 100
        assert answers.count(struct.pack(">IIQ", nbd.SIMPLE_REPLY_MAGIC, EINVAL, 8)) == 1
        client.send(request(Cmd.DISC))
        assert client.rest() == b""


@pytest.mark.parametrize("export", ["ram", "img"])
def test_n10_100000_pipelined_flushes(server: Server, export: str) -> None:
    """N10: a flood of flushes is answered, each once, while another client is served in between."""
    count = 100_000 if export == "ram" else 20_000
    flood = b"".join(request(Cmd.FLUSH, cookie) for cookie in range(count))
    with Raw(server.socket) as client, Raw(server.socket) as good:
        good.go("ram")
        client.go(export)
        client.socket.setblocking(False)
        answers = bytearray()
        slowest = 0.0
        last = time.monotonic()
        while len(answers) < 16 * count:
            assert time.monotonic() - last < 20
            for step in (client.socket.send, client.socket.recv):
                try:
                    if step == client.socket.send:
                        flood = flood[step(flood[: 1 << 18]) :] if flood else flood
                    else:
                        answers += client.socket.recv(MIB)
                        last = time.monotonic()
                except BlockingIOError:
                    pass
            begun = time.monotonic()
            good.read()
            slowest = max(slowest, time.monotonic() - begun)
        seen = {cookie for magic, error, cookie in struct.iter_unpack(">IIQ", answers) if not error}
        assert len(seen) == count
        assert slowest < FAIR_SECONDS


# --- N13 -----------------------------------------------------------------------------------------------------------------


def test_n13_stop_with_all_of_it_connected() -> None:
    """N13, CVE-2024-7409: silent clients, half of a write, unread replies, half an option: SIGTERM ends it in 2 s with
    status 0, and what was flushed is in the file."""
    with serving(CONFIG) as server:
        clients = [Raw(server.socket) for _ in range(300)]
        for number, client in enumerate(clients):
            if number % 4 == 1:
                client.greet().send(nbd.OPTION.pack(nbd.OPTION_MAGIC, 7, 100) + b"half")
            if number % 4 == 2:
                client.go("img").send(request(Cmd.WRITE, 1, 0, MAX_PAYLOAD) + b"\xee" * 1000)
            if number % 40 == 3:
                client.go("zero").send(request(Cmd.READ, 1, 0, MAX_PAYLOAD) * 3)
        good = Raw(server.socket).go("img")
        data = random.Random(13).randbytes(MIB)
        good.send(request(Cmd.WRITE, 1, MIB, MIB, payload=data))
        assert good.simple() == (0, 1, b"")
        good.send(request(Cmd.FLUSH, 2))
        assert good.simple() == (0, 2, b"")
        good.send(request(Cmd.WRITE, 1, 2 * MIB, MIB, payload=data))
        assert good.simple() == (0, 1, b"")
        server.stop()  # within 2 s, with 0
        with (server.directory / "a.img").open("rb") as image:
            assert image.read(MIB) == bytes(MIB)
            assert image.read(2 * MIB) == data * 2
        for client in (*clients, good):
            client.socket.close()


def test_n8_half_a_request_then_a_half_close(server: Server) -> None:
    """N8: a client that ends its sending side within a request gets the answers to the whole ones, and the end."""
    with Raw(server.socket) as client:
        client.go("ram")
        client.send(request(Cmd.READ, 1, 0, 512) + request(Cmd.WRITE, 2, 0, 4096) + b"x" * 4095)
        client.socket.shutdown(socket.SHUT_WR)
        assert len(client.rest()) == 16 + 512
    with Raw(server.socket) as client:
        assert client.go("ram").read() == bytes(512)

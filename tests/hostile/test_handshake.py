"""N2 to N6 and the CVEs of handshakes, said byte for byte to one real server that must live through all of it."""

import itertools
import random
import struct
from collections.abc import Iterator
from typing import Final

import pytest

from nbdmap.nbd.constants import OPTION, OPTION_MAGIC, Info, Opt, Rep
from nbdmap.nbd.handshake import MAX_DRAINED_DATA, MAX_OPTION_DATA, MAX_OPTIONS
from tests.hostile.wire import CONFIG, LONGEST_NAME, MIB, Raw, cpu_seconds, openers, resident, serves
from tests.support.clients import wait_until
from tests.support.handshake import BOTH, FIXED, info, option, query
from tests.support.server import Server, serving

NAMED: Final = (Opt.INFO, Opt.GO)
QUERIES: Final = (Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT)
EVERY_OPTION: Final = (*range(16), 255, 256, 2**31, 2**32 - 1)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(CONFIG) as running:
        yield running
        serves(running)
        wait_until(lambda: set(openers(running).values()) == {0})


def name(raw: bytes) -> bytes:
    return struct.pack(">I", len(raw)) + raw


# --- N2 ------------------------------------------------------------------------------------------------------------------

GARBAGE: Final = {
    "zeroes": bytes(64),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "unknown client flags": struct.pack(">I", 0xFFFFFFFF),
    "old-style flags": struct.pack(">I", 4),
    "wrong option magic": BOTH + OPTION.pack(OPTION_MAGIC + 1, Opt.LIST, 0),
    "reply magic": BOTH + OPTION.pack(0x3E889045565A9, Opt.LIST, 0),
    "request instead of an option": BOTH + struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 512),
    "option without fixed newstyle": struct.pack(">I", 0) + option(Opt.LIST),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_n2_garbage_closes(server: Server, what: str) -> None:
    """N2: garbage magic, wrong option magic, old-style client flags."""
    with Raw(server.socket) as client:
        client.send(GARBAGE[what])
        assert client.rest() == b"NBDMAGICIHAVEOPT\0\3"


def test_n2_cve_2017_7539_unexpected_data_at_each_step(server: Server) -> None:
    """CVE-2017-7539: a handshake of many steps is interrupted by garbage after each of them."""
    steps = [
        BOTH, option(Opt.STRUCTURED_REPLY), option(Opt.SET_META_CONTEXT, query("ram", b"base:allocation")),
        option(Opt.INFO, info("ram", Info.NAME)), option(Opt.LIST), option(Opt.GO, info("ram")),
    ]  # fmt: skip
    for count, junk in itertools.product(range(len(steps) + 1), [b"\0" * 40, b"\xff" * 40, OPTION.pack(OPTION_MAGIC, 7, 9)]):
        with Raw(server.socket) as client:
            client.send(b"".join(steps[:count]) + junk)
            client.socket.shutdown(1)
            assert client.rest().startswith(b"NBDMAGIC")
    serves(server)


def test_n2_no_flood_of_the_log() -> None:
    """N2: 2,000 clients with garbage write a handful of lines, which say how many were not written; no traceback."""
    with serving(CONFIG) as server:
        before = len(server.log().splitlines())
        for number in range(2000):
            with Raw(server.socket) as client:
                client.send(b"\xff" * 4 if number % 2 else BOTH + bytes(16))
                client.rest()
        serves(server)
        lines = server.log().splitlines()[before:]
        assert len(lines) < 60, f"{len(lines)} lines"
        assert any("unknown client flags" in line for line in lines)


# --- N3 ------------------------------------------------------------------------------------------------------------------


def test_n3_options_that_claim_4_gib(server: Server) -> None:
    """N3, CVE-2017-15119, CVE-2013-2850: an option of 4 GiB - 1 bytes, known or not, ends the connection at once."""
    before = resident(server)
    for number in range(256):
        with Raw(server.socket) as client:
            client.greet()
            client.send(OPTION.pack(OPTION_MAGIC, number, 2**32 - 1) + bytes(4096))
            assert client.rest() == b""
    assert resident(server) - before < MIB


def test_n3_streamed_options_cost_little(server: Server) -> None:
    """N3, CVE-2017-15119: what is drained costs at most 50 ms of CPU a MiB and no memory; more than that is not drained."""
    with Raw(server.socket) as client:
        client.greet()
        assert client.ask(4711, bytes(MAX_DRAINED_DATA)) == Rep.ERR_UNSUP
        before, memory = cpu_seconds(server), resident(server)
        for _ in range(32):
            for number in (Opt.LIST, 99999):
                kind = client.ask(number, bytes(MAX_DRAINED_DATA))
                assert kind == (Rep.ERR_TOO_BIG if number == Opt.LIST else Rep.ERR_UNSUP)
        assert (cpu_seconds(server) - before) / 64 <= 0.05
        assert resident(server) - memory <= 64 << 10
        client.send(OPTION.pack(OPTION_MAGIC, Opt.LIST, MAX_DRAINED_DATA + 1))
        assert client.rest() == b""


def test_n3_cve_2013_2850_unknown_options_with_text(server: Server) -> None:
    """CVE-2013-2850: an unknown option with 4,096 bytes of text is answered shortly."""
    with Raw(server.socket) as client:
        client.greet()
        for number in (0, 12, 255, 2**32 - 1):
            assert client.ask(number, b"k" * 4096) == Rep.ERR_UNSUP


# --- N4 ------------------------------------------------------------------------------------------------------------------

NAMES: Final = {
    "0": b"", "255": b"n" * 255, "256": b"n" * 256, "3000 x a": b"a" * 3000, "4096": b"m" * 4096, "4097": b"n" * 4097,
    "20000": b"n" * 20000, "NUL": b"ra\0m", "bad UTF-8": b"\xff\xfe", "surrogate": b"\xed\xa0\x80",
    "../": b"../" * 20 + b"etc/passwd",
    "/etc/passwd": b"/etc/passwd", "/dev/mapper/ram": b"/dev/mapper/ram", "%s": b"%s%n" * 30, "number": b"254:0",
}  # fmt: skip


@pytest.mark.parametrize("what", NAMES)
def test_n4_names(server: Server, what: str) -> None:
    """N4, CVE-2017-15118, CVE-2022-26495, CVE-2022-26496, CVE-2020-10761, CVE-2020-28374: no name does harm, none is a path.

    Every error path is met with a name of 4,096 bytes; `replies` checks that the text stays within the protocol's limit.
    """
    raw = NAMES[what]
    bad = len(raw) > 4096 or b"\0" in raw or not raw.isascii()
    wanted = Rep.ACK if not raw else Rep.ERR_INVALID if bad else Rep.ERR_UNKNOWN
    with Raw(server.socket) as client:
        client.greet()
        assert client.ask(Opt.STRUCTURED_REPLY) == Rep.ACK
        assert client.ask(Opt.INFO, name(raw) + bytes(2)) == wanted
        for number in QUERIES:
            assert client.ask(number, name(raw) + bytes(4)) == wanted
        assert client.ask(Opt.GO, name(raw) + bytes(2)) == wanted
    with Raw(server.socket) as client:
        client.greet()
        client.send(option(Opt.EXPORT_NAME, raw))
        if raw:
            assert client.rest() == b""
        else:
            assert len(client.exactly(10)) == 10


def test_n4_the_longest_name_is_served(server: Server) -> None:
    """CVE-2017-15118, CVE-2020-10761: an export with a name and a description of 4,096 bytes each, by every option."""
    for number in (Opt.INFO, Opt.GO):
        with Raw(server.socket) as client:
            client.greet()
            assert client.ask(Opt.LIST) == Rep.ACK
            client.send(option(number, info(LONGEST_NAME, Info.NAME, Info.DESCRIPTION)))
            said = [data[2:] for _, kind, data in client.replies() if kind == Rep.INFO]
            assert LONGEST_NAME.encode() in said
            assert b"d" * 4096 in said
    with Raw(server.socket) as client:
        client.greet()
        client.send(option(Opt.EXPORT_NAME, LONGEST_NAME.encode()))
        assert struct.unpack(">QH", client.exactly(10))[0] == 4096


@pytest.mark.parametrize("length", [7, 4097, 2**16, 2**31 - 1, 2**31, 2**32 - 1])
def test_n4_names_with_lying_lengths(server: Server, length: int) -> None:
    """N4, CVE-2022-26495, CVE-2022-26496: the length of a name is not that of the data."""
    with Raw(server.socket) as client:
        client.greet()
        assert client.ask(Opt.STRUCTURED_REPLY) == Rep.ACK
        for number in (*NAMED, *QUERIES):
            assert client.ask(number, struct.pack(">I", length) + b"ramram") == Rep.ERR_INVALID
        client.send(OPTION.pack(OPTION_MAGIC, Opt.EXPORT_NAME, length) + b"ramram")
        client.socket.shutdown(1)
        assert client.rest() == b""


# --- N5 ------------------------------------------------------------------------------------------------------------------


def test_n5_inconsistent_lengths(server: Server) -> None:
    """N5: numbers of information requests that the data does not have."""
    with Raw(server.socket) as client:
        client.greet()
        for number in NAMED:
            for data in (
                b"", b"\0", bytes(4), bytes(5), bytes(7), name(b"ram"), name(b"ram") + b"\0\1", name(b"ram") + b"\xff\xff\0\0",
                name(b"ram") + bytes(2) + b"x", name(b"ram") + b"\0\1\0\0\0",
            ):  # fmt: skip
                assert client.ask(number, data) == Rep.ERR_INVALID, data


def test_n5_many_information_requests(server: Server) -> None:
    """N5, CVE-2022-26496: 65,535 requests are more than fits; as many as fit are answered, each kind once."""
    with Raw(server.socket) as client:
        client.greet()
        data = name(b"ram") + struct.pack(">H", 65535) + bytes(2 * 65535)
        assert client.ask(Opt.INFO, data) == Rep.ERR_TOO_BIG
        count = (MAX_OPTION_DATA - 9) // 2
        fits = name(b"ram") + struct.pack(">H", count) + b"".join(struct.pack(">H", n % 65536) for n in range(count))
        client.send(option(Opt.INFO, fits))
        assert len(client.replies()) <= 5


def test_n5_a_million_options(server: Server) -> None:
    """N5: options are counted; a handshake does not go on for ever."""
    with Raw(server.socket) as client:
        client.greet()
        answered = 0
        try:
            while answered < 1_000_000:
                client.socket.sendall(option(Opt.LIST_META_CONTEXT, bytes(8)) * 100)
                for _ in range(100):
                    client.replies()
                    answered += 1
        except (AssertionError, ConnectionError):
            pass
        assert MAX_OPTIONS - 200 <= answered <= MAX_OPTIONS


def test_n5_options_without_reading_the_replies(server: Server) -> None:
    """N5: who pipelines options and reads no reply is left, and costs no memory."""
    before = resident(server)
    with Raw(server.socket) as client:
        client.greet()
        with pytest.raises(ConnectionError):
            client.socket.sendall(option(Opt.LIST) * 1_000_000)
    assert resident(server) - before < 4 * MIB


# --- N6 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", QUERIES)
def test_n6_queries_do_not_amplify(server: Server, number: int) -> None:
    """N6: at most twice the bytes that came in go out, whatever is asked."""
    asked = [
        query("ram", *[b"base:allocation"] * 1000), query("ram", *[b"q" * 4096] * 15), query("ram", *[b"base:"] * 1024),
        query("ram", *[b""] * 1024), query("ram", *[b"base:allocation"] * 1025), query(LONGEST_NAME, b"base:allocation"),
    ]  # fmt: skip
    with Raw(server.socket) as client:
        client.greet()
        assert client.ask(Opt.STRUCTURED_REPLY) == Rep.ACK
        for data in asked:
            client.send(option(number, data))
            size = sum(20 + len(text) for _, _, text in client.replies())
            assert size <= 2 * (16 + len(data))


def test_n6_list_is_bounded(server: Server) -> None:
    """N6: LIST says each export once (here 8,192 bytes of one name and description, and three short ones)."""
    with Raw(server.socket) as client:
        client.greet()
        client.send(option(Opt.LIST))
        found = client.replies()
        assert len(found) == 5
        assert sum(len(data) for _, _, data in found) < 8192 + 100


# --- many at once ----------------------------------------------------------------------------------------------------------


def test_cve_2011_1925_2013_7441_a_thousand_failed_negotiations(server: Server) -> None:
    """CVE-2011-1925, CVE-2013-7441: unknown names, closes at every step: the server lives."""
    ways = [
        b"", FIXED, BOTH + option(Opt.EXPORT_NAME, b"unknown"), BOTH + option(Opt.GO, info("unknown")),
        BOTH + OPTION.pack(OPTION_MAGIC, Opt.GO, 9) + b"\0\0", BOTH + option(Opt.ABORT), BOTH + option(Opt.ABORT, b"x" * 70000),
        struct.pack(">I", 0) + option(Opt.EXPORT_NAME, b"unknown"),
    ]  # fmt: skip
    for number in range(1000):
        with Raw(server.socket) as client:
            client.send(ways[number % len(ways)])
    serves(server)


@pytest.mark.parametrize("seed", range(4))
def test_cve_2019_14851_options_and_commands_in_random_order(server: Server, seed: int) -> None:
    """CVE-2019-14851: no order of options and commands does harm; every option gets its answer."""
    numbers = random.Random(seed)
    pieces = [
        (Opt.STRUCTURED_REPLY, b""), (Opt.EXTENDED_HEADERS, b""), (Opt.LIST, b""), (Opt.STARTTLS, b""), (Opt.PEEK_EXPORT, b""),
        *((number, query("ram", b"base:allocation")) for number in QUERIES), *((Opt.INFO, info(one)) for one in ("ram", "", "x")),
        (Opt.SET_META_CONTEXT, query("zero", b"base:allocation")), (Opt.SET_META_CONTEXT, b"junk"), (Opt.GO, info("unknown")),
        (99, b"?"), (0, b""),
    ]  # fmt: skip
    for _ in range(40):
        with Raw(server.socket) as client:
            client.greet()
            for number, data in numbers.choices(pieces, k=8):
                client.ask(number, data)
            client.send(option(Opt.GO, info("ram")))
            assert client.replies()[-1][1] == Rep.ACK
            for _ in range(3):
                command, flags = numbers.randrange(10), numbers.randrange(64)
                client.send(struct.pack(">IHHQQI", numbers.choice([0x25609513, 1]), flags, command, 1, 0, 0))
            client.socket.shutdown(1)
            client.rest()


def test_cve_2019_14850_nothing_is_opened_before_go(server: Server) -> None:
    """CVE-2019-14850: whatever is asked before GO, no device is opened."""
    with Raw(server.socket) as client:
        client.greet()
        for data in ((Opt.LIST, b""), (Opt.INFO, info("img", 0, 1, 2, 3)), (Opt.LIST_META_CONTEXT, query("img"))):
            assert client.ask(*data) == Rep.ACK
            assert openers(server)["img"] == 0
        assert client.ask(Opt.GO, info("img")) == Rep.ACK
        wait_until(lambda: openers(server)["img"] == 1)
    wait_until(lambda: openers(server)["img"] == 0)

import errno
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdmap.errors import AccessRefused, IoFailed, NbdmapError, NotFound, ProtocolError
from nbdmap.nbd.client import MAX_REPLIES, MAX_REPLY, Agreement, ClientHandshake, printable
from nbdmap.nbd.constants import (
    HAS_FLAGS,
    INIT_MAGIC,
    OLDSTYLE_MAGIC,
    OPTION_MAGIC,
    REPLY_MAGIC,
    SEND_DF,
    SEND_FLUSH,
    Info,
    Opt,
    Rep,
)
from nbdmap.nbd.handshake import Export, ServerHandshake, TlsMode
from nbdmap.nbd.negotiation import State

SIZE = 1 << 30
FLAGS = HAS_FLAGS | SEND_FLUSH
ALLOCATION = b"base:allocation"
GREETING = struct.pack(">QQH", INIT_MAGIC, OPTION_MAGIC, 3)
DEFAULTS = (1, 4096, 32 << 20)


class OneExport:
    def list(self) -> Sequence[tuple[str, str]]:
        return [("disk", "")]

    def find(self, name: str) -> Export:
        if name != "disk":
            raise NotFound(f"there is no export {name!r}")
        return Export("disk", "", SIZE, FLAGS, 512, 8192, 1 << 20)


def reply(number: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", REPLY_MAGIC, number, kind, len(data)) + data


def named(data: bytes) -> bytes:
    return reply(Opt.GO, Rep.INFO, data)


def block_sizes(*sizes: int) -> bytes:
    return reply(Opt.GO, Rep.INFO, struct.pack(">HIII", Info.BLOCK_SIZE, *sizes))


NO_EXTENDED = reply(Opt.EXTENDED_HEADERS, Rep.ERR_UNSUP)
NO_STRUCTURED = reply(Opt.STRUCTURED_REPLY, Rep.ERR_UNSUP)
STRUCTURED = reply(Opt.STRUCTURED_REPLY, Rep.ACK)
CONTEXT = reply(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, b"\0\0\0\7" + ALLOCATION) + reply(Opt.SET_META_CONTEXT, Rep.ACK)
SIMPLE = GREETING + NO_EXTENDED + NO_STRUCTURED
EXPORT = reply(Opt.GO, Rep.INFO, struct.pack(">HQH", Info.EXPORT, SIZE, FLAGS))
GO = EXPORT + reply(Opt.GO, Rep.ACK)


def options(output: bytes | bytearray) -> list[int]:
    """The numbers of the options in what a client said behind its flags."""
    found = []
    while output:
        magic, number, length = struct.unpack_from(">QII", output)
        assert magic == OPTION_MAGIC
        assert len(output) >= 16 + length
        found.append(number)
        output = output[16 + length :]
    return found


def talk(client: ClientHandshake, server: ServerHandshake) -> None:
    """Carries bytes between the two until both are silent."""
    while client.output or server.output:
        said, answered = bytes(client.output), bytes(server.output)
        client.output.clear()
        server.output.clear()
        server.feed(said)
        client.feed(answered)
        if client.state is State.STARTING_TLS and server.state is State.STARTING_TLS:
            server.tls_started()
            client.tls_started()


def told(script: bytes, *, tls: bool = False, export: str = "disk") -> ClientHandshake:
    """A client that was told all of this."""
    client = ClientHandshake(export, tls=tls)
    client.feed(script)
    return client


def failure(script: bytes, *, tls: bool = False) -> NbdmapError:
    client = told(script, tls=tls)
    assert client.state is State.CLOSED
    assert client.failure == client.error.message
    return client.error


# --- with our own server -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tls", [False, True])
def test_extended_headers(tls: bool) -> None:
    client, server = ClientHandshake("disk", tls=tls), ServerHandshake(OneExport(), TlsMode.REQUIRED if tls else TlsMode.OFF)
    talk(client, server)
    assert client.state is State.TRANSMISSION
    assert client.agreement == Agreement(SIZE, FLAGS | SEND_DF, 512, 8192, 1 << 20, extended=True, allocation=1)
    assert server.session.extended
    assert client.leftover == server.leftover == b""


@pytest.mark.parametrize(
    ("export", "tls", "mode", "error", "text"),
    [
        ("nope", False, TlsMode.OFF, NotFound, "the server refuses export 'nope' with ERR_UNKNOWN: there is no export 'nope'"),
        ("disk", True, TlsMode.OFF, AccessRefused, "TLS is wanted, but the server refuses it: this server has no TLS"),
        ("disk", False, TlsMode.REQUIRED, AccessRefused, "ERR_TLS_REQD: this server requires TLS (write nbds://"),
    ],
)
def test_refusals(export: str, tls: bool, mode: TlsMode, error: type, text: str) -> None:
    client, server = ClientHandshake(export, tls=tls), ServerHandshake(OneExport(), mode)
    talk(client, server)
    assert client.state is State.CLOSED
    assert type(client.error) is error
    assert text in client.failure
    assert (server.state, server.failure) == (State.CLOSED, ""), "the client took its leave"


def test_shutdown() -> None:
    client, server = ClientHandshake("disk"), ServerHandshake(OneExport())
    server.shutting_down = True
    talk(client, server)
    assert client.error.errno == errno.ESHUTDOWN


# --- with servers of other makes ---------------------------------------------------------------------------------------
MAKES = {
    "simple": (SIMPLE + GO, Agreement(SIZE, FLAGS)),
    "structured": (
        GREETING + NO_EXTENDED + STRUCTURED + CONTEXT + GO,
        Agreement(SIZE, FLAGS, structured=True, allocation=7),
    ),
    "structured without contexts": (
        GREETING + NO_EXTENDED + STRUCTURED + reply(Opt.SET_META_CONTEXT, Rep.ERR_UNSUP) + GO,
        Agreement(SIZE, FLAGS, structured=True),
    ),
    "contexts, but not that one": (
        GREETING
        + NO_EXTENDED
        + STRUCTURED
        + reply(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, b"\0\0\0\1qemu:x")
        + reply(Opt.SET_META_CONTEXT, Rep.ACK)
        + GO,
        Agreement(SIZE, FLAGS, structured=True),
    ),
    "context and then an error": (
        GREETING + NO_EXTENDED + STRUCTURED + CONTEXT[:-20] + reply(Opt.SET_META_CONTEXT, Rep.ERR_TOO_BIG) + GO,
        Agreement(SIZE, FLAGS, structured=True),
    ),
    "block sizes and more": (
        SIMPLE + named(b"\0\1disk") + block_sizes(512, 4096, 2**32 - 1) + named(b"\0\x63xy") + GO,
        Agreement(SIZE, FLAGS, 512, 4096, 2**32 - 1),
    ),
    "no flags": (
        SIMPLE + reply(Opt.GO, Rep.INFO, struct.pack(">HQH", 0, SIZE, 0xFFFE)) + reply(Opt.GO, Rep.ACK),
        Agreement(SIZE, 0),
    ),
    "no GO": (SIMPLE + reply(Opt.GO, Rep.ERR_UNSUP) + struct.pack(">QH", SIZE, FLAGS), Agreement(SIZE, FLAGS)),
    "no GO, structured": (
        GREETING + NO_EXTENDED + STRUCTURED + CONTEXT + reply(Opt.GO, Rep.ERR_UNSUP) + struct.pack(">QH", SIZE, FLAGS),
        Agreement(SIZE, FLAGS, structured=True, allocation=7),
    ),
    "no fixed newstyle": (
        struct.pack(">QQHQH", INIT_MAGIC, OPTION_MAGIC, 2, SIZE, FLAGS),
        Agreement(SIZE, FLAGS),
    ),
    "zeroes": (struct.pack(">QQHQH124x", INIT_MAGIC, OPTION_MAGIC, 0, SIZE, FLAGS), Agreement(SIZE, FLAGS)),
    "unknown handshake flags": (struct.pack(">QQH", INIT_MAGIC, OPTION_MAGIC, 0xFFFF) + SIMPLE[18:] + GO, Agreement(SIZE, FLAGS)),
}


@pytest.mark.parametrize("name", MAKES)
def test_whole(name: str) -> None:
    script, agreement = MAKES[name]
    client = told(script)
    assert (client.state, client.failure, client.leftover) == (State.TRANSMISSION, "", b"")
    assert client.agreement == agreement
    assert client.output[:4] == struct.pack(">I", struct.unpack_from(">QQH", script)[2] & 3)
    assert Opt.ABORT not in options(client.output[4:])


@pytest.mark.parametrize("name", MAKES)
def test_byte_by_byte(name: str) -> None:
    script, agreement = MAKES[name]
    client = ClientHandshake("disk")
    for byte in script[:-1]:
        client.feed(bytes([byte]))
        assert client.state is State.NEGOTIATING
    client.feed(script[-1:])
    assert client.agreement == agreement
    assert client.output == told(script).output


@pytest.mark.parametrize("name", MAKES)
def test_with_what_follows(name: str) -> None:
    client = told(MAKES[name][0] + b"junk")
    assert client.agreement == MAKES[name][1]
    assert client.leftover == b"junk"


@pytest.mark.parametrize("name", MAKES)
def test_server_that_leaves(name: str) -> None:
    script = MAKES[name][0]
    for length in range(0, len(script), 7):
        client = told(script[:length])
        client.eof()
        assert client.state is State.CLOSED
        assert client.failure == "the peer left in the middle of the handshake"


def test_what_is_asked() -> None:
    client = told(SIMPLE + reply(Opt.GO, Rep.ERR_UNSUP), export="é")
    assert options(client.output[4:]) == [Opt.EXTENDED_HEADERS, Opt.STRUCTURED_REPLY, Opt.GO, Opt.EXPORT_NAME]
    assert client.output.endswith(struct.pack(">QII", OPTION_MAGIC, Opt.EXPORT_NAME, 2) + "é".encode())
    client = told(GREETING + NO_EXTENDED + STRUCTURED, export="é")
    assert client.output.endswith(b"\0\0\0\2\xc3\xa9\0\0\0\1\0\0\0\x0fbase:allocation")


# --- TLS ---------------------------------------------------------------------------------------------------------------
def test_starttls_comes_first_and_alone() -> None:
    client = told(GREETING, tls=True)
    assert options(client.output[4:]) == [Opt.STARTTLS]
    client.feed(reply(Opt.STARTTLS, Rep.ACK))
    assert client.state is State.STARTING_TLS
    client.output.clear()
    client.tls_started()
    assert options(client.output) == [Opt.EXTENDED_HEADERS]


@pytest.mark.parametrize("at_once", [True, False])
def test_plaintext_behind_starttls(at_once: bool) -> None:
    injected = reply(Opt.EXTENDED_HEADERS, Rep.ACK)
    client = told(GREETING + reply(Opt.STARTTLS, Rep.ACK) + injected * at_once, tls=True)
    client.feed(injected)
    assert (client.state, client.failure) == (State.CLOSED, "bytes in clear behind STARTTLS")
    with pytest.raises(ProtocolError, match="bytes in clear"):
        client.tls_started()


def test_too_old_for_tls() -> None:
    assert isinstance(failure(struct.pack(">QQH", INIT_MAGIC, OPTION_MAGIC, 2), tls=True), AccessRefused)


# --- hostile and broken servers ----------------------------------------------------------------------------------------
EXTENDED = GREETING + reply(Opt.EXTENDED_HEADERS, Rep.ACK) + reply(Opt.SET_META_CONTEXT, Rep.ACK)
HOSTILE = {
    "not NBD": (b"HTTP/1.1 400 Bad Request\r\n", "this is not an NBD server"),
    "old": (struct.pack(">QQH", INIT_MAGIC, OLDSTYLE_MAGIC, 0), "the old protocol"),
    "reply magic": (GREETING + b"\0" * 20, "a reply with magic 0x0 to option 0"),
    "reply to another option": (GREETING + reply(Opt.LIST, Rep.ACK), "to option 3, not to EXTENDED_HEADERS"),
    "reply too long": (GREETING + struct.pack(">QIII", REPLY_MAGIC, 11, Rep.ACK, MAX_REPLY + 1), "a reply of 8193 bytes"),
    "reply of 4 GiB": (GREETING + struct.pack(">QIII", REPLY_MAGIC, 11, Rep.ERR_UNSUP, 2**32 - 1), "a reply of 4294967295 bytes"),
    "unasked reply": (GREETING + reply(Opt.EXTENDED_HEADERS, Rep.SERVER, b"1234"), "a reply of type 2"),
    "reply too short": (SIMPLE + reply(Opt.GO, Rep.INFO, b"\0\0\0"), "a reply of type 3 and 3 bytes to GO"),
    "endless replies": (SIMPLE + EXPORT * (MAX_REPLIES + 1), "more than 256 replies to GO"),
    "no INFO_EXPORT": (SIMPLE + block_sizes(*DEFAULTS) + reply(Opt.GO, Rep.ACK), "GO was not answered with one INFO_EXPORT"),
    "two INFO_EXPORT": (SIMPLE + EXPORT + GO, "GO was not answered with one INFO_EXPORT"),
    "INFO_EXPORT too short": (SIMPLE + reply(Opt.GO, Rep.INFO, bytes(11)) + reply(Opt.GO, Rep.ACK), "of 12 bytes"),
    "size of 2^63": (SIMPLE + named(struct.pack(">HQH", 0, 1 << 63, 1)) + reply(Opt.GO, Rep.ACK), "2^63 or more"),
    "size of 2^64-1": (SIMPLE + reply(Opt.GO, Rep.ERR_UNSUP) + b"\xff" * 10, "2^63 or more"),
    "block sizes too short": (SIMPLE + named(b"\0\x03123") + GO, "INFO_BLOCK_SIZE of 5 bytes"),
    "extended headers without GO": (EXTENDED + reply(Opt.GO, Rep.ERR_UNSUP), "with ERR_UNSUP"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name: str) -> None:
    script, text = HOSTILE[name]
    assert text in failure(script).message
    client = ClientHandshake("disk")
    for byte in script:
        client.feed(bytes([byte]))
    assert text in client.failure


@pytest.mark.parametrize(
    "sizes",
    [
        (0, 4096, 8192),
        (3, 4096, 8192),
        (1, 0, 8192),
        (1, 5000, 8192),
        (1, 256, 8192),
        (1, 4096, 4095),
        (1, 4096, 0),
        (4096, 512, 8192),
        (1 << 17, 1 << 17, 1 << 20),
    ],
)
def test_block_sizes_that_cannot_be(sizes: tuple[int, int, int]) -> None:
    assert "cannot be" in failure(SIMPLE + block_sizes(*sizes) + GO).message


@pytest.mark.parametrize(
    ("kind", "error", "number"),
    [
        (Rep.ERR_UNKNOWN, NotFound, errno.ENOENT),
        (Rep.ERR_POLICY, AccessRefused, errno.EACCES),
        (Rep.ERR_TLS_REQD, AccessRefused, errno.EACCES),
        (Rep.ERR_SHUTDOWN, IoFailed, errno.ESHUTDOWN),
        (Rep.ERR_PLATFORM, IoFailed, errno.EIO),
        (2**31 + 12345, IoFailed, errno.EIO),
    ],
)
def test_errors_of_go(kind: int, error: type, number: int) -> None:
    client = told(SIMPLE + reply(Opt.GO, kind, b"because\n\x1b[31m of \xff"))
    assert (type(client.error), client.error.errno) == (error, number)
    assert "because  [31m of \ufffd" in client.failure
    assert client.failure.isprintable()
    assert options(client.output[4:])[-1] == Opt.ABORT
    assert ":" not in told(SIMPLE + reply(Opt.GO, Rep.ERR_POLICY)).failure


def test_printable() -> None:
    assert printable(b" one\r\ntwo\0 ") == "one  two"
    assert len(printable(b"x" * 10000)) == 4096


@settings(deadline=None)
@given(st.sampled_from(sorted(MAKES)), st.integers(0, 400), st.binary(max_size=30), st.booleans())
def test_any_bytes(name: str, position: int, junk: bytes, replace: bool) -> None:
    script = MAKES[name][0]
    script = script[:position] + junk + script[position + len(junk) * replace :]
    client = told(script)
    client.eof()
    assert client.state is State.CLOSED
    if hasattr(client, "agreement"):
        assert 0 <= client.agreement.size < 1 << 63

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdmap.nbd.constants import (
    HAS_FLAGS,
    OPTION_MAGIC,
    Info,
    Opt,
    Rep,
)
from nbdmap.nbd.handshake import (
    MAX_DRAINED_DATA,
    MAX_OPTION_DATA,
    ServerHandshake,
    Session,
    State,
    TlsMode,
)
from tests.support.handshake import (
    ALLOCATION,
    BOTH,
    DISK,
    FIXED,
    PLAIN,
    STRICT,
    FakeExports,
    ask,
    final,
    greeted,
    info,
    info_export,
    option,
    query,
    replies,
)


def test_no_zeroes_are_never_appended_to_go() -> None:
    handshake = greeted(FIXED)
    assert ask(handshake, Opt.GO, info("")) == [info_export(DISK, PLAIN), (Rep.ACK, b"")]


def test_empty_description_is_not_sent() -> None:
    assert ask(greeted(), Opt.INFO, info("strict", Info.DESCRIPTION)) == [
        info_export(STRICT, HAS_FLAGS),
        (Rep.INFO, struct.pack(">HIII", 3, 512, 4096, 1 << 20)),
        (Rep.ACK, b""),
    ]


def test_repeated_requests_do_not_amplify() -> None:
    handshake = greeted()
    many = ask(handshake, Opt.INFO, info("disk", *[1, 2, 3] * 5000))
    assert many == ask(handshake, Opt.INFO, info("disk", 1, 2, 3))
    assert ask(handshake, Opt.INFO, info("disk", *range(30000)))[-1] == (Rep.ACK, b"")


def test_errors_keep_haggling() -> None:
    handshake = greeted()
    assert final(handshake, Opt.GO, info("nope")) == Rep.ERR_UNKNOWN
    assert final(handshake, Opt.GO, info("disk")) == Rep.ACK


@pytest.mark.parametrize(
    "data",
    [
        query("disk"),
        query("nope", ALLOCATION),
        query("strict", ALLOCATION),
        query("disk", b"base:\xff"),
        bytes(MAX_OPTION_DATA + 1),
    ],
)
def test_set_replaces_even_when_it_fails(data: bytes) -> None:
    handshake = greeted()
    assert final(handshake, Opt.STRUCTURED_REPLY) == Rep.ACK
    assert final(handshake, Opt.SET_META_CONTEXT, query("disk", ALLOCATION)) == Rep.ACK
    final(handshake, Opt.SET_META_CONTEXT, data)
    assert final(handshake, Opt.GO, info("disk")) == Rep.ACK
    assert handshake.session.contexts == {}


def test_contexts_are_void_for_another_export() -> None:
    handshake = greeted()
    assert final(handshake, Opt.STRUCTURED_REPLY) == Rep.ACK
    assert final(handshake, Opt.SET_META_CONTEXT, query("", ALLOCATION)) == Rep.ACK
    assert final(handshake, Opt.GO, info("disk")) == Rep.ACK
    assert handshake.session.contexts == {}


def test_drained_data_is_not_kept() -> None:
    handshake = greeted()
    handshake.feed(struct.pack(">QII", OPTION_MAGIC, Opt.GO, MAX_DRAINED_DATA))
    for _ in range(MAX_DRAINED_DATA // 65536):
        assert not handshake.output
        handshake.feed(bytes(65536))
        assert len(handshake._received) < 65536
    assert replies(handshake.output)[-1][1] == Rep.ERR_TOO_BIG


SESSION = BOTH + option(Opt.STRUCTURED_REPLY) + option(99, b"data") + option(Opt.LIST)
ENDS = {0, 4, 4 + 16, 4 + 16 + 20, 4 + 16 + 20 + 16}


@pytest.mark.parametrize("length", range(len(SESSION) + 1))
def test_leaving_at_every_byte(length: int) -> None:
    handshake = ServerHandshake(FakeExports())
    handshake.feed(SESSION[:length])
    handshake.eof()
    assert handshake.state is State.CLOSED
    assert bool(handshake.failure) == (length not in ENDS)
    handshake.eof()


# --- anything at all ---------------------------------------------------------------------------------------------------
NUMBERS = st.integers(0, 12) | st.integers(0, 2**32 - 1)
DATA = st.one_of(
    st.just(b""),
    st.binary(max_size=40),
    st.builds(info, st.sampled_from(["", "disk", "strict", "nope"]), st.integers(0, 5)),
    st.builds(query, st.sampled_from(["", "disk", "nope"]), st.sampled_from([ALLOCATION, b"base:", b"x"])),
)
OPTIONS = st.lists(st.builds(option, NUMBERS, DATA) | st.binary(max_size=3), max_size=12).map(b"".join)


def in_step(handshake: ServerHandshake) -> None:
    """What must hold after any input."""
    if handshake.state is State.TRANSMISSION:
        assert isinstance(handshake.session, Session)
    assert not handshake.failure or handshake.state is State.CLOSED
    assert len(handshake._received) <= MAX_OPTION_DATA
    assert len(handshake.output) < 1 << 20


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from(TlsMode))
def test_random_bytes(data: bytes, tls: TlsMode) -> None:
    handshake = ServerHandshake(FakeExports(), tls)
    handshake.feed(data)
    in_step(handshake)


@settings(deadline=None)
@given(OPTIONS, st.sampled_from(TlsMode), st.lists(st.integers(1, 50)))
def test_random_options_in_random_pieces(data: bytes, tls: TlsMode, lengths: list[int]) -> None:
    whole, pieces = greeted(tls=tls), greeted(tls=tls)
    whole.feed(data)
    for length in lengths:
        pieces.feed(data[:length])
        data = data[length:]
    pieces.feed(data)
    in_step(whole)
    in_step(pieces)
    assert (whole.state, whole.failure, whole.leftover) == (pieces.state, pieces.failure, pieces.leftover)
    assert whole.output == pieces.output

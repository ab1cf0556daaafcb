import struct

import pytest

from nbdmap.errors import AccessRefused, Busy, IoFailed, NbdmapError, NoSuchDevice, NotFound, ProtocolError
from nbdmap.nbd.constants import (
    INIT_MAGIC,
    OPTION_MAGIC,
    SEND_DF,
    Info,
    Opt,
    Rep,
)
from nbdmap.nbd.handshake import (
    MAX_DRAINED_DATA,
    MAX_OPTION_DATA,
    MAX_OPTIONS,
    MAX_QUERIES,
    ServerHandshake,
    Session,
    State,
    TlsMode,
)
from tests.support.handshake import (
    ALLOCATION,
    BOTH,
    DISK,
    LONGEST,
    PLAIN,
    FakeExports,
    ask,
    final,
    greeted,
    info,
    info_export,
    option,
    query,
    replies,
    start_tls,
    state_of,
)

# --- every message: whole, byte by byte, with trailing junk ------------------------------------------------------------
EXCHANGES: dict[str, tuple[bytes, list[int], State]] = {
    "abort": (option(Opt.ABORT), [Rep.ACK], State.CLOSED),
    "abort with data": (option(Opt.ABORT, b"bye"), [Rep.ACK], State.CLOSED),
    "abort with much data": (option(Opt.ABORT, bytes(MAX_OPTION_DATA + 1)), [Rep.ACK], State.CLOSED),
    "list": (option(Opt.LIST), [Rep.SERVER, Rep.SERVER, Rep.ACK], State.NEGOTIATING),
    "list with data": (option(Opt.LIST, b"x"), [Rep.ERR_INVALID], State.NEGOTIATING),
    "peek": (option(Opt.PEEK_EXPORT), [Rep.ERR_UNSUP], State.NEGOTIATING),
    "starttls without TLS": (option(Opt.STARTTLS), [Rep.ERR_POLICY], State.NEGOTIATING),
    "starttls with data": (option(Opt.STARTTLS, b"x"), [Rep.ERR_INVALID], State.NEGOTIATING),
    "info": (option(Opt.INFO, info("")), [Rep.INFO, Rep.ACK], State.NEGOTIATING),
    "info, all of it": (
        option(Opt.INFO, info("disk", 0, 1, 2, 3, 77)),
        [Rep.INFO, Rep.INFO, Rep.INFO, Rep.INFO, Rep.ACK],
        State.NEGOTIATING,
    ),
    "info, unknown": (option(Opt.INFO, info("nope")), [Rep.ERR_UNKNOWN], State.NEGOTIATING),
    "go": (option(Opt.GO, info("")), [Rep.INFO, Rep.ACK], State.TRANSMISSION),
    "go, unasked block sizes": (option(Opt.GO, info("strict")), [Rep.INFO, Rep.INFO, Rep.ACK], State.TRANSMISSION),
    "go, unknown": (option(Opt.GO, info("nope", 3)), [Rep.ERR_UNKNOWN], State.NEGOTIATING),
    "go, no data": (option(Opt.GO), [Rep.ERR_INVALID], State.NEGOTIATING),
    "go, count missing": (option(Opt.GO, info("")[:-2]), [Rep.ERR_INVALID], State.NEGOTIATING),
    "go, half a count": (option(Opt.GO, info("")[:-1]), [Rep.ERR_INVALID], State.NEGOTIATING),
    "go, request missing": (option(Opt.GO, info("", 1)[:-2]), [Rep.ERR_INVALID], State.NEGOTIATING),
    "go, request too many": (option(Opt.GO, info("") + b"\0\3"), [Rep.ERR_INVALID], State.NEGOTIATING),
    "go, name too long": (option(Opt.GO, info("x" * 4097)), [Rep.ERR_INVALID], State.NEGOTIATING),
    "go, longest name": (option(Opt.GO, info(LONGEST)), [Rep.ERR_UNKNOWN], State.NEGOTIATING),
    "go, NUL": (option(Opt.GO, info("disk\0")), [Rep.ERR_INVALID], State.NEGOTIATING),
    "go, path": (option(Opt.GO, info("../../etc/passwd")), [Rep.ERR_UNKNOWN], State.NEGOTIATING),
    "go, not UTF-8": (option(Opt.GO, b"\0\0\0\1\xff\0\0"), [Rep.ERR_INVALID], State.NEGOTIATING),
    "go, length 2^32-1": (option(Opt.GO, b"\xff\xff\xff\xffdisk\0\0"), [Rep.ERR_INVALID], State.NEGOTIATING),
    "go, length 2^31": (option(Opt.GO, b"\x80\0\0\0disk\0\0"), [Rep.ERR_INVALID], State.NEGOTIATING),
    "structured": (option(Opt.STRUCTURED_REPLY), [Rep.ACK], State.NEGOTIATING),
    "structured with data": (option(Opt.STRUCTURED_REPLY, b"x"), [Rep.ERR_INVALID], State.NEGOTIATING),
    "extended": (option(Opt.EXTENDED_HEADERS), [Rep.ACK], State.NEGOTIATING),
    "extended with data": (option(Opt.EXTENDED_HEADERS, b"x"), [Rep.ERR_INVALID], State.NEGOTIATING),
    "list contexts": (option(Opt.LIST_META_CONTEXT, query("")), [Rep.META_CONTEXT, Rep.ACK], State.NEGOTIATING),
    "set contexts too early": (option(Opt.SET_META_CONTEXT, query("", ALLOCATION)), [Rep.ERR_INVALID], State.NEGOTIATING),
    "too big": (option(Opt.GO, bytes(MAX_OPTION_DATA + 1)), [Rep.ERR_TOO_BIG], State.NEGOTIATING),
    "largest that is drained": (option(Opt.LIST, bytes(MAX_DRAINED_DATA)), [Rep.ERR_TOO_BIG], State.NEGOTIATING),
    "unknown and too big": (option(1000, bytes(MAX_OPTION_DATA + 1)), [Rep.ERR_UNSUP], State.NEGOTIATING),
    "unknown": (option(2**32 - 1, b"data that is skipped"), [Rep.ERR_UNSUP], State.NEGOTIATING),
    "unknown, 0": (option(0), [Rep.ERR_UNSUP], State.NEGOTIATING),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_whole(name: str) -> None:
    data, kinds, state = EXCHANGES[name]
    handshake = greeted()
    handshake.feed(data)
    assert [kind for _, kind, _ in replies(handshake.output)] == kinds
    assert (handshake.state, handshake.failure, handshake.leftover) == (state, "", b"")


@pytest.mark.parametrize("name", [name for name, (data, _, _) in EXCHANGES.items() if len(data) < 10000])
def test_byte_by_byte(name: str) -> None:
    data, _, state = EXCHANGES[name]
    whole, handshake = greeted(), greeted(b"")
    whole.feed(data)
    for byte in BOTH + data[:-1]:
        handshake.feed(bytes([byte]))
        assert not handshake.output
        assert handshake.state is State.NEGOTIATING
    handshake.feed(memoryview(data)[-1:])
    assert handshake.output == whole.output
    assert handshake.state is state


@pytest.mark.parametrize("name", EXCHANGES)
def test_with_what_follows(name: str) -> None:
    data, kinds, state = EXCHANGES[name]
    handshake = greeted()
    handshake.feed(data + option(Opt.LIST) + b"IHAVE")
    found = [kind for _, kind, _ in replies(handshake.output)]
    if state is State.NEGOTIATING:
        assert found == [*kinds, Rep.SERVER, Rep.SERVER, Rep.ACK]
        handshake.feed(b"JUNKJUNKJUN")
        assert (handshake.state, handshake.failure) == (State.CLOSED, "option magic 0x49484156454a554e")
    else:
        assert found == kinds
        assert handshake.state is state
        assert handshake.leftover == (option(Opt.LIST) + b"IHAVE" if state is State.TRANSMISSION else b"")


def test_greeting() -> None:
    handshake = ServerHandshake(FakeExports())
    assert handshake.output == struct.pack(">QQH", INIT_MAGIC, OPTION_MAGIC, 3)
    assert handshake.state is State.NEGOTIATING


@pytest.mark.parametrize("flags", [4, 2**31, 2**32 - 1])
def test_unknown_client_flags(flags: int) -> None:
    handshake = greeted(struct.pack(">I", flags))
    assert (handshake.state, handshake.failure) == (State.CLOSED, f"unknown client flags {flags:#x}")
    handshake.feed(option(Opt.LIST))
    assert not handshake.output


# --- EXPORT_NAME -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("flags", "padding"), [(0, 124), (1, 124), (2, 0), (3, 0)])
@pytest.mark.parametrize("name", ["", "disk"])
def test_export_name(flags: int, padding: int, name: str) -> None:
    handshake = greeted(struct.pack(">I", flags))
    for byte in option(Opt.EXPORT_NAME, name.encode()):
        assert not handshake.output
        handshake.feed(bytes([byte]))
    assert handshake.output == struct.pack(">QH", DISK.size, PLAIN) + bytes(padding)
    assert handshake.state is State.TRANSMISSION
    assert handshake.session.export.flags == PLAIN
    assert not handshake.session.contexts
    handshake.feed(b"more")
    handshake.feed(b"and more")
    assert handshake.leftover == b"moreand more"


@pytest.mark.parametrize(
    ("name", "failure"),
    [
        (b"nope", "EXPORT_NAME: there is no export 'nope'"),
        (b"disk\0", "EXPORT_NAME: a NUL in a name"),
        (b"\xff", "EXPORT_NAME: a name that is not UTF-8"),
        (LONGEST.encode(), f"EXPORT_NAME: there is no export {LONGEST!r}"),
        (b"x" * 4097, "export name of 4097 bytes"),
    ],
)
def test_export_name_cannot_be_refused(name: bytes, failure: str) -> None:
    handshake = greeted()
    handshake.feed(option(Opt.EXPORT_NAME, name))
    assert (handshake.state, handshake.failure, bytes(handshake.output)) == (State.CLOSED, failure, b"")


def test_export_name_keeps_what_was_agreed() -> None:
    handshake = greeted()
    assert final(handshake, Opt.STRUCTURED_REPLY) == Rep.ACK
    assert final(handshake, Opt.SET_META_CONTEXT, query("disk", ALLOCATION)) == Rep.ACK
    handshake.feed(option(Opt.EXPORT_NAME, b"disk"))
    assert handshake.output == struct.pack(">QH", DISK.size, PLAIN | SEND_DF)
    assert handshake.session.structured
    assert list(handshake.session.contexts.values()) == ["base:allocation"]


def test_export_name_while_shutting_down_or_extended() -> None:
    handshake = greeted()
    handshake.shutting_down = True
    handshake.feed(option(Opt.EXPORT_NAME))
    assert handshake.failure == "EXPORT_NAME while shutting down"
    handshake = greeted()
    assert final(handshake, Opt.EXTENDED_HEADERS) == Rep.ACK
    handshake.feed(option(Opt.EXPORT_NAME))
    assert (handshake.state, handshake.failure) == (State.CLOSED, "EXPORT_NAME after EXTENDED_HEADERS")


def test_not_fixed_newstyle_has_nothing_but_export_name() -> None:
    handshake = greeted(struct.pack(">I", 2))
    handshake.feed(option(Opt.LIST))
    assert (handshake.state, bytes(handshake.output)) == (State.CLOSED, b"")
    handshake = greeted(struct.pack(">I", 0))
    assert ask(handshake, Opt.ABORT) == [(Rep.ACK, b"")]


# --- LIST, INFO, GO ----------------------------------------------------------------------------------------------------
def test_list() -> None:
    assert ask(greeted(), Opt.LIST) == [
        (Rep.SERVER, b"\0\0\0\4diska disk"),
        (Rep.SERVER, b"\0\0\0\6strict"),
        (Rep.ACK, b""),
    ]


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (NotFound("gone"), Rep.ERR_UNKNOWN),
        (NoSuchDevice("gone"), Rep.ERR_UNKNOWN),
        (AccessRefused("not for you"), Rep.ERR_POLICY),
        (Busy("too many clients"), Rep.ERR_POLICY),
        (IoFailed("broken"), Rep.ERR_PLATFORM),
        (Busy("é" * 4000), Rep.ERR_POLICY),
        (Busy("x" + "é" * 4000), Rep.ERR_POLICY),
        (Busy("\ud800"), Rep.ERR_POLICY),
    ],
)
def test_refusals_say_why(refusal: NbdmapError, kind: Rep) -> None:
    exports = FakeExports()
    exports.refusal = refusal
    handshake = greeted(exports=exports)
    for number, data in [(Opt.LIST, b""), (Opt.INFO, info("")), (Opt.GO, info("")), (Opt.LIST_META_CONTEXT, query(""))]:
        ((found, text),) = ask(handshake, number, data)
        assert found == kind
        assert refusal.message.encode(errors="replace").startswith(text)
        assert text.decode()
        assert len(text) > 4090 or len(refusal.message) < 100
    assert handshake.state is State.NEGOTIATING


def test_info_and_go_say_the_same() -> None:
    handshake = greeted()
    wanted = info("", Info.EXPORT, Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)
    found = ask(handshake, Opt.INFO, wanted)
    assert sorted(found) == sorted(
        [
            info_export(DISK, PLAIN),
            (Rep.INFO, b"\0\1disk"),
            (Rep.INFO, b"\0\2a disk"),
            (Rep.INFO, struct.pack(">HIII", 3, 1, 4096, 32 << 20)),
            (Rep.ACK, b""),
        ]
    )
    assert found[-1] == (Rep.ACK, b"")
    assert ask(handshake, Opt.GO, wanted) == found
    assert handshake.session == Session(handshake.session.export, False, False, {})
    assert handshake.session.export.name == "disk"


# --- structured replies, extended headers, contexts --------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "flags", "structured", "extended"),
    [
        ([], PLAIN, False, False),
        ([Opt.STRUCTURED_REPLY], PLAIN | SEND_DF, True, False),
        ([Opt.STRUCTURED_REPLY, Opt.STRUCTURED_REPLY], PLAIN | SEND_DF, True, False),
        ([Opt.EXTENDED_HEADERS], DISK.flags | SEND_DF, False, True),
        ([Opt.STRUCTURED_REPLY, Opt.EXTENDED_HEADERS, Opt.EXTENDED_HEADERS], DISK.flags | SEND_DF, False, True),
    ],
)
def test_flags_follow_what_was_agreed(options: list[Opt], flags: int, structured: bool, extended: bool) -> None:
    handshake = greeted()
    for number in options:
        assert ask(handshake, number) == [(Rep.ACK, b"")]
    assert ask(handshake, Opt.GO, info("disk"))[0] == info_export(DISK, flags)
    session = handshake.session
    assert (session.export.flags, session.structured, session.extended) == (flags, structured, extended)


def test_no_way_back_from_extended_headers() -> None:
    handshake = greeted()
    assert final(handshake, Opt.EXTENDED_HEADERS) == Rep.ACK
    assert final(handshake, Opt.STRUCTURED_REPLY) == Rep.ERR_EXT_HEADER_REQD
    assert final(handshake, Opt.GO, info("")) == Rep.ACK


@pytest.mark.parametrize(
    ("queries", "listed", "selected"),
    [
        ([], True, False),
        ([b"base:"], True, False),
        ([ALLOCATION], True, True),
        ([ALLOCATION, b"base:", ALLOCATION, b"qemu:dirty-bitmap:x"], True, True),
        ([b"base:nothing", b"x-other:", b"", b"base", b"no colon"], False, False),
    ],
)
@pytest.mark.parametrize("mode", [Opt.STRUCTURED_REPLY, Opt.EXTENDED_HEADERS])
def test_contexts(queries: list[bytes], listed: bool, selected: bool, mode: Opt) -> None:
    handshake = greeted()
    assert final(handshake, mode) == Rep.ACK
    found = ask(handshake, Opt.LIST_META_CONTEXT, query("disk", *queries))
    assert found == [(Rep.META_CONTEXT, b"\0\0\0\0base:allocation")] * listed + [(Rep.ACK, b"")]
    found = ask(handshake, Opt.SET_META_CONTEXT, query("disk", *queries))
    assert found == [(Rep.META_CONTEXT, b"\0\0\0\1base:allocation")] * selected + [(Rep.ACK, b"")]
    assert final(handshake, Opt.GO, info("disk")) == Rep.ACK
    assert handshake.session.contexts == ({1: "base:allocation"} if selected else {})


BAD_QUERIES = {
    "nothing": b"",
    "no count": b"\0\0\0\0",
    "half a count": b"\0\0\0\0\0\0",
    "a query short": query("")[:-4] + b"\0\0\0\1",
    "a query too long": query("disk", ALLOCATION)[:-1],
    "a length of 2^32-1": query("disk")[:-4] + b"\0\0\0\1\xff\xff\xff\xff",
    "bytes behind": query("disk", ALLOCATION) + b"x",
    "a count of 2^32-1": query("disk")[:-4] + b"\xff\xff\xff\xff",
    "a query of 4097 bytes": query("disk", b"x" * 4097),
    "a query with NUL": query("disk", b"base:\0"),
    "a query not UTF-8": query("disk", b"base:\xff"),
    "a name not UTF-8": b"\0\0\0\1\xff\0\0\0\0",
}


@pytest.mark.parametrize("name", BAD_QUERIES)
def test_bad_queries(name: str) -> None:
    handshake = greeted()
    assert final(handshake, Opt.STRUCTURED_REPLY) == Rep.ACK
    for number in (Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT):
        assert [kind for kind, _ in ask(handshake, number, BAD_QUERIES[name])] == [Rep.ERR_INVALID]
    assert final(handshake, Opt.LIST_META_CONTEXT, query("disk")) == Rep.ACK


def test_many_queries_are_too_big_and_do_not_amplify() -> None:
    handshake = greeted()
    assert final(handshake, Opt.STRUCTURED_REPLY) == Rep.ACK
    assert len(ask(handshake, Opt.LIST_META_CONTEXT, query("", *[ALLOCATION] * MAX_QUERIES))) == 2
    assert final(handshake, Opt.LIST_META_CONTEXT, query("", *[b""] * (MAX_QUERIES + 1))) == Rep.ERR_TOO_BIG
    assert final(handshake, Opt.SET_META_CONTEXT, query("", *[b""] * (MAX_QUERIES + 1))) == Rep.ERR_TOO_BIG


# --- TLS ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [n for n in range(13) if n not in (Opt.EXPORT_NAME, Opt.ABORT, Opt.STARTTLS)] + [99999])
@pytest.mark.parametrize("data", [b"", b"x", bytes(MAX_OPTION_DATA + 1)])
def test_required_tls_hides_everything(number: int, data: bytes) -> None:
    exports = FakeExports()
    handshake = greeted(tls=TlsMode.REQUIRED, exports=exports)
    handshake.shutting_down = True
    assert [kind for kind, _ in ask(handshake, number, data)] == [Rep.ERR_TLS_REQD]
    assert exports.asked == 0
    handshake.shutting_down = False
    start_tls(handshake)
    assert Rep.ERR_TLS_REQD not in [kind for kind, _ in ask(handshake, number, data)]


def test_required_tls_closes_on_export_name() -> None:
    exports = FakeExports()
    handshake = greeted(tls=TlsMode.REQUIRED, exports=exports)
    handshake.feed(option(Opt.EXPORT_NAME, b"disk"))
    assert (handshake.state, exports.asked) == (State.CLOSED, 0)
    assert handshake.failure == "EXPORT_NAME without the TLS that is required"
    handshake = greeted(tls=TlsMode.REQUIRED)
    assert ask(handshake, Opt.ABORT) == [(Rep.ACK, b"")]
    handshake = greeted(tls=TlsMode.REQUIRED)
    start_tls(handshake)
    handshake.feed(option(Opt.EXPORT_NAME, b"disk"))
    assert handshake.state is State.TRANSMISSION


@pytest.mark.parametrize("tls", [TlsMode.OFFERED, TlsMode.REQUIRED])
def test_second_starttls(tls: TlsMode) -> None:
    handshake = greeted(tls=tls)
    assert final(handshake, Opt.STARTTLS, b"x") == Rep.ERR_INVALID
    start_tls(handshake)
    assert final(handshake, Opt.STARTTLS) == Rep.ERR_INVALID
    assert final(handshake, Opt.LIST) == Rep.ACK
    assert handshake.state is State.NEGOTIATING


@pytest.mark.parametrize("mode", [Opt.STRUCTURED_REPLY, Opt.EXTENDED_HEADERS])
def test_starttls_forgets_everything(mode: Opt) -> None:
    handshake = greeted(tls=TlsMode.OFFERED)
    assert final(handshake, mode) == Rep.ACK
    assert final(handshake, Opt.SET_META_CONTEXT, query("", ALLOCATION)) == Rep.ACK
    start_tls(handshake)
    assert final(handshake, Opt.SET_META_CONTEXT, query("", ALLOCATION)) == Rep.ERR_INVALID
    assert ask(handshake, Opt.GO, info(""))[0] == info_export(DISK, PLAIN)
    assert handshake.session == Session(handshake.session.export, False, False, {})


def test_plaintext_behind_starttls_at_once() -> None:
    handshake = greeted(tls=TlsMode.OFFERED)
    handshake.feed(option(Opt.STARTTLS) + b"x")
    assert (handshake.state, handshake.failure) == (State.CLOSED, "bytes in clear behind STARTTLS")
    with pytest.raises(ProtocolError, match="bytes in clear behind STARTTLS"):
        handshake.tls_started()


def test_plaintext_behind_starttls_later() -> None:
    handshake = greeted(tls=TlsMode.OFFERED)
    handshake.feed(option(Opt.STARTTLS))
    handshake.feed(b"")
    assert state_of(handshake) is State.STARTING_TLS
    handshake.feed(option(Opt.STRUCTURED_REPLY))
    assert state_of(handshake) is State.CLOSED
    with pytest.raises(ProtocolError, match="bytes in clear behind STARTTLS"):
        handshake.tls_started()


def test_tls_is_not_started_unasked() -> None:
    with pytest.raises(ProtocolError, match="TLS was not asked for"):
        greeted(tls=TlsMode.REQUIRED).tls_started()


# --- limits and ends ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", range(256))
def test_no_option_data_beyond_the_limit_is_read(number: int) -> None:
    handshake = greeted()
    handshake.feed(struct.pack(">QII", OPTION_MAGIC, number, 2**32 - 1))
    assert (handshake.state, bytes(handshake.output)) == (State.CLOSED, b"")
    handshake.feed(bytes(1000))
    assert handshake.state is State.CLOSED


def test_number_of_options() -> None:
    handshake = greeted()
    for _ in range(MAX_OPTIONS - 1):
        handshake.feed(option(Opt.STRUCTURED_REPLY))
        handshake.output.clear()
    assert handshake.state is State.NEGOTIATING
    handshake.feed(option(Opt.STRUCTURED_REPLY))
    assert (handshake.state, handshake.failure) == (State.CLOSED, f"more than {MAX_OPTIONS} options")


def test_pipelined_options_do_not_pile_up_replies() -> None:
    handshake = greeted()
    handshake.feed(option(Opt.LIST) * 10000)
    assert (handshake.state, len(handshake.output) < 70000) == (State.CLOSED, True)
    assert handshake.failure == "more options were sent than replies were awaited"


def test_shutting_down() -> None:
    handshake = greeted(tls=TlsMode.OFFERED)
    handshake.shutting_down = True
    for number in (Opt.LIST, Opt.GO, Opt.STARTTLS, Opt.SET_META_CONTEXT, 99):
        assert final(handshake, number) == Rep.ERR_SHUTDOWN
    assert ask(handshake, Opt.ABORT) == [(Rep.ACK, b"")]
    assert (handshake.state, handshake.failure) == (State.CLOSED, "")

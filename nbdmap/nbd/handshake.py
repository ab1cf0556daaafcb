"""The server's side of the NBD handshake, without I/O: bytes in by `feed`, bytes out in `output`.

Follows NetworkBlockDevice/nbd doc/proto.md, fixed newstyle, with TLS, structured replies, extended headers and the metadata
context base:allocation. The negotiation is one generator that reads like the specification: it yields how many bytes it
needs next and is sent exactly those (see negotiation.py); what it raises closes the session.

Invariants: no option's data is kept beyond 64 KiB, whatever length it claims; every error reply is sent after all data of
its option was consumed, so that client and server stay in step; nothing is read from a device here, and an export is only
looked at by the options that name it, never before TLS when TLS is required.

One exchange: the client sends IHAVEOPT, GO (7), length 6, an empty name, no information requests; the server answers
REP_INFO with INFO_EXPORT (size and flags of the default export) and REP_ACK, and both are in transmission.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, Protocol

from nbdmap.errors import AccessRefused, Busy, NbdmapError, NoSuchDevice, NotFound, ProtocolError
from nbdmap.nbd.constants import (
    BASE_ALLOCATION,
    BLOCK_STATUS_PAYLOAD,
    FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES,
    GREETING,
    HAS_FLAGS,
    INIT_MAGIC,
    MAX_PAYLOAD,
    MAX_STRING,
    OPTION,
    OPTION_MAGIC,
    OPTION_REPLY,
    REPLY_MAGIC,
    SEND_DF,
    Info,
    Opt,
    Rep,
)
from nbdmap.nbd.negotiation import Negotiation, Steps
from nbdmap.nbd.negotiation import State as State

MAX_OPTION_DATA: Final = 64 << 10
"""Option data that is kept and understood."""
MAX_DRAINED_DATA: Final = 1 << 20
"""Option data that is read and dropped to answer ERR_TOO_BIG; more closes the connection."""
MAX_OPTIONS: Final = 16384
MAX_QUERIES: Final = 1024
"""Queries of one LIST_META_CONTEXT or SET_META_CONTEXT; more are ERR_TOO_BIG."""
MAX_PIPELINED_OUTPUT: Final = 64 << 10
"""Replies not yet taken when another option arrives behind them: a client that pipelines may not pile up more."""
ALLOCATION_ID: Final = 1
"""The id of base:allocation. 0 is what LIST_META_CONTEXT says."""
DEFAULT_BLOCK_SIZES: Final = (1, 4096, MAX_PAYLOAD)
"""What a client assumes that was not told (minimum, preferred, maximum)."""

_DRAIN_STEP: Final = 16 << 10
_U32: Final = struct.Struct(">I")
_EXPORT: Final = struct.Struct(">QH")
_INFO_EXPORT: Final = struct.Struct(">HQH")
_INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")


@dataclass(frozen=True, slots=True)
class Export:
    """What a client is told of an export. `flags` are transmission flags; SEND_DF is added here when it applies."""

    name: str
    description: str
    size: int
    flags: int
    minimum_block: int
    preferred_block: int
    maximum_block: int


class Exports(Protocol):
    """What can be exported. "" names the default export; `Export.name` is the canonical name."""

    def list(self) -> Sequence[tuple[str, str]]:
        """(name, description) of each export. Not called before TLS when TLS is required."""

    def find(self, name: str) -> Export:
        """The export, without side effects. Raises NotFound, AccessRefused or Busy, whose message the client gets."""


class TlsMode(Enum):
    OFF = "off"
    OFFERED = "offered"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class Session:
    """What was agreed: the export (with the flags that were sent) and how to talk. `contexts`: id -> name.

    Extended headers take the place of structured replies: at most one of the two is set.
    """

    export: Export
    structured: bool
    extended: bool
    contexts: Mapping[int, str]


class _Refused(Exception):
    """An option is answered with this error reply; the negotiation goes on."""

    def __init__(self, reply: Rep, text: str) -> None:
        super().__init__(text)
        self.reply = reply
        self.text = text


class ServerHandshake(Negotiation):
    """The server's side; `session` is set once `state` is TRANSMISSION. `shutting_down` may be set at any time."""

    def __init__(self, exports: Exports, tls: TlsMode = TlsMode.OFF) -> None:
        super().__init__()
        self.output += GREETING.pack(INIT_MAGIC, OPTION_MAGIC, FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)
        self.shutting_down = False
        self.session: Session
        self._exports = exports
        self._tls = tls
        self._encrypted = False
        self._no_zeroes = False
        self._forget()

    def tls_started(self) -> None:
        super().tls_started()
        self._encrypted = True

    def _forget(self) -> None:
        self._structured = False
        self._extended = False
        self._contexts: dict[int, str] = {}
        self._contexts_of = ""

    # --- the negotiation -----------------------------------------------------------------------------------------------
    def _negotiate(self) -> Steps:
        flags = _U32.unpack((yield _U32.size))[0]
        if flags & ~(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES):
            raise ProtocolError(f"unknown client flags {flags:#x}")
        self._no_zeroes = bool(flags & FLAG_NO_ZEROES)
        for _ in range(MAX_OPTIONS):
            self._between = True
            magic, option, length = OPTION.unpack((yield OPTION.size))
            self._between = False
            if magic != OPTION_MAGIC:
                raise ProtocolError(f"option magic {magic:#018x}")
            if len(self.output) > MAX_PIPELINED_OUTPUT:
                raise ProtocolError("more options were sent than replies were awaited")
            if option == Opt.EXPORT_NAME:
                if length > MAX_STRING:
                    raise ProtocolError(f"export name of {length} bytes")
                self._export_name((yield length))
            elif not flags & FLAG_FIXED_NEWSTYLE and option != Opt.ABORT:
                raise ProtocolError(f"option {option} from a client that is not fixed newstyle")
            elif length <= MAX_OPTION_DATA:
                self._haggle(option, (yield length))
            elif length <= MAX_DRAINED_DATA:
                for start in range(0, length, _DRAIN_STEP):
                    yield min(_DRAIN_STEP, length - start)
                self._haggle(option, None)
            else:
                raise ProtocolError(f"option {option} with {length} bytes of data")
        raise ProtocolError(f"more than {MAX_OPTIONS} options")

    def _haggle(self, option: int, data: bytes | None) -> None:
        """Answers one option. `data` is None when it was too much to keep."""
        if option == Opt.SET_META_CONTEXT:
            self._contexts = {}  # it replaces them even when it fails
        try:
            self._check_allowed(option)
            known = _OPTIONS.get(option)
            if known is None:
                raise _Refused(Rep.ERR_UNSUP, f"option {option} is not known here")
            if option == Opt.ABORT:
                data = b""
            if data is None:
                raise _Refused(Rep.ERR_TOO_BIG, f"more than {MAX_OPTION_DATA} bytes of data")
            if data and option in _WITHOUT_DATA:
                raise _Refused(Rep.ERR_INVALID, f"{Opt(option).name} has no data")
            known(self, option, data)
        except _Refused as refused:
            self._reply(option, refused.reply, _text(refused.text))

    def _check_allowed(self, option: int) -> None:
        if option == Opt.ABORT:
            return
        if self._needs_tls() and option != Opt.STARTTLS:
            raise _Refused(Rep.ERR_TLS_REQD, "this server requires TLS")
        if self.shutting_down:
            raise _Refused(Rep.ERR_SHUTDOWN, "the server is shutting down")

    def _needs_tls(self) -> bool:
        return self._tls is TlsMode.REQUIRED and not self._encrypted

    def _reply(self, option: int, reply: Rep, data: bytes = b"") -> None:
        self.output += OPTION_REPLY.pack(REPLY_MAGIC, option, reply, len(data)) + data

    # --- the options ---------------------------------------------------------------------------------------------------
    def _export_name(self, data: bytes) -> None:
        """The old way into transmission: it cannot say no, only close."""
        if self._needs_tls():
            raise ProtocolError("EXPORT_NAME without the TLS that is required")
        if self._extended:
            raise ProtocolError("EXPORT_NAME after EXTENDED_HEADERS")
        if self.shutting_down:
            raise ProtocolError("EXPORT_NAME while shutting down")
        try:
            name = _name(data)
            export = self._find(name)
        except _Refused as refused:
            raise ProtocolError(f"EXPORT_NAME: {refused.text}") from None
        self.output += _EXPORT.pack(export.size, export.flags) + bytes(0 if self._no_zeroes else 124)
        self._enter(name, export)

    def _abort(self, option: int, _data: bytes) -> None:
        self._reply(option, Rep.ACK)
        self._close(ProtocolError(""))

    def _list(self, option: int, _data: bytes) -> None:
        try:
            exports = self._exports.list()
        except NbdmapError as error:
            raise _refusal(error) from None
        for name, description in exports:
            raw = name.encode()
            self._reply(option, Rep.SERVER, _U32.pack(len(raw)) + raw + _text(description))
        self._reply(option, Rep.ACK)

    def _starttls(self, option: int, _data: bytes) -> None:
        if self._encrypted:
            raise _Refused(Rep.ERR_INVALID, "TLS is already on")
        if self._tls is TlsMode.OFF:
            raise _Refused(Rep.ERR_POLICY, "this server has no TLS")
        self._reply(option, Rep.ACK)
        self.state = State.STARTING_TLS

    def _info(self, option: int, data: bytes) -> None:
        """INFO, and GO which enters transmission after the same answer."""
        name, end = _counted_name(data, 0)
        first = end + 2
        if len(data) != first + 2 * int.from_bytes(data[end:first], "big"):
            raise _Refused(Rep.ERR_INVALID, "the number of information requests does not match the data")
        wanted = {info for (info,) in struct.iter_unpack(">H", data[first:])}
        export = self._find(name)
        sizes = (export.minimum_block, export.preferred_block, export.maximum_block)
        self._reply(option, Rep.INFO, _INFO_EXPORT.pack(Info.EXPORT, export.size, export.flags))
        if Info.NAME in wanted:
            self._reply(option, Rep.INFO, Info.NAME.to_bytes(2, "big") + export.name.encode())
        if Info.DESCRIPTION in wanted and export.description:
            self._reply(option, Rep.INFO, Info.DESCRIPTION.to_bytes(2, "big") + _text(export.description))
        if Info.BLOCK_SIZE in wanted or sizes != DEFAULT_BLOCK_SIZES:
            self._reply(option, Rep.INFO, _INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes))
        self._reply(option, Rep.ACK)
        if option == Opt.GO:
            self._enter(name, export)

    def _structured_reply(self, option: int, _data: bytes) -> None:
        if self._extended:
            raise _Refused(Rep.ERR_EXT_HEADER_REQD, "extended headers are on already")
        self._structured = True
        self._reply(option, Rep.ACK)

    def _extended_headers(self, option: int, _data: bytes) -> None:
        self._extended = True
        self._reply(option, Rep.ACK)

    def _meta_context(self, option: int, data: bytes) -> None:
        """LIST_META_CONTEXT tells what can be selected, SET_META_CONTEXT selects; a failed SET selects nothing."""
        selecting = option == Opt.SET_META_CONTEXT
        if selecting and not (self._structured or self._extended):
            raise _Refused(Rep.ERR_INVALID, "metadata contexts need structured replies or extended headers")
        name, queries = _meta_query(data)
        self._find(name)
        if BASE_ALLOCATION in queries or (not selecting and (not queries or "base:" in queries)):
            identifier = ALLOCATION_ID if selecting else 0
            self._reply(option, Rep.META_CONTEXT, _U32.pack(identifier) + BASE_ALLOCATION.encode())
            if selecting:
                self._contexts, self._contexts_of = {ALLOCATION_ID: BASE_ALLOCATION}, name
        self._reply(option, Rep.ACK)

    # --- exports -------------------------------------------------------------------------------------------------------
    def _find(self, name: str) -> Export:
        """The export with the flags as this client is told them."""
        try:
            export = self._exports.find(name)
        except NbdmapError as error:
            raise _refusal(error) from None
        flags = (export.flags | HAS_FLAGS) & ~SEND_DF
        if self._structured or self._extended:
            flags |= SEND_DF
        if not self._extended:
            flags &= ~BLOCK_STATUS_PAYLOAD
        return replace(export, flags=flags)

    def _enter(self, name: str, export: Export) -> None:
        contexts = self._contexts if self._contexts_of == name else {}
        self.session = Session(export, self._structured and not self._extended, self._extended, contexts)
        self.state = State.TRANSMISSION


_OPTIONS: Final = {
    int(Opt.ABORT): ServerHandshake._abort,
    int(Opt.LIST): ServerHandshake._list,
    int(Opt.STARTTLS): ServerHandshake._starttls,
    int(Opt.INFO): ServerHandshake._info,
    int(Opt.GO): ServerHandshake._info,
    int(Opt.STRUCTURED_REPLY): ServerHandshake._structured_reply,
    int(Opt.LIST_META_CONTEXT): ServerHandshake._meta_context,
    int(Opt.SET_META_CONTEXT): ServerHandshake._meta_context,
    int(Opt.EXTENDED_HEADERS): ServerHandshake._extended_headers,
}
_WITHOUT_DATA: Final = frozenset({Opt.LIST, Opt.STARTTLS, Opt.STRUCTURED_REPLY, Opt.EXTENDED_HEADERS})


# --- option data -------------------------------------------------------------------------------------------------------
def _text(text: str) -> bytes:
    """A string for the wire: UTF-8, cut at a character's end to what the protocol allows."""
    return text.encode(errors="replace")[:MAX_STRING].decode(errors="ignore").encode()


def _refusal(error: NbdmapError) -> _Refused:
    """How the failure to find an export is told."""
    if isinstance(error, NotFound | NoSuchDevice):
        return _Refused(Rep.ERR_UNKNOWN, error.message)
    if isinstance(error, AccessRefused | Busy):
        return _Refused(Rep.ERR_POLICY, error.message)
    return _Refused(Rep.ERR_PLATFORM, error.message)


def _name(raw: bytes) -> str:
    """A string of the protocol: UTF-8 without NUL, not too long."""
    if len(raw) > MAX_STRING:
        raise _Refused(Rep.ERR_INVALID, f"a name of {len(raw)} bytes; at most {MAX_STRING} are allowed")
    if b"\0" in raw:
        raise _Refused(Rep.ERR_INVALID, "a NUL in a name")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise _Refused(Rep.ERR_INVALID, "a name that is not UTF-8") from None


def _counted_name(data: bytes, start: int) -> tuple[str, int]:
    """The string behind its 32-bit length at `start`, and where it ends."""
    begin = start + _U32.size
    end = begin + int.from_bytes(data[start:begin], "big")
    if len(data) < end:
        raise _Refused(Rep.ERR_INVALID, "a name reaches beyond the data of its option")
    return _name(data[begin:end]), end


def _meta_query(data: bytes) -> tuple[str, set[str]]:
    """The export name and the queries of LIST_META_CONTEXT and SET_META_CONTEXT."""
    name, end = _counted_name(data, 0)
    count = int.from_bytes(data[end : end + _U32.size], "big")
    end += _U32.size
    if len(data) < end + count * _U32.size:
        raise _Refused(Rep.ERR_INVALID, f"{count} queries do not fit in the data of the option")
    if count > MAX_QUERIES:
        raise _Refused(Rep.ERR_TOO_BIG, f"{count} queries; at most {MAX_QUERIES} are allowed")
    queries = set()
    for _ in range(count):
        query, end = _counted_name(data, end)
        queries.add(query)
    if end != len(data):
        raise _Refused(Rep.ERR_INVALID, "bytes behind the last query")
    return name, queries

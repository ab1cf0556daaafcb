"""The client's side of the NBD handshake, without I/O: `ClientHandshake` is fed bytes and ends with an `Agreement`.

Follows doc/proto.md. It asks for TLS if that is wanted (and takes no for a failure), then for extended headers or else
structured replies, for base:allocation, and for the export by GO with its block sizes; a server without GO gets EXPORT_NAME.

The server is not trusted: every length is bounded before it is waited for, every size is checked before it is believed,
every answer must belong to the option that was asked, and its texts are made printable.
"""

import errno
from collections.abc import Generator
from dataclasses import dataclass
from struct import Struct
from typing import Final, NoReturn

from nbdmap.errors import AccessRefused, IoFailed, NbdmapError, NotFound, ProtocolError
from nbdmap.nbd.constants import (
    BASE_ALLOCATION,
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
    Info,
    Opt,
    Rep,
)
from nbdmap.nbd.negotiation import Negotiation, State, Steps

MAX_REPLY: Final = 8 << 10
"""The longest option reply that is read; the specification's strings have at most 4096 bytes."""
MAX_REPLIES: Final = 256
"""The most replies to one option."""
MAX_MINIMUM_BLOCK: Final = 65536

_ERROR_BIT: Final = 1 << 31
_U32: Final = Struct(">I")
_EXPORT: Final = Struct(">QH")
_INFO_EXPORT: Final = Struct(">HQH")
_INFO_BLOCK_SIZE: Final = Struct(">HIII")
_GO_REQUESTS: Final = Struct(">HH").pack(1, Info.BLOCK_SIZE)


@dataclass(frozen=True, slots=True)
class Agreement:
    """What client and server agreed on. `flags` are transmission flags, `allocation` the id of base:allocation."""

    size: int
    flags: int
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_block: int = MAX_PAYLOAD
    structured: bool = False
    extended: bool = False
    allocation: int | None = None


def printable(text: bytes) -> str:
    """A text from the peer as one line that is safe to log and to show."""
    return "".join(c if c.isprintable() else " " for c in text[:MAX_STRING].decode(errors="replace")).strip()


class ClientHandshake(Negotiation):
    """The client's side; `agreement` is set once `state` is TRANSMISSION, `error` once it is CLOSED."""

    def __init__(self, export: str, *, tls: bool = False) -> None:
        super().__init__()
        self.agreement: Agreement
        self.error: NbdmapError
        self._between = False  # a server that leaves before the end is always a failure
        self._export = export.encode()
        self._tls = tls
        self._forget()

    def _forget(self) -> None:
        self._structured = False
        self._extended = False
        self._allocation: int | None = None

    def _close(self, reason: NbdmapError) -> None:
        super()._close(reason)
        self.error = reason

    def _negotiate(self) -> Steps:
        init, magic, offered = GREETING.unpack((yield GREETING.size))
        if init != INIT_MAGIC:
            raise ProtocolError("this is not an NBD server")
        if magic != OPTION_MAGIC:
            raise ProtocolError("the server only speaks the old protocol, from before nbd 3.10")
        flags = offered & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)
        self.output += _U32.pack(flags)
        fixed = bool(flags & FLAG_FIXED_NEWSTYLE)
        if self._tls:
            yield from self._start_tls(fixed)
        agreement = None
        if fixed:
            yield from self._choose_replies()
            agreement = yield from self._go()
        if agreement is None:
            agreement = yield from self._export_name(padding=0 if flags & FLAG_NO_ZEROES else 124)
        if agreement.size >= 1 << 63:
            raise ProtocolError(f"a size of {agreement.size} bytes, 2^63 or more")
        self.agreement = agreement
        self.state = State.TRANSMISSION
        yield 0

    def _start_tls(self, fixed: bool) -> Steps:
        if not fixed:
            raise AccessRefused("TLS is wanted, but the server is too old for it")
        final, text, _ = yield from self._ask(Opt.STARTTLS)
        if final != Rep.ACK:
            self._refused(final, f"TLS is wanted, but the server refuses it: {text}")
        self.state = State.STARTING_TLS
        yield 0

    def _choose_replies(self) -> Steps:
        """Extended headers, or structured replies, or simple ones; with either of the first two also base:allocation."""
        final, _, _ = yield from self._ask(Opt.EXTENDED_HEADERS)
        self._extended = final == Rep.ACK
        if not self._extended:
            final, _, _ = yield from self._ask(Opt.STRUCTURED_REPLY)
            self._structured = final == Rep.ACK
        if not (self._extended or self._structured):
            return
        query = BASE_ALLOCATION.encode()
        data = self._named() + _U32.pack(1) + _U32.pack(len(query)) + query
        final, _, replies = yield from self._ask(Opt.SET_META_CONTEXT, data, Rep.META_CONTEXT)
        found = [_U32.unpack_from(reply)[0] for reply in replies if reply[_U32.size :] == query]
        if final == Rep.ACK and found:
            self._allocation = found[0]

    def _go(self) -> Generator[int, bytes, Agreement | None]:
        """The export by GO; None from a server that does not know GO."""
        final, text, replies = yield from self._ask(Opt.GO, self._named() + _GO_REQUESTS, Rep.INFO)
        if final == Rep.ERR_UNSUP and not self._extended:
            return None
        if final != Rep.ACK:
            self._refused(final, text)
        exports = [reply for reply in replies if reply[:2] == Info.EXPORT.to_bytes(2, "big")]
        if len(exports) != 1 or len(exports[0]) != _INFO_EXPORT.size:
            raise ProtocolError("GO was not answered with one INFO_EXPORT of 12 bytes")
        _, size, flags = _INFO_EXPORT.unpack(exports[0])
        sizes = (1, 4096, MAX_PAYLOAD)
        for reply in replies:
            if reply[:2] == Info.BLOCK_SIZE.to_bytes(2, "big"):
                sizes = _block_sizes(reply)
        return self._agree(size, flags, sizes)

    def _export_name(self, padding: int) -> Generator[int, bytes, Agreement]:
        self.output += OPTION.pack(OPTION_MAGIC, Opt.EXPORT_NAME, len(self._export)) + self._export
        size, flags = _EXPORT.unpack((yield _EXPORT.size))
        yield padding
        return self._agree(size, flags, (1, 4096, MAX_PAYLOAD))

    def _agree(self, size: int, flags: int, sizes: tuple[int, int, int]) -> Agreement:
        flags = flags if flags & HAS_FLAGS else 0
        return Agreement(size, flags, *sizes, self._structured, self._extended, self._allocation)

    # --- one option ----------------------------------------------------------------------------------------------------
    def _named(self) -> bytes:
        return _U32.pack(len(self._export)) + self._export

    def _ask(
        self, option: Opt, data: bytes = b"", expected: Rep | None = None
    ) -> Generator[int, bytes, tuple[int, str, list[bytes]]]:
        """Sends an option. Returns the final reply (ACK or an error), its text, and the `expected` replies before it."""
        self.output += OPTION.pack(OPTION_MAGIC, option, len(data)) + data
        replies: list[bytes] = []
        while len(replies) <= MAX_REPLIES:
            magic, answered, kind, length = OPTION_REPLY.unpack((yield OPTION_REPLY.size))
            if magic != REPLY_MAGIC or answered != option:
                raise ProtocolError(f"a reply with magic {magic:#x} to option {answered}, not to {option.name}")
            if length > MAX_REPLY:
                raise ProtocolError(f"a reply of {length} bytes to {option.name}")
            content = yield length
            if kind == Rep.ACK or kind & _ERROR_BIT:
                if kind in (Rep.ERR_TLS_REQD, Rep.ERR_SHUTDOWN):
                    self._refused(kind, printable(content))
                return kind, printable(content), replies
            if kind != expected or length < _U32.size:
                raise ProtocolError(f"a reply of type {kind} and {length} bytes to {option.name}")
            replies.append(content)
        raise ProtocolError(f"more than {MAX_REPLIES} replies to {option.name}")

    def _refused(self, kind: int, text: str) -> NoReturn:
        """Takes leave in good order and raises what the server's refusal means."""
        self.output += OPTION.pack(OPTION_MAGIC, Opt.ABORT, 0)
        name = Rep(kind).name if kind in _REPLIES else f"error {kind:#x}"
        export = self._export.decode()
        message = f"the server refuses export {export!r} with {name}" + (f": {text}" if text else "")
        if kind == Rep.ERR_UNKNOWN:
            raise NotFound(message)
        if kind == Rep.ERR_TLS_REQD:
            raise AccessRefused(f"{message} (write nbds:// instead of nbd://)")
        if kind == Rep.ERR_POLICY:
            raise AccessRefused(message)
        raise IoFailed(message, errno.ESHUTDOWN if kind == Rep.ERR_SHUTDOWN else errno.EIO)


_REPLIES: Final = frozenset(Rep)


def _block_sizes(reply: bytes) -> tuple[int, int, int]:
    """The minimum, preferred and maximum block size of INFO_BLOCK_SIZE, if they can be."""
    if len(reply) != _INFO_BLOCK_SIZE.size:
        raise ProtocolError(f"INFO_BLOCK_SIZE of {len(reply)} bytes")
    _, minimum, preferred, maximum = _INFO_BLOCK_SIZE.unpack(reply)
    powers = minimum.bit_count() == preferred.bit_count() == 1
    if not powers or minimum > MAX_MINIMUM_BLOCK or preferred < max(minimum, 512) or maximum < preferred:
        raise ProtocolError(f"block sizes {minimum}, {preferred}, {maximum} cannot be")
    return minimum, preferred, maximum

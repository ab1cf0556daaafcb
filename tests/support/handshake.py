"""What tests of the server's handshake share: exports, options, and the reading of replies."""

import struct
from collections.abc import Sequence

from nbdmap.errors import NbdmapError, NotFound
from nbdmap.nbd.constants import (
    BLOCK_STATUS_PAYLOAD,
    HAS_FLAGS,
    OPTION_MAGIC,
    REPLY_MAGIC,
    SEND_FLUSH,
    Info,
    Opt,
    Rep,
)
from nbdmap.nbd.handshake import (
    Export,
    ServerHandshake,
    State,
    TlsMode,
)

DISK = Export("disk", "a disk", 1 << 30, HAS_FLAGS | SEND_FLUSH | BLOCK_STATUS_PAYLOAD, 1, 4096, 32 << 20)
STRICT = Export("strict", "", 1 << 20, HAS_FLAGS, 512, 4096, 1 << 20)
LONGEST = "é" * 2048
FIXED, BOTH = struct.pack(">I", 1), struct.pack(">I", 3)
PLAIN = HAS_FLAGS | SEND_FLUSH
ALLOCATION = b"base:allocation"

Reply = tuple[int, int, bytes]


class FakeExports:
    """Two exports, of which the first is the default, and names that are refused; counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.refusal: NbdmapError | None = None

    def list(self) -> Sequence[tuple[str, str]]:
        self.asked += 1
        if self.refusal:
            raise self.refusal
        return [("disk", "a disk"), ("strict", "")]

    def find(self, name: str) -> Export:
        self.asked += 1
        if self.refusal:
            raise self.refusal
        if name in ("", "disk"):
            return DISK
        if name == "strict":
            return STRICT
        raise NotFound(f"there is no export {name!r}")


def option(number: int, data: bytes = b"") -> bytes:
    return struct.pack(">QII", OPTION_MAGIC, number, len(data)) + data


def info(name: str, *wanted: int) -> bytes:
    raw = name.encode()
    return struct.pack(f">I{len(raw)}sH{len(wanted)}H", len(raw), raw, len(wanted), *wanted)


def query(name: str, *queries: bytes) -> bytes:
    raw = name.encode()
    start = struct.pack(f">I{len(raw)}sI", len(raw), raw, len(queries))
    return start + b"".join(struct.pack(">I", len(text)) + text for text in queries)


def replies(data: bytes | bytearray) -> list[Reply]:
    """The option replies in what a server said: (option, type, data)."""
    found = []
    while data:
        magic, number, kind, length = struct.unpack_from(">QIII", data)
        assert magic == REPLY_MAGIC
        assert kind < 2**31 or length <= 4096, "an error's text is short"
        assert len(data) >= 20 + length
        found.append((number, kind, bytes(data[20 : 20 + length])))
        data = data[20 + length :]
    return found


def greeted(flags: bytes = BOTH, tls: TlsMode = TlsMode.OFF, exports: FakeExports | None = None) -> ServerHandshake:
    handshake = ServerHandshake(exports or FakeExports(), tls)
    handshake.output.clear()
    handshake.feed(flags)
    assert not handshake.output
    return handshake


def ask(handshake: ServerHandshake, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
    """Sends an option; its replies: (type, data)."""
    handshake.feed(option(number, data))
    found = replies(handshake.output)
    handshake.output.clear()
    assert all(answered == number for answered, _, _ in found)
    return [(kind, content) for _, kind, content in found]


def final(handshake: ServerHandshake, number: int, data: bytes = b"") -> int:
    return ask(handshake, number, data)[-1][0]


def state_of(handshake: ServerHandshake) -> State:
    """The state; a function, because mypy believes that an attribute stays what it was."""
    return handshake.state


def start_tls(handshake: ServerHandshake) -> None:
    assert ask(handshake, Opt.STARTTLS) == [(Rep.ACK, b"")]
    assert state_of(handshake) is State.STARTING_TLS
    handshake.tls_started()
    assert state_of(handshake) is State.NEGOTIATING


def info_export(export: Export, flags: int) -> tuple[int, bytes]:
    return Rep.INFO, struct.pack(">HQH", Info.EXPORT, export.size, flags)

"""What both sides of a handshake have in common: a generator that says how many bytes it needs, and who feeds it.

The generator yields a number of bytes, is sent exactly those, appends what it has to say to `output`, and moves `state`.
What it raises as an NbdmapError closes the negotiation; nothing that a peer sends is raised out of `feed`. Follows doc/proto.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator
from enum import Enum

from nbdmap.errors import NbdmapError, ProtocolError

Steps = Generator[int, bytes, None]


class State(Enum):
    NEGOTIATING = "negotiating"
    STARTING_TLS = "starting TLS"
    TRANSMISSION = "transmission"
    CLOSED = "closed"


class Negotiation(ABC):
    """One side of one connection. The caller moves bytes and watches `state` after each call:

    STARTING_TLS: send `output` in clear, start TLS, then call `tls_started`; feed nothing in between.
    TRANSMISSION: send `output`; `leftover` holds what the peer already sent behind the handshake.
    CLOSED: send `output` and close; `failure` says why in one line, "" when the peer left in good order.

    `output` is the caller's to take and clear. The caller limits the time, and stops feeding while its peer does not read.
    """

    def __init__(self) -> None:
        self.output = bytearray()
        self.state = State.NEGOTIATING
        self.failure = ""
        self.leftover = b""
        self._received = bytearray()
        self._steps = self._negotiate()
        self._needed = next(self._steps)
        self._between = True  # the peer may leave here

    @abstractmethod
    def _negotiate(self) -> Steps:
        """The negotiation, from the first byte to the last."""

    @abstractmethod
    def _forget(self) -> None:
        """Drops what was agreed in clear."""

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Takes bytes from the peer. Never raises for what they are."""
        if self.state is State.CLOSED:
            return
        self._received += data
        used = 0
        try:
            while self.state is State.NEGOTIATING and len(self._received) - used >= self._needed:
                piece = bytes(self._received[used : used + self._needed])
                used += len(piece)
                self._needed = self._steps.send(piece)
            if self.state is State.STARTING_TLS and len(self._received) > used:
                raise ProtocolError("bytes in clear behind STARTTLS")
        except NbdmapError as error:
            self._close(error)
        del self._received[:used]
        if self.state is State.TRANSMISSION:
            self.leftover += self._received
            self._received.clear()

    def eof(self) -> None:
        """The peer closed its side."""
        if self.state is not State.CLOSED:
            middle = self._received or not self._between
            self._close(ProtocolError("the peer left in the middle of the handshake" if middle else ""))

    def tls_started(self) -> None:
        """TLS is up: everything said before is forgotten. Raises ProtocolError if the peer spoke in clear meanwhile."""
        if self.state is not State.STARTING_TLS:
            raise ProtocolError(self.failure or "TLS was not asked for")
        self._forget()
        self.state = State.NEGOTIATING
        self.feed(b"")

    def _close(self, reason: NbdmapError) -> None:
        self.state = State.CLOSED
        self.failure = reason.message
        self._received.clear()

"""The client's side of the admin RPC: blocking, and quick to import.

    with Connection(path) as server:
        server.call("info", {"name": "lin"})
"""

import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Protocol, Self

from nbdmap.cli.errors import CommandFailed, NoServer


class Refused(Exception):
    """The server refused; `errno` is 0 when it was not for a verb's own reason."""

    def __init__(self, message: str, errno: int = 0, stage: str = "", number: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.errno = errno
        self.stage = stage
        self.number = number


class Server(Protocol):
    """What the commands need of a server."""

    def call(self, method: str, params: Mapping[str, Any]) -> Any:
        """The result of a verb. Raises Refused."""
        ...

    def events(self) -> Iterator[Mapping[str, str]]:
        """The events from now on."""
        ...

    def close(self) -> None:
        """Ends the connection, if there is one."""
        ...


def refusal(error: Mapping[str, Any]) -> Refused:
    """The exception for an error object."""
    data = error.get("data", {})
    return Refused(error["message"], data.get("errno", 0), data.get("stage", ""), data.get("number", ""))


class Connection:
    """A connection to the socket at `path`, made at the first call."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self._answers: BinaryIO | None = None
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """As Server.close."""
        for one in (self._answers, self._socket):
            if one is not None:
                one.close()
        self._answers = self._socket = None

    def call(self, method: str, params: Mapping[str, Any]) -> Any:
        """As Server.call. Raises NoServer when nobody listens, and CommandFailed when the connection breaks."""
        self._number += 1
        request = {"jsonrpc": "2.0", "id": self._number, "method": method, "params": params}
        try:
            connection = self._connect()
            connection.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise self._broken(error) from None
        return self._read()["result"]

    def events(self) -> Iterator[Mapping[str, str]]:
        """As Server.events. Raises CommandFailed when the connection breaks."""
        self.call("events", {})
        while True:
            yield self._read()["params"]

    def _read(self) -> Any:
        assert self._answers is not None
        try:
            line = self._answers.readline()
        except OSError as error:
            raise self._broken(error) from None
        if not line.endswith(b"\n"):
            raise CommandFailed(f"The server at {self._path} closed the connection.")
        answer = json.loads(line)
        if "error" in answer:
            raise refusal(answer["error"])
        return answer

    def _broken(self, error: OSError) -> CommandFailed:
        return CommandFailed(f"The connection to {self._path} broke: {error.strerror or error}")

    def _connect(self) -> socket.socket:
        if self._socket is None:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(self._path)
            except OSError as error:
                connection.close()
                raise NoServer(
                    f"No server answers at {self._path} ({error.strerror or error}); start one with `nbdmap serve`, "
                    "or name its socket with --socket or $NBDMAP_SOCKET"
                ) from None
            self._socket = connection
            self._answers = connection.makefile("rb")
        return self._socket

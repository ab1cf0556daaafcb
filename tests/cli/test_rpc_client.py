"""The blocking client against the real server, each in its own thread."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdmap.cli.errors import CommandFailed, NoServer
from nbdmap.cli.rpc_client import Connection, Refused
from nbdmap.control.events import Events
from nbdmap.control.exports import Exports
from nbdmap.control.mapper import Mapper
from nbdmap.control.rpc import AdminServer
from nbdmap.control.verbs import Verbs
from nbdmap.targets import TARGETS


async def test_calls_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    mapper = Mapper(TARGETS, Events(lambda: 1.0))
    server = AdminServer(Verbs(mapper, Exports(mapper)), path)
    await server.start()

    try:
        await asyncio.to_thread(_calls, str(path))
    finally:
        await server.close()
        await mapper.close()


def _calls(path: str) -> None:
    with Connection(path) as connection:
        assert connection.call("create", {"name": "a", "table": "0 8 zero"})["name"] == "a"
        with pytest.raises(Refused) as caught:
            connection.call("create", {"name": "b", "table": "0 8 linear nosuch 0"})
        assert (caught.value.errno, caught.value.stage, caught.value.number) == (2, "reload", "254:1")
        with pytest.raises(Refused, match="unknown parameter") as refused:
            connection.call("info", {"nam": "x"})
        assert refused.value.errno == 0


@contextmanager
def answering(path: Path, *lines: bytes) -> Iterator[None]:
    """A server that answers one client with `lines`, whatever it says, and closes."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"".join(lines))

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


def test_a_server_that_closes(tmp_path: Path) -> None:
    path = tmp_path / "s"
    closed = pytest.raises(CommandFailed, match="closed the connection")
    with answering(path, b'{"id":1,"res'), Connection(str(path)) as connection, closed:
        connection.call("info", {})


def test_events_end_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "s"
    notification = json.dumps({"method": "event", "params": {"ACTION": "add"}}).encode() + b"\n"
    with answering(path, b'{"id":1,"result":{}}\n', notification), Connection(str(path)) as connection:
        events = connection.events()
        assert next(events) == {"ACTION": "add"}
        with pytest.raises(CommandFailed, match="closed the connection"):
            next(events)


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "s"))
    with Connection(str(tmp_path / "s")) as connection, pytest.raises(NoServer, match="Connection refused"):
        connection.call("info", {})

"""The admin RPC: what it refuses, what it streams, who it lets go, and the socket's file."""

import asyncio
import json
import os
import random
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdmap.block.io import WRITE, Io
from nbdmap.control import rpc
from nbdmap.control.admin_path import admin_path
from nbdmap.control.events import Events
from nbdmap.control.exports import Exports
from nbdmap.control.mapper import Mapper
from nbdmap.control.verbs import Verbs
from nbdmap.errors import Busy, InvalidArgument, IoFailed
from nbdmap.targets import TARGETS
from tests.support.disks import FakeDisk


class Client:
    """A connection that writes and reads lines."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def ask(self, method: str, number: object = 1, **params: object) -> None:
        self.raw(json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params}).encode() + b"\n")

    def raw(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> Any:
        return json.loads(await self.reader.readline())

    async def call(self, method: str, **params: object) -> Any:
        self.ask(method, **params)
        return (await self.answer())["result"]

    async def error(self, line: bytes) -> tuple[int, str]:
        self.raw(line)
        error = (await self.answer())["error"]
        return error["code"], error["message"]


class Rig:
    """A server, its mapper, and clients of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.disk = FakeDisk("7:0")
        self.mapper = Mapper(TARGETS, Events(lambda: 1.5))
        self.mapper.disks["disk"] = self.disk
        self.verbs = Verbs(self.mapper, Exports(self.mapper))
        self.server = rpc.AdminServer(self.verbs, path)
        self.clients: list[Client] = []

    async def client(self) -> Client:
        client = Client(*await asyncio.open_unix_connection(str(self.path), limit=1 << 25))
        self.clients.append(client)
        return client


@asynccontextmanager
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig(tmp_path / "admin.sock")
    await made.server.start()
    try:
        yield made
    finally:
        await made.server.close()
        for client in made.clients:
            client.writer.close()
        await made.mapper.close()


async def until(condition: Any) -> None:
    """Lets the loop turn until something is so."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not happen")


async def test_a_verb_is_called_with_its_parameters_and_defaults(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        client = await made.client()
        info = await client.call("create", name="lin", table="0 8 linear disk 0", minor=None)
        assert (info["name"], info["minor"], info["live"], info["export"]) == ("lin", 0, True, "lin")
        [table] = await client.call("table", name="lin")
        assert table["lines"] == [{"start": 0, "length": 8, "target": "linear", "params": "7:0 0"}]
        assert await client.call("version") == {"version": "0.1.0", "driver": "4.48.0"}


async def test_a_failed_verb_answers_with_its_errno(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        client = await made.client()
        client.ask("remove", "x", name="nosuch")
        assert await client.answer() == {
            "jsonrpc": "2.0", "id": "x",
            "error": {"code": -6, "message": "no device 'nosuch'", "data": {"errno": 6, "errno_name": "ENXIO"}},
        }  # fmt: skip
        client.ask("create", name="bad", table="0 8 linear disk")
        error = (await client.answer())["error"]
        assert error["data"] == {"errno": 22, "errno_name": "EINVAL", "stage": "reload", "number": "254:0"}
        assert made.mapper.devices == {}


@pytest.mark.parametrize(
    ("line", "code", "complaint"),
    [
        (b"{nonsense\n", rpc.PARSE_ERROR, "not JSON"),
        (b"\xff\xfe\n", rpc.PARSE_ERROR, "not JSON"),
        (b"[" * 100_000 + b"\n", rpc.PARSE_ERROR, "not JSON"),
        (b'{"a":' + b"9" * 5000 + b"}\n", rpc.PARSE_ERROR, "not JSON"),
        (b"[]\n", rpc.INVALID_REQUEST, "one JSON-RPC 2.0 object"),
        (b'"info"\n', rpc.INVALID_REQUEST, "one JSON-RPC 2.0 object"),
        (b'{"jsonrpc":"1.0","id":1,"method":"info"}\n', rpc.INVALID_REQUEST, "one JSON-RPC 2.0 object"),
        (b'{"id":1}\n', rpc.INVALID_REQUEST, "the method is missing"),
        (b'{"id":[1],"method":"info"}\n', rpc.INVALID_REQUEST, "an id is"),
        (b'{"id":1,"method":5}\n', rpc.INVALID_REQUEST, "the method is missing"),
        (b'{"id":1,"method":"frob"}\n', rpc.METHOD_NOT_FOUND, "no method 'frob'"),
        (b'{"id":1,"method":"_describe"}\n', rpc.METHOD_NOT_FOUND, "no method '_describe'"),
        (b'{"id":1,"method":"__init__"}\n', rpc.METHOD_NOT_FOUND, "no method '__init__'"),
        (b'{"id":1,"method":"info","params":["lin"]}\n', rpc.INVALID_PARAMS, "info: params must be an object"),
        (b'{"id":1,"method":"info","params":{"nam":"x"}}\n', rpc.INVALID_PARAMS, "unknown parameter 'nam' (there are: name,"),
        (b'{"id":1,"method":"info","params":{"name":1}}\n', rpc.INVALID_PARAMS, "info: parameter 'name' must be a string"),
        (b'{"id":1,"method":"info","params":{"inactive":1}}\n', rpc.INVALID_PARAMS, "'inactive' must be true or false"),
        (b'{"id":1,"method":"message","params":{"sector":true}}\n', rpc.INVALID_PARAMS, "'sector' must be an integer"),
        (b'{"id":1,"method":"message","params":{"sector":1.0}}\n', rpc.INVALID_PARAMS, "'sector' must be an integer"),
        (b'{"id":1,"method":"create","params":{"minor":"1"}}\n', rpc.INVALID_PARAMS, "'minor' must be an integer or null"),
        (b'{"id":1,"method":"create","params":{}}\n', rpc.INVALID_PARAMS, "create: parameter 'name' is missing"),
        (b'{"id":1,"method":"info","params":{"name":"\\ud800"}}\n', rpc.INVALID_PARAMS, "'name' is not valid UTF-8"),
        (b'{"id":1,"method":"events","params":{"x":1}}\n', rpc.INVALID_PARAMS, "unknown parameter 'x' (there are: none)"),
    ],
)  # fmt: skip
async def test_what_is_refused_is_told(tmp_path: Path, line: bytes, code: int, complaint: str) -> None:
    async with rig(tmp_path) as made:
        client = await made.client()
        answered, message = await client.error(line)
        assert answered == code
        assert complaint in message
        assert await client.call("info") == []  # and the connection goes on


async def test_garbage_ends_nothing(tmp_path: Path) -> None:
    chance = random.Random(7)
    async with rig(tmp_path) as made:
        client = await made.client()
        for _ in range(50):
            client.raw(chance.randbytes(chance.randrange(1, 200)))
        client.raw(b"\n")
        client.ask("version", "last")
        while (answer := await client.answer()).get("id") != "last":
            assert answer["error"]["code"] in (rpc.PARSE_ERROR, rpc.INVALID_REQUEST)
        assert answer["result"]["driver"]


async def test_a_failure_inside_is_told_without_its_details(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Verbs):
        async def version(self) -> Any:
            """Fails."""
            raise RuntimeError("secret")

    made = Rig(tmp_path / "admin.sock")
    methods = rpc.Methods(Broken(made.mapper, Exports(made.mapper)))
    with pytest.raises(rpc.RpcError) as caught:
        await methods.call("version", {})
    assert (caught.value.code, caught.value.message) == (rpc.INTERNAL_ERROR, "internal error: RuntimeError")
    assert "the verb version failed" in caplog.text


async def test_every_public_verb_is_a_method(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        found = {one["name"]: one for one in await (await made.client()).call("rpc.discover")}
    assert {"create", "remove", "info", "events", "dump_config"} < set(found)
    assert not [name for name in found if name.startswith("_")]
    assert all(one["summary"] for one in found.values())
    assert {"name": "minor", "types": ["integer", "null"], "default": None} in found["create"]["params"]
    assert {"name": "name", "types": ["string"], "required": True} in found["create"]["params"]


async def test_requests_are_answered_in_order(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        client = await made.client()
        client.ask("create", 1, name="a", table="0 8 zero")
        client.ask("nosuch", 2)
        client.ask("rename", 3, name="a", new_name="b")
        client.raw(b'{"method":"remove","params":{"name":"b"}}\n\n')  # a notification has no answer, an empty line is nothing
        client.raw(b'{"method":"remove","params":{"name":"b"}}\n')  # nor has its failure
        client.ask("info", 4)
        answers = [await client.answer() for _ in range(4)]
        assert [answer["id"] for answer in answers] == [1, 2, 3, 4]
        assert answers[3]["result"] == []


async def test_a_line_may_come_in_pieces_and_may_be_long(tmp_path: Path) -> None:
    table = "# " + "x" * 300_000 + "\n" + "\n".join(f"{8 * number} 8 zero" for number in range(500))
    async with rig(tmp_path) as made:
        client = await made.client()
        client.raw(b'{"id":1,"met')
        await asyncio.sleep(0)
        client.raw(b'hod":"info"}\n')
        assert (await client.answer())["result"] == []
        assert (await client.call("create", name="long", table=table))["targets"] == 500


async def test_a_line_that_is_too_long_ends_the_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_LINE", 1 << 16)
    async with rig(tmp_path) as made:
        client = await made.client()
        client.ask("version", 1)
        client.raw(b"x" * (1 << 18))
        assert (await client.answer())["id"] == 1
        assert (await client.answer())["error"]["message"] == "a request is longer than 65536 bytes"
        assert await client.reader.read() == b""


async def test_events_are_streamed_after_the_acknowledgement(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        listener, client = await made.client(), await made.client()
        listener.ask("events", 9)
        assert await listener.answer() == {"jsonrpc": "2.0", "id": 9, "result": {}}
        await client.call("create", name="a", uuid="u", table="0 8 zero")
        await client.call("remove", name="a")
        events = [await listener.answer() for _ in range(3)]
        assert [event["method"] for event in events] == ["event"] * 3
        assert [event["params"]["ACTION"] for event in events] == ["add", "change", "remove"]
        assert events[0]["params"] == {
            "TIMESTAMP": "1.500000", "ACTION": "add", "DEVPATH": "/block/dm-0", "SUBSYSTEM": "block", "DM_NAME": "a",
            "DM_UUID": "u", "MINOR": "0", "MAJOR": "254", "SEQNUM": "1",
        }  # fmt: skip
        listener.writer.close()
        await until(lambda: not made.mapper.events._listeners)


async def test_who_goes_away_cancels_what_is_under_way(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        client = await made.client()
        await client.call("create", name="a", table="0 8 linear disk 0")
        device = made.mapper.devices["a"]
        made.disk.gate = asyncio.Event()
        data = memoryview(bytes(512))
        writing = asyncio.ensure_future(device.submit(Io(WRITE, 512, data), 0))
        client.ask("suspend", name="a")  # waits for the write
        client.ask("remove_all")
        await until(lambda: device.suspended)
        client.writer.close()
        await until(lambda: not device.suspended)
        made.disk.gate.set()
        await writing
        assert "a" in made.mapper.devices
        await until(lambda: not made.server._connections)


async def test_who_ends_its_sending_side_is_still_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "CLOSED_CHECK", 0.001)
    async with rig(tmp_path) as made:
        client, other = await made.client(), await made.client()
        await other.call("create", name="a", table="0 8 zero")
        client.ask("wait", name="a")
        client.writer.write_eof()
        await until(lambda: made.mapper.devices["a"]._event is not None)
        await other.call("rename", name="a", new_name="b")
        answer = await client.answer()
        assert (answer["result"]["event"], answer["result"]["name"]) == (1, "b")
        assert await client.reader.read() == b""
        gone = await made.client()
        gone.ask("wait", name="b")
        gone.writer.write_eof()
        await until(lambda: made.mapper.devices["b"]._event is not None)
        gone.writer.close()  # only a look at the socket tells
        await asyncio.wait_for(_connections_left(made.server, 1), 5)


async def _connections_left(server: rpc.AdminServer, number: int) -> None:
    while len(server._connections) > number:
        await asyncio.wait(server._connections, timeout=0.001, return_when=asyncio.FIRST_COMPLETED)


async def test_more_clients_than_may_be_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_CONNECTIONS", 2)
    async with rig(tmp_path) as made:
        first, second = await made.client(), await made.client()
        await first.call("version")
        await second.call("version")
        third = await made.client()
        assert (await third.answer())["error"] == {
            "code": rpc.TOO_MANY_CONNECTIONS, "message": "2 clients are connected, as many as may be",
        }  # fmt: skip
        assert await third.reader.read() == b""
        first.writer.close()
        await until(lambda: len(made.server._connections) == 1)
        assert (await (await made.client()).call("version"))["driver"]


# --- the socket ------------------------------------------------------------------------------------------------------------


async def test_the_socket_is_the_owners_alone_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "made" / "admin.sock"
    server = Rig(path).server
    old = os.umask(0)
    try:
        await server.start()
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    await server.close()
    await server.close()
    assert not path.exists()


async def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    async with rig(tmp_path) as made:
        assert await (await made.client()).call("info") == []
        with pytest.raises(Busy, match="another nbdmap listens on"):
            await rpc.AdminServer(made.verbs, path).start()
        assert await (await made.client()).call("info") == []


async def test_another_servers_socket_is_left_alone(tmp_path: Path) -> None:
    first = Rig(tmp_path / "admin.sock").server
    await first.start()
    os.unlink(first.path)
    async with rig(tmp_path) as second:
        await first.close()
        assert await (await second.client()).call("info") == []


def test_what_cannot_be_a_socket_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Busy, match="exists and is not a socket"):
        rpc.bind(str(tmp_path / "file"))
    with pytest.raises(IoFailed, match="the admin socket's directory"):
        rpc.bind(str(tmp_path / "file" / "admin.sock"))
    with pytest.raises(InvalidArgument, match="is too long"):
        rpc.bind(str(tmp_path / ("x" * 200)))


def test_the_path_of_the_socket() -> None:
    assert admin_path({"NBDMAP_SOCKET": "/x"}, 0) == "/x"
    assert admin_path({"XDG_RUNTIME_DIR": "/run/user/5"}, 0) == "/run/nbdmap/admin.sock"
    assert admin_path({"XDG_RUNTIME_DIR": "/run/user/5"}, 5) == "/run/user/5/nbdmap/admin.sock"
    assert admin_path({}, 5) == "/run/user/5/nbdmap/admin.sock"

"""nbdmap.server.listener: where it listens, what it refuses, and that nobody is left when it closes."""

import asyncio
import errno
import os
import resource
import socket
import stat
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest

from nbdmap.block.device import Device
from nbdmap.errors import InvalidArgument, IoFailed
from nbdmap.nbd import constants as nbd
from nbdmap.nbd.constants import Opt
from nbdmap.nbd.handshake import Export, TlsMode
from nbdmap.nbd.uri import Uri, parse_uri
from nbdmap.server import listener as module
from nbdmap.server.connection import Connection
from nbdmap.server.tls import server_context
from tests.support.certificates import make_certificates
from tests.support.disks import FakeDisk
from tests.support.handshake import BOTH, DISK, FakeExports, info, option

GREETING = b"NBDMAGICIHAVEOPT\0\3"
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Listener(module.Listener):
    """One that is closed at the end of the test, whatever happens."""

    made: ClassVar[list["Listener"]] = []
    streams: ClassVar[list[Stream]] = []

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.made.append(self)


@pytest.fixture(autouse=True)
async def closed_at_the_end() -> AsyncIterator[None]:
    yield
    for _, writer in Listener.streams:
        writer.transport.abort()
    for made in Listener.made:
        await made.close()
    Listener.made.clear()
    Listener.streams.clear()
    await turns()


async def connect(port: int, host: str = "127.0.0.1") -> Stream:
    Listener.streams.append(await asyncio.open_connection(host, port))
    return Listener.streams[-1]


async def connect_at(path: Path) -> Stream:
    Listener.streams.append(await asyncio.open_unix_connection(path))
    return Listener.streams[-1]


async def turns() -> None:
    """Lets everything that can run do so."""
    for _ in range(10):
        await asyncio.sleep(0)


class OneDisk(FakeExports):
    """One export, and how many have it open."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = FakeDisk("7:0")

    def find(self, name: str) -> Export:
        return DISK

    def open(self, name: str) -> Device:
        self.disk.openers += 1
        return self.disk

    async def release(self, device: Device) -> None:
        device.openers -= 1


@asynccontextmanager
async def listening(*uris: str, tls_required: bool = False, context: Any = None) -> AsyncIterator[Listener]:
    made = Listener(OneDisk(), context, tls_required)
    try:
        for uri in uris:
            await made.listen(parse_uri(uri))
        yield made
    finally:
        await made.close()


async def greeted(host: str, port: int) -> bool:
    """Whether somebody there speaks NBD."""
    reader, writer = await connect(port, host)
    greeting = await reader.read(18)
    writer.close()
    await writer.wait_closed()
    return greeting == GREETING


async def greeted_at(path: Path) -> bool:
    reader, writer = await connect_at(path)
    greeting = await reader.read(18)
    writer.close()
    await writer.wait_closed()
    return greeting == GREETING


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what it waits for sets no event
            await asyncio.sleep(0)


def names(patch: pytest.MonkeyPatch, *addresses: tuple[int, str]) -> None:
    """From now on every name has these addresses."""

    async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        return [
            (family, socket.SOCK_STREAM, 6, "", (name, port, 0, 0) if family == socket.AF_INET6 else (name, port))
            for family, name in addresses
        ]

    patch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)


# --- TCP -------------------------------------------------------------------------------------------------------------------


async def test_tcp_on_a_free_port() -> None:
    async with listening("nbd://127.0.0.1:0", "nbd://127.0.0.1:0") as made:
        first, second = (uri.port for uri in made.uris)
        assert 0 < first != second > 0
        assert made.uris[0] == Uri("127.0.0.1", first)
        assert await greeted("127.0.0.1", first)
        assert await greeted("127.0.0.1", second)
    with pytest.raises(ConnectionRefusedError):
        await greeted("127.0.0.1", first)


async def test_ipv6() -> None:
    async with listening("nbd://[::1]:0") as made:
        assert str(made.uris[0]) == f"nbd://[::1]:{made.uris[0].port}"
        assert await greeted("::1", made.uris[0].port)
        with pytest.raises(ConnectionRefusedError):
            await greeted("127.0.0.1", made.uris[0].port)


BOTH_FAMILIES = ((socket.AF_INET6, "::1"), (socket.AF_INET, "127.0.0.1"))


async def test_port_0_is_the_same_port_in_both_families(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        names(patch, *BOTH_FAMILIES, BOTH_FAMILIES[0])  # a name may have an address twice
        made = Listener(OneDisk(), None, False)
        await made.listen(Uri("both", 0), accept=False)
    await made.accept()
    (uri,) = made.uris
    assert await greeted("::1", uri.port)
    assert await greeted("127.0.0.1", uri.port)
    await made.close()


async def test_port_0_is_tried_again_when_the_other_family_has_it_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[socket.socket] = []
    most = 2

    def take(listening: socket.socket) -> None:
        """Somebody else gets the first two ports in the other family."""
        listening.listen()
        if listening.family == socket.AF_INET6 and len(taken) < most:
            taken.append(socket.socket())
            taken[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):  # another process listens there already
                taken[-1].bind(("127.0.0.1", listening.getsockname()[1]))
                taken[-1].listen()

    with monkeypatch.context() as patch:
        names(patch, *BOTH_FAMILIES)
        patch.setattr(module, "_prepare", take)
        made = Listener(OneDisk(), None, False)
        await made.listen(Uri("both", 0), accept=False)
        assert made.uris[0].port not in [one.getsockname()[1] for one in taken]
        assert len(taken) == 2
        most += module.PORT_TRIES
        with pytest.raises(IoFailed, match="no port is free on all of its addresses") as caught:
            await made.listen(Uri("both", 0), accept=False)
        assert caught.value.errno == errno.EADDRINUSE
    await made.close()
    for one in taken:
        one.close()


async def test_a_port_in_use_is_refused_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        async with listening() as made:
            with pytest.raises(IoFailed, match=f"listen on 127.0.0.1:{port}: Address already in use") as caught:
                await made.listen(Uri("127.0.0.1", port))
            assert caught.value.errno == errno.EADDRINUSE
            with monkeypatch.context() as patch:
                names(patch, *BOTH_FAMILIES)
                with pytest.raises(IoFailed, match="already in use"):
                    await made.listen(Uri("both", port))
            assert made.uris == []
            with socket.socket(socket.AF_INET6) as free:  # that half was given back
                free.bind(("::1", port))


@pytest.mark.parametrize(
    ("host", "complaint"),
    [
        ("no.such.host.invalid", r"listen on no.such.host.invalid:1: .+"),
        ("x" * 64, "not the name of a host"),
        ("203.0.113.1", "listen on 203.0.113.1:1: Cannot assign requested address"),
    ],
)
async def test_an_address_that_is_not_ours_is_refused(host: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if host.endswith("invalid"):  # without asking a real name server

        async def getaddrinfo(*_: Any, **__: Any) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    made = Listener(OneDisk(), None, False)
    with pytest.raises(IoFailed, match=complaint) as caught:
        await made.listen(Uri(host, 1))
    assert caught.value.errno == errno.EADDRNOTAVAIL
    assert made.uris == []


async def test_addresses_that_the_machine_has_not_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        names(patch, (socket.AF_INET, "203.0.113.1"), (socket.AF_INET, "127.0.0.1"))
        made = Listener(OneDisk(), None, False)
        await made.listen(Uri("both", 0), accept=False)
        names(patch, (socket.AF_INET, "203.0.113.1"), (socket.AF_INET, "203.0.113.2"))
        with pytest.raises(IoFailed, match="Cannot assign requested address"):
            await made.listen(Uri("both", 0))
    await made.accept()
    assert await greeted("127.0.0.1", made.uris[0].port)
    await made.close()


async def test_a_kernel_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket

    def no_ipv6(family: int, *rest: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, *rest)

    with monkeypatch.context() as patch:
        names(patch, *BOTH_FAMILIES)
        patch.setattr(socket, "socket", no_ipv6)
        made = Listener(OneDisk(), None, False)
        await made.listen(Uri("localhost", 0), accept=False)
        names(patch, BOTH_FAMILIES[0])
        with pytest.raises(IoFailed, match="Address family not supported"):
            await made.listen(Uri("::1", 0))
    await made.close()


async def test_clients_wait_in_line_until_they_are_accepted() -> None:
    made = Listener(OneDisk(), None, False)
    await made.listen(Uri("127.0.0.1", 0), accept=False)
    reader, _ = await connect(made.uris[0].port)
    assert not made.clients
    await made.accept()
    assert await reader.readexactly(18) == GREETING
    (client,) = made.clients
    options = client._transport.get_extra_info("socket")
    assert options.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert options.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert options.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == module.KEEPALIVE_SECONDS
    await made.close()


async def test_a_listener_that_never_accepted_frees_its_port() -> None:
    made = Listener(OneDisk(), None, False)
    await made.listen(Uri("127.0.0.1", 0), accept=False)
    await made.close()
    async with listening(str(made.uris[0])):
        pass


async def test_a_socket_that_cannot_be_served_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def create_server(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, "out of memory")

    made = Listener(OneDisk(), None, False)
    await made.listen(Uri("127.0.0.1", 0), accept=False)
    with monkeypatch.context() as patch:
        patch.setattr(asyncio.get_running_loop(), "create_server", create_server)
        with pytest.raises(OSError, match="out of memory"):
            await made.accept()
    async with listening(str(made.uris[0])):  # the port is free
        pass
    await made.close()


# --- Unix sockets ----------------------------------------------------------------------------------------------------------


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    async with listening(f"nbd+unix:///?socket={path}") as made:
        assert made.uris == [Uri(socket=str(path))]
        assert await greeted_at(path)
    assert not path.exists()


async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with listening(f"nbd+unix:///?socket={path}"):
        assert await greeted_at(path)


async def test_a_live_socket_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    uri = f"nbd+unix:///?socket={path}"
    async with listening(uri):
        with pytest.raises(IoFailed, match=f"listen on {path}: Address already in use") as caught:
            async with listening(uri):
                pass
        assert caught.value.errno == errno.EADDRINUSE
        assert await greeted_at(path)


async def test_a_live_socket_with_a_full_backlog_is_not_waited_for(tmp_path: Path) -> None:
    path = str(tmp_path / "nbd.sock")
    clients: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(path)
        busy.listen(0)
        while not clients or clients[-1].connect_ex(path) != errno.EAGAIN:
            clients.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
        with pytest.raises(IoFailed, match="already in use"):
            await Listener(OneDisk(), None, False).listen(Uri(socket=path))
    for client in clients:
        client.close()


async def test_other_things_in_the_way_are_kept(tmp_path: Path) -> None:
    file, directory, packets = tmp_path / "file", tmp_path / "directory", tmp_path / "packets"
    file.write_text("precious")
    directory.mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(packets))
        for path in (file, directory, packets, tmp_path / "dangling"):
            with pytest.raises(IoFailed, match="already in use"):
                await Listener(OneDisk(), None, False).listen(Uri(socket=str(path)))
    assert file.read_text() == "precious"
    assert packets.exists()


async def test_a_path_that_cannot_be_a_socket_is_told(tmp_path: Path) -> None:
    made = Listener(OneDisk(), None, False)
    with pytest.raises(IoFailed, match="too long"):
        await made.listen(Uri(socket="/tmp/" + "x" * 200))
    with pytest.raises(IoFailed, match="No such file or directory"):
        await made.listen(Uri(socket=str(tmp_path / "no" / "where")))


async def test_a_socket_that_may_not_be_probed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    class Forbidden(socket.socket):
        def connect(self, address: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "socket", Forbidden)
    with pytest.raises(IoFailed, match="Permission denied"):
        await Listener(OneDisk(), None, False).listen(Uri(socket=str(path)))
    assert path.exists()


async def test_only_its_own_socket_is_taken_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone, replaced, moved = tmp_path / "gone", tmp_path / "replaced", tmp_path / "d" / "moved"
    moved.parent.mkdir()
    async with listening(*(f"nbd+unix:///?socket={path}" for path in (gone, replaced, moved))):
        gone.unlink()
        replaced.unlink()
        replaced.write_text("another's")
        moved.unlink()
        moved.parent.rmdir()
        moved.parent.write_text("a file where the directory was")
    assert replaced.read_text() == "another's"
    assert "Not a directory" in caplog.text


# --- TLS -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("uri", "required"), [("nbds://127.0.0.1:0", False), ("nbd://127.0.0.1:0", True)])
async def test_tls_needs_certificates(uri: str, required: bool) -> None:
    made = Listener(OneDisk(), None, required)
    with pytest.raises(InvalidArgument, match="TLS is required, but no certificates are given"):
        await made.listen(parse_uri(uri))
    assert made.uris == []


async def test_tls_is_required_where_one_of_both_says_so(tmp_path: Path) -> None:
    context = server_context(str(make_certificates(tmp_path)), False)
    async with listening("nbd://127.0.0.1:0", "nbds://127.0.0.1:0", context=context) as made:
        assert [uri.tls for uri in made.uris] == [False, True]
        for uri, mode in zip(made.uris, (TlsMode.OFFERED, TlsMode.REQUIRED), strict=True):
            reader, writer = await connect(uri.port)
            await reader.readexactly(18)
            writer.write(BOTH + option(Opt.LIST))
            kind = struct.unpack(">QIII", await reader.readexactly(20))[2]
            assert (kind == 2**31 + 5) is (mode is TlsMode.REQUIRED)
            writer.close()
    async with listening("nbd://127.0.0.1:0", context=context, tls_required=True) as made:
        assert made.uris[0].tls


# --- sockets that are passed in --------------------------------------------------------------------------------------------


async def test_adopted_sockets(tmp_path: Path) -> None:
    tcp, unix = socket.socket(), socket.socket(socket.AF_UNIX)
    tcp.bind(("127.0.0.1", 0))
    unix.bind(str(tmp_path / "nbd.sock"))
    port = tcp.getsockname()[1]
    made = Listener(OneDisk(), None, False)
    await made.adopt([tcp.detach(), unix.detach()])
    assert await greeted("127.0.0.1", port)
    assert await greeted_at(tmp_path / "nbd.sock")
    await made.close()
    assert stat.S_ISSOCK((tmp_path / "nbd.sock").stat().st_mode)  # it is systemd's


async def test_what_cannot_be_adopted_is_refused_and_named(tmp_path: Path) -> None:
    made = Listener(OneDisk(), None, False)
    with socket.socket() as closed:
        number = closed.fileno()
    with pytest.raises(IoFailed, match=f"descriptor {number}: Bad file descriptor"):
        await made.adopt([number])
    file = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(IoFailed, match=f"descriptor {file}: Socket operation on non-socket"):
        await made.adopt([file])
    os.close(file)
    for family in (socket.AF_INET, socket.AF_UNIX):
        packets = socket.socket(family, socket.SOCK_DGRAM).detach()
        with pytest.raises(InvalidArgument, match=f"descriptor {packets} is neither a TCP nor a Unix stream socket"):
            await made.adopt([packets])
    one, other = socket.socketpair()
    connected = one.detach()
    with pytest.raises(IoFailed, match=f"listen on descriptor {connected}: Invalid argument"):
        await made.adopt([connected])
    assert other.recv(1) == b""  # it was closed
    other.close()
    await made.close()


async def test_adopted_sockets_wait_for_accept() -> None:
    tcp = socket.socket()
    tcp.bind(("127.0.0.1", 0))
    port = tcp.getsockname()[1]
    made = Listener(OneDisk(), None, False)
    await made.adopt([tcp.detach()], accept=False)
    reader, _ = await connect(port)
    assert not made.clients
    await made.accept()
    assert await reader.readexactly(18) == GREETING
    await made.close()


async def test_adopted_sockets_want_certificates_where_tls_is_required() -> None:
    tcp = socket.socket()
    with pytest.raises(InvalidArgument, match="no certificates"):
        await Listener(OneDisk(), None, True).adopt([tcp.fileno()])
    tcp.close()


# --- clients ---------------------------------------------------------------------------------------------------------------


async def test_descriptors_that_run_out_do_not_stop_it() -> None:
    """Clients who come then are sent away at once; nothing spins, and the next are served."""
    async with listening("nbd://127.0.0.1:0") as made:
        port = made.uris[0].port
        clients = [socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) for _ in range(8)]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(client.fileno() for client in clients)
        fillers: list[int] = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        try:
            with suppress(OSError):
                while True:
                    fillers.append(os.dup(clients[0].fileno()))
            with pytest.raises(OSError, match="Too many open files"):
                os.dup(clients[0].fileno())
            loop = asyncio.get_running_loop()
            for client in clients:
                assert client.connect_ex(("127.0.0.1", port)) in (0, errno.EINPROGRESS)
            for client in clients:
                async with asyncio.timeout(5):
                    assert await loop.sock_recv(client, 100) == b""
            assert not made.clients
        finally:
            for filler in fillers:
                os.close(filler)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for client in clients:
                client.close()
        assert await greeted("127.0.0.1", port)


async def test_renewed_certificates_are_for_those_who_come_from_now_on(tmp_path: Path) -> None:
    first = server_context(str(make_certificates(tmp_path / "1")), False)
    second = server_context(str(make_certificates(tmp_path / "2")), False)
    async with listening("nbd://127.0.0.1:0", context=first) as made:
        seen = []
        for context in (first, second):
            made.renew(context)
            reader, writer = await connect(made.uris[0].port)
            await reader.readexactly(18)
            (client,) = made.clients
            seen.append(client._context)
            writer.close()
            await until(lambda: not made.clients)
        assert seen == [first, second]


@pytest.mark.parametrize("turns", range(8))
async def test_a_client_of_the_last_moment_is_not_left_behind(turns: int) -> None:
    made = Listener(OneDisk(), None, False)
    await made.listen(Uri("127.0.0.1", 0))
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.connect(("127.0.0.1", made.uris[0].port))  # in line, whatever the loop does
        for _ in range(turns):
            await asyncio.sleep(0)
        await made.close()
        client.setblocking(False)
        said = b"."
        async with asyncio.timeout(5):
            try:
                while said:
                    said = await asyncio.get_running_loop().sock_recv(client, 100)
            except ConnectionResetError:
                pass
        assert not made.clients


async def test_a_connection_made_after_the_end_is_dropped() -> None:
    made = Listener(OneDisk(), None, False)
    await made.close()
    ours, theirs = socket.socketpair()
    connection = Connection(made._exports, TlsMode.OFF, None, made._shared)
    await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, ours)
    async with asyncio.timeout(5):
        await connection.gone
    assert theirs.recv(100) == b""
    theirs.close()


async def test_close_that_is_cancelled_leaves_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that does not end holds the end up; whoever cannot wait for it cancels."""
    exports = OneDisk()
    made = Listener(exports, None, False)
    await made.listen(Uri("127.0.0.1", 0))
    exports.disk.gate = asyncio.Event()
    _, writer = await connect(made.uris[0].port)
    writer.write(BOTH + option(Opt.GO, info("")) + nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.Cmd.READ, 1, 0, 512))
    await until(lambda: exports.disk.log)
    before = asyncio.all_tasks()
    closing = asyncio.ensure_future(made.close())
    await turns()
    assert exports.disk.openers == 1
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await turns()
    assert asyncio.all_tasks() == before
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.001)
    await made.close()
    assert exports.disk.openers == 0


async def test_a_client_that_does_nothing_is_dropped_at_the_end() -> None:
    made = Listener(OneDisk(), None, False)
    await made.listen(Uri("127.0.0.1", 0))
    reader, _ = await connect(made.uris[0].port)
    await reader.readexactly(18)
    await made.close()
    assert await reader.read() == b""
    assert not made.clients
    await made.close()  # once more does no harm

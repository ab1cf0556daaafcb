import asyncio
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from nbdmap.block import link as module
from nbdmap.block.link import Link, open_link, tls_context
from nbdmap.errors import AccessRefused, IoFailed, NbdmapError
from nbdmap.nbd.constants import GREETING, INIT_MAGIC, OPTION_MAGIC, REPLY_MAGIC, Cmd, Opt, Rep
from nbdmap.nbd.replies import Request
from nbdmap.nbd.uri import Uri
from tests.support.certificates import make_certificates, server_context
from tests.support.fake_nbd import FakeServer


class Owner:
    """Keeps what a link says."""

    def __init__(self) -> None:
        self.finished: asyncio.Queue[Request] = asyncio.Queue()
        self.lost: asyncio.Queue[Exception] = asyncio.Queue()

    def on_answers(self, link: Link, finished: list[Request]) -> None:
        for request in finished:
            self.finished.put_nowait(request)

    def on_loss(self, link: Link, error: Exception) -> None:
        self.lost.put_nowait(error)

    async def open(self, uri: Uri) -> Link:
        return await open_link(uri, tls_context(uri), self.on_answers, self.on_loss)

    async def refusal(self, uri: Uri) -> NbdmapError:
        with pytest.raises(NbdmapError) as caught:
            await self.open(uri)
        assert caught.value.message.startswith(str(uri))
        return caught.value


@asynccontextmanager
async def scripted(path: Path, *pieces: bytes) -> AsyncIterator[tuple[Uri, list[bytes]]]:
    """A server that says each piece and, between two, waits for the client; what it heard is in the list."""
    heard: list[bytes] = []
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        for piece in pieces:
            writer.write(piece)
            heard.append(await reader.read(65536))
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield Uri(socket=str(path), export="disk"), heard
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0)


def reply(number: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", REPLY_MAGIC, number, kind, len(data)) + data


HELLO = GREETING.pack(INIT_MAGIC, OPTION_MAGIC, 3)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Signed by somebody else."""
    return make_certificates(tmp_path_factory.mktemp("strangers"), "127.0.0.1")


# --- requests ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tcp", [True, False])
@pytest.mark.parametrize("tls", [True, False])
async def test_requests(tmp_path: Path, certificates: Path, tcp: bool, tls: bool) -> None:
    context = server_context(certificates) if tls else None
    owner, payload = Owner(), bytes(range(256)) * 512
    async with FakeServer(tmp_path / "nbd", tcp=tcp, context=context) as server:
        uri = replace(server.uri, tls_certificates=str(certificates) * tls, tls_hostname="localhost" * tls)
        link = await owner.open(uri)
        assert link.agreement.size == server.size
        write = Request(Cmd.WRITE, 4096, len(payload), memoryview(payload))
        read = Request(Cmd.READ, 4096, len(payload), memoryview(bytearray(len(payload))))
        link.send(write)
        assert await owner.finished.get() is write
        link.send(read)
        assert await owner.finished.get() is read
        assert read.data == payload
        await link.close()
        await link.close()
        assert (server.discs, owner.lost.qsize()) == (1, 0)


async def test_loss_is_told_once(tmp_path: Path) -> None:
    owner = Owner()
    async with FakeServer(tmp_path / "nbd") as server:
        server.open.clear()
        link = await owner.open(server.uri)
        request = Request(Cmd.FLUSH, 0, 0)
        link.send(request)
        await server.until(lambda: len(server.log) == 1)
        await server.drop()
        assert isinstance(await owner.lost.get(), OSError)
        link.send(Request(Cmd.FLUSH, 0, 0))
        link.hang_up()
        await link.close()
        assert owner.lost.empty()


async def test_answers_after_hanging_up_are_not_looked_at(tmp_path: Path) -> None:
    owner = Owner()
    async with FakeServer(tmp_path / "nbd") as server:
        link = await owner.open(server.uri)
        link.hang_up()
        buffer = link.get_buffer(-1)
        buffer[:4] = b"junk"
        link.buffer_updated(4)
        await link.close()
        assert owner.finished.empty()
        assert owner.lost.empty()


# --- connections that fail ---------------------------------------------------------------------------------------------
async def test_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_TIMEOUT_S", 0.01)
    async with scripted(tmp_path / "nbd", b"") as (uri, _):
        assert "no answer within 0.01 s" in (await Owner().refusal(uri)).message


async def test_cancelled(tmp_path: Path) -> None:
    async with scripted(tmp_path / "nbd", b"") as (uri, _):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(Owner().open(uri), 0.01)


async def test_nobody_there(tmp_path: Path) -> None:
    assert "No such file" in (await Owner().refusal(Uri(socket=str(tmp_path / "nbd")))).message
    async with FakeServer(tmp_path / "nbd", tcp=True) as server:
        uri = server.uri
    error = await Owner().refusal(uri)
    assert isinstance(error, IoFailed)


async def test_server_that_leaves(tmp_path: Path) -> None:
    async with FakeServer(tmp_path / "nbd", greeting=HELLO[:7]) as server:
        opening = asyncio.ensure_future(Owner().refusal(server.uri))
        await server.until(lambda: server.connections == 1)
        await server.drop()
        assert "the peer left in the middle of the handshake" in (await opening).message


async def test_replies_before_requests(tmp_path: Path) -> None:
    simple = reply(Opt.EXTENDED_HEADERS, Rep.ERR_UNSUP) + reply(Opt.STRUCTURED_REPLY, Rep.ERR_UNSUP)
    export = reply(Opt.GO, Rep.INFO, struct.pack(">HQH", 0, 1 << 20, 1)) + reply(Opt.GO, Rep.ACK)
    async with scripted(tmp_path / "nbd", HELLO + simple + export + b"junk") as (uri, _):
        assert "replies before there were requests" in (await Owner().refusal(uri)).message


# --- TLS ---------------------------------------------------------------------------------------------------------------
TLS_FAILURES: dict[str, tuple[Callable[[Uri, Path, Path], Uri], str]] = {
    "unknown authority": (
        lambda uri, ours, theirs: replace(uri, tls_certificates=str(theirs), tls_hostname="localhost"),
        "certificate verify failed",
    ),
    "authorities of the system": (lambda uri, ours, theirs: replace(uri, tls_hostname="localhost"), "certificate verify failed"),
    "another name": (
        lambda uri, ours, theirs: replace(uri, tls_certificates=str(ours), tls_hostname="example.com"),
        "certificate verify failed",
    ),
    "the address is not in it": (lambda uri, ours, theirs: replace(uri, tls_certificates=str(ours)), "certificate verify failed"),
}


@pytest.mark.parametrize("name", TLS_FAILURES)
async def test_certificates_are_verified(tmp_path: Path, certificates: Path, strangers: Path, name: str) -> None:
    change, why = TLS_FAILURES[name]
    async with FakeServer(tmp_path / "nbd", tcp=True, context=server_context(certificates)) as server:
        assert why in (await Owner().refusal(change(server.uri, certificates, strangers))).message
        assert server.log == []


async def test_certificates_of_addresses_and_none(tmp_path: Path, strangers: Path) -> None:
    async with FakeServer(tmp_path / "nbd", tcp=True, context=server_context(strangers)) as server:
        for uri in (replace(server.uri, tls_certificates=str(strangers)), replace(server.uri, tls_verify_peer=False)):
            link = await Owner().open(uri)
            await link.close()


async def test_client_certificates(tmp_path: Path, certificates: Path, strangers: Path) -> None:
    context = server_context(certificates, ask_client=True)
    async with FakeServer(tmp_path / "nbd", context=context) as server:
        link = await Owner().open(replace(server.uri, tls_certificates=str(certificates)))
        await link.close()
        await Owner().refusal(replace(server.uri, tls_verify_peer=False))
        await Owner().refusal(replace(server.uri, tls_verify_peer=False, tls_certificates=str(strangers)))


def test_contexts(tmp_path: Path, certificates: Path) -> None:
    assert tls_context(Uri()) is None
    uri = Uri(tls=True, tls_certificates=str(tmp_path))
    with pytest.raises(IoFailed, match=r"certificates in .*: No such file or directory"):
        tls_context(uri)
    (tmp_path / "ca-cert.pem").write_text("not a certificate")
    with pytest.raises(IoFailed, match="certificates in"):
        tls_context(uri)
    (tmp_path / "ca-cert.pem").write_bytes((certificates / "ca-cert.pem").read_bytes())
    assert tls_context(uri), "without a client's certificate"
    context = tls_context(replace(uri, tls_certificates=str(certificates)))
    assert context is not None
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.check_hostname
    unverified = tls_context(Uri(tls=True, tls_verify_peer=False))
    assert unverified is not None
    assert unverified.verify_mode == ssl.CERT_NONE


async def test_a_context_is_enough_to_want_tls(tmp_path: Path, certificates: Path) -> None:
    async with FakeServer(tmp_path / "nbd", context=server_context(certificates)) as server:
        context, owner = tls_context(replace(server.uri, tls_certificates=str(certificates))), Owner()
        link = await open_link(replace(server.uri, tls=False), context, owner.on_answers, owner.on_loss)
        await link.close()


async def test_no_tls_is_no_connection(tmp_path: Path) -> None:
    async with FakeServer(tmp_path / "nbd") as server:
        error = await Owner().refusal(replace(server.uri, tls=True, tls_verify_peer=False))
        assert isinstance(error, AccessRefused)
        assert "TLS is wanted" in error.message


INJECTED = reply(Opt.EXTENDED_HEADERS, Rep.ACK)
ACCEPTED = reply(Opt.STARTTLS, Rep.ACK)


@pytest.mark.parametrize("pieces", [(HELLO, ACCEPTED + INJECTED), (HELLO + ACCEPTED + INJECTED,), (HELLO, ACCEPTED, INJECTED)])
async def test_plaintext_behind_starttls(tmp_path: Path, pieces: tuple[bytes, ...]) -> None:
    async with scripted(tmp_path / "nbd", *pieces) as (uri, heard):
        await Owner().refusal(replace(uri, tls=True, tls_verify_peer=False))
        options = [data for data in heard if b"IHAVEOPT" in data]
        assert len(options) <= 1, "nothing but STARTTLS was said in clear"


async def test_server_that_leaves_while_tls_starts(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HELLO)
        await reader.readexactly(20)
        writer.write(ACCEPTED)
        await reader.read(1)
        writer.close()

    server = await asyncio.start_unix_server(serve, tmp_path / "nbd")
    async with server:
        await Owner().refusal(Uri(socket=str(tmp_path / "nbd"), tls=True, tls_verify_peer=False))

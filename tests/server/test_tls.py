"""nbdmap.server.tls: the server's context, and STARTTLS from end to end with Python's own TLS on the client's side."""

import asyncio
import datetime
import logging
import ssl
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import ClassVar

import pytest
from cryptography.hazmat.primitives import serialization

from nbdmap.block.device import Device
from nbdmap.errors import InvalidArgument
from nbdmap.nbd import constants as nbd
from nbdmap.nbd.constants import Cmd, Error, Info, Opt, Rep
from nbdmap.nbd.handshake import Export
from nbdmap.nbd.uri import Uri
from nbdmap.server import connection
from nbdmap.server.listener import Listener
from nbdmap.server.tls import server_context
from tests.support.certificates import make_certificates
from tests.support.disks import FakeDisk
from tests.support.handshake import BOTH, FakeExports, info, option

GOOD, AHEAD, STRANGER, EXPIRED = "good", "ahead", "stranger", "expired"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories: good; stranger, of another authority; expired, whose client's certificate has ended."""
    directory = tmp_path_factory.mktemp("tls")
    for name in (GOOD, STRANGER):
        make_certificates(directory / name)
    make_certificates(directory / EXPIRED, client_ends=datetime.timedelta(days=-1))
    return directory


# --- the context -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(certificates: Path, tmp_path: Path) -> Path:
    """A directory of good files that a test may spoil."""
    for path in (certificates / GOOD).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_the_context_is_strict(copy: Path) -> None:
    context = server_context(str(copy), verify_peer=True)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.verify_mode is ssl.CERT_REQUIRED
    (copy / "ca-cert.pem").unlink()
    assert server_context(str(copy), verify_peer=False).verify_mode is ssl.CERT_NONE


@pytest.mark.parametrize("name", ["server-cert.pem", "server-key.pem", "ca-cert.pem"])
@pytest.mark.parametrize("way", ["missing", "directory", "garbage", "empty"])
def test_a_file_that_is_missing_or_wrong_is_named(copy: Path, name: str, way: str) -> None:
    (copy / name).unlink()
    if way == "directory":
        (copy / name).mkdir()
    elif way != "missing":
        (copy / name).write_text("garbage" if way == "garbage" else "")
    with pytest.raises(InvalidArgument, match=f"^tls: .*{name}.*") as caught:
        server_context(str(copy), verify_peer=True)
    assert caught.value.message.endswith("is missing") is (way in ("missing", "directory"))


def test_a_key_that_does_not_belong_to_the_certificate_is_refused(copy: Path, certificates: Path) -> None:
    (copy / "server-key.pem").write_bytes((certificates / STRANGER / "server-key.pem").read_bytes())
    with pytest.raises(InvalidArgument, match="key values mismatch"):
        server_context(str(copy), verify_peer=False)


def test_an_encrypted_key_does_not_make_the_server_ask_at_the_terminal(copy: Path) -> None:
    key = serialization.load_pem_private_key((copy / "server-key.pem").read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"secret")
    form = serialization.PrivateFormat.PKCS8
    (copy / "server-key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, locked))
    with pytest.raises(InvalidArgument, match=r"server-key\.pem is encrypted"):
        server_context(str(copy), verify_peer=False)


# --- a client --------------------------------------------------------------------------------------------------------------


class Disk(FakeExports):
    """One export on a FakeDisk."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = FakeDisk("7:0", 16)
        self.disk.bytes[:512] = b"d" * 512

    def find(self, name: str) -> Export:
        self.asked += 1
        return Export("disk", "", self.disk.size, nbd.HAS_FLAGS | nbd.SEND_FLUSH, 512, 4096, nbd.MAX_PAYLOAD)

    def open(self, name: str) -> Device:
        self.disk.openers += 1
        return self.disk

    async def release(self, device: Device) -> None:
        device.openers -= 1


class Site(Listener):
    """A listener on a free port; closed at the end of its test."""

    made: ClassVar[list["Site"]] = []

    def __init__(self, context: ssl.SSLContext | None, *, required: bool = False) -> None:
        self.exports = Disk()
        super().__init__(self.exports, context, required)
        self.made.append(self)

    async def start(self) -> "Site":
        await self.listen(Uri("127.0.0.1", 0))
        return self


async def site(certificates: Path, *, required: bool = False, verify: bool = False) -> Site:
    return await Site(server_context(str(certificates / GOOD), verify), required=required).start()


class Client:
    """Speaks in clear until `tls` is called, which does TLS over memory, so that a test decides what goes in one segment."""

    made: ClassVar[list["Client"]] = []

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._object: ssl.SSLObject | None = None
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.made.append(self)

    @classmethod
    async def connect(cls, at: Site) -> "Client":
        client = cls(*await asyncio.open_connection("127.0.0.1", at.uris[0].port))
        assert await client.receive(18) == b"NBDMAGICIHAVEOPT\0\3"
        client.send(BOTH)
        return client

    async def tls(self, context: ssl.SSLContext, behind: bytes = b"") -> None:
        """Shakes hands; `behind` leaves together with the end of the handshake."""
        self._object = context.wrap_bio(self._in, self._out, server_hostname="localhost")
        while True:
            try:
                self._object.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._exchange()
        self.send(behind)

    async def _exchange(self) -> None:
        self.writer.write(self._out.read())
        data = await self.reader.read(1 << 16)
        if data:
            self._in.write(data)
        else:
            self._in.write_eof()

    def send(self, data: bytes) -> None:
        if self._object is not None:
            if data:
                self._object.write(data)
            data = self._out.read()
        self.writer.write(data)

    async def receive(self, length: int) -> bytes:
        if self._object is None:
            return await self.reader.readexactly(length)
        found = b""
        while len(found) < length:
            try:
                piece = self._object.read(length - len(found))
                if not piece:
                    raise EOFError
                found += piece
            except ssl.SSLWantReadError:
                await self._exchange()
        return found

    async def reply(self) -> tuple[int, int, bytes]:
        """An option reply: option, type, data."""
        magic, number, kind, length = struct.unpack(">QIII", await self.receive(20))
        assert magic == nbd.REPLY_MAGIC
        return number, kind, await self.receive(length)

    async def ask(self, number: int, data: bytes = b"") -> int:
        """Sends an option; the type of its last reply."""
        self.send(option(number, data))
        while True:
            _, kind, _ = await self.reply()
            if kind == Rep.ACK or kind >= 2**31:
                return kind

    async def starttls(self, context: ssl.SSLContext, behind: bytes = b"") -> "Client":
        assert await self.ask(Opt.STARTTLS) == Rep.ACK
        await self.tls(context, behind)
        return self

    async def is_over(self) -> bool:
        """Whether the server ends the connection, be it in clear, in TLS or by a reset."""
        async with asyncio.timeout(5):
            try:
                while True:
                    await self.receive(1)
            except (EOFError, ConnectionResetError, ssl.SSLError):
                return True


@pytest.fixture(autouse=True)
async def closed_at_the_end() -> AsyncIterator[None]:
    yield
    await clean()


async def clean() -> None:
    for client in Client.made:
        client.writer.transport.abort()
    for one in Site.made:
        await one.close()
        assert not one.clients
        assert one.exports.disk.openers == 0
    Client.made.clear()
    Site.made.clear()


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def trusting(certificates: Path, identity: str = "") -> ssl.SSLContext:
    """A client's context, with its certificate of the directory `identity`."""
    context = ssl.create_default_context(cafile=str(certificates / GOOD / "ca-cert.pem"))
    if identity:
        directory = certificates / identity
        context.load_cert_chain(directory / "client-cert.pem", directory / "client-key.pem")
    return context


def read(cookie: int) -> bytes:
    return nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, Cmd.READ, cookie, 0, 512)


# --- from end to end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("required", [False, True])
async def test_from_starttls_to_the_last_request(certificates: Path, version: ssl.TLSVersion, required: bool) -> None:
    at = await site(certificates, required=required)
    context = trusting(certificates)
    context.minimum_version = context.maximum_version = version
    client = await (await Client.connect(at)).starttls(context)
    assert await client.ask(Opt.GO, info("disk")) == Rep.ACK
    client.send(read(1) + read(2) + nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, Cmd.WRITE, 3, 512, 512) + b"w" * 512)
    for cookie in (1, 2):
        assert await client.receive(16 + 512) == nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, cookie) + b"d" * 512
    assert await client.receive(16) == nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, 3)
    assert at.exports.disk.bytes[512:1024] == b"w" * 512
    client.send(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, Cmd.DISC, 4, 0, 0))
    with pytest.raises(EOFError):  # a proper end of TLS, not a cut
        await client.receive(1)


async def test_large_transfers(certificates: Path) -> None:
    at = await site(certificates)
    at.exports.disk = FakeDisk("7:0", 8192)
    client = await (await Client.connect(at)).starttls(trusting(certificates))
    assert await client.ask(Opt.GO, info("disk")) == Rep.ACK
    size = 4 << 20
    client.send(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, Cmd.WRITE, 1, 0, size) + b"w" * size)
    assert await client.receive(16) == nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, 1)
    client.send(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, Cmd.READ, 2, 0, size))
    assert (await client.receive(16 + size))[16:] == b"w" * size


async def test_where_tls_is_offered_clear_works_too(certificates: Path) -> None:
    client = await Client.connect(await site(certificates))
    assert await client.ask(Opt.GO, info("disk")) == Rep.ACK
    client.send(read(1))
    assert (await client.receive(16 + 512)).endswith(b"d")


async def test_without_certificates_starttls_is_refused_and_clear_goes_on() -> None:
    client = await Client.connect(await Site(None).start())
    assert await client.ask(Opt.STARTTLS) == Rep.ERR_POLICY
    assert await client.ask(Opt.GO, info("disk")) == Rep.ACK


async def test_starttls_twice_and_with_data_is_invalid(certificates: Path) -> None:
    client = await Client.connect(await site(certificates, required=True))
    assert await client.ask(Opt.STARTTLS, b"data") == Rep.ERR_INVALID
    await client.starttls(trusting(certificates))
    assert await client.ask(Opt.STARTTLS) == Rep.ERR_INVALID
    assert await client.ask(Opt.GO, info("disk")) == Rep.ACK


async def test_nothing_is_told_before_tls_where_it_is_required(certificates: Path) -> None:
    at = await site(certificates, required=True)
    client = await Client.connect(at)
    for number, data in [(Opt.LIST, b""), (Opt.INFO, info("disk", Info.NAME)), (Opt.GO, info("disk")), (99, b"")]:
        assert await client.ask(number, data) == Rep.ERR_TLS_REQD
    client.send(option(Opt.EXPORT_NAME, b"disk"))
    assert await client.is_over()
    assert await (await Client.connect(at)).ask(Opt.ABORT) == Rep.ACK
    assert at.exports.asked == 0
    client = await (await Client.connect(at)).starttls(trusting(certificates))
    assert await client.ask(Opt.LIST) == Rep.ACK


async def test_what_was_agreed_in_clear_is_forgotten(certificates: Path) -> None:
    client = await Client.connect(await site(certificates))
    assert await client.ask(Opt.STRUCTURED_REPLY) == Rep.ACK
    await client.starttls(trusting(certificates))
    assert await client.ask(Opt.GO, info("disk")) == Rep.ACK
    client.send(read(1))
    assert await client.receive(16) == nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, 1)


# --- what arrives at the wrong moment --------------------------------------------------------------------------------------


async def test_clear_behind_starttls_ends_the_connection(certificates: Path) -> None:
    at = await site(certificates)
    client = await Client.connect(at)
    client.send(option(Opt.STARTTLS) + option(Opt.LIST))
    assert await client.is_over()
    assert at.exports.asked == 0


async def test_clear_in_the_very_next_segment_ends_the_connection(certificates: Path) -> None:
    """STARTTLS ends where the server's buffer ends, so the next bytes are received before TLS has begun."""
    at = await site(certificates, required=True)
    client = Client(*await asyncio.open_connection("127.0.0.1", at.uris[0].port))
    await client.receive(18)
    last = option(Opt.STARTTLS)
    fill = option(99, bytes(connection.HANDSHAKE_BUFFER - len(BOTH) - len(last) - 16))
    client.send(BOTH + fill + last + option(Opt.LIST))
    assert await client.is_over()
    assert at.exports.asked == 0


async def test_clear_where_tls_should_begin_ends_the_connection(certificates: Path) -> None:
    client = await Client.connect(await site(certificates))
    assert await client.ask(Opt.STARTTLS) == Rep.ACK
    client.send(option(Opt.LIST))
    assert await client.is_over()


@pytest.mark.parametrize("filler", [0, 3000])
async def test_options_right_behind_the_handshake_are_not_lost(certificates: Path, filler: int) -> None:
    """They are decrypted before the server knows that TLS is up."""
    client = await Client.connect(await site(certificates, required=True))
    options = (option(99, bytes(filler)) if filler else b"") + option(Opt.LIST)
    await client.starttls(trusting(certificates), behind=options)
    if filler:
        assert (await client.reply())[:2] == (99, Rep.ERR_UNSUP)
    assert (await client.reply())[:2] == (Opt.LIST, Rep.SERVER)


async def test_go_and_requests_right_behind_the_handshake(certificates: Path) -> None:
    client = await Client.connect(await site(certificates, required=True))
    behind = option(Opt.GO, info("disk")) + read(1)
    await client.starttls(trusting(certificates), behind=behind)
    while (await client.reply())[1] != Rep.ACK:
        pass
    assert (await client.receive(16 + 512)).endswith(b"d")


@pytest.mark.parametrize("size", [1400, 5000, 60000])
async def test_more_than_fits_behind_the_handshake(certificates: Path, size: int) -> None:
    """A client that pipelines so much breaks the protocol: whatever it gets, the server goes on."""
    at = await site(certificates, required=True)
    client = await Client.connect(at)
    await client.starttls(trusting(certificates), behind=option(99, bytes(size)) * 3 + option(Opt.ABORT))
    assert await client.is_over()
    other = await (await Client.connect(at)).starttls(trusting(certificates))
    assert await other.ask(Opt.LIST) == Rep.ACK


def test_data_that_is_decrypted_before_start_tls_returns(certificates: Path) -> None:
    """So it is on asyncio's own loop; uvloop holds it back until the server has heard that TLS is up."""

    async def run() -> None:
        at = await site(certificates, required=True)
        client = await Client.connect(at)
        await client.starttls(trusting(certificates), behind=option(Opt.GO, info("disk")) + read(1))
        while (await client.reply())[1] != Rep.ACK:
            pass
        assert (await client.receive(16 + 512)).endswith(b"d")
        await clean()

    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(run())


async def test_the_end_of_tls_within_the_options(certificates: Path) -> None:
    at = await site(certificates)
    client = await (await Client.connect(at)).starttls(trusting(certificates))
    assert client._object is not None
    with pytest.raises(ssl.SSLWantReadError):
        client._object.unwrap()
    client.send(b"")
    assert await client.is_over()


# --- who is let in ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("identity", [GOOD, "", STRANGER, EXPIRED])
async def test_the_client_s_certificate(certificates: Path, identity: str, version: ssl.TLSVersion, tmp_path: Path) -> None:
    directory = tmp_path / "server"
    directory.mkdir()
    for path in (certificates / GOOD).iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    if identity == EXPIRED:  # of an authority that the server trusts
        (directory / "ca-cert.pem").write_bytes((certificates / EXPIRED / "ca-cert.pem").read_bytes())
    at = await Site(server_context(str(directory), True), required=True).start()
    context = trusting(certificates, identity)
    context.minimum_version = context.maximum_version = version
    client = await Client.connect(at)
    if identity == GOOD:
        await client.starttls(context)
        assert await client.ask(Opt.GO, info("disk")) == Rep.ACK
        return
    try:
        await client.starttls(context)
        client.send(option(Opt.LIST))
    except ssl.SSLError:  # TLS 1.2 says it within the handshake
        assert version is ssl.TLSVersion.TLSv1_2
    assert await client.is_over()
    assert at.exports.asked == 0


async def test_tls_1_1_is_refused(certificates: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    client = await Client.connect(await site(certificates))
    assert await client.ask(Opt.STARTTLS) == Rep.ACK
    suites = struct.pack(">5H", 0xC009, 0xC00A, 0xC013, 0x002F, 0x0035)
    hello = b"\3\2" + bytes(32) + b"\0" + struct.pack(">H", len(suites)) + suites + b"\1\0"
    hello = b"\1" + len(hello).to_bytes(3, "big") + hello
    client.send(b"\x16\3\1" + struct.pack(">H", len(hello)) + hello)
    assert await client.is_over()  # without an alert: uvloop sends none
    assert "UNSUPPORTED_PROTOCOL" in caplog.text


@pytest.mark.parametrize("said", [b"", b"\x16\3\1\2\0\1"])
async def test_a_handshake_that_stalls_ends_at_the_deadline(
    certificates: Path, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = await site(certificates)
    monkeypatch.setattr(connection, "HANDSHAKE_SECONDS", 0.02)
    client = await Client.connect(at)
    assert await client.ask(Opt.STARTTLS) == Rep.ACK
    client.send(said)
    assert await client.is_over()
    await turns()
    assert not at.clients


async def test_silence_after_tls_ends_at_the_same_deadline(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = await site(certificates)
    monkeypatch.setattr(connection, "HANDSHAKE_SECONDS", 0.1)
    client = await (await Client.connect(at)).starttls(trusting(certificates))
    assert await client.ask(Opt.LIST) == Rep.ACK
    assert await client.is_over()
    await turns()
    assert not at.clients


async def test_a_refused_request_over_tls(certificates: Path) -> None:
    client = await (await Client.connect(await site(certificates))).starttls(trusting(certificates))
    assert await client.ask(Opt.GO, info("disk")) == Rep.ACK
    client.send(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, Cmd.READ, 1, 1 << 40, 512))
    assert await client.receive(16) == nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, Error.EINVAL, 1)

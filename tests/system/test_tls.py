"""TLS with real clients and with raw sockets: offered, required, client certificates, and what must not survive STARTTLS."""

import contextlib
import os
import re
import shutil
import socket
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from nbdmap.nbd import constants as nbd
from nbdmap.nbd.constants import Info, Opt, Rep
from tests.support.certificates import make_certificates
from tests.support.clients import attempt, nbdsh, run
from tests.support.handshake import option
from tests.support.server import Server, private_directory, serving

MIB: Final = 1 << 20
PLAIN: Final = struct.pack(">I", nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES)
SECRET: Final = "name-to-keep"


class Site(NamedTuple):
    """A server, its certificates, and where it offers TLS and where it requires it."""

    server: Server
    certificates: Path
    offered: int
    required: int

    def uri(self, export: str = SECRET, *, certificates: Path | None = None, host: str = "localhost") -> str:
        """The export by TLS, as libnbd spells it."""
        return f"nbds://{host}:{self.required}/{export}?tls-certificates={certificates or self.certificates}"


@contextlib.contextmanager
def site(tls: str = "") -> Iterator[Site]:
    """A server with TLS; `tls` is added to the key of this name."""
    with private_directory() as directory:
        certificates = make_certificates(directory / "tls")
        config = f"""
tls: {{certificates: tls{tls}}}
disks: {{ram: {{memory: 32MiB}}}}
devices: {{{SECRET}: {{table: 0 65536 linear ram 0, export: {{description: secret too}}}}}}
"""
        with serving(config, directory=directory, listen=["nbd://localhost:0", "nbds://localhost:0"]) as server:
            ports = [int(port) for port in re.findall(r"listening on nbds?://localhost:(\d+)", server.log())]
            yield Site(server, certificates, *ports)


@pytest.fixture(scope="module")
def usual() -> Iterator[Site]:
    with site() as running:
        yield running


@pytest.fixture(scope="module")
def strict() -> Iterator[Site]:
    """TLS everywhere, and only for clients with a certificate."""
    with site(", require: true, verify_peer: true") as running:
        yield running


# --- real clients ----------------------------------------------------------------------------------------------------------


def test_libnbd_over_tls(usual: Site, tmp_path: Path) -> None:
    said = run("nbdinfo", usual.uri())
    assert "with TLS" in said
    source = tmp_path / "a"
    source.write_bytes(os.urandom(32 * MIB))
    run("nbdcopy", "--flush", "-C", "4", source, usual.uri())
    run("nbdcopy", "-C", "4", usual.uri(), tmp_path / "b")
    run("cmp", source, tmp_path / "b")
    run("nbdcopy", usual.server.uri(SECRET), tmp_path / "c")  # offered only: in clear works, too
    run("cmp", source, tmp_path / "c")


def test_qemu_over_tls(usual: Site, tmp_path: Path) -> None:
    source = tmp_path / "a"
    source.write_bytes(os.urandom(32 * MIB))
    credentials = f"tls-creds-x509,id=t,dir={usual.certificates},endpoint=client"
    target = f"driver=raw,file.driver=nbd,file.host=localhost,file.port={usual.required},file.tls-creds=t,file.export={SECRET}"
    run("qemu-img", "convert", "--object", credentials, "-n", "--target-image-opts", "-f", "raw", source, target)
    compare = ("qemu-img", "compare", "--object", credentials, "--image-opts")
    assert "identical" in run(*compare, f"driver=raw,file.driver=file,file.filename={source}", target)


def test_tls_where_it_is_offered(usual: Site) -> None:
    script = f"""
h.set_tls(nbd.TLS_REQUIRE)
h.set_tls_certificates({str(usual.certificates)!r})
h.set_export_name({SECRET!r})
h.connect_tcp("localhost", "{usual.offered}")
assert h.get_tls_negotiated() and h.get_structured_replies_negotiated()
h.pwrite(b"t" * 4096, 0)
assert h.pread(4096, 0) == b"t" * 4096
"""
    nbdsh(script, connect=False)


def test_in_clear_where_tls_is_required(usual: Site) -> None:
    for name in (SECRET, "", "unknown"):
        failed = attempt("nbdsh", "-v", "-u", f"nbd://localhost:{usual.required}/{name}")
        assert failed.returncode == 1
        assert "this server requires TLS" in failed.stderr, failed.stderr
    failed = attempt("nbdinfo", "--list", f"nbd://localhost:{usual.required}")
    assert SECRET not in failed.stdout + failed.stderr


def test_the_client_checks_the_server(usual: Site, tmp_path: Path) -> None:
    other = make_certificates(tmp_path / "other")
    assert "certificate" in attempt("nbdinfo", usual.uri(certificates=other)).stderr
    assert attempt("nbdinfo", usual.uri(host="127.0.0.1")).returncode == 1  # the certificate is for localhost


def test_the_server_checks_the_client(strict: Site, tmp_path: Path) -> None:
    assert "with TLS" in run("nbdinfo", strict.uri())
    nobody = tmp_path / "nobody"
    nobody.mkdir()
    shutil.copy(strict.certificates / "ca-cert.pem", nobody)
    stranger = make_certificates(tmp_path / "stranger")
    shutil.copy(strict.certificates / "ca-cert.pem", stranger)
    for certificates in (nobody, stranger):
        failed = attempt("nbdinfo", strict.uri(certificates=certificates))
        assert failed.returncode == 1
        assert SECRET not in failed.stdout
    assert attempt("nbdinfo", strict.server.uri(SECRET)).returncode == 1  # require: on the Unix socket as well
    assert "with TLS" in run("nbdinfo", strict.uri())


# --- raw sockets -----------------------------------------------------------------------------------------------------------


class Raw:
    """A client that does what none should."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("localhost", port), timeout=10)
        assert self.exactly(18).startswith(b"NBDMAGICIHAVEOPT")
        self.send(PLAIN)

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            assert more, f"the server has closed after {data!r}"
            data += more
        return data

    def reply(self) -> tuple[int, int, bytes]:
        """(option, reply, data)"""
        magic, number, kind, length = nbd.OPTION_REPLY.unpack(self.exactly(nbd.OPTION_REPLY.size))
        assert magic == nbd.REPLY_MAGIC
        return number, kind, self.exactly(length)

    def ask(self, number: int, data: bytes = b"") -> tuple[int, bytes]:
        """The first reply to an option."""
        self.send(option(number, data))
        answered, kind, text = self.reply()
        assert answered == number
        return kind, text

    def closed(self) -> bool:
        """Whether the server closes without another word."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def start_tls(self, context: ssl.SSLContext) -> None:
        assert self.ask(Opt.STARTTLS)[0] == Rep.ACK
        self.socket = context.wrap_socket(self.socket, server_hostname="localhost")


def trusting(where: Site, *, client: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(where.certificates / "ca-cert.pem"))
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    if client:
        context.load_cert_chain(where.certificates / "client-cert.pem", where.certificates / "client-key.pem")
    return context


def go(name: str) -> bytes:
    raw = name.encode()
    return struct.pack(">I", len(raw)) + raw + struct.pack(">HH", 1, Info.BLOCK_SIZE)


def test_nothing_is_named_before_tls(usual: Site) -> None:
    with Raw(usual.required) as raw:
        asked = [
            raw.ask(number, data)
            for number, data in [
                (Opt.LIST, b""), (Opt.INFO, go(SECRET)), (Opt.INFO, go("unknown")), (Opt.GO, go(SECRET)), (Opt.GO, go("")),
                (Opt.STRUCTURED_REPLY, b""), (Opt.EXTENDED_HEADERS, b""), (Opt.SET_META_CONTEXT, go(SECRET)),
                (Opt.LIST_META_CONTEXT, go(SECRET)), (4711, b"junk"),
            ]
        ]  # fmt: skip
        assert {kind for kind, _ in asked} == {Rep.ERR_TLS_REQD}
        assert len({text for _, text in asked}) == 1
        raw.send(option(Opt.EXPORT_NAME, SECRET.encode()))
        assert raw.closed()
    with Raw(usual.required) as raw:
        assert raw.ask(Opt.ABORT)[0] == Rep.ACK
        assert raw.closed()


def test_what_came_before_starttls_is_forgotten(usual: Site) -> None:
    """CVE-2021-3716: structured replies and contexts, agreed in clear by somebody in the middle, do not hold."""
    with Raw(usual.offered) as raw:
        assert raw.ask(Opt.STRUCTURED_REPLY)[0] == Rep.ACK
        raw.start_tls(trusting(usual))
        raw.send(option(Opt.GO, go(SECRET)))
        flags, kind = None, 0
        while kind != Rep.ACK:
            number, kind, data = raw.reply()
            assert number == Opt.GO
            if kind == Rep.INFO and data[:2] == b"\0\0":
                flags = struct.unpack(">HQH", data)[2]
        assert flags is not None
        assert not flags & nbd.SEND_DF
        raw.send(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.Cmd.READ, 7, 0, 512))
        assert nbd.SIMPLE_REPLY.unpack(raw.exactly(16)) == (nbd.SIMPLE_REPLY_MAGIC, 0, 7)


def test_bytes_sent_in_clear_behind_starttls_end_the_connection(usual: Site) -> None:
    with Raw(usual.required) as raw:
        raw.send(option(Opt.STARTTLS) + option(Opt.LIST))
        try:
            assert raw.reply() == (Opt.STARTTLS, Rep.ACK, b"")
        except (AssertionError, ConnectionResetError):
            return  # closed without even the acknowledgement
        assert raw.closed()


def test_starttls_twice_with_data_and_in_vain(usual: Site) -> None:
    with Raw(usual.required) as raw:
        assert raw.ask(Opt.STARTTLS, b"data")[0] == Rep.ERR_INVALID
        raw.start_tls(trusting(usual))
        assert raw.ask(Opt.STARTTLS)[0] == Rep.ERR_INVALID
        assert raw.ask(Opt.LIST)[0] == Rep.SERVER
    with Raw(usual.required) as raw:
        assert raw.ask(Opt.STARTTLS)[0] == Rep.ACK
        raw.send(option(Opt.LIST))  # that is no ClientHello
        raw.socket.settimeout(5)
        rest = b""
        with contextlib.suppress(ConnectionResetError):
            while more := raw.socket.recv(4096):
                rest += more
        assert SECRET.encode() not in rest


@pytest.mark.parametrize("length", [100, 4096])
def test_options_in_the_same_segment_as_the_end_of_the_handshake(usual: Site, length: int) -> None:
    """Decrypted before the server knows that TLS has started; neither lost nor too much, whatever their length."""
    with Raw(usual.required) as raw:
        assert raw.ask(Opt.STARTTLS)[0] == Rep.ACK
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = trusting(usual).wrap_bio(incoming, outgoing, server_hostname="localhost")
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                raw.send(outgoing.read())
                incoming.write(raw.socket.recv(65536))
        tls.write(option(Opt.INFO, go("x" * length)) + option(Opt.ABORT))
        raw.send(outgoing.read())
        answer = b""
        while len(answer) < 2 * nbd.OPTION_REPLY.size:
            try:
                answer += tls.read()
            except ssl.SSLWantReadError:
                more = raw.socket.recv(65536)
                assert more, f"the server has closed after {answer!r}"
                incoming.write(more)
        assert nbd.OPTION_REPLY.unpack_from(answer)[1:3] == (Opt.INFO, Rep.ERR_UNKNOWN)


def test_old_versions_of_tls_are_refused(usual: Site) -> None:
    context = trusting(usual)
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.options &= ~(ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1)
    with pytest.warns(DeprecationWarning, match="TLSv1_1 is deprecated"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with Raw(usual.required) as raw, pytest.raises((ssl.SSLError, ConnectionResetError)):
        raw.start_tls(context)
    with Raw(usual.required) as raw:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        raw.start_tls(context)
        assert raw.ask(Opt.LIST)[0] == Rep.SERVER


def test_clients_that_stop_in_the_middle_hinder_nobody(usual: Site) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            raw = stack.enter_context(Raw(usual.required))
            assert raw.ask(Opt.STARTTLS)[0] == Rep.ACK
            raw.send(b"\x16\x03\x01")  # the begin of a ClientHello
        assert "with TLS" in run("nbdinfo", usual.uri())
    assert "with TLS" in run("nbdinfo", usual.uri())

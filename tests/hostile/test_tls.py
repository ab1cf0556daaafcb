"""N11, N12, CVE-2021-3716: what must not survive STARTTLS, and TLS handshakes that are wrong, old, stalled or refused.

What libnbd, qemu and single sockets see of TLS is in tests/system/test_tls.py.
"""

import datetime
import shutil
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from nbdmap.nbd import constants as nbd
from nbdmap.nbd.constants import Info, Opt, Rep
from tests.hostile.wire import CONFIG, MIB, Raw, descriptors, hasty, openers, request, resident, tcp
from tests.support import certificates as making
from tests.support.certificates import make_certificates
from tests.support.clients import wait_until
from tests.support.handshake import BOTH, info, option, query
from tests.support.server import Server, private_directory, serving

DEADLINE: Final = 3.0
HELLO: Final = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"


class Site(NamedTuple):
    server: Server
    certificates: Path

    def context(self, authority: Path | None = None, client: Path | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str((authority or self.certificates) / "ca-cert.pem"))
        context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
        if client:
            context.load_cert_chain(client / "client-cert.pem", client / "client-key.pem")
        return context


@pytest.fixture(scope="module", params=["offered", "required"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    with private_directory() as directory:
        certificates = make_certificates(directory / "tls")
        required = request.param == "required"
        config = f"tls: {{certificates: {certificates}, require: {required}, verify_peer: {required}}}\n{CONFIG}"
        with hasty(DEADLINE, config, listen=["nbd://127.0.0.1:0"]) as server:
            yield Site(server, certificates)
            wait_until(lambda: set(openers(server).values()) == {0})


ONLY_REQUIRED: Final = pytest.mark.parametrize("site", ["required"], indirect=True)


def refused(site: Site, context: ssl.SSLContext) -> bool:
    """Whether no option is answered over such a TLS. With TLS 1.3 the client learns it only when it reads."""
    with Raw(tcp(site.server)) as client:
        client.greet()
        assert client.ask(Opt.STARTTLS) == Rep.ACK
        try:
            client.socket = context.wrap_socket(client.socket, server_hostname="localhost")
            client.socket.sendall(option(Opt.LIST))
            return client.socket.recv(20) == b""
        except (ssl.SSLError, ConnectionError):
            return True


# --- N11 -----------------------------------------------------------------------------------------------------------------

INJECTED: Final = {
    "structured replies": [(Opt.STRUCTURED_REPLY, b"")],
    "extended headers": [(Opt.EXTENDED_HEADERS, b"")],
    "contexts": [(Opt.STRUCTURED_REPLY, b""), (Opt.SET_META_CONTEXT, query("ram", b"base:allocation"))],
    "everything": [(Opt.EXTENDED_HEADERS, b""), (Opt.SET_META_CONTEXT, query("ram", b"base:allocation")), (Opt.LIST, b"")],
}


@pytest.mark.parametrize("what", INJECTED)
def test_n11_what_was_agreed_in_clear_is_forgotten(site: Site, what: str) -> None:
    """N11, CVE-2021-3716: structured replies, extended headers or contexts before STARTTLS; a second STARTTLS."""
    with Raw(tcp(site.server)) as client:
        client.greet()
        kinds = {client.ask(number, data) for number, data in INJECTED[what]}
        assert kinds <= {Rep.ACK, Rep.ERR_TLS_REQD}
        assert client.ask(Opt.STARTTLS) == Rep.ACK
        client.socket = site.context(client=site.certificates).wrap_socket(client.socket, server_hostname="localhost")
        assert client.ask(Opt.STARTTLS) == Rep.ERR_INVALID
        client.send(option(Opt.GO, info("ram")))
        told = next(data for _, kind, data in client.replies() if kind == Rep.INFO and data[:2] == b"\0\0")
        assert not struct.unpack(">HQH", told)[2] & nbd.SEND_DF
        client.send(request(nbd.Cmd.BLOCK_STATUS, 1, 0, 512))
        assert client.simple() == (nbd.Error.EINVAL, 1, b"")
        assert client.read() == bytes(512)


@pytest.mark.parametrize(
    "behind",
    [option(Opt.LIST), option(Opt.GO, info("ram")), b"\x16", HELLO, option(Opt.STARTTLS), bytes(5000)],
    ids=["list", "go", "a byte", "hello", "starttls", "many"],
)
def test_n11_plaintext_behind_starttls_is_never_obeyed(site: Site, behind: bytes) -> None:
    """N11, CVE-2021-3716: bytes pipelined in clear behind STARTTLS are not answered, in clear or within TLS."""
    with Raw(tcp(site.server)) as client:
        client.greet()
        client.send(option(Opt.STARTTLS) + behind)
        said = client.rest()
        assert said in (b"", nbd.OPTION_REPLY.pack(nbd.REPLY_MAGIC, Opt.STARTTLS, Rep.ACK, 0))


INJECTED_IN_CLEAR: Final = [option(Opt.LIST), option(Opt.GO, info("ram")), option(Opt.LIST)[:9]]


@pytest.mark.parametrize("behind", INJECTED_IN_CLEAR, ids=["list", "go", "half"])
def test_n11_plaintext_is_not_obeyed_once_tls_is_up(site: Site, behind: bytes) -> None:
    """N11, CVE-2021-3716: injected behind STARTTLS by somebody between, whose victim then makes TLS: the server closes, or has
    forgotten it; the first answer within TLS is that to the first question within TLS."""
    with Raw(tcp(site.server)) as client:
        client.greet()
        client.send(option(Opt.STARTTLS) + behind)
        try:
            client.exactly(20)
            client.socket = site.context(client=site.certificates).wrap_socket(client.socket, server_hostname="localhost")
            client.socket.sendall(option(Opt.ABORT))
            said = client.rest()
        except (ssl.SSLError, ConnectionError, AssertionError):
            return
        assert said in (b"", nbd.OPTION_REPLY.pack(nbd.REPLY_MAGIC, Opt.ABORT, Rep.ACK, 0))


@ONLY_REQUIRED
def test_n11_options_before_tls_with_tls_required(site: Site) -> None:
    """N11: nothing but STARTTLS and ABORT is done in clear; all else gets one and the same answer."""
    with Raw(tcp(site.server)) as client:
        client.greet()
        for number in [*range(3, 5), *range(6, 20), 2**32 - 1]:
            for data in (b"", info("ram", Info.NAME), query("ram", b"base:allocation")):
                assert client.ask(number, data) == Rep.ERR_TLS_REQD
        client.send(option(Opt.EXPORT_NAME, b"ram"))
        assert client.rest() == b""


# --- N12 -----------------------------------------------------------------------------------------------------------------


@ONLY_REQUIRED
def test_n12_client_certificates(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """N12: none, one of another authority, one that has expired: refused; the right one is served."""
    other = make_certificates(tmp_path / "other")

    class Past(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Past":
            return cls.fromtimestamp(time.time() - 40 * 86400, tz)

    key_bytes = (site.certificates / "ca-key.pem").read_bytes()
    authority = serialization.load_pem_private_key(key_bytes, None)
    assert isinstance(authority, ec.EllipticCurvePrivateKey)
    expired = tmp_path / "expired"
    shutil.copytree(site.certificates, expired)
    with monkeypatch.context() as patch:
        patch.setattr("tests.support.certificates.datetime.datetime", Past)
        key = ec.generate_private_key(ec.SECP256R1())
        signed = making._sign("client", "client", key, "nbdmap's test authority", authority)
        making._store(expired, "client", signed, key)
    assert refused(site, site.context())
    assert refused(site, site.context(client=other))
    assert refused(site, site.context(client=expired))
    assert refused(site, site.context(authority=other))  # the client refuses the server
    assert not refused(site, site.context(client=site.certificates))


def test_n12_old_versions_and_weak_ciphers(site: Site) -> None:
    """N12: a downgrade by somebody in the middle to TLS 1.0, 1.1, anonymous or null ciphers fails."""
    for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        with pytest.warns(DeprecationWarning, match="deprecated"):
            context.minimum_version = version
        with pytest.warns(DeprecationWarning, match="deprecated"):
            context.maximum_version = version
        context.set_ciphers("ALL:@SECLEVEL=0")
        assert refused(site, context)
    weak = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    weak.check_hostname = False
    weak.verify_mode = ssl.CERT_NONE
    weak.maximum_version = ssl.TLSVersion.TLSv1_2
    weak.set_ciphers("aNULL:eNULL:@SECLEVEL=0")
    assert refused(site, weak)


def test_n12_a_client_that_wants_tls_takes_no_for_a_failure(site: Site) -> None:
    """N12, CVE-2019-14842: a proxy that strips STARTTLS: the client's side is in test_remote.py; the server offers it."""
    with Raw(tcp(site.server)) as client:
        client.greet()
        assert client.ask(Opt.STARTTLS, b"x") == Rep.ERR_INVALID
        assert client.ask(Opt.STARTTLS) == Rep.ACK


STALLS: Final = {
    "silence": b"", "a byte": b"\x16", "half a hello": HELLO, "an alert": b"\x15\x03\x03\x00\x02\x02\x28",
    "a record of 16 KiB that never ends": b"\x16\x03\x01\x40\x00" + bytes(1000), "zeroes": bytes(100),
}  # fmt: skip


def test_n12_stalled_handshakes_end_at_the_deadline(site: Site) -> None:
    """N12: 300 clients stop within TLS's handshake: dropped at the deadline, a good client is served meanwhile."""
    before, memory = descriptors(site.server), resident(site.server)
    clients = []
    for number in range(300):
        client = Raw(tcp(site.server)).greet()
        assert client.ask(Opt.STARTTLS) == Rep.ACK
        client.send(list(STALLS.values())[number % len(STALLS)])
        clients.append(client)
    begun = time.monotonic()
    assert not refused(site, site.context(client=site.certificates))
    assert time.monotonic() - begun < 1
    for client in clients:
        client.rest()
        client.socket.close()
    assert time.monotonic() - begun < DEADLINE + 2
    wait_until(lambda: descriptors(site.server) <= before)
    assert resident(site.server) - memory < 300 * (128 << 10) + 4 * MIB


def test_n12_stop_within_tls_handshakes() -> None:
    """N12, N13: SIGTERM while 100 clients are within TLS's handshake, and one is served: it ends in 2 s."""
    with private_directory() as directory:
        certificates = make_certificates(directory / "tls")
        config = f"tls: {{certificates: {certificates}}}\n{CONFIG}"
        with serving(config, listen=["nbd://127.0.0.1:0"]) as server:
            clients = []
            for number in range(100):
                client = Raw(tcp(server)).greet()
                client.send(option(Opt.STARTTLS))
                client.exactly(20)
                client.send(list(STALLS.values())[number % len(STALLS)])
                clients.append(client)
            server.stop()
            for client in clients:
                client.rest()
                client.socket.close()


def test_n12_no_renegotiation(site: Site) -> None:
    """N12: TLS 1.2's renegotiation is switched off in Python's ssl; a second ClientHello within TLS closes."""
    context = site.context(client=site.certificates)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with Raw(tcp(site.server)) as client:
        client.greet()
        assert client.ask(Opt.STARTTLS) == Rep.ACK
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                client.send(outgoing.read())
                incoming.write(client.socket.recv(65536))
        client.send(outgoing.read())
        client.send(HELLO + bytes(512 - 6))  # a record in clear where only ciphertext may stand
        client.socket.settimeout(DEADLINE + 2)
        assert b"NBD" not in client.rest()


def test_n12_bytes_that_pretend_to_be_tls_on_a_plain_port(site: Site) -> None:
    """N12: a ClientHello instead of NBD's flags closes at once."""
    with Raw(tcp(site.server)) as client:
        client.exactly(18)
        client.send(HELLO + bytes(500))
        assert client.rest() == b""
    with Raw(tcp(site.server)) as client:
        client.send(BOTH)
        client.socket.shutdown(socket.SHUT_WR)
        assert client.rest().startswith(b"NBDMAGIC")

"""X.509 certificates for tests, in the files that libnbd, nbdkit and qemu look for."""

import datetime
import ipaddress
import ssl
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY: Final = datetime.timedelta(days=1)


def make_certificates(directory: Path, host: str = "localhost", *, client_ends: datetime.timedelta = DAY) -> Path:
    """A new authority and what it signed for a server called `host`, or at that address, and for a client, whose
    certificate ends `client_ends` from now."""
    directory.mkdir(parents=True, exist_ok=True)
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _sign("ca", "nbdmap's test authority", authority_key, "nbdmap's test authority", authority_key)
    _store(directory, "ca", authority, authority_key)
    for role, subject in [("server", host), ("client", "client")]:
        key = ec.generate_private_key(ec.SECP256R1())
        ends = client_ends if role == "client" else DAY
        _store(directory, role, _sign(role, subject, key, "nbdmap's test authority", authority_key, ends), key)
    return directory


def server_context(directory: Path, *, ask_client: bool = False) -> ssl.SSLContext:
    """A server's context of those files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server-cert.pem", directory / "server-key.pem")
    if ask_client:
        context.load_verify_locations(directory / "ca-cert.pem")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _sign(
    role: str, subject: str, key: ec.EllipticCurvePrivateKey, issuer: str, issuer_key: ec.EllipticCurvePrivateKey,
    ends: datetime.timedelta = DAY,
) -> x509.Certificate:  # fmt: skip
    now = datetime.datetime.now(datetime.UTC)
    try:
        name: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(subject))
    except ValueError:
        name = x509.DNSName(subject)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 2 * DAY)
        .not_valid_after(now + ends)
        .add_extension(x509.BasicConstraints(ca=role == "ca", path_length=None), critical=True)
    )
    if role == "server":
        builder = builder.add_extension(x509.SubjectAlternativeName([name]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _store(directory: Path, role: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    (directory / f"{role}-cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (directory / f"{role}-key.pem").write_bytes(pem)

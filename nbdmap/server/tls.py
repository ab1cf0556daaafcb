"""TLS contexts from a directory of PEM files, named as libnbd, nbdkit and qemu name them.

    ca-cert.pem  server-cert.pem  server-key.pem

TLS 1.2 and later, X.509 only (Python's ssl knows pre-shared keys from 3.13 on).
"""

import os
import ssl
from pathlib import Path

from nbdmap.errors import InvalidArgument


def server_context(directory: str, verify_peer: bool) -> ssl.SSLContext:
    """The server's context. With `verify_peer` a client must show a certificate that ca-cert.pem has signed.

    Raises InvalidArgument naming the file that is missing or wrong.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    certificate, key, authority = (Path(directory, name) for name in ("server-cert.pem", "server-key.pem", "ca-cert.pem"))
    for path in (certificate, key, *([authority] if verify_peer else [])):
        if not os.path.isfile(path):
            raise InvalidArgument(f"tls: {path} is missing")

    def passphrase() -> str:
        raise InvalidArgument(f"tls: {key} is encrypted; a server has nobody to ask for its passphrase")

    try:
        context.load_cert_chain(certificate, key, passphrase)
    except (ssl.SSLError, OSError) as error:
        raise InvalidArgument(f"tls: {certificate}, {key}: {error}") from error
    if verify_peer:
        try:
            context.load_verify_locations(authority)
        except (ssl.SSLError, OSError) as error:
            raise InvalidArgument(f"tls: {authority}: {error}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context

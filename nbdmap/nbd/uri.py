"""NBD URIs: where a server is, whether it must speak TLS, and which export is meant.

    nbd://storage.example:10810/disk%201
    nbds+unix:///disk?socket=/run/nbd.sock&tls-hostname=storage.example

Follows NetworkBlockDevice/nbd doc/uri.md and RFC 3986. `nbds` and `nbds+unix` mean that TLS is required, never merely hoped
for; a tls- parameter on a plain scheme is refused, so that nobody believes in a protection that is not there. What is not
understood is refused by name. Invariant: `parse_uri(str(uri)) == uri`.
"""

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from nbdmap.errors import InvalidArgument
from nbdmap.nbd.constants import DEFAULT_PORT, MAX_STRING

_URI: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)(?:/([^?#]*))?(?:\?([^#]*))?", re.DOTALL)
_AUTHORITY: Final = re.compile(r"(?:\[([^\[\]]+)\]|([^:@\[\]]*))(?::([0-9]*))?")
_SCHEMES: Final = {
    "nbd": (False, False),  # scheme: (TLS, Unix socket)
    "nbds": (True, False),
    "nbd+unix": (False, True),
    "nbds+unix": (True, True),
}
_TRUTH: Final = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_KEYS: Final = ("socket", "tls-certificates", "tls-hostname", "tls-verify-peer")


@dataclass(frozen=True, slots=True)
class Uri:
    """One server and export. `socket` is the path of a Unix socket, or "" for TCP to `host` and `port`.

    `tls_certificates` is a directory with ca-cert.pem (and client-cert.pem, client-key.pem), `tls_hostname` the name to
    find in the server's certificate instead of `host`; both may be "".
    """

    host: str = "localhost"
    port: int = DEFAULT_PORT
    socket: str = ""
    tls: bool = False
    export: str = ""
    tls_certificates: str = ""
    tls_hostname: str = ""
    tls_verify_peer: bool = True

    def __str__(self) -> str:
        scheme = ("nbds" if self.tls else "nbd") + ("+unix" if self.socket else "")
        authority = "" if self.socket else quote(self.host, safe="")
        if ":" in self.host and not self.socket:
            authority = "[" + quote(self.host, safe=":") + "]"
        if self.port != DEFAULT_PORT and not self.socket:
            authority += f":{self.port}"
        values = (self.socket, self.tls_certificates, self.tls_hostname, "" if self.tls_verify_peer else "false")
        query = "&".join(f"{key}={quote(value, safe='/:')}" for key, value in zip(_KEYS, values, strict=True) if value)
        path = "/" + quote(self.export, safe="/:@,") if self.export or self.socket else ""
        return f"{scheme}://{authority}{path}" + (f"?{query}" if query else "")


def parse_uri(text: str) -> Uri:
    """The Uri that `text` spells. Raises InvalidArgument saying which part cannot be.

    >>> parse_uri("nbd://example.com//disk").export
    '/disk'
    """
    match = _URI.fullmatch(text)
    if match is None:
        raise InvalidArgument(f"{text!r} is not an NBD URI (examples: nbd://host:10809/export, nbd+unix:///?socket=PATH)")
    scheme, authority, path, query = match.groups()
    if scheme.lower() not in _SCHEMES:
        raise InvalidArgument(f"{text!r}: scheme {scheme!r} is not one of {', '.join(_SCHEMES)}")
    tls, unix = _SCHEMES[scheme.lower()]
    fields = _query(text, query or "")
    socket = fields.get("socket", "")
    if unix and not socket:
        raise InvalidArgument(f"{text!r}: {scheme} needs ?socket=PATH")
    if not unix and "socket" in fields:
        raise InvalidArgument(f"{text!r}: socket belongs to nbd+unix and nbds+unix")
    if unix and authority:
        raise InvalidArgument(f"{text!r}: {scheme} has no host (write {scheme}:///EXPORT?socket=PATH)")
    useless = [key for key in fields if key.startswith("tls-") and not tls]
    if useless:
        raise InvalidArgument(f"{text!r}: {useless[0]} needs TLS: write nbds instead of nbd")
    verify = fields.get("tls-verify-peer", "1").lower()
    if verify not in _TRUTH:
        raise InvalidArgument(f"{text!r}: tls-verify-peer={verify!r} is neither true nor false")
    host, port = _authority(text, authority)
    export = _decode(text, path or "", "the export name")
    if "\0" in export or len(export.encode()) > MAX_STRING:
        raise InvalidArgument(f"{text!r}: an export name has no NUL and at most {MAX_STRING} bytes")
    certificates, hostname = fields.get("tls-certificates", ""), fields.get("tls-hostname", "")
    return Uri(host, port, socket, tls, export, certificates, hostname, _TRUTH[verify])


def _authority(text: str, authority: str) -> tuple[str, int]:
    """Host and port, each with its default."""
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise InvalidArgument(f"{text!r}: {authority!r} is not HOST, HOST:PORT or [IPv6]:PORT")
    address, name, port = match.groups()
    number = int(port) if port else DEFAULT_PORT
    if not 0 <= number <= 65535:
        raise InvalidArgument(f"{text!r}: port {number} is not in 0 to 65535")
    host = _decode(text, address or name, "the host")
    if "\0" in host or (":" in host) != bool(address):
        raise InvalidArgument(f"{text!r}: {authority!r} is not HOST, HOST:PORT or [IPv6]:PORT")
    return host or "localhost", number


def _query(text: str, query: str) -> dict[str, str]:
    """The query parameters; each is known and given once."""
    fields: dict[str, str] = {}
    for item in filter(None, query.split("&")):
        key, equals, value = item.partition("=")
        if key not in _KEYS:
            raise InvalidArgument(f"{text!r}: unknown parameter {key!r} (known: {', '.join(_KEYS)})")
        if key in fields:
            raise InvalidArgument(f"{text!r}: {key} is given twice")
        if not equals or not value:
            raise InvalidArgument(f"{text!r}: {key} needs a value")
        fields[key] = _decode(text, value, key)
    return fields


def _decode(text: str, part: str, what: str) -> str:
    """Percent-decodes one part of a URI."""
    if re.search("%(?![0-9A-Fa-f]{2})", part):
        raise InvalidArgument(f"{text!r}: {what} has a % without two hexadecimal digits")
    try:
        return unquote_to_bytes(part).decode()
    except UnicodeDecodeError:
        raise InvalidArgument(f"{text!r}: {what} is not UTF-8") from None

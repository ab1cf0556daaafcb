import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmap.errors import InvalidArgument
from nbdmap.nbd.constants import DEFAULT_PORT
from nbdmap.nbd.uri import Uri, parse_uri


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbd://example.com/disk", Uri("example.com", export="disk")),
        ("nbd://example.com", Uri("example.com")),
        ("nbd://example.com/", Uri("example.com")),
        ("nbd://example.com//disk", Uri("example.com", export="/disk")),
        ("nbd://example.com/hello%20world", Uri("example.com", export="hello world")),
        ("nbd://example.com/a+b&c=d", Uri("example.com", export="a+b&c=d")),
        ("nbd://10.0.0.2:10810/x", Uri("10.0.0.2", 10810, export="x")),
        ("nbd://10.0.0.2:/x", Uri("10.0.0.2", DEFAULT_PORT, export="x")),
        ("nbd://h:0", Uri("h", 0)),
        ("nbd://", Uri("localhost")),
        ("nbd:///x", Uri("localhost", export="x")),
        ("nbd://:1234", Uri("localhost", 1234)),
        ("NBD://h", Uri("h")),
        ("nbd://[::1]:5/x", Uri("::1", 5, export="x")),
        ("nbd://[fe80::1%25eth0]", Uri("fe80::1%eth0")),
        ("nbds://h/x", Uri("h", tls=True, export="x")),
        ("nbd+unix:///x?socket=/run/nbd.sock", Uri(socket="/run/nbd.sock", export="x")),
        ("nbd+unix://?socket=nbd.sock", Uri(socket="nbd.sock")),
        ("nbd+unix:///?socket=%00/abstract", Uri(socket="\0/abstract")),
        ("nbds+unix:///x?socket=/s&tls-hostname=h", Uri(socket="/s", tls=True, export="x", tls_hostname="h")),
        ("nbds://h?tls-certificates=/etc/pki", Uri("h", tls=True, tls_certificates="/etc/pki")),
        ("nbds://h?tls-verify-peer=false", Uri("h", tls=True, tls_verify_peer=False)),
        ("nbds://h?tls-verify-peer=1", Uri("h", tls=True)),
        ("nbds://h?tls-verify-peer=0&", Uri("h", tls=True, tls_verify_peer=False)),
        ("nbd://h/%E2%82%AC", Uri("h", export="€")),
        ("nbd://h/" + "x" * 4096, Uri("h", export="x" * 4096)),
    ],
)
def test_parse(text: str, uri: Uri) -> None:
    assert parse_uri(text) == uri
    assert parse_uri(str(uri)) == uri


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is not an NBD URI"),
        ("/dev/sda", "is not an NBD URI"),
        ("nbd:h", "is not an NBD URI"),
        ("nbd://h/x#y", "is not an NBD URI"),
        ("http://h/x", "scheme 'http' is not one of nbd, nbds, nbd+unix, nbds+unix"),
        ("nbd+unix:///x", "needs ?socket=PATH"),
        ("nbd+unix://host/x?socket=/s", "has no host"),
        ("nbd://h?socket=/s", "socket belongs to nbd+unix"),
        ("nbd://h?tls-hostname=x", "tls-hostname needs TLS: write nbds"),
        ("nbd://h?colour=red", "unknown parameter 'colour'"),
        ("nbds://h?tls-hostname=a&tls-hostname=b", "tls-hostname is given twice"),
        ("nbds://h?tls-hostname=", "tls-hostname needs a value"),
        ("nbds://h?tls-hostname", "tls-hostname needs a value"),
        ("nbds://h?tls-verify-peer=maybe", "tls-verify-peer='maybe' is neither true nor false"),
        ("nbd://h:65536", "port 65536 is not in 0 to 65535"),
        ("nbd://h:http", "is not HOST, HOST:PORT"),
        ("nbd://user@h", "is not HOST, HOST:PORT"),
        ("nbd://::1", "is not HOST, HOST:PORT"),
        ("nbd://[h]", "is not HOST, HOST:PORT"),
        ("nbd://a%3Ab", "is not HOST, HOST:PORT"),
        ("nbd://h%00", "is not HOST, HOST:PORT"),
        ("nbd://h/%4", "the export name has a % without"),
        ("nbd://h/%GG", "the export name has a % without"),
        ("nbd://h/%FF", "the export name is not UTF-8"),
        ("nbd://h/a%00b", "an export name has no NUL"),
        ("nbd://h/" + "x" * 4097, "at most 4096 bytes"),
    ],
)
def test_refuse(text: str, complaint: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(complaint)):
        parse_uri(text)


def test_format() -> None:
    assert str(Uri()) == "nbd://localhost"
    assert str(Uri("::1", 5, export="a b?c")) == "nbd://[::1]:5/a%20b%3Fc"
    assert str(Uri(socket="/run/a&b", tls=True, export="x")) == "nbds+unix:///x?socket=/run/a%26b"
    assert str(Uri("h", tls=True, tls_verify_peer=False)) == "nbds://h?tls-verify-peer=false"


NAMES = st.text("aZ0-._~:/?#[]@!$&'()*+,;=% \n\x7f€\U0001f4be", max_size=40)


@given(NAMES, NAMES, st.integers(0, 65535), NAMES.filter(bool), st.booleans())
def test_what_is_formatted_is_parsed(export: str, host: str, port: int, value: str, tls: bool) -> None:
    tcp = Uri(host or "localhost", port, tls=tls, export=export, tls_hostname=value * tls)
    unix = Uri(socket=value, tls=tls, export=export, tls_certificates=value * tls)
    for uri in (tcp, unix):
        assert parse_uri(str(uri)) == uri


@given(st.text(max_size=60) | st.text(max_size=60).map("nbd://".__add__))
def test_any_text_is_a_uri_or_refused(text: str) -> None:
    try:
        uri = parse_uri(text)
    except InvalidArgument:
        return
    assert parse_uri(str(uri)) == uri

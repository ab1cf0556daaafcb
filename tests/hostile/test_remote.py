"""CVEs of NBD clients: what a hostile server may say to nbdmap's remote disk. N8's cuts are in test_remote_cut.py."""

import asyncio
import errno
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest

from nbdmap.block import link
from nbdmap.block.io import WRITE, Io
from nbdmap.block.link import tls_context
from nbdmap.block.remote import RemoteDisk
from nbdmap.errors import AccessRefused, IoFailed, NbdmapError, ProtocolError
from nbdmap.nbd import constants as nbd
from nbdmap.nbd.constants import (
    GREETING,
    INIT_MAGIC,
    OLDSTYLE_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY,
    REPLY_MAGIC,
    Cmd,
    Info,
    Opt,
    Rep,
)
from nbdmap.nbd.uri import Uri, parse_uri
from tests.support.certificates import make_certificates, server_context
from tests.support.fake_nbd import FakeServer
from tests.support.remote import MAKES, Time, connected

HELLO: Final = GREETING.pack(INIT_MAGIC, OPTION_MAGIC, 3)
EXPORT: Final = struct.pack(">HQH", Info.EXPORT, 1 << 20, 1)
Answers = Callable[[int], bytes]


def reply(option: int, kind: int, data: bytes = b"", length: int | None = None) -> bytes:
    return OPTION_REPLY.pack(REPLY_MAGIC, option, kind, len(data) if length is None else length) + data


def usual(option: int) -> bytes:
    """What a simple, honest server says."""
    if option == Opt.GO:
        return reply(option, Rep.INFO, EXPORT) + reply(option, Rep.ACK)
    return reply(option, Rep.ERR_UNSUP)


@asynccontextmanager
async def liar(path: Path, answers: Answers = usual, greeting: bytes = HELLO, behind: bytes = b"") -> AsyncIterator[Uri]:
    """A server that says `greeting` and answers options as told; then it listens for ever, or until it is left."""
    writers = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            writer.write(greeting)
            await reader.readexactly(4)
            while True:
                _, option, length = nbd.OPTION.unpack(await reader.readexactly(16))
                await reader.readexactly(length)
                writer.write(answers(option))
                if option == Opt.GO:
                    writer.write(behind)
        except (OSError, EOFError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_unix_server(talk, path / "s")
    try:
        yield Uri(socket=str(path / "s"))
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


async def fails(uri: Uri, match: str = ".", kind: type[NbdmapError] = ProtocolError, tls: ssl.SSLContext | None = None) -> None:
    with pytest.raises(kind, match=match):
        await RemoteDisk.connect(uri, name="far", number="7:0", reconnect=Time().policy(), tls=tls)


GREETINGS: Final = {
    "garbage": (b"\xff" * 18, "not an NBD server"),
    "http": (b"HTTP/1.1 400 Bad Request", "not an NBD server"),
    "old style": (struct.pack(">QQ", INIT_MAGIC, OLDSTYLE_MAGIC) + bytes(136), "old protocol"),
    "no handshake flags, then silence cut": (GREETING.pack(INIT_MAGIC, OPTION_MAGIC, 0)[:17], "no answer"),
}


@pytest.mark.parametrize("what", GREETINGS)
async def test_greetings(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2021-20286: a server that is none, or stops in the middle, fails the connect."""
    monkeypatch.setattr(link, "CONNECT_TIMEOUT_S", 0.2)
    greeting, match = GREETINGS[what]
    async with liar(tmp_path, greeting=greeting) as uri:
        await fails(uri, match, NbdmapError)


LIES: Final[dict[str, tuple[int, bytes]]] = {
    "4 GiB of reply": (Opt.EXTENDED_HEADERS, reply(Opt.EXTENDED_HEADERS, Rep.ACK, length=2**32 - 1)),
    "8 KiB and a byte": (Opt.GO, reply(Opt.GO, Rep.INFO, length=8193)),
    "another option's": (Opt.GO, reply(Opt.LIST, Rep.ACK)),
    "another magic": (Opt.GO, struct.pack(">QIII", REPLY_MAGIC + 1, Opt.GO, Rep.ACK, 0)),
    "no INFO_EXPORT": (Opt.GO, reply(Opt.GO, Rep.ACK)),
    "two of it": (Opt.GO, reply(Opt.GO, Rep.INFO, EXPORT) * 2 + reply(Opt.GO, Rep.ACK)),
    "a short one": (Opt.GO, reply(Opt.GO, Rep.INFO, EXPORT[:8]) + reply(Opt.GO, Rep.ACK)),
    "an empty INFO": (Opt.GO, reply(Opt.GO, Rep.INFO)),
    "a LIST reply": (Opt.GO, reply(Opt.GO, Rep.SERVER, b"\xff" * 4 + b"name")),
    "infos for ever": (Opt.GO, reply(Opt.GO, Rep.INFO, EXPORT) * 1000),
    "a size of 2^63": (Opt.GO, reply(Opt.GO, Rep.INFO, struct.pack(">HQH", 0, 2**63, 1)) + reply(Opt.GO, Rep.ACK)),
    "a size of 2^64-1": (Opt.GO, reply(Opt.GO, Rep.INFO, struct.pack(">HQH", 0, 2**64 - 1, 1)) + reply(Opt.GO, Rep.ACK)),
    **{
        f"blocks {sizes}": (
            Opt.GO,
            reply(Opt.GO, Rep.INFO, EXPORT) + reply(Opt.GO, Rep.INFO, struct.pack(">HIII", 3, *sizes)) + reply(Opt.GO, Rep.ACK),
        )
        for sizes in [(0, 0, 0), (3, 4096, 8192), (1 << 17, 1 << 17, 1 << 25), (512, 256, 4096), (1, 4096, 0), (1, 4096, 2048)]
    },
}  # fmt: skip


@pytest.mark.parametrize("what", LIES)
async def test_lies_in_the_handshake(tmp_path: Path, what: str) -> None:
    """CVE-2017-2630, CVE-2023-5215, CVE-2021-20286: lengths, sizes, kinds and numbers of replies that cannot be."""
    option, lie = LIES[what]
    async with liar(tmp_path, lambda asked: lie if asked == option else usual(asked)) as uri:
        await fails(uri)


async def test_replies_before_requests(tmp_path: Path) -> None:
    """CVE-2021-20286: a server that answers what was not asked."""
    async with liar(tmp_path, behind=nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, 1)) as uri:
        await fails(uri, "before there were requests")


@pytest.mark.parametrize("kind", [Rep.ERR_UNSUP, Rep.ERR_POLICY, Rep.ERR_INVALID, Rep.ERR_SHUTDOWN, 2**31 + 99])
async def test_cve_2019_14842_tls_is_never_given_up(tmp_path: Path, kind: int) -> None:
    """CVE-2019-14842: TLS was wanted; a refusal of STARTTLS, by the server or by somebody between, fails the connect."""
    async with liar(tmp_path, lambda option: reply(option, kind) if option == Opt.STARTTLS else usual(option)) as uri:
        await fails(uri, "refuses", NbdmapError, ssl.create_default_context())
    async with liar(tmp_path, greeting=GREETING.pack(INIT_MAGIC, OPTION_MAGIC, 0)) as uri:
        await fails(uri, "too old", AccessRefused, ssl.create_default_context())


async def test_cve_2021_3716_nothing_said_in_clear_behind_the_consent_counts(tmp_path: Path) -> None:
    """CVE-2021-3716 from the other side: replies injected in clear behind the consent to STARTTLS end the connection."""
    injected = reply(Opt.STARTTLS, Rep.ACK) + reply(Opt.EXTENDED_HEADERS, Rep.ACK) + usual(Opt.GO)
    async with liar(tmp_path, lambda option: injected if option == Opt.STARTTLS else usual(option)) as uri:
        await fails(uri, ".", NbdmapError, ssl.create_default_context())


@pytest.mark.parametrize("trust", ["right", "other authority", "other name"])
async def test_cve_2024_7383_the_servers_certificate_is_checked(tmp_path: Path, trust: str) -> None:
    """CVE-2024-7383: the chain and the name in the certificate are checked, over TCP and for tls-hostname alike."""
    mine = make_certificates(tmp_path / "mine", host="127.0.0.1" if trust != "other name" else "elsewhere.example")
    known = make_certificates(tmp_path / "other") if trust == "other authority" else mine
    async with FakeServer(tmp_path / "s", context=server_context(mine), tcp=True) as server:
        uri = Uri(server.uri.host, server.uri.port, export="disk", tls=True, tls_certificates=str(known))
        if trust == "right":
            disk = await RemoteDisk.connect(uri, name="far", number="7:0", reconnect=Time().policy())
            await disk.close()
        else:
            await fails(uri, "certificate", IoFailed)
        context = tls_context(uri)
        assert context is not None
        assert context.verify_mode == ssl.CERT_REQUIRED
        assert context.check_hostname


@pytest.mark.parametrize("make", MAKES)
async def test_cve_2022_0485_the_error_of_each_write_reaches_its_caller(tmp_path: Path, make: str) -> None:
    """CVE-2022-0485: of 16 writes in flight the Nth fails, for every N: exactly its caller is told."""
    failing = 0
    server = FakeServer(tmp_path / "s", refused=MAKES[make])
    server.failure = lambda asked: errno.EIO if asked.command == Cmd.WRITE and asked.offset == failing * 512 else 0
    async with server, connected(server) as disk:
        for failing in range(16):
            writes = [disk.submit(Io(WRITE, 512, memoryview(bytes(512))), n * 512) for n in range(16)]
            results = await asyncio.gather(*writes, return_exceptions=True)
            assert [n for n, result in enumerate(results) if result is not None] == [failing]
            assert isinstance(results[failing], IoFailed)


EXTENTS: Final = {
    "2023-07: none": [], "no length": [(0, 0)], "too many": [(1, 0)] * 4097, "beyond the request": [(1 << 30, 3)],
    "2023-5871: odd flags": [(512, 0xFFFFFFFF), (512, 4)], "little": [(1, 0)], "odd": [(511, 1), (2, 2), (3, 3)],
}  # fmt: skip


@pytest.mark.parametrize("make", ["structured", "extended"])
@pytest.mark.parametrize("what", EXTENTS)
async def test_cve_2023_5871_block_status(tmp_path: Path, make: str, what: str) -> None:
    """CVE-2023-5871 and the block status DoS of 2023-07: extents that make no sense give an error or less, never a loop."""
    server = FakeServer(tmp_path / "s", refused=MAKES[make], extents=EXTENTS[what] or [(0, 0)])
    async with server, connected(server) as disk:
        asking = asyncio.ensure_future(disk.extents(0, 65536))
        async with asyncio.timeout(10):
            await server.until(lambda: server.connections > 1 or asking.done() or len(server.log) > 0)
            for _ in range(100):
                await asyncio.sleep(0)
        if what in ("2023-07: none", "no length"):
            assert server.connections > 1, "such a server is left"
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        else:
            found = await asking
            assert 0 < sum(length for length, _ in found) <= 65536
            assert all(length % 512 == 0 and flags <= 3 for length, flags in found)


async def test_cve_2023_5871_flags_of_64_bits(tmp_path: Path) -> None:
    """CVE-2023-5871: extended headers have flags of 64 bits; only the two that are known are looked at."""
    server = FakeServer(tmp_path / "s", extents=[(4096, 2**64 - 1), (4096, 2**63 | 1)])
    async with server, connected(server) as disk:
        assert await disk.extents(0, 8192) == [(4096, 3), (4096, 1)]


UNREACHABLE: Final = [
    "nbd://a..b/", "nbd://" + "x" * 70 + ".example/", "nbds://.example/", "nbd://256.0.0.1/", "nbd://[::g]/", "nbd://%20/",
    "nbds://127.0.0.1:1/?tls-certificates=a%00b",
    "nbd+unix:///?socket=" + "/s" * 100, "nbd+unix:///?socket=/no/such", "nbd+unix:///?socket=%00x", "nbd+unix:///?socket=a%00b",
    "nbds+unix:///?socket=/no/such&tls-certificates=/no/such", "nbd://127.0.0.1:1/", "nbd://%e2%82%ac%e2%82%ac/",
]  # fmt: skip


@pytest.mark.parametrize("text", UNREACHABLE)
async def test_uris_that_lead_nowhere(text: str) -> None:
    """Every URI that a table may name fails with what is declared, never with another exception."""
    with pytest.raises(NbdmapError):
        await RemoteDisk.connect(parse_uri(text), name="far", number="7:0", reconnect=Time().policy())


async def test_a_server_name_that_tls_cannot_check(tmp_path: Path) -> None:
    """A name that no certificate can have is a declared failure, before or after the server has agreed to TLS."""
    certificates = make_certificates(tmp_path / "c")
    for name in (".example", "a..b", "x" * 300, "*"):
        async with FakeServer(tmp_path / "s", context=server_context(certificates)) as server:
            uri = Uri(socket=str(server.path), export="disk", tls=True, tls_hostname=name, tls_certificates=str(certificates))
            await fails(uri, ".", NbdmapError)

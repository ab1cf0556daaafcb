"""Connections that are lost while TLS starts: none may be kept for ever."""

import asyncio
import socket
import struct
from pathlib import Path

import pytest

from nbdmap.block.device import Device
from nbdmap.nbd.constants import Opt
from nbdmap.nbd.uri import parse_uri
from nbdmap.server.listener import Listener
from nbdmap.server.tls import server_context
from tests.support.certificates import make_certificates
from tests.support.handshake import BOTH, FakeExports, option


class NoDevices(FakeExports):
    """Exports that nobody gets to."""

    def open(self, name: str) -> Device:
        raise AssertionError(name)

    async def release(self, device: Device) -> None:
        raise AssertionError(device)


@pytest.mark.parametrize("way", ["reset", "close", "junk", "stop"])
async def test_a_connection_lost_within_the_handshake_of_tls_is_forgotten(tmp_path: Path, way: str) -> None:
    listener = Listener(NoDevices(), server_context(str(make_certificates(tmp_path)), False), True)
    await listener.listen(parse_uri("nbd://127.0.0.1:0"))
    reader, writer = await asyncio.open_connection("127.0.0.1", listener.uris[0].port)
    await reader.readexactly(18)
    writer.write(BOTH + option(Opt.STARTTLS))
    await reader.readexactly(20)
    (client,) = listener.clients
    writer.write(b"\x16\x03\x01\x02\x00\x01" if way != "junk" else option(Opt.LIST))
    if way == "reset":
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    elif way == "close":
        writer.close()
    elif way == "stop":
        await listener.close()
    async with asyncio.timeout(5):
        await client.gone
    assert not listener.clients
    writer.close()
    await listener.close()

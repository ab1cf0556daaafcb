"""What the tests of configurations share."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdmap.block.remote import RemoteDisk
from nbdmap.nbd.uri import Uri
from nbdmap.server.listener import Listener
from tests.support.site import Client, Connect, Site


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(tmp_path)
    yield made
    await made.mapper.close()


@pytest.fixture
async def connect(site: Site) -> AsyncIterator[Connect]:
    """Connects clients to a server of the site."""
    listener = Listener(site.exports, None, tls_required=False)
    socket = str(site.directory / "nbd.sock")
    await listener.listen(Uri(socket=socket))
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(listener.close)

        async def made(export: str) -> Client:
            disk = await RemoteDisk.connect(Uri(socket=socket, export=export), name="client", number="43:0")
            client = Client(disk)
            stack.push_async_callback(client.stop)
            return client

        yield made

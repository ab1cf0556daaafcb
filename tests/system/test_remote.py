"""RemoteDisk against the servers that people have: nbdkit, qemu-nbd and our own."""

import asyncio
import errno
import random
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from nbdmap.block.device import Device
from nbdmap.block.io import DISCARD, FLUSH, READ, WRITE, Io
from nbdmap.block.link import tls_context
from nbdmap.block.reconnect import Reconnect
from nbdmap.block.remote import RemoteDisk
from nbdmap.errors import AccessRefused, NbdmapError, NotFound
from nbdmap.nbd.uri import Uri, parse_uri
from tests.contract import disk as contract
from tests.contract.disk import act, all_extents, read, refusal, write
from tests.support.certificates import make_certificates
from tests.support.programs import need
from tests.support.server import private_directory, serving

SIZE = 4 << 20


@contextmanager
def activated(path: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server that is given a socket which listens already, as systemd does: there is nothing to wait for."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        script = f'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&{listening.fileno()}'
        server = subprocess.Popen(
            ["/bin/bash", "-c", script, "server", *command],
            pass_fds=[listening.fileno()],
            cwd=path.parent,
            stdin=subprocess.DEVNULL,
        )
    try:
        yield server
    finally:
        kill(server)


def kill(server: subprocess.Popen[bytes]) -> None:
    """What a crash is."""
    server.kill()
    server.wait()


@contextmanager
def nbdkit(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """nbdkit on the socket `nbd` of the directory."""
    with activated(directory / "nbd", need("nbdkit", "nbdkit"), "-f", *arguments) as server:
        yield server


@contextmanager
def an_nbdkit() -> Iterator[Uri]:
    with private_directory() as directory, nbdkit(directory, "memory", str(SIZE)):
        yield Uri(socket=str(directory / "nbd"))


@contextmanager
def a_qemu_nbd() -> Iterator[Uri]:
    with private_directory() as directory:
        with (directory / "image").open("wb") as image:
            image.truncate(SIZE)
        options = ["-t", "-e", "4", "--discard=unmap", "-f", "raw", "-x", "disk", str(directory / "image")]
        with activated(directory / "nbd", need("qemu-nbd", "qemu-utils"), *options):
            yield Uri(socket=str(directory / "nbd"), export="disk")


@contextmanager
def our_own() -> Iterator[Uri]:
    config = f"disks: {{ram: {{memory: {SIZE}}}}}\ndevices: {{disk: {{table: 0 {SIZE // 512} linear ram 0}}}}\n"
    with serving(config) as server:
        yield parse_uri(server.uri("disk"))


SERVERS = {"nbdkit": an_nbdkit, "qemu-nbd": a_qemu_nbd, "nbdmap": our_own}


@asynccontextmanager
async def connected(uri: Uri, reconnect: Reconnect | None = None) -> AsyncIterator[RemoteDisk]:
    disk = await RemoteDisk.connect(uri, name="far", number="7:0", reconnect=reconnect)
    try:
        yield disk
    finally:
        await disk.close()


@pytest.mark.parametrize("check", contract.CONTRACT)
@pytest.mark.parametrize("name", SERVERS)
async def test_contract(name: str, check: Callable[[Device], Awaitable[None]]) -> None:
    with SERVERS[name]() as uri:
        async with connected(uri) as disk:
            assert disk.size == SIZE
            assert disk.limits.discard
            assert disk.limits.zero
            await check(disk)


@pytest.mark.parametrize("name", SERVERS)
async def test_extents_of_what_was_written(name: str) -> None:
    with SERVERS[name]() as uri:
        async with connected(uri) as disk:
            assert all(flags for _, flags in await all_extents(disk, 0, disk.size))
            await write(disk, 1 << 20, b"x" * 65536)
            assert (65536, 0) in await all_extents(disk, 0, disk.size)
            await act(disk, DISCARD, 0, disk.size)


@pytest.mark.parametrize("name", ["qemu-nbd", "nbdmap"])
async def test_unknown_export(name: str) -> None:
    with SERVERS[name]() as uri, pytest.raises(NotFound, match="ERR_UNKNOWN"):
        await RemoteDisk.connect(replace(uri, export="nope"), name="far", number="7:0")


async def test_read_only_and_text_of_errors() -> None:
    with private_directory() as directory, nbdkit(directory, "-r", "memory", str(SIZE)):
        async with connected(Uri(socket=str(directory / "nbd"))) as disk:
            assert disk.read_only
    broken = ["--filter=error", "memory", str(SIZE), "error-pwrite=ENOSPC", "error-rate=1"]
    with private_directory() as directory, nbdkit(directory, *broken):
        async with connected(Uri(socket=str(directory / "nbd"))) as disk:
            error = await refusal(write(disk, 0, bytes(512)))
            assert error.errno == errno.ENOSPC
            assert "write of far at byte 0" in error.message


LESS = {
    "noextents": ["--filter=noextents", "memory", str(SIZE)],
    "nozero": ["--filter=nozero", "memory", str(SIZE)],
    "blocks": [
        *("--filter=blocksize-policy", "memory", str(SIZE)),
        *("blocksize-minimum=4096", "blocksize-maximum=65536", "blocksize-error-policy=error"),
    ],
}


@pytest.mark.parametrize("name", LESS)
async def test_servers_that_can_less(name: str) -> None:
    with private_directory() as directory, nbdkit(directory, *LESS[name]):
        async with connected(Uri(socket=str(directory / "nbd"))) as disk:
            assert disk.limits.logical_block == (4096 if name == "blocks" else 512)
            assert disk.limits.zero == (name != "nozero")
            await contract.random_operations(disk)
            await contract.whole_disk(disk)


def at_once() -> Reconnect:
    """Pauses that are short, because the server is back soon."""
    return Reconnect(first_pause_s=0.01, longest_pause_s=0.05)


async def test_killed_and_started_again() -> None:
    """nbdkit's memory forgets everything when it is killed: what no flush has covered must come from us."""
    with private_directory() as directory:
        uri, data = Uri(socket=str(directory / "nbd")), random.Random(1).randbytes(SIZE)
        with nbdkit(directory, "memory", str(SIZE)) as server:
            disk = await RemoteDisk.connect(uri, name="far", number="7:0", reconnect=at_once())
            for offset in range(0, SIZE, 65536):
                await write(disk, offset, data[offset : offset + 65536])
            kill(server)
            buffer = bytearray(SIZE)
            reading = asyncio.ensure_future(disk.submit(Io(READ, SIZE, memoryview(buffer)), 0))
        with nbdkit(directory, "memory", str(SIZE)):
            await reading
            assert buffer == data
            await disk.close()


async def test_killed_under_load() -> None:
    """A file survives the death of its server, so everything acknowledged must be in it, whatever was in flight."""
    with private_directory() as directory:
        uri, rng = Uri(socket=str(directory / "nbd")), random.Random(2)
        (directory / "image").write_bytes(bytes(SIZE))
        data = rng.randbytes(SIZE)
        with nbdkit(directory, "file", "image") as server:
            disk = await RemoteDisk.connect(uri, name="far", number="7:0", reconnect=at_once())
            view = memoryview(data)
            offsets, halfway = iter(range(0, SIZE, 4096)), asyncio.Event()

            async def work() -> None:
                for offset in offsets:
                    await disk.submit(Io(WRITE, 4096, view[offset : offset + 4096]), offset)
                    if offset == SIZE // 2:
                        kill(server)
                        halfway.set()

            working = asyncio.gather(*(work() for _ in range(32)))
            await halfway.wait()
        with nbdkit(directory, "file", "image"):
            await working
            await disk.submit(Io(FLUSH, 0), 0)
            await disk.close()
        assert (directory / "image").read_bytes() == data


# --- TLS ---------------------------------------------------------------------------------------------------------------
async def test_tls() -> None:
    with private_directory() as directory:
        ours, theirs = make_certificates(directory / "ours"), make_certificates(directory / "theirs")
        tls = ["--tls=require", f"--tls-certificates={ours}", "--tls-verify-peer"]
        with nbdkit(directory, *tls, "memory", str(SIZE)):
            uri = Uri(socket=str(directory / "nbd"), tls=True, tls_certificates=str(ours))
            async with connected(uri) as disk:
                await contract.random_operations(disk)
            with pytest.raises(AccessRefused, match="ERR_TLS_REQD"):
                await RemoteDisk.connect(Uri(socket=uri.socket), name="far", number="7:0")
            for wrong in (replace(uri, tls_certificates=str(theirs)), replace(uri, tls_hostname="example.com")):
                with pytest.raises(NbdmapError, match="certificate verify failed"):
                    await RemoteDisk.connect(wrong, name="far", number="7:0")
            careless = replace(uri, tls_certificates=str(ours), tls_hostname="example.com", tls_verify_peer=False)
            assert tls_context(careless) is not None
            async with connected(careless) as disk:
                assert await read(disk, 0, 512) is not None


async def test_tls_of_our_own() -> None:
    with private_directory() as directory:
        files = make_certificates(directory / "tls")
        config = f"""
tls: {{certificates: {files}, require: true, verify_peer: true}}
disks: {{ram: {{memory: {SIZE}}}}}
devices: {{disk: {{table: 0 {SIZE // 512} linear ram 0}}}}
"""
        with serving(config) as server:
            uri = replace(parse_uri(server.uri("disk")), tls=True, tls_certificates=str(files))
            async with connected(uri) as disk:
                await contract.random_operations(disk)
                await contract.whole_disk(disk)

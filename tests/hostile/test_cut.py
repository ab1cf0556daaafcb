"""N8: a session of 2,000 bytes is cut at every byte, in both directions, and each byte of it is falsified.

The model is that of proto.md: a request whose last byte has arrived is done, one that has not arrived whole changes
nothing. The disk is compared byte by byte after each cut; openers, tasks and descriptors must be what they were.
"""

import asyncio
import itertools
import os
import random
import socket
import struct
from dataclasses import dataclass
from typing import Final

import pytest

from nbdmap.nbd import constants as nbd
from nbdmap.nbd.constants import Cmd, Opt
from nbdmap.nbd.uri import parse_uri
from tests.support.disks import FakeDisk
from tests.support.handshake import BOTH, info, option, query
from tests.support.nbd import Stack, serving

SIZE: Final = 64 * 512
LENGTH: Final = 2000
SECONDS: Final = 5.0


@dataclass
class Step:
    """What a client says, and what the disk is when that has arrived whole."""

    said: bytes
    disk: bytes


def session(*, structured: bool, seed: int = 1) -> list[Step]:
    """About LENGTH bytes: a handshake with options, then writes, trims, zeroes, reads, status and flushes."""
    numbers = random.Random(seed)
    disk = bytearray(SIZE)
    words = [BOTH, option(Opt.LIST)]
    if structured:
        words += [option(Opt.STRUCTURED_REPLY), option(Opt.SET_META_CONTEXT, query("disk", b"base:allocation"))]
    words += [option(Opt.INFO, info("disk", 0, 1, 2, 3)), option(Opt.GO, info("disk", 3))]
    steps = [Step(word, bytes(disk)) for word in words]
    cookie = 0
    while sum(len(step.said) for step in steps) < LENGTH - 28:
        cookie += 1
        place = numbers.randrange(63) * 512
        writes = cookie % 4 == 1 and cookie < 12
        others = [Cmd.FLUSH, Cmd.TRIM, Cmd.WRITE_ZEROES, Cmd.CACHE, Cmd.BLOCK_STATUS, 99]
        command = Cmd.WRITE if writes else Cmd.READ if cookie % 4 == 2 else numbers.choice(others)
        length = 0 if command == Cmd.FLUSH else 512
        payload = numbers.randbytes(512) if writes else b""
        if command in (Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES):
            disk[place : place + 512] = payload or bytes(512)
        request = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, command, cookie, place, length)
        steps.append(Step(request + payload, bytes(disk)))
    steps.append(Step(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, Cmd.DISC, 0, 0, 0), bytes(disk)))
    return steps


class Site:
    """A stack with one device on a disk that can be looked at, and what it has at rest."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.disk = FakeDisk("7:0", SIZE // 512)

    async def start(self) -> "Site":
        self.device = await self.stack.add("disk", f"0 {SIZE // 512} linear 7:0 0", self.disk)
        self.descriptors = len(os.listdir("/proc/self/fd"))
        self.tasks = len(asyncio.all_tasks())
        return self

    def connect(self) -> socket.socket:
        one = socket.socket(socket.AF_UNIX)
        one.connect(self.stack.socket)
        one.setblocking(False)
        return one

    async def at_rest(self) -> None:
        """When the last client is gone; nothing of it may be left. A hang is a TimeoutError."""
        async with asyncio.timeout(SECONDS):
            while self.stack.listener.clients or self.device.openers or len(asyncio.all_tasks()) > self.tasks:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert self.device.live is not None
        assert self.device.live.in_flight == 0

    def check_descriptors(self) -> None:
        assert len(os.listdir("/proc/self/fd")) == self.descriptors

    async def accepted(self) -> None:
        async with asyncio.timeout(SECONDS):
            while not self.stack.listener.clients:  # noqa: ASYNC110
                await asyncio.sleep(0)


async def everything(client: socket.socket) -> bytes:
    """What the server says until it closes."""
    loop = asyncio.get_running_loop()
    heard = b""
    async with asyncio.timeout(SECONDS):
        while more := await loop.sock_recv(client, 1 << 16):
            heard += more
    return heard


@pytest.mark.parametrize("structured", [False, True])
async def test_n8_the_client_is_cut_at_every_byte(structured: bool) -> None:
    """N8: the first k bytes of the session arrive, for every k, and then the end; what is done is what arrived whole."""
    steps = session(structured=structured)
    said = b"".join(step.said for step in steps)
    assert LENGTH - 600 < len(said) < LENGTH + 600
    ends = list(itertools.accumulate(len(step.said) for step in steps))
    async with serving() as stack:
        site = await Site(stack).start()
        for cut in range(len(said) + 1):
            site.disk.bytes[:] = bytes(SIZE)
            client = site.connect()
            client.send(said[:cut])
            client.shutdown(socket.SHUT_WR)
            await everything(client)
            client.close()
            await site.at_rest()
            whole = sum(end <= cut for end in ends)
            assert site.disk.bytes == (steps[whole - 1].disk if whole else bytes(SIZE)), f"cut at {cut}"
        site.check_descriptors()


@pytest.mark.parametrize("structured", [False, True])
async def test_n8_the_client_leaves_after_every_byte_of_the_answers(structured: bool) -> None:
    """N8, the other direction: the client has said all, reads k bytes of the answers, for every k, and is gone.

    What it has heard an answer to is done; of the rest, as much as was begun before the server noticed, in order.
    """
    steps = session(structured=structured)
    said = b"".join(step.said for step in steps)
    async with serving() as stack:
        site = await Site(stack).start()
        answered = []  # bytes that the answers to the first steps have
        for count in range(1, len(steps) + 1):
            client = site.connect()
            client.send(b"".join(step.said for step in steps[:count]))
            client.shutdown(socket.SHUT_WR)
            answered.append(len(await everything(client)))
            client.close()
            await site.at_rest()
        assert answered[-1] > LENGTH - 600
        for cut in range(answered[-1] + 1):
            site.disk.bytes[:] = bytes(SIZE)
            client = site.connect()
            client.send(said)
            async with asyncio.timeout(SECONDS):
                heard = 0
                while heard < cut:
                    heard += len(await asyncio.get_running_loop().sock_recv(client, cut - heard))
            client.close()
            await asyncio.sleep(0)
            await site.at_rest()
            known = sum(end <= cut for end in answered)
            allowed = [step.disk for step in steps[max(0, known - 1) :]]
            assert bytes(site.disk.bytes) in allowed, f"left after {cut} bytes"
        site.check_descriptors()


@pytest.mark.parametrize("flip", [0x01, 0xFF])
async def test_every_byte_of_the_session_is_falsified(flip: int) -> None:
    """One byte is not what it should be, for every byte: nothing is left behind, and the server says nothing foolish."""
    said = b"".join(step.said for step in session(structured=True))
    async with serving() as stack:
        site = await Site(stack).start()
        for at in range(len(said)):
            client = site.connect()
            client.send(said[:at] + bytes([said[at] ^ flip]) + said[at + 1 :])
            client.shutdown(socket.SHUT_WR)
            assert (await everything(client)).startswith(b"NBDMAGICIHAVEOPT")
            client.close()
            await site.at_rest()
        site.check_descriptors()


async def test_n8_resets_of_tcp_at_every_byte() -> None:
    """As the first, but over TCP and with RST, which may overtake what was sent: each whole request is done or not."""
    steps = session(structured=True)
    said = b"".join(step.said for step in steps)
    allowed = {step.disk for step in steps} | {bytes(SIZE)}
    reached = set()
    async with serving() as stack:
        await stack.listener.listen(parse_uri("nbd://127.0.0.1:0"))
        site = await Site(stack).start()
        port = stack.listener.uris[-1].port
        for cut in range(len(said) + 1):
            site.disk.bytes[:] = bytes(SIZE)
            client = socket.socket()
            client.connect(("127.0.0.1", port))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.send(said[:cut])
            if cut % 5:
                await site.accepted()
                for _ in range(cut % 5):  # turns of the loop that the server has
                    await asyncio.sleep(0)
            client.close()
            await asyncio.sleep(0)
            await site.at_rest()
            assert bytes(site.disk.bytes) in allowed, f"cut at {cut}"
            reached.add(bytes(site.disk.bytes))
        assert len(reached) > 3, "the server did some of it"
        site.check_descriptors()

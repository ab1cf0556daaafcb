"""nbdmap.server.serving: what a request that has passed the door asks of the device, and the reply made of the answer."""

import struct
from typing import Any

import pytest

from nbdmap.block.device import HOLE, ZERO, Device, Extent, Limits
from nbdmap.errors import InvalidArgument, IoFailed
from nbdmap.nbd import constants as nbd
from nbdmap.nbd.constants import Chunk, Cmd
from nbdmap.nbd.handshake import Export, Session
from nbdmap.nbd.transmission import PayloadRequest, Request, allocate
from nbdmap.server import serving
from nbdmap.server.serving import Reply, Serving
from tests.support.disks import ALL, FakeDisk, eio

KIB = 1 << 10


def on(device: Device, style: str = "simple", contexts: dict[int, str] | None = None) -> Serving:
    """A session over `device` in one of the three styles of headers."""
    export = Export("disk", "", device.size, nbd.HAS_FLAGS, 512, 4096, nbd.MAX_PAYLOAD)
    contexts = {1: nbd.BASE_ALLOCATION} if contexts is None else contexts
    return Serving(device, Session(export, style == "structured", style == "extended", contexts), allocate)


async def serve(
    at: Serving, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes | None = None
) -> list[bytes]:
    """The buffers of the reply."""
    request = Request(flags, command, 7, offset, length)
    if payload is not None:
        request = PayloadRequest(flags, command, 7, offset, length)
        request.payload = memoryview(payload)
    reply: Reply = []
    await at.serve(request, reply)
    return [bytes(buffer) for buffer in reply]


def simple(data: bytes = b"") -> list[bytes]:
    return [struct.pack(">IIQ", nbd.SIMPLE_REPLY_MAGIC, 0, 7) + data]


def chunk(kind: int, payload: bytes = b"", *, done: bool = True) -> bytes:
    return struct.pack(">IHHQI", nbd.STRUCTURED_REPLY_MAGIC, done, kind, 7, len(payload)) + payload


def data(offset: int, content: bytes, *, done: bool = True) -> bytes:
    return chunk(Chunk.OFFSET_DATA, struct.pack(">Q", offset) + content, done=done)


def hole(offset: int, length: int, *, done: bool = True) -> bytes:
    return chunk(Chunk.OFFSET_HOLE, struct.pack(">QI", offset, length), done=done)


@pytest.mark.parametrize(
    ("command", "flags", "asked"),
    [
        (Cmd.READ, nbd.CMD_FLAG_FUA, ("read", 512, 1024, 0)),
        (Cmd.TRIM, nbd.CMD_FLAG_FUA, ("discard", 512, 1024, nbd.CMD_FLAG_FUA)),
        (Cmd.CACHE, 0, ("cache", 512, 1024, 0)),
        (Cmd.WRITE_ZEROES, 0, ("write_zeroes", 512, 1024, 0)),
        (Cmd.WRITE_ZEROES, 1 | 2 | 16, ("write_zeroes", 512, 1024, 1 | 2 | 16)),
    ],
)
async def test_what_each_command_asks_of_the_device(command: Cmd, flags: int, asked: tuple[str, int, int, int]) -> None:
    disk = FakeDisk("7:0")
    disk.bytes[:] = b"d" * disk.size
    assert await serve(on(disk), command, 512, 1024, flags) == simple(b"d" * 1024 if command == Cmd.READ else b"")
    assert disk.log == [asked]


async def test_a_write_hands_its_payload_on_with_fua_and_no_other_flag() -> None:
    disk = FakeDisk("7:0")
    flags = nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_PAYLOAD_LEN
    assert await serve(on(disk), Cmd.WRITE, 512, 512, flags, b"w" * 512) == simple()
    assert disk.log == [("write", 512, 512, nbd.CMD_FLAG_FUA)]
    assert disk.bytes[512:1024] == b"w" * 512


async def test_a_flush_flushes_whatever_range_it_names() -> None:
    disk = FakeDisk("7:0")
    assert await serve(on(disk), Cmd.FLUSH) == simple()
    assert await serve(on(disk), Cmd.FLUSH, 512, 512) == simple()
    assert disk.log == [("flush", 0, 0, 0)] * 2


@pytest.mark.parametrize("command", [Cmd.READ, Cmd.WRITE, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES, Cmd.BLOCK_STATUS])
async def test_a_request_for_nothing_asks_nothing_of_the_device(command: Cmd) -> None:
    disk = FakeDisk("7:0")
    payload = b"" if command == Cmd.WRITE else None
    assert await serve(on(disk), command, payload=payload) == simple()
    structured = [chunk(Chunk.NONE)] if command == Cmd.READ else simple()
    assert await serve(on(disk, "structured"), command, payload=payload) == structured
    assert disk.log == []


async def test_a_failure_is_raised_as_it_is() -> None:
    disk = FakeDisk("7:0")
    disk.failure = eio
    for command in (Cmd.READ, Cmd.FLUSH, Cmd.TRIM):
        with pytest.raises(IoFailed, match="broken on purpose"):
            await serve(on(disk), command, 0, 512)


# --- large reads -----------------------------------------------------------------------------------------------------------


def sparse() -> FakeDisk:
    """64 KiB of data, 64 KiB of holes that are zeroes, 64 KiB of provisioned zeroes, 64 KiB of holes whose content is data
    (nobody knows), 256 KiB of data."""
    disk = FakeDisk("7:0", 1024)
    disk.bytes[:] = b"d" * disk.size
    disk.bytes[64 * KIB : 192 * KIB] = bytes(128 * KIB)
    disk.runs = [(64 * KIB, 0), (64 * KIB, HOLE | ZERO), (64 * KIB, ZERO), (64 * KIB, HOLE), (256 * KIB, 0)]
    return disk


async def test_a_large_read_leaves_zeroes_out() -> None:
    disk = sparse()
    assert await serve(on(disk, "structured"), Cmd.READ, 32 * KIB, 224 * KIB) == [
        data(32 * KIB, b"d" * 32 * KIB, done=False),
        hole(64 * KIB, 128 * KIB, done=False),
        data(192 * KIB, b"d" * 64 * KIB),
    ]
    assert [entry[:3] for entry in disk.log] == [("read", 32 * KIB, 32 * KIB), ("read", 192 * KIB, 64 * KIB)]


async def test_a_large_read_of_zeroes_alone_reads_nothing() -> None:
    disk = sparse()
    assert await serve(on(disk, "structured"), Cmd.READ, 64 * KIB, 128 * KIB) == [hole(64 * KIB, 128 * KIB)]
    assert disk.log == []


async def test_a_large_read_of_data_alone_is_one_chunk() -> None:
    disk = sparse()
    assert await serve(on(disk, "structured"), Cmd.READ, 192 * KIB, 128 * KIB) == [data(192 * KIB, b"d" * 128 * KIB)]
    assert [entry[:3] for entry in disk.log] == [("read", 192 * KIB, 128 * KIB)]


@pytest.mark.parametrize(
    ("style", "length", "flags", "limits"),
    [
        ("simple", 128 * KIB, 0, ALL),
        ("structured", serving.SPARSE_READ - 512, 0, ALL),
        ("structured", 128 * KIB, nbd.CMD_FLAG_DF, ALL),
        ("structured", 128 * KIB, 0, Limits(sparse=False)),
    ],
)
async def test_reads_that_do_not_look_for_holes(style: str, length: int, flags: int, limits: Limits) -> None:
    disk = sparse()
    disk.limits = limits
    (reply,) = await serve(on(disk, style), Cmd.READ, 64 * KIB, length, flags)
    assert reply.endswith(bytes(length))
    assert [entry[:3] for entry in disk.log] == [("read", 64 * KIB, length)]


class Short(FakeDisk):
    """Knows its first 4 KiB only."""

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return [(4 * KIB, HOLE | ZERO)]


async def test_what_the_extents_do_not_cover_is_read() -> None:
    disk = Short("7:0")
    disk.bytes[:] = b"d" * disk.size
    assert await serve(on(disk, "structured"), Cmd.READ, 0, 64 * KIB) == [
        hole(0, 4 * KIB, done=False),
        data(4 * KIB, b"d" * 60 * KIB),
    ]


async def test_a_failure_in_one_piece_fails_the_read() -> None:
    disk = sparse()
    disk.failure = lambda io, offset: IoFailed("bad sector") if offset == 192 * KIB else None
    with pytest.raises(IoFailed, match="bad sector"):
        await serve(on(disk, "structured"), Cmd.READ, 32 * KIB, 224 * KIB)


# --- block status ----------------------------------------------------------------------------------------------------------


class Flagged(FakeDisk):
    """Has a flag of its own that is no flag of base:allocation."""

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return [(512, HOLE | 1 << 5), (length - 512, ZERO)]


def status(*words: int, done: bool = True) -> bytes:
    return chunk(Chunk.BLOCK_STATUS, struct.pack(f">{len(words)}I", *words), done=done)


async def test_block_status() -> None:
    at = on(Flagged("7:0"), "structured")
    assert await serve(at, Cmd.BLOCK_STATUS, 0, 4096) == [status(1, 512, HOLE, 3584, ZERO)]
    assert await serve(at, Cmd.BLOCK_STATUS, 0, 4096, nbd.CMD_FLAG_REQ_ONE) == [status(1, 512, HOLE)]


async def test_every_context_gets_a_chunk_and_the_last_says_so() -> None:
    at = on(FakeDisk("7:0"), "structured", {1: nbd.BASE_ALLOCATION, 5: "another"})
    assert await serve(at, Cmd.BLOCK_STATUS, 0, 4096) == [status(1, 4096, 0, done=False), status(5, 4096, 0)]


def wanted(length: int, *ids: int) -> dict[str, Any]:
    payload = struct.pack(f">Q{len(ids)}I", length, *ids)
    return {"length": len(payload), "flags": nbd.CMD_FLAG_PAYLOAD_LEN, "payload": payload}


async def test_a_payload_selects_contexts_and_range() -> None:
    at = on(FakeDisk("7:0", 16), "extended", {1: nbd.BASE_ALLOCATION, 5: "another"})
    (reply,) = await serve(at, Cmd.BLOCK_STATUS, 4096, **wanted(1024, 5))
    head = struct.pack(">IHHQQQ", nbd.EXTENDED_REPLY_MAGIC, 1, Chunk.BLOCK_STATUS_EXT, 7, 4096, 24)
    assert reply == head + struct.pack(">IIQQ", 5, 1, 1024, 0)
    assert len(await serve(at, Cmd.BLOCK_STATUS, 4096, **wanted(4096, 5, 1))) == 2


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        (wanted(512, 1, 1), r"context ids \[1, 1\] are not all different and negotiated"),
        (wanted(512, 2), r"context ids \[2\] are not all different"),
        (wanted(512, 1, 2), r"context ids \[1, 2\] are not all different"),
        (wanted(0, 1), "BLOCK_STATUS of 0 bytes at 4096 reaches beyond the end, 8192"),
        (wanted(4608, 1), "BLOCK_STATUS of 4608 bytes at 4096 reaches"),
        (wanted(2**64 - 512, 1), "BLOCK_STATUS of 18446744073709551104 bytes at 4096 reaches"),
        (wanted(513, 1), "BLOCK_STATUS of 513 bytes is not aligned to blocks of 512"),
    ],
)
async def test_a_payload_that_cannot_be_is_refused(asked: dict[str, Any], complaint: str) -> None:
    at = on(FakeDisk("7:0", 16), "extended")
    with pytest.raises(InvalidArgument, match=complaint):
        await serve(at, Cmd.BLOCK_STATUS, 4096, **asked)

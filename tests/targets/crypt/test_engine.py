"""nbdmap.targets.crypt.engine: requests that arrive together, failures among them, slow disks, cancellations."""

import asyncio
import random

import pytest

from nbdmap.block.io import DONE, READ, WRITE, Deferred, Failed, Io, Op, Pending, Plug
from nbdmap.ciphers.keyed import Numbered
from nbdmap.dm.table import Table
from nbdmap.errors import IoFailed, NbdmapError
from tests.support.disks import FakeDisk, build, mapped, read, write

KEY = bytes(range(64)).hex()
LINE = f"0 2048 crypt aes-xts-plain64 {KEY} 0 7:0 0"


class QuickDisk(FakeDisk):
    """Done at once, as the page cache is: submit is no coroutine."""

    def submit(self, io: Io, offset: int) -> Pending:
        try:
            FakeDisk.submit(self, io, offset).send(None)
        except StopIteration:
            return DONE
        except NbdmapError as error:
            return Failed(error)
        raise AssertionError("a quick disk does not wait")


class Parking(QuickDisk):
    """Parks writes as Deferreds."""

    def __init__(self, number: str, sectors: int) -> None:
        super().__init__(number, sectors)
        self.parked: list[tuple[Io, int, Deferred]] = []

    def submit(self, io: Io, offset: int) -> Pending:
        if io.op is READ:
            return super().submit(io, offset)
        self.parked.append((io, offset, Deferred()))
        return self.parked[-1][2]


def batch(table: Table, requests: list[tuple[Io, int]]) -> list[Pending]:
    """What a connection does with requests that have arrived together."""
    plug = Plug()
    plug.active = True
    pendings = [table.submit(Io(io.op, io.length, io.data, io.flags, plug), offset) for io, offset in requests]
    assert all(not pending.ended for pending in pendings if isinstance(pending, Deferred))
    plug.pull()
    return pendings


@pytest.mark.parametrize("disk_type", [QuickDisk, FakeDisk])
async def test_batches_give_the_same_as_requests_alone(disk_type: type[FakeDisk]) -> None:
    disk, rng = disk_type("7:0", 2048), random.Random(1)
    table = await build(LINE, disk)
    model = bytearray(2048 * 512)
    await write(table, 0, bytes(model))
    for _ in range(30):
        places = rng.sample(range(0, 2048, 64), rng.randrange(1, 20))
        spans = [(place * 512, rng.randrange(1, 65) * 512) for place in places]
        datas = [rng.randbytes(length) for _, length in spans]
        writes = [(Io(WRITE, length, memoryview(data)), at) for (at, length), data in zip(spans, datas, strict=True)]
        for pending in batch(table, writes):
            await pending
        for (at, length), data in zip(spans, datas, strict=True):
            model[at : at + length] = data
        buffers = [bytearray(length) for _, length in spans]
        reads = [(Io(READ, len(one), memoryview(one)), at) for (at, _), one in zip(spans, buffers, strict=True)]
        for pending in batch(table, reads):
            await pending
        assert buffers == datas
    assert await read(table, 0, len(model)) == model
    await table.close()


async def test_small_requests_of_a_quick_disk_are_done_when_the_plug_is_pulled() -> None:
    table = await build(LINE, QuickDisk("7:0", 2048))
    data = memoryview(bytearray(4096))
    pendings = batch(table, [(Io(op, 4096, data), 4096 * at) for at in range(4) for op in (WRITE, READ)])
    for written, was_read in zip(pendings[::2], pendings[1::2], strict=True):
        assert isinstance(written, Deferred)
        assert written.ended
        assert was_read is DONE
    await table.close()


@pytest.mark.parametrize("disk_type", [QuickDisk, FakeDisk])
async def test_one_failure_is_one_requests(disk_type: type[FakeDisk]) -> None:
    disk = disk_type("7:0", 2048)
    disk.failure = lambda io, offset: IoFailed("bad place") if offset == 8192 else None
    table = await build(LINE, disk)
    for op in (WRITE, READ):
        requests = [(Io(op, 4096, memoryview(bytearray(4096))), 4096 * at) for at in range(4)]
        tasks = [asyncio.ensure_future(one) for one in batch(table, requests)]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [type(None), type(None), IoFailed, type(None)]
    await table.close()


async def test_writes_wait_for_a_disk_that_defers() -> None:
    disk = Parking("7:0", 2048)
    table = await build(LINE, disk)
    pendings = batch(table, [(Io(WRITE, 4096, memoryview(bytearray(4096))), 4096 * at) for at in range(3)])
    assert [isinstance(pending, Deferred) and pending.ended for pending in pendings] == [False] * 3
    disk.parked[1][2].finish(IoFailed("broken"))
    disk.parked[0][2].finish()
    await pendings[0]
    with pytest.raises(IoFailed, match="broken"):
        await pendings[1]
    disk.parked[2][2].finish()
    await pendings[2]
    await table.close()


@pytest.mark.parametrize("length", [4096, 256 << 10])
async def test_a_cancelled_write_ends(length: int) -> None:
    reached = asyncio.Event()

    class Stuck(FakeDisk):
        async def submit(self, io: Io, offset: int) -> None:
            reached.set()
            await asyncio.Event().wait()

    disk = Stuck("7:0", 2048)
    table = await build(LINE, disk)
    (pending,) = batch(table, [(Io(WRITE, length, memoryview(bytearray(length))), 0)])
    task = asyncio.ensure_future(pending)
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert disk.bytes[:4096] == bytes(4096)
    await table.close()


async def test_a_cipher_that_fails_fails_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, *arguments: object) -> None:
        raise RuntimeError("no more")

    table = await build(LINE.replace("xts-plain64", "cbc-plain").replace(KEY, KEY[:64]), QuickDisk("7:0", 2048))
    for name in ("encrypt", "decrypt"):
        monkeypatch.setattr(Numbered, name, broken)
    for pending in batch(table, [(Io(WRITE, 4096, memoryview(bytearray(4096))), 4096 * at) for at in range(2)]):
        with pytest.raises(IoFailed, match="encryption failed: no more"):
            await pending
    with pytest.raises(RuntimeError, match="no more"):  # what was read is answered by nobody then
        batch(table, [(Io(READ, 4096, memoryview(bytearray(4096))), 4096 * at) for at in range(2)])
    for op in (READ, WRITE):
        with pytest.raises(IoFailed, match="cryption failed: no more"):
            await table.submit(Io(op, 4096, memoryview(bytearray(4096))), 0)
    await table.close()


async def test_who_looks_at_what_was_read_looks_at_plaintext() -> None:
    """flakey changes a byte of each read: of what is decrypted, not of what is still to be, which would spoil 16."""
    disk = QuickDisk("7:0", 2048)
    crypt = await mapped("secret", LINE, disk)
    data = random.Random(3).randbytes(4096)
    await write(crypt, 0, data)
    table = await build("0 2048 flakey 254:0 0 0 1 5 corrupt_bio_byte 9 r 77 0", crypt)
    buffer = bytearray(4096)
    for pending in batch(table, [(Io(READ, 4096, memoryview(buffer)), 0)]):
        await pending
    assert buffer == data[:8] + bytes([77]) + data[9:]
    await table.close()
    await crypt.close()


@pytest.mark.parametrize("line", [LINE, LINE.replace("aes", "serpent")], ids=["in slices", "in threads"])
async def test_many_large_requests_at_once(line: str) -> None:
    """More than there are threads and ciphers for them."""
    table = await build(line, FakeDisk("7:0", 2048))
    datas = [random.Random(seed).randbytes(256 << 10) for seed in range(4)]
    await asyncio.gather(*(asyncio.ensure_future(write(table, at * (256 << 10), data)) for at, data in enumerate(datas)))
    assert await asyncio.gather(*(asyncio.ensure_future(read(table, at * (256 << 10), 256 << 10)) for at in range(4))) == datas
    await table.close()


@pytest.mark.parametrize(("op", "length", "slices"), [(READ, 384 << 10, 3), (READ, 1 << 20, 1), (WRITE, 1 << 20, 8)])
async def test_a_large_request_leaves_the_loop_to_others(op: Op, length: int, slices: int) -> None:
    """Between its slices, or while a thread is at it."""
    table = await build(LINE, QuickDisk("7:0", 2048))
    turns = 0
    request = asyncio.ensure_future(table.submit(Io(op, length, memoryview(bytearray(length))), 0))
    while not request.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns >= slices
    await table.close()


async def test_writes_that_are_held_up_keep_their_ciphertext() -> None:
    """It lies in buffers that later batches must not get."""
    disk, datas = Parking("7:0", 2048), [random.Random(seed).randbytes(4096) for seed in range(120)]
    table = await build(LINE, disk)
    for first in range(0, 120, 40):
        batch(table, [(Io(WRITE, 4096, memoryview(datas[at])), 4096 * at) for at in range(first, first + 40)])
    for io, offset, pending in disk.parked:
        disk.bytes[offset : offset + io.length] = io.data
        pending.finish()
    assert await read(table, 0, 120 * 4096) == b"".join(datas)
    await table.close()

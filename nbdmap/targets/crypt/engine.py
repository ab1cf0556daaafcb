"""How a crypt target's requests meet its cipher: together, at once, in slices, or in a thread.

- Small requests of one wake-up of a connection are encrypted or decrypted together, when the plug is pulled. A write is parked
  until then; a read is done, as its ciphertext is there, which nobody looks at before (nbdmap.block.io.Plug).
- Larger ones, and reads that had to wait for the disk, by themselves and at once.
- Above TOGETHER in slices, between which the loop does other things: threads take the interpreter from one another, which costs
  two thirds as much again for 1 MiB of AES and as much again for 256 KiB.
- Large reads in threads all the same: from READ_IN_THREAD on the second core is worth more than that (1 MiB: 1.4 times as many).
- Of slower ciphers everything above INLINE in threads. At most THREADS at a time, each with a cipher of its own, because a cipher
  has working memory.

What is worked on together shares a buffer from a pool, which writes keep until they have ended; a single read is decrypted where
it lies, in the buffer of the reply.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

from nbdmap.block.buffers import Buffers
from nbdmap.block.device import Device
from nbdmap.block.io import DONE, WRITE, Deferred, Failed, Io, Pending
from nbdmap.block.threads import Threads
from nbdmap.errors import IoFailed
from nbdmap.units import KIB, SECTOR

if TYPE_CHECKING:
    from nbdmap.ciphers.cipher import SectorCipher

log: Final = logging.getLogger(__name__)

SMALL: Final = 32 * KIB
"""Requests up to this wait for those that arrived with them."""
INLINE: Final = 64 * KIB
"""Larger requests of ciphers that are not quick are encrypted in threads, so that the others need not wait for them."""
TOGETHER: Final = 128 * KIB
"""Bytes that are encrypted together, or in one slice: PIECE of nbdmap.ciphers, and what one write that is held up below keeps in
memory."""
Write = tuple[Io, int, Deferred]
"""A write that waits for others, and its offset."""
READ_IN_THREAD: Final = 512 * KIB
"""Reads of quick ciphers from this size on are decrypted in threads, too."""
THREADS: Final = min(os.cpu_count() or 1, 4)


class Engine:
    """Reads from and writes to `device`; byte `offset` of the mapped device is `offset + shift` there.

    `begin` is where the encrypted range starts on the mapped device: sector 0 of the cipher.
    """

    def __init__(self, device: Device, begin: int, shift: int) -> None:
        self._device = device
        self._begin = begin
        self._shift = shift
        self._own: list[SectorCipher] = []  # the loop's, if there is a key
        self._at_once = INLINE  # the largest request that is not encrypted in slices or in a thread
        self._others: SimpleQueue[SectorCipher] = SimpleQueue()
        self._threads = Threads("crypt")
        self._buffers = Buffers()
        self._arrived: list[tuple[Io, int]] = []  # reads whose ciphertext is there, and their offsets
        self._leaving: list[Write] = []

    def use(self, make: Callable[[], "SectorCipher"]) -> None:
        """Encrypts with what `make` makes from now on. Not while a request is in flight."""
        ciphers = [make() for _ in range(THREADS + 1)]
        self._others = SimpleQueue()
        self._own = [ciphers.pop()]
        self._at_once = TOGETHER if self._own[0].quick else INLINE
        for cipher in ciphers:
            self._others.put(cipher)

    def forget(self) -> None:
        """Drops the ciphers, and with them the keys that the libraries hold."""
        self._others = SimpleQueue()
        self._own = []

    async def close(self) -> None:
        """Ends the threads."""
        await self._threads.close()

    def _sector(self, offset: int) -> int:
        return (offset - self._begin) // SECTOR

    # --- reads ---------------------------------------------------------------------------------------------------------

    def read(self, io: Io, offset: int) -> Pending:
        """Reads and decrypts."""
        pending = self._device.submit(io.unplugged(), offset + self._shift)
        if pending is not DONE or io.length > self._at_once:
            return self._decrypt_later(pending, io, offset)
        if io.plug.active and io.length <= SMALL:
            if not self._arrived:
                io.plug.add(self._decrypt_arrived)
            self._arrived.append((io, offset))
            return DONE
        try:
            self._own[0].decrypt(self._sector(offset), io.data, io.data)
        except Exception as error:
            return Failed(_failure("decryption", error))
        return DONE

    async def _decrypt_later(self, pending: Pending, io: Io, offset: int) -> None:
        await pending
        await self._aside(False, self._sector(offset), io.data, io.data)

    def _decrypt_arrived(self) -> None:
        arrived, self._arrived = self._arrived, []
        for first, end, length in _groups([io.length for io, _ in arrived]):
            reads = arrived[first:end]
            room = self._buffers.take(length)
            self._own[0].decrypt_joined([self._sector(offset) for _, offset in reads], [io.data for io, _ in reads], room)
            at = 0
            for io, _ in reads:
                io.data[:] = room[at : at + io.length]
                at += io.length

    # --- writes --------------------------------------------------------------------------------------------------------

    def write(self, io: Io, offset: int) -> Pending:
        """Encrypts and writes."""
        if io.length > self._at_once:
            return self._encrypt_first(io, offset)
        if io.plug.active and io.length <= SMALL:
            if not self._leaving:
                io.plug.add(self._encrypt_leaving)
            deferred = Deferred()
            self._leaving.append((io, offset, deferred))
            return deferred
        data = self._buffers.take(io.length)
        try:
            self._own[0].encrypt(self._sector(offset), io.data, data)
        except Exception as error:
            return Failed(_failure("encryption", error))
        return self._device.submit(Io(WRITE, io.length, data, io.flags, io.plug), offset + self._shift)

    async def _encrypt_first(self, io: Io, offset: int) -> None:
        data = self._buffers.take(io.length)
        await self._aside(True, self._sector(offset), io.data, data)
        await self._device.submit(Io(WRITE, io.length, data, io.flags), offset + self._shift)

    def _encrypt_leaving(self) -> None:
        leaving, self._leaving = self._leaving, []
        for first, end, length in _groups([io.length for io, _, _ in leaving]):
            writes = leaving[first:end]
            room = self._buffers.take(length)
            failure = self._encrypt_joined(writes, room)
            at = 0
            for io, offset, deferred in writes:
                if failure is None:
                    data = room[at : at + io.length]
                    deferred.follow(self._device.submit(Io(WRITE, io.length, data, io.flags, io.plug), offset + self._shift))
                else:
                    deferred.finish(failure)
                at += io.length

    def _encrypt_joined(self, writes: list[Write], room: memoryview) -> IoFailed | None:
        sectors = [self._sector(offset) for _, offset, _ in writes]
        try:
            self._own[0].encrypt_joined(sectors, [io.data for io, _, _ in writes], room)
        except Exception as error:
            return _failure("encryption", error)
        return None

    # --- both ----------------------------------------------------------------------------------------------------------

    async def _aside(self, encrypt: bool, sector: int, source: memoryview, target: memoryview) -> None:
        """In slices or in a thread, unless it is small."""
        size = len(source)
        if size > self._at_once and (not self._own[0].quick or (size >= READ_IN_THREAD and not encrypt)):
            await self._threads.run(self._in_thread, encrypt, sector, source, target)
            return
        crypt = self._own[0].encrypt if encrypt else self._own[0].decrypt
        for at in range(0, size, TOGETHER):
            if at:
                await asyncio.sleep(0)
            end = at + TOGETHER
            crypt(sector + at // SECTOR, source[at:end], target[at:end])

    def _in_thread(self, encrypt: bool, sector: int, source: memoryview, target: memoryview) -> None:
        cipher = self._others.get()
        try:
            (cipher.encrypt if encrypt else cipher.decrypt)(sector, source, target)
        finally:
            self._others.put(cipher)


def _failure(what: str, error: Exception) -> IoFailed:
    log.error("%s failed", what, exc_info=error)
    return IoFailed(f"{what} failed: {error}")


def _groups(lengths: list[int]) -> Iterator[tuple[int, int, int]]:
    """Neighbours, of TOGETHER bytes at most: which those are, and how many bytes."""
    start = length = 0
    for number, one in enumerate(lengths):
        if length + one > TOGETHER:
            yield start, number, length
            start, length = number, 0
        length += one
    yield start, len(lengths), length

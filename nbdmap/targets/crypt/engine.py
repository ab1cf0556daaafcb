"""How a crypt target's requests meet its cipher: together, at once, or in a thread.

- Small requests of one wake-up of a connection are encrypted or decrypted together, when the plug is pulled; reads that had to
  wait for the disk, with those that came back beside them.
- Larger ones, up to INLINE, by themselves and at once.
- Those above in threads: at most THREADS at a time, each with a cipher of its own, because a cipher has working memory.

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
from nbdmap.block.io import DONE, WRITE, Deferred, Io, Pending
from nbdmap.block.threads import Threads
from nbdmap.errors import IoFailed
from nbdmap.units import KIB, SECTOR

if TYPE_CHECKING:
    from nbdmap.ciphers.cipher import SectorCipher

log: Final = logging.getLogger(__name__)

SMALL: Final = 32 * KIB
"""Requests up to this wait for those that arrived with them."""
INLINE: Final = 64 * KIB
"""Larger requests are encrypted in threads, so that the others need not wait for them."""
TOGETHER: Final = 128 * KIB
"""Bytes that are encrypted together: PIECE of nbdmap.ciphers, and what one write that is held up below keeps in memory."""
Parked = tuple[Io, int, Deferred]
"""A request that waits for others, and its offset."""
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
        self._others: SimpleQueue[SectorCipher] = SimpleQueue()
        self._threads = Threads("crypt")
        self._buffers = Buffers()
        self._arrived: list[Parked] = []  # reads whose ciphertext is there
        self._leaving: list[Parked] = []  # writes

    def use(self, make: Callable[[], "SectorCipher"]) -> None:
        """Encrypts with what `make` makes from now on. Not while a request is in flight."""
        ciphers = [make() for _ in range(THREADS + 1)]
        self._others = SimpleQueue()
        self._own = [ciphers.pop()]
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
        pending = self._device.submit(io, offset + self._shift)
        if pending is not DONE or io.length > INLINE:
            return self._decrypt_later(pending, io, offset)
        if io.plug.active and io.length <= SMALL:
            if not self._arrived:
                io.plug.add(self._decrypt_arrived)
            return _park(self._arrived, io, offset)
        self._own[0].decrypt(self._sector(offset), io.data, io.data)
        return DONE

    async def _decrypt_later(self, pending: Pending, io: Io, offset: int) -> None:
        await pending
        if io.length > SMALL:
            await self._threads.run(self._in_thread, False, self._sector(offset), io.data, io.data)
            return
        if not self._arrived:
            asyncio.get_running_loop().call_soon(self._decrypt_arrived)
        await _park(self._arrived, io, offset)

    def _decrypt_arrived(self) -> None:
        arrived, self._arrived = self._arrived, []
        for reads, length in _groups(arrived):
            room = self._buffers.take(length)
            failure = self._together(False, reads, room)
            at = 0
            for io, _, deferred in reads:
                end = at + io.length
                if failure is None:
                    io.data[:] = room[at:end]
                deferred.finish(failure)
                at = end

    # --- writes --------------------------------------------------------------------------------------------------------

    def write(self, io: Io, offset: int) -> Pending:
        """Encrypts and writes."""
        if io.length > INLINE:
            return self._encrypt_in_thread(io, offset)
        if io.plug.active and io.length <= SMALL:
            if not self._leaving:
                io.plug.add(self._encrypt_leaving)
            return _park(self._leaving, io, offset)
        data = self._buffers.take(io.length)
        self._own[0].encrypt(self._sector(offset), io.data, data)
        return self._device.submit(Io(WRITE, io.length, data, io.flags, io.plug), offset + self._shift)

    async def _encrypt_in_thread(self, io: Io, offset: int) -> None:
        data = self._buffers.take(io.length)
        await self._threads.run(self._in_thread, True, self._sector(offset), io.data, data)
        await self._device.submit(Io(WRITE, io.length, data, io.flags), offset + self._shift)

    def _encrypt_leaving(self) -> None:
        leaving, self._leaving = self._leaving, []
        for writes, length in _groups(leaving):
            room = self._buffers.take(length)
            failure = self._together(True, writes, room)
            at = 0
            for io, offset, deferred in writes:
                end = at + io.length
                if failure is None:
                    data = room[at:end]
                    deferred.follow(self._device.submit(Io(WRITE, io.length, data, io.flags, io.plug), offset + self._shift))
                else:
                    deferred.finish(failure)
                at = end

    # --- both ----------------------------------------------------------------------------------------------------------

    def _together(self, encrypt: bool, requests: list[Parked], room: memoryview) -> IoFailed | None:
        """Encrypts or decrypts all of them into `room`, one behind the other."""
        begin = self._begin
        sectors = [(offset - begin) // SECTOR for _, offset, _ in requests]
        datas = [io.data for io, _, _ in requests]
        try:
            (self._own[0].encrypt_joined if encrypt else self._own[0].decrypt_joined)(sectors, datas, room)
        except Exception as error:
            log.exception("a cipher failed")
            return IoFailed(f"{'encryption' if encrypt else 'decryption'} failed: {error}")
        return None

    def _in_thread(self, encrypt: bool, sector: int, source: memoryview, target: memoryview) -> None:
        cipher = self._others.get()
        try:
            (cipher.encrypt if encrypt else cipher.decrypt)(sector, source, target)
        finally:
            self._others.put(cipher)


def _park(parked: list[Parked], io: Io, offset: int) -> Deferred:
    deferred = Deferred()
    parked.append((io, offset, deferred))
    return deferred


def _groups(requests: list[Parked]) -> Iterator[tuple[list[Parked], int]]:
    """Neighbours, of TOGETHER bytes at most, and how many those are."""
    start = length = 0
    for number, (io, _, _) in enumerate(requests):
        if length + io.length > TOGETHER:
            yield requests[start:number], length
            start, length = number, 0
        length += io.length
    yield requests[start:], length

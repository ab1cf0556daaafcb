"""LUKS disks as devices: a header of any disk is read, a passphrase tried, and out comes the table of a crypt device.

    devices: {home: {luks: {disk: sda, key_file: home.key}}}
    0 32768 crypt aes-xts-plain64 :64:logon:cryptsetup:6c7083e7-8854-4234-bea6-09164338c040-d0 0 sda 32768

The volume key stands in no table: the line names it as cryptsetup's do, and it is in the keyring only while the table is
loaded. Passphrases are tried in a thread, and nothing waits for it when nobody wants the answer any more.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import NamedTuple

from nbdmap.block.device import Device
from nbdmap.block.io import READ, Io, to_the_end
from nbdmap.dm.table import TargetLine
from nbdmap.dm.target import Opener
from nbdmap.errors import AccessRefused, IoFailed, PassphraseRefused
from nbdmap.luks import volume
from nbdmap.luks.keyfile import KeyFile
from nbdmap.luks.luks1 import Luks1
from nbdmap.luks.secret import wipe, wiping
from nbdmap.targets.crypt.keys import KEYRING
from nbdmap.units import round_down, round_up


class DeviceImage:
    """A device as the code that reads headers wants it: to be used in a thread, which waits while the loop reads."""

    def __init__(self, device: Device) -> None:
        self.name = device.name
        self.size = device.size
        self._device = device
        self._loop = asyncio.get_running_loop()
        self._ended = False
        self._reading: asyncio.Task[bytearray] | None = None

    async def end(self) -> None:
        """From now on the device is not used: a read that is under way is cancelled, and all that follow fail."""
        self._ended = True
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait((self._reading,))

    def read(self, offset: int, length: int) -> bytearray:
        """As Image.read."""
        return asyncio.run_coroutine_threadsafe(self._read(offset, length), self._loop).result()

    async def _read(self, offset: int, length: int) -> bytearray:
        if self._ended:
            raise IoFailed(f"{self.name}: nobody waits for its header any more")
        self._reading = asyncio.ensure_future(self._read_device(offset, length))
        try:
            return await self._reading
        finally:
            self._reading = None

    async def _read_device(self, offset: int, length: int) -> bytearray:
        length = max(0, min(length, self.size - offset))
        block = self._device.limits.logical_block
        start = round_down(offset, block)
        data = bytearray(round_up(offset + length, block) - start if length else 0)
        if data:
            await self._device.submit(Io(READ, len(data), memoryview(data)), start)
        found = data[offset - start : offset - start + length]
        wipe(data)
        return found

    def write(self, offset: int, data: bytes | bytearray) -> None:
        """Headers are changed by the commands that have the disk for themselves."""
        raise AccessRefused(f"{self.name}: its header is not to be changed while it is a disk of the server")

    def flush(self) -> None:
        """Nothing was written."""


class LuksDisk(NamedTuple):
    """What to open. `disk` and `header` are named as in tables; `options` are more options of the crypt target."""

    disk: str
    header: str = ""
    key_slot: int | None = None
    options: tuple[str, ...] = ()


class Secret(NamedTuple):
    """What opens it: a passphrase, a file that is one, or a file that is the volume key itself."""

    passphrase: bytearray | None = None
    key_file: KeyFile | None = None
    volume_key_file: str = ""


def is_luks_line(line: TargetLine) -> bool:
    """Whether a table's line is one of those that are made here."""
    return line.type_name == "crypt" and ":logon:cryptsetup:" in line.params


class _Found(NamedTuple):
    """The words of the table that depend on the header, and the key, to be wiped."""

    table: str
    uuid: str
    description: str
    key: bytearray


@asynccontextmanager
async def unlocked(
    turn: asyncio.Lock, opener: Opener, wanted: LuksDisk, secret: Secret
) -> AsyncIterator[tuple[str, str]]:
    """The table of the crypt device and what its uuid begins with; the table can be loaded inside the block only.

    `turn` is held while passphrases are tried: one at a time in the whole process, as each may take seconds and a GiB.
    Raises PassphraseRefused, InvalidArgument when there is no LUKS disk, CorruptMetadata, Unsupported, and what opening does.
    """
    opened: list[Device] = []
    images: list[DeviceImage] = []
    with ExitStack() as stack:
        try:
            for reference in (wanted.disk, wanted.header or wanted.disk):
                opened.append(await opener.open(reference, read_only=True))
                images.append(DeviceImage(opened[-1]))
            async with turn:
                found = await _in_a_thread(lambda: _unlock(images[0], images[1], wanted, secret))
            key = stack.enter_context(wiping(found.key))
        finally:
            await to_the_end(_give_back(opener, opened, images))
        stack.enter_context(KEYRING.holding(f"logon:{found.description}", key))
        yield found.table, found.uuid


async def _give_back(opener: Opener, opened: list[Device], images: list[DeviceImage]) -> None:
    for image in images:
        await image.end()
    for device in opened:
        await opener.release(device)


async def _in_a_thread(job: Callable[[], _Found]) -> _Found:
    """Runs `job` in a thread. A cancellation does not wait for its end, which may be seconds away, and nothing else does."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Found] = loop.create_future()

    def end(found: _Found | None, error: BaseException | None) -> None:
        if found is not None and not future.done():
            future.set_result(found)
        elif found is not None:
            wipe(found.key)
        elif error is not None and not future.done():
            future.set_exception(error)

    def work() -> None:
        found, error = None, None
        try:
            found = job()
        except BaseException as raised:
            error = raised
        try:
            loop.call_soon_threadsafe(end, found, error)
        except RuntimeError:  # the loop has ended
            if found is not None:
                wipe(found.key)

    threading.Thread(target=work, name="nbdmap luks", daemon=True).start()
    return await future


def _unlock(disk: DeviceImage, header_disk: DeviceImage, wanted: LuksDisk, secret: Secret) -> _Found:
    """In a thread."""
    header = volume.read(header_disk)
    segment = header.segment()
    size = volume.data_size(segment, disk.name, disk.size, detached=bool(wanted.header))
    key = _volume_key(header, wanted, secret)
    description = f"cryptsetup:{header.uuid}" if isinstance(header, Luks1) else header.key_description()
    word = "-" if segment.encryption.startswith("cipher_null") else f":{len(key)}:logon:{description}"
    table = volume.table_line(segment, size, word, wanted.disk, wanted.options)
    return _Found(table, f"CRYPT-LUKS{header.version}-{header.uuid.replace('-', '')}-", description, key)


def _volume_key(header: volume.Header, wanted: LuksDisk, secret: Secret) -> bytearray:
    if secret.volume_key_file:
        key = KeyFile(secret.volume_key_file).read()
        if not header.is_key(key):
            wipe(key)
            raise PassphraseRefused(f"{header.image.name}: {secret.volume_key_file} is not its volume key")
        return key
    if secret.passphrase is not None:
        return header.unlock(secret.passphrase, wanted.key_slot).key
    assert secret.key_file is not None
    with wiping(secret.key_file.read()) as passphrase:
        return header.unlock(passphrase, wanted.key_slot).key

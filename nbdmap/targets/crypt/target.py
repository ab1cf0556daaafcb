"""crypt: encrypts what is written to the device below, decrypts what is read (Documentation device-mapper/crypt).

    0 2048 crypt aes-cbc-essiv:sha256 babebabebabebabebabebabebabebabe 0 /dev/sda 0

The ciphertext is the kernel's, byte for byte. Nothing is kept between requests: what the disk holds after a crash is, encryption
sector by encryption sector, one write's or another's, unless the disk itself tears sectors.

Keys: `key set` and `key wipe` are obeyed while the device is suspended, when no request is in flight; without a key it does not
resume (EAGAIN). A key is wiped from the memory that this code has it in; libraries wipe their own.
"""

import asyncio
from dataclasses import replace
from typing import Self

from nbdmap.block.device import Device, Limits
from nbdmap.block.io import READ, WRITE, Io, Pending
from nbdmap.ciphers.spec import CipherSpec
from nbdmap.dm.args import Args
from nbdmap.dm.target import Below, Spec, Target
from nbdmap.errors import InvalidArgument, NbdmapError, NotReady
from nbdmap.targets.crypt.engine import Engine
from nbdmap.targets.crypt.keys import KeyWord, wipe, without_keys
from nbdmap.targets.crypt.parameters import Options, parse_options
from nbdmap.units import SECTOR


class Crypt(Target):
    """`crypt <cipher> <key> <iv_offset> <device> <start> [<n> <options>...]`"""

    type_name = "crypt"
    version = (1, 28, 0)

    def __init__(
        self, spec: Spec, cipher: CipherSpec, iv_offset_sectors: int, device: Device, start: int, options: Options
    ) -> None:
        super().__init__(spec)
        self._cipher = cipher
        self._iv_offset_sectors = iv_offset_sectors
        self._device = device
        self._start = start
        self._options = options
        self._key = bytearray()
        self._key_size = 0
        self._reference = ""  # of the keyring; then the key itself is not kept
        self._has_key = False
        self._suspended = False
        self._shift = start - spec.begin
        self._engine = Engine(device, spec.begin, self._shift)

    @classmethod
    async def construct(cls, spec: Spec, args: Args) -> Self:
        """The cipher, the key, the IV's offset in sectors, device and start; then options."""
        try:
            return await cls._construct(spec, args)
        except NbdmapError as error:
            error.message = without_keys(error.message)
            error.args = (error.message,)
            raise

    @classmethod
    async def _construct(cls, spec: Spec, args: Args) -> Self:
        cipher_word = args.word("cipher")
        key_word = args.word("key")
        offset_word, reference, start_word = (args.word(what) for what in ("iv_offset", "device", "start sector"))
        key = KeyWord(key_word)
        options = parse_options(args, spec.length)
        args.end()
        cipher = CipherSpec.parse(cipher_word)
        iv_offset_sectors = Args((offset_word,)).number("iv_offset")
        if iv_offset_sectors % (options.sector_size // SECTOR):
            raise InvalidArgument(f"iv_offset {iv_offset_sectors} is not a multiple of sector_size {options.sector_size}")
        start = Args((start_word,)).start()
        target = cls(spec, cipher, iv_offset_sectors, await spec.open(reference), start, options)
        try:
            await target._use(key)
            return target
        except BaseException as error:
            failure = error  # compiled code must not wait within an except clause, see setup.py
        await target.close()
        raise failure

    async def _use(self, word: KeyWord) -> None:
        """Makes `word` the key. Raises, and changes nothing, when the cipher cannot have it."""
        from nbdmap.ciphers.cipher import SectorCipher

        key = await asyncio.to_thread(word.read) if word.reference else word.read()
        try:
            self._engine.use(
                lambda: SectorCipher(
                    self._cipher, key, sector_size=self._options.sector_size, iv_offset=self._iv_offset_sectors,
                    large_sectors=self._options.large_sectors,
                )
            )  # fmt: skip
        except BaseException:
            wipe(key)
            raise
        wipe(self._key)
        self._reference, self._key_size, self._has_key = word.reference, word.size, True
        if word.reference:
            wipe(key)
        else:
            self._key = key

    def submit(self, io: Io, offset: int) -> Pending:
        """Decrypts reads, encrypts writes, and passes the rest down."""
        if io.op is READ:
            return self._engine.read(io, offset)
        if io.op is WRITE:
            return self._engine.write(io, offset)
        return self._device.submit(io, offset + self._shift)

    def devices(self) -> list[Below]:
        """The one range."""
        return [Below(self._device, self._start, self.length)]

    def limits(self) -> Limits:
        """Those of the device; no zeroes, as they would not be zeroes when read, and discards only where they are allowed."""
        below = self._device.limits
        size = self._options.sector_size
        return replace(
            below,
            logical_block=max(below.logical_block, size),
            io_min=max(below.io_min, size) if size > SECTOR else below.io_min,
            discard=below.discard and self._options.allow_discards,
            zero=False,
            fast_zero=False,
            sparse=False,
        )

    def table(self) -> str:
        """`<cipher> <key> <iv_offset> <major:minor> <start>[ <n> <options>]`; the key as it is, as the kernel prints it."""
        key = self._reference or self._key.hex() or "00" * self._key_size or "-"
        place = f"{self._iv_offset_sectors} {self._device.number} {self._start // SECTOR}"
        return f"{self._cipher.text} {key} {place}{self._options.words()}"

    async def message(self, args: Args) -> str:
        """`key set <key>` and `key wipe`, while suspended."""
        words = [args.word("message")]
        while args:
            words.append(args.word("message"))
        names = [word.lower() for word in words[:2]]
        if names[0] != "key":
            raise InvalidArgument(f"crypt takes the messages 'key set <key>' and 'key wipe', not {without_keys(words[0])!r}")
        if not self._suspended:
            raise InvalidArgument("keys are changed only while the device is suspended")
        if names == ["key", "set"] and len(words) == 3:
            key = KeyWord(words[2])
            if key.size != self._key_size:
                raise InvalidArgument(f"the key has {key.size} bytes, the one before has {self._key_size}")
            await self._use(key)
        elif names == ["key", "wipe"] and len(words) == 2:
            self._forget_key()
        else:
            raise InvalidArgument("crypt takes the messages 'key set <key>' and 'key wipe'")
        return ""

    def _forget_key(self) -> None:
        if self._has_key:
            self._engine.forget()
        wipe(self._key)
        self._reference, self._has_key = "", False

    async def postsuspend(self) -> None:
        """From now on keys may be changed."""
        self._suspended = True

    async def preresume(self) -> None:
        """Refuses without a key."""
        if not self._has_key:
            raise NotReady("the key was wiped: set one first")

    async def resume(self) -> None:
        """Keys stay as they are."""
        self._suspended = False

    async def close(self) -> None:
        """Wipes the key."""
        self._forget_key()
        await self._engine.close()

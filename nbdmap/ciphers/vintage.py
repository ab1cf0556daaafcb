"""The IV modes of other systems: loop-AES (lmk), TrueCrypt (tcw), BitLocker (eboiv, elephant). dm-reference b.3.

lmk and elephant look at the data, lmk and tcw have key material of their own behind the cipher's keys. All work on many sectors
at once: the lanes of MD5 and of the diffuser are the sectors.
"""

import math
import zlib
from typing import Final

import numpy as np
import numpy.typing as npt

from nbdmap.ciphers.arrays import SPARE, Bytes, Key, Words, words
from nbdmap.ciphers.blocks import Block
from nbdmap.ciphers.ivs import Ivs, little_endian
from nbdmap.ciphers.modes import Mode
from nbdmap.ciphers.spec import CipherSpec
from nbdmap.errors import InvalidArgument
from nbdmap.units import SECTOR

Lanes = npt.NDArray[np.uint32]

_WHITENING: Final = 16
_MAX_ELEPHANT_KEY: Final = 32


def extra_key_size(spec: CipherSpec, key_size: int, iv_size: int) -> int:
    """Bytes at the end of a key of `key_size` that are the IV mode's own. Raises InvalidArgument where they cannot be."""
    if spec.iv_mode == "lmk" and key_size % spec.key_count:  # version 3: one key more
        return key_size // (spec.key_count + 1)
    if spec.iv_mode == "tcw":
        extra = iv_size + _WHITENING
        if key_size <= extra:
            raise InvalidArgument(f"cipher {spec.text!r}: a tcw key has more than {extra} bytes, not {key_size}")
        return extra
    if spec.iv_mode == "elephant":
        if key_size // 2 > _MAX_ELEPHANT_KEY:
            most = 2 * _MAX_ELEPHANT_KEY
            raise InvalidArgument(f"cipher {spec.text!r}: an elephant key has at most {most} bytes, not {key_size}")
        return key_size // 2
    return 0


def _only_sectors(name: str, sector_size: int) -> None:
    if sector_size != SECTOR:
        raise InvalidArgument(f"{name} works with sectors of {SECTOR} bytes only, not {sector_size}")


def eboiv(mode: Mode, sector_size: int) -> Ivs:
    """The byte offset of the sector, encrypted: one block of zeroes with the offset for its IV. `mode` is for such blocks."""

    def ivs(numbers: Words) -> Bytes:
        offsets = little_endian(numbers * np.uint64(sector_size), mode.iv_size)
        result = np.zeros_like(offsets)
        mode.encrypt(offsets, np.zeros_like(offsets), result)
        return result

    return ivs


# --- loop-AES ----------------------------------------------------------------------------------------------------------------

_SINES: Final = [np.uint32(int(abs(math.sin(i + 1)) * (1 << 32))) for i in range(64)]
_TURNS: Final = ((7, 12, 17, 22), (5, 9, 14, 20), (4, 11, 16, 23), (6, 10, 15, 21))
_ORDER: Final = ((1, 0), (5, 1), (3, 5), (7, 0))
_START: Final = (0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476)


def _rotate(value: Lanes, bits: int) -> Lanes:
    return value << np.uint32(bits) | value >> np.uint32(32 - bits)


def md5_rounds(state: Lanes, block: Lanes) -> Lanes:
    """MD5's compression (RFC 1321) of one block for each lane; state (4, lanes), block (16, lanes)."""
    a, b, c, d = state
    for step in range(64):
        part = step // 16
        if part == 0:
            mixed = (b & c) | (~b & d)
        elif part == 1:
            mixed = (d & b) | (~d & c)
        elif part == 2:
            mixed = b ^ c ^ d
        else:
            mixed = c ^ (b | ~d)
        times, plus = _ORDER[part]
        mixed = mixed + a + _SINES[step] + block[(times * step + plus) % 16]
        a, d, c, b = d, c, b, b + _rotate(mixed, _TURNS[part][step % 4])
    added: Lanes = state + np.stack((a, b, c, d))
    return added


class Lmk:
    """The IV is MD5's state after the sector's bytes from 16 on and its number, after the seed in version 3."""

    def __init__(self, mode: Mode, seed: Key, sector_size: int) -> None:
        _only_sectors("lmk", sector_size)
        self._mode = mode
        start = np.array(_START, np.uint32).reshape(4, 1)
        if seed:
            block = np.frombuffer(bytes(seed[:16]).ljust(64, b"\0"), np.uint32).reshape(16, 1)
            start = md5_rounds(start, block)
        self._start = start

    def _ivs(self, numbers: Words, plain: Bytes) -> Bytes:
        message = np.empty((len(plain), 128), np.uint32)
        message[:, :124] = plain.view(np.uint32)[:, 4:]
        message[:, 124] = numbers & np.uint64(0xFFFFFFFF)
        message[:, 125] = numbers >> np.uint64(32) & np.uint64(0xFFFFFF) | np.uint64(0x80000000)
        message[:, 126] = 4024
        message[:, 127] = 0
        lanes = np.ascontiguousarray(message.T)
        state = np.repeat(self._start, len(plain), 1)
        for block in range(8):
            state = md5_rounds(state, lanes[16 * block : 16 * block + 16])
        return np.ascontiguousarray(state.T).view(np.uint8)[:, : self._mode.iv_size]

    def encrypt(self, numbers: Words, source: Bytes, target: Bytes) -> None:
        self._mode.encrypt(np.ascontiguousarray(self._ivs(numbers, source)), source, target)

    def decrypt(self, numbers: Words, source: Bytes, target: Bytes) -> None:
        size = self._mode.iv_size
        self._mode.decrypt(np.zeros((len(source), size), np.uint8), source, target)
        target[:, :size] ^= self._ivs(numbers, target)


# --- TrueCrypt ---------------------------------------------------------------------------------------------------------------


def _crc_tables() -> npt.NDArray[np.uint32]:
    """[position][byte]: that byte's part in the CRC-32 of four bytes, without inversions."""
    nothing = 0xFFFFFFFF
    return np.array(
        [
            [zlib.crc32(bytes((byte if at == position else 0) for at in range(4)), nothing) ^ nothing for byte in range(256)]
            for position in range(4)
        ],
        np.uint32,
    )


class Tcw:
    """The IV is the seed XOR the number; the ciphertext is XORed with eight bytes made of the whitening key and the number."""

    def __init__(self, mode: Mode, own: Key, sector_size: int) -> None:
        _only_sectors("tcw", sector_size)
        self._mode = mode
        self._seed = np.frombuffer(own[:-_WHITENING], np.uint64)
        self._whitening = np.frombuffer(own[-_WHITENING:], np.uint64)
        self._tables = _crc_tables()

    def _ivs(self, numbers: Words) -> Bytes:
        return (numbers[:, None] ^ self._seed).view(np.uint8)

    def _white(self, numbers: Words) -> Words:
        """The eight bytes of each sector."""
        salted = (numbers[:, None] ^ self._whitening).view(np.uint8).reshape(-1, 4, 4)
        crc = np.zeros(salted.shape[:2], np.uint32)
        for position in range(4):
            crc ^= self._tables[position][salted[:, :, position]]
        return np.stack((crc[:, 0] ^ crc[:, 3], crc[:, 1] ^ crc[:, 2]), 1).view(np.uint64)

    def encrypt(self, numbers: Words, source: Bytes, target: Bytes) -> None:
        self._mode.encrypt(self._ivs(numbers), source, target)
        whitened = words(target)
        whitened ^= self._white(numbers)

    def decrypt(self, numbers: Words, source: Bytes, target: Bytes) -> None:
        rows = (words(source) ^ self._white(numbers)).view(np.uint8)
        self._mode.decrypt(self._ivs(numbers), rows, target)


# --- BitLocker ---------------------------------------------------------------------------------------------------------------

_A_TURNS: Final = (9, 0, 13, 0)
_B_TURNS: Final = (0, 10, 0, 25)


class Elephant:
    """Before CBC the sector goes through XOR with a key of its own and the Elephant diffuser, both ways over 32-bit words."""

    def __init__(self, mode: Mode, ivs: Ivs, tweak: Block, sector_size: int) -> None:
        self._mode = mode
        self._ivs = ivs
        self._tweak = tweak
        self._sector_size = sector_size

    def _sector_keys(self, numbers: Words) -> Words:
        """32 bytes for each sector."""
        offsets = little_endian(numbers * np.uint64(self._sector_size), 16)
        pairs = np.repeat(offsets, 2, 0)
        pairs[1::2, 15] = 0x80
        room = np.empty(pairs.size + SPARE, np.uint8)
        self._tweak.encrypt(pairs, room)
        return room[: pairs.size].view(np.uint64).reshape(len(numbers), 4)

    def _mix(self, numbers: Words, rows: Bytes) -> None:
        """XORs each row with its sector's key."""
        mixed = words(rows).reshape(len(rows), -1, 4)
        mixed ^= self._sector_keys(numbers)[:, None, :]

    def encrypt(self, numbers: Words, source: Bytes, target: Bytes) -> None:
        rows = source.copy()
        self._mix(numbers, rows)
        lanes = np.ascontiguousarray(rows.view(np.uint32).T)
        for _ in range(5):
            _a_back(lanes)
        for _ in range(3):
            _b_back(lanes)
        self._mode.encrypt(self._ivs(numbers), np.ascontiguousarray(lanes.T).view(np.uint8), target)

    def decrypt(self, numbers: Words, source: Bytes, target: Bytes) -> None:
        rows = np.empty_like(source)
        self._mode.decrypt(self._ivs(numbers), source, rows)
        lanes = np.ascontiguousarray(rows.view(np.uint32).T)
        for _ in range(3):
            _b(lanes)
        for _ in range(5):
            _a(lanes)
        target[:] = np.ascontiguousarray(lanes.T).view(np.uint8)
        self._mix(numbers, target)


def _turned(value: Lanes, turns: int) -> Lanes:
    return _rotate(value, turns) if turns else value


def _a(lanes: Lanes) -> None:
    """Words in rising order; each depends on words that are done."""
    for i in range(len(lanes)):
        lanes[i] += lanes[i - 2] ^ _turned(lanes[i - 5], _A_TURNS[i % 4])


def _a_back(lanes: Lanes) -> None:
    """Words in falling order."""
    for i in range(len(lanes) - 1, -1, -1):
        lanes[i] -= lanes[i - 2] ^ _turned(lanes[i - 5], _A_TURNS[i % 4])


def _b(lanes: Lanes) -> None:
    count = len(lanes)
    for i in range(count):
        lanes[i] += lanes[(i + 2) % count] ^ _turned(lanes[(i + 5) % count], _B_TURNS[i % 4])


def _b_back(lanes: Lanes) -> None:
    count = len(lanes)
    for i in range(count - 1, -1, -1):
        lanes[i] -= lanes[(i + 2) % count] ^ _turned(lanes[(i + 5) % count], _B_TURNS[i % 4])

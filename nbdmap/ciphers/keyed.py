"""What the words of a cipher string and a key amount to: for each of its keys a mode over a block cipher, and IVs.

Which way of working serves a mode is chosen here, by what was measured (bench/README.md): libcrypto one sector at a time for
few or large sectors of AES, numpy over many otherwise, libgcrypt for the other ciphers that it has.
"""

from typing import Protocol

from nbdmap.ciphers import adiantum, libcrypto, libgcrypt, vintage
from nbdmap.ciphers.arrays import Bytes, Key, Words
from nbdmap.ciphers.blocks import ADIANTUM_ROUNDS, BLOCK_SIZES, check_key_size, make_block, mode_block_size
from nbdmap.ciphers.ivs import Ivs, make_ivs
from nbdmap.ciphers.modes import BySize, Cbc, Ctr, Ecb, Lrw, Mode, Scratch, Xts
from nbdmap.ciphers.spec import CipherSpec
from nbdmap.errors import InvalidArgument, NotFound
from nbdmap.units import SECTOR

_ALL = 1 << 20
_LRW_KEY = 16
"""Bytes of the second key of lrw."""


class Keyed(Protocol):
    """Encrypts rows of sectors with one key; `numbers` are their IV sector numbers."""

    def encrypt(self, numbers: Words, source: Bytes, target: Bytes) -> None:
        """Each row of `source` into the same row of `target`."""
        ...

    def decrypt(self, numbers: Words, source: Bytes, target: Bytes) -> None:
        """The reverse."""
        ...


class Numbered:
    """A mode whose IVs depend on nothing but the sectors' numbers."""

    def __init__(self, mode: Mode, ivs: Ivs) -> None:
        self._mode = mode
        self._ivs = ivs

    def encrypt(self, numbers: Words, source: Bytes, target: Bytes) -> None:
        self._mode.encrypt(self._ivs(numbers), source, target)

    def decrypt(self, numbers: Words, source: Bytes, target: Bytes) -> None:
        self._mode.decrypt(self._ivs(numbers), source, target)


def make_keyed(spec: CipherSpec, key: Key, sector_size: int) -> list[Keyed]:
    """One for each of the keys that `key` is made of; some IV modes take a part at its end for themselves."""
    iv_size = _iv_size(spec)
    extra = vintage.extra_key_size(spec, len(key), iv_size)
    size = (len(key) - extra) // spec.key_count
    keys = [key[number * size : number * size + size] for number in range(spec.key_count)]
    scratch = Scratch(sector_size)
    modes = [make_mode(spec, one, scratch) for one in keys]
    own = key[len(key) - extra :]
    if spec.iv_mode == "lmk":
        return [vintage.Lmk(mode, own, sector_size) for mode in modes]
    if spec.iv_mode == "tcw":
        return [vintage.Tcw(mode, own, sector_size) for mode in modes]
    if spec.iv_mode in ("eboiv", "elephant"):
        if iv_size != mode_block_size(spec):
            raise InvalidArgument(f"cipher {spec.text!r}: {spec.iv_mode} needs IVs of the cipher's block size")
        ivs = vintage.eboiv(make_mode(spec, keys[0], Scratch(iv_size)), sector_size)  # the first key's, for all
        if spec.iv_mode == "elephant":
            return [vintage.Elephant(mode, ivs, make_block("aes", own), sector_size) for mode in modes]
        return [Numbered(mode, ivs) for mode in modes]
    return [Numbered(mode, make_ivs(spec, iv_size, one)) for mode, one in zip(modes, keys, strict=True)]


def _iv_size(spec: CipherSpec) -> int:
    """Bytes of an IV. Raises NotFound for a cipher that there is not."""
    if spec.cipher not in BLOCK_SIZES:
        check_key_size(spec.cipher, 0)
    return {"ecb": 0, "adiantum": adiantum.IV_SIZE}.get(spec.chain_mode, BLOCK_SIZES[spec.cipher])


def make_mode(spec: CipherSpec, key: Key, scratch: Scratch) -> Mode:
    """The chaining mode of `spec` over its cipher with `key`."""
    cipher, kind = spec.cipher, spec.chain_mode
    there_is_not = NotFound(f"cipher {spec.text!r}: there is no mode {kind}({cipher})")
    if (kind == "adiantum") != (cipher in ADIANTUM_ROUNDS):
        raise there_is_not
    if kind == "adiantum":
        check_key_size(cipher, len(key))
        return adiantum.Adiantum(key, ADIANTUM_ROUNDS[cipher])
    if (kind in ("xts", "lrw") and BLOCK_SIZES[cipher] != 16) or (cipher, kind) == ("cipher_null", "ctr"):
        raise InvalidArgument(f"cipher {spec.text!r}: {kind} cannot have blocks of {BLOCK_SIZES[cipher]} bytes")
    if kind == "ecb":
        return Ecb(make_block(cipher, key), scratch)
    if kind == "lrw":
        return Lrw(make_block(cipher, key[:-_LRW_KEY]), key[-_LRW_KEY:], scratch)
    if kind not in ("cbc", "ctr", "xts"):
        raise there_is_not
    if kind == "xts" and len(key) % 2:
        raise InvalidArgument(f"cipher {spec.text!r}: an xts key is two keys, and {len(key)} bytes are odd")
    size = len(key) // 2 if kind == "xts" else len(key)
    check_key_size(cipher, size)
    if size in libgcrypt.KEY_SIZES.get(cipher, ()):
        return libgcrypt.GcryptMode(cipher, kind, key)
    if kind == "ctr":
        return Ctr(make_block(cipher, key), scratch)
    if kind == "cbc":
        mode: Mode = Cbc(make_block(cipher, key), scratch)
    else:
        mode = Xts(make_block(cipher, key[:size]), make_block(cipher, key[size:]), scratch)
    return _quickest(kind, key, mode, *few_sectors(spec, scratch.sector_size)) if cipher == "aes" else mode


def _quickest(kind: str, key: Key, many: Mode, encrypted: int, decrypted: int) -> Mode:
    few = libcrypto.find_mode(kind, key)
    return many if few is None else BySize(few, many, encrypted, decrypted)


def few_sectors(spec: CipherSpec, sector_size: int) -> tuple[int, int]:
    """How many sectors are few, in encryption and decryption: those that libcrypto does one by one."""
    if sector_size > SECTOR:
        return _ALL, _ALL if spec.chain_mode == "xts" else 1
    return (20, 20) if spec.chain_mode == "xts" else (48, 8)

"""Block ciphers: many blocks at once, each by itself (ECB), with one key.

    block = make_block("aes", key)
    block.encrypt(source, target)

AES is that of `cryptography`; the others come from libgcrypt, which Debian always has (package libgcrypt20), loaded when one is
first asked for. Neither object may be used by two threads at once.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Protocol

from nbdmap.ciphers import libgcrypt
from nbdmap.ciphers.arrays import Bytes, Key
from nbdmap.ciphers.spec import CipherSpec
from nbdmap.errors import InvalidArgument, NotFound


class Block(Protocol):
    """A block cipher with its key. Source and target are contiguous and the same, or do not overlap; a whole number of blocks.

    The target's memory must reach SPARE bytes further, which are not changed.
    """

    size: int

    def encrypt(self, source: Any, target: Any) -> object:
        """Encrypts every block of `source` into `target`."""
        ...

    def decrypt(self, source: Any, target: Any) -> object:
        """The reverse."""
        ...


class Aes:
    """AES with a key of 16, 24 or 32 bytes."""

    size = 16

    def __init__(self, key: Key) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        cipher = Cipher(algorithms.AES(key), modes.ECB())
        self.encrypt = cipher.encryptor().update_into
        self.decrypt = cipher.decryptor().update_into


class Null:
    """cipher_null: no encryption at all."""

    size = 1

    def encrypt(self, source: Bytes, target: Bytes) -> None:
        target[: source.size] = source.reshape(-1)

    decrypt = encrypt


ADIANTUM_ROUNDS: Final[Mapping[str, int]] = MappingProxyType({"xchacha12,aes": 12, "xchacha20,aes": 20})
"""What adiantum is made of, and nothing else: the rounds of its stream."""
KEY_SIZES: Final[Mapping[str, tuple[int, ...]]] = MappingProxyType(
    {"aes": (16, 24, 32), "cipher_null": (0,), **dict.fromkeys(ADIANTUM_ROUNDS, (32,))} | libgcrypt.KEY_SIZES
)
"""The ciphers and the bytes that their keys may have."""
BLOCK_SIZES: Final[Mapping[str, int]] = MappingProxyType(
    {"aes": 16, "cipher_null": 1, **dict.fromkeys(ADIANTUM_ROUNDS, 16)} | libgcrypt.BLOCK_SIZES
)


def check_key_size(cipher: str, size: int) -> None:
    """Raises NotFound (ENOENT) for a cipher that there is not, InvalidArgument for a key that it cannot have."""
    if cipher not in KEY_SIZES:
        raise NotFound(f"there is no cipher {cipher!r} (known: {', '.join(KEY_SIZES)})")
    if size not in KEY_SIZES[cipher]:
        sizes = ", ".join(map(str, KEY_SIZES[cipher]))
        raise InvalidArgument(f"cipher {cipher} cannot have a key of {size} bytes (possible: {sizes})")


def mode_block_size(spec: CipherSpec) -> int:
    """What the crypto API calls the block size of the mode: 1 for a stream."""
    return 1 if spec.chain_mode == "ctr" else BLOCK_SIZES[spec.cipher]


def make_block(cipher: str, key: Key) -> Block:
    """`cipher` with `key`. Raises as check_key_size does, and NotFound where libgcrypt is missing."""
    check_key_size(cipher, len(key))
    if cipher == "aes":
        return Aes(key)
    if cipher == "cipher_null":
        return Null()
    if cipher in ADIANTUM_ROUNDS:
        raise NotFound(f"{cipher} is no block cipher")
    return libgcrypt.Gcrypt(cipher, key)

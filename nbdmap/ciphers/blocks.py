"""Block ciphers: many blocks at once, each by itself (ECB), with one key.

    block = make_block("aes", key)
    block.encrypt(source, target)

AES is that of `cryptography`, and so is cast5 with keys of less than 11 bytes. The others come from libgcrypt, which Debian
always has (package libgcrypt20), and what that lacks, cast6 and twofish with 24 bytes, from Botan (package libbotan-2-19). A
library is loaded when it is first asked for. No object may be used by two threads at once.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Protocol

from nbdmap.ciphers import libbotan, libgcrypt
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


class OpenSsl:
    """AES, or cast5, of `cryptography`."""

    def __init__(self, cipher: str, key: Key) -> None:
        from cryptography.hazmat.primitives.ciphers import BlockCipherAlgorithm, Cipher, modes

        algorithm: BlockCipherAlgorithm
        if cipher == "aes":
            from cryptography.hazmat.primitives.ciphers.algorithms import AES

            algorithm = AES(key)
        else:
            from cryptography.hazmat.decrepit.ciphers.algorithms import CAST5

            algorithm = CAST5(bytes(key))
        self.size = BLOCK_SIZES[cipher]
        one = Cipher(algorithm, modes.ECB())
        self.encrypt = one.encryptor().update_into
        self.decrypt = one.decryptor().update_into


class Null:
    """cipher_null: no encryption at all."""

    size = 1

    def encrypt(self, source: Bytes, target: Bytes) -> None:
        target[: source.size] = source.reshape(-1)

    decrypt = encrypt


ADIANTUM_ROUNDS: Final[Mapping[str, int]] = MappingProxyType({"xchacha12,aes": 12, "xchacha20,aes": 20})
"""What adiantum is made of, and nothing else: the rounds of its stream."""
_SHORT_CAST5: Final = tuple(range(5, 11))
KEY_SIZES: Final[Mapping[str, tuple[int, ...]]] = MappingProxyType(
    {"aes": (16, 24, 32), "cipher_null": (0,), **dict.fromkeys(ADIANTUM_ROUNDS, (32,))}
    | libgcrypt.KEY_SIZES
    | libbotan.KEY_SIZES
    | {"twofish": (16, 24, 32), "cast5": _SHORT_CAST5 + libgcrypt.KEY_SIZES["cast5"]}
)
"""The ciphers and the bytes that their keys may have."""
BLOCK_SIZES: Final[Mapping[str, int]] = MappingProxyType(
    {"aes": 16, "cipher_null": 1, **dict.fromkeys(ADIANTUM_ROUNDS, 16), "cast6": 16} | libgcrypt.BLOCK_SIZES
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
    """`cipher` with `key`. Raises as check_key_size does, and NotFound where the library is missing."""
    check_key_size(cipher, len(key))
    if cipher == "aes" or (cipher == "cast5" and len(key) in _SHORT_CAST5):
        return OpenSsl(cipher, key)
    if cipher == "cipher_null":
        return Null()
    if cipher in ADIANTUM_ROUNDS:
        raise InvalidArgument(f"{cipher} is no block cipher")
    if len(key) in libbotan.KEY_SIZES.get(cipher, ()):
        return libbotan.Botan(cipher, key)
    return libgcrypt.Gcrypt(cipher, key)

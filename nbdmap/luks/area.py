"""How the areas of key slots are encrypted: as sectors of 512 bytes, counted from the start of the area, in place."""

from nbdmap.ciphers.cipher import SectorCipher
from nbdmap.ciphers.spec import CipherSpec


def encrypt(encryption: str, key: bytearray, data: bytearray) -> None:
    """Encrypts whole sectors in place. Raises InvalidArgument or NotFound for a cipher or key size that there is not."""
    _cipher(encryption, key).encrypt(0, data, data)


def decrypt(encryption: str, key: bytearray, data: bytearray) -> None:
    """The reverse. What cipher_null has made can be read, but is not made here."""
    if encryption.startswith("cipher_null"):
        return
    _cipher(encryption, key).decrypt(0, data, data)


def check(encryption: str, key_size: int) -> None:
    """Raises InvalidArgument or NotFound when there is no such cipher with a key of so many bytes."""
    _cipher(encryption, bytearray(number % 251 for number in range(key_size)))


def _cipher(encryption: str, key: bytearray) -> SectorCipher:
    return SectorCipher(CipherSpec.parse(encryption), key)

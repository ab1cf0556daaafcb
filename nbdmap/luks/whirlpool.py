"""The hash whirlpool, which OpenSSL has given up and old LUKS1 disks have: by libgcrypt, loaded when it is asked for."""

import ctypes
from functools import cache
from typing import Final

from nbdmap.errors import InvalidArgument, IoFailed

SIZE: Final = 64
"""Bytes of a digest."""
_WHIRLPOOL, _PBKDF2 = 305, 34
_DISABLE_SECMEM, _INITIALIZATION_FINISHED = 37, 38


@cache
def library() -> ctypes.CDLL:
    """libgcrypt. Raises InvalidArgument naming the package where there is none."""
    try:
        found = ctypes.CDLL("libgcrypt.so.20")
    except OSError:
        raise InvalidArgument("the hash 'whirlpool' needs libgcrypt (Debian: package libgcrypt20)") from None
    size, data = ctypes.c_size_t, ctypes.c_char_p
    found.gcry_check_version(None)
    found.gcry_control(_DISABLE_SECMEM, 0)
    found.gcry_control(_INITIALIZATION_FINISHED, 0)
    found.gcry_md_hash_buffer.argtypes = [ctypes.c_int, ctypes.c_void_p, data, size]
    found.gcry_md_hash_buffer.restype = None
    found.gcry_kdf_derive.argtypes = [
        ctypes.c_void_p, size, ctypes.c_int, ctypes.c_int, data, size, ctypes.c_ulong, size, ctypes.c_void_p
    ]  # fmt: skip
    return found


class Whirlpool:
    """As a hash of hashlib."""

    digest_size = SIZE

    def __init__(self, data: bytes) -> None:
        self._data = data

    def digest(self) -> bytes:
        """The 64 bytes."""
        result = ctypes.create_string_buffer(SIZE)
        library().gcry_md_hash_buffer(_WHIRLPOOL, result, self._data, len(self._data))
        return result.raw


def pbkdf2(passphrase: bytearray, salt: bytes, iterations: int, key: bytearray) -> None:
    """Fills `key`."""
    secret = (ctypes.c_char * max(1, len(passphrase))).from_buffer(passphrase if passphrase else bytearray(1))
    result = (ctypes.c_char * len(key)).from_buffer(key)
    if error := library().gcry_kdf_derive(
        ctypes.addressof(secret), len(passphrase), _PBKDF2, _WHIRLPOOL, salt, len(salt), iterations,
        len(key), ctypes.addressof(result),
    ):  # fmt: skip
        raise IoFailed(f"libgcrypt's PBKDF2 failed: error {error & 0xFFFF}")

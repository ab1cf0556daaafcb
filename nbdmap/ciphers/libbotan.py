"""What libgcrypt lacks, of Botan: cast6, and twofish with a key of 24 bytes (Debian: package libbotan-2-19).

By Botan's C interface, which has many blocks in one call. The library is loaded when one of them is first asked for.
"""

import ctypes
from functools import cache
from typing import Any, Final

import numpy as np

from nbdmap.ciphers.arrays import Bytes, Key, address
from nbdmap.errors import InvalidArgument, NotFound

LIBRARY: Final = "libbotan-2.so.19"
SIZE: Final = 16
"""Bytes of a block, of both."""
KEY_SIZES: Final = {"cast6": (16, 20, 24, 28, 32), "twofish": (24,)}
_NAMES: Final = {"cast6": b"CAST-256", "twofish": b"Twofish"}


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise NotFound(f"this cipher needs Botan (Debian: package libbotan-2-19): {error}") from None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.botan_block_cipher_init.argtypes = [ctypes.POINTER(pointer), ctypes.c_char_p]
    library.botan_block_cipher_destroy.argtypes = [pointer]
    library.botan_block_cipher_set_key.argtypes = [pointer, pointer, size]
    library.botan_block_cipher_encrypt_blocks.argtypes = [pointer, pointer, pointer, size]
    library.botan_block_cipher_decrypt_blocks.argtypes = [pointer, pointer, pointer, size]
    return library


class Botan:
    """A Block: ECB over all that is given. Its key is wiped by Botan when it goes."""

    size = SIZE

    def __init__(self, cipher: str, key: Key) -> None:
        self._library = _library()
        self._handle = ctypes.c_void_p()
        if self._library.botan_block_cipher_init(ctypes.byref(self._handle), _NAMES[cipher]):
            raise NotFound(f"this machine's Botan has no cipher {cipher!r}")
        if self._library.botan_block_cipher_set_key(self._handle, address(np.frombuffer(key, np.uint8)), len(key)):
            raise InvalidArgument(f"Botan takes no key of {len(key)} bytes for {cipher}")

    def encrypt(self, source: Bytes, target: Bytes) -> None:
        """As Block has it."""
        self._run(self._library.botan_block_cipher_encrypt_blocks, source, target)

    def decrypt(self, source: Bytes, target: Bytes) -> None:
        """As Block has it."""
        self._run(self._library.botan_block_cipher_decrypt_blocks, source, target)

    def _run(self, crypt: Any, source: Bytes, target: Bytes) -> None:
        if error := crypt(self._handle, address(source), address(target), source.size // SIZE):
            raise RuntimeError(f"Botan failed: error {error}")

    def __del__(self) -> None:
        if hasattr(self, "_handle"):  # there is the library
            self._library.botan_block_cipher_destroy(self._handle)

"""The ciphers that are not AES, of libgcrypt: serpent, twofish, camellia, cast5, blowfish, des, des3_ede.

Debian always has the library (package libgcrypt20: apt and systemd need it). It is loaded when one of them is first asked for.
"""

import ctypes
from functools import cache
from typing import Any, Final

import numpy as np

from nbdmap.ciphers.arrays import Bytes, Key, address
from nbdmap.errors import InvalidArgument, NotFound

LIBRARY: Final = "libgcrypt.so.20"
ECB: Final = 1
MODES: Final = {"ecb": ECB, "cbc": 3, "ctr": 6, "xts": 13}
_DISABLE_SECMEM, _INITIALIZATION_FINISHED, _ALLOW_WEAK_KEY = 37, 38, 79

_ALGORITHMS: Final = {
    ("des3_ede", 24): 2,
    ("des", 8): 302,
    ("twofish", 32): 10,
    ("twofish", 16): 303,
    ("serpent", 16): 304,
    ("serpent", 24): 305,
    ("serpent", 32): 306,
    ("camellia", 16): 310,
    ("camellia", 24): 311,
    ("camellia", 32): 312,
} | {("blowfish", size): 4 for size in range(4, 57)} | {("cast5", size): 3 for size in range(11, 17)}  # fmt: skip
BLOCK_SIZES: Final = {"serpent": 16, "twofish": 16, "camellia": 16, "cast5": 8, "blowfish": 8, "des": 8, "des3_ede": 8}
KEY_SIZES: Final = {name: tuple(sorted(size for cipher, size in _ALGORITHMS if cipher == name)) for name in BLOCK_SIZES}


@cache
def _library() -> ctypes.PyDLL:
    try:
        library = ctypes.PyDLL(LIBRARY)
    except OSError as error:
        raise NotFound(f"this cipher needs libgcrypt (Debian: package libgcrypt20): {error}") from None
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.gcry_check_version.argtypes, library.gcry_check_version.restype = [ctypes.c_char_p], ctypes.c_char_p
    library.gcry_check_version(None)
    library.gcry_control(_DISABLE_SECMEM, 0)
    library.gcry_control(_INITIALIZATION_FINISHED, 0)
    library.gcry_cipher_open.argtypes = [ctypes.POINTER(pointer), number, number, ctypes.c_uint]
    library.gcry_cipher_close.argtypes, library.gcry_cipher_close.restype = [pointer], None
    library.gcry_cipher_ctl.argtypes = [pointer, number, pointer, size]
    library.gcry_cipher_setkey.argtypes = [pointer, pointer, size]
    library.gcry_cipher_setiv.argtypes = library.gcry_cipher_setctr.argtypes = [pointer, pointer, size]
    library.gcry_cipher_encrypt.argtypes = library.gcry_cipher_decrypt.argtypes = [pointer, pointer, size, pointer, size]
    return library


class _Handle:
    """A cipher in one of libgcrypt's modes, with its key."""

    def __init__(self, cipher: str, mode: int, key: Key) -> None:
        self.library = _library()
        self.handle = ctypes.c_void_p()
        size = len(key) // 2 if mode == MODES["xts"] else len(key)
        if self.library.gcry_cipher_open(ctypes.byref(self.handle), _ALGORITHMS[cipher, size], mode, 0):
            raise NotFound(f"this machine's libgcrypt has no cipher {cipher!r}")
        self.library.gcry_cipher_ctl(self.handle, _ALLOW_WEAK_KEY, None, 1)
        if cipher == "cast5":
            key = bytes(key).ljust(16, b"\0")  # RFC 2144: so are keys of more than 80 bits
        if self.library.gcry_cipher_setkey(self.handle, address(np.frombuffer(key, np.uint8)), len(key)):
            raise InvalidArgument(f"libgcrypt takes no key of {len(key)} bytes for {cipher}")

    def __del__(self) -> None:
        if hasattr(self, "handle"):  # there is the library
            self.library.gcry_cipher_close(self.handle)


class Gcrypt:
    """A Block: ECB over all that is given."""

    def __init__(self, cipher: str, key: Key) -> None:
        self.size = BLOCK_SIZES[cipher]
        self._handle = _Handle(cipher, ECB, key)

    def encrypt(self, source: Bytes, target: Bytes) -> None:
        self._run(self._handle.library.gcry_cipher_encrypt, source, target)

    def decrypt(self, source: Bytes, target: Bytes) -> None:
        self._run(self._handle.library.gcry_cipher_decrypt, source, target)

    def _run(self, crypt: Any, source: Bytes, target: Bytes) -> None:
        if error := crypt(self._handle.handle, address(target), source.size, address(source), source.size):
            raise RuntimeError(f"libgcrypt failed: error {error}")


class GcryptMode:
    """A Mode: cbc, ctr or xts, a sector at a time."""

    def __init__(self, cipher: str, chain_mode: str, key: Key) -> None:
        self.iv_size = BLOCK_SIZES[cipher]
        self._handle = _Handle(cipher, MODES[chain_mode], key)
        library = self._handle.library
        self._start = library.gcry_cipher_setctr if chain_mode == "ctr" else library.gcry_cipher_setiv

    def encrypt(self, ivs: Bytes, source: Bytes, target: Bytes) -> None:
        self._run(self._handle.library.gcry_cipher_encrypt, ivs, source, target)

    def decrypt(self, ivs: Bytes, source: Bytes, target: Bytes) -> None:
        self._run(self._handle.library.gcry_cipher_decrypt, ivs, source, target)

    def _run(self, crypt: Any, ivs: Bytes, source: Bytes, target: Bytes) -> None:
        start, handle, size = self._start, self._handle.handle, self.iv_size
        width, iv, origin, result = source.shape[1], address(ivs), address(source), address(target)
        for number in range(len(source)):
            at = number * width
            if error := start(handle, iv + number * size, size) or crypt(handle, result + at, width, origin + at, width):
                raise RuntimeError(f"libgcrypt failed: error {error}")

"""AES of OpenSSL's libcrypto, one call a sector, where the library is found (Debian: package libssl3, there with Python's ssl).

A context whose key stays and whose IV is set anew costs a tenth of a context for each sector, and less than numpy's fixed
costs when there are few sectors, or large ones. Without the library everything works the same; it is only slower there.
"""

import ctypes
from functools import cache
from typing import Any, Final

import numpy as np

from nbdmap.ciphers.arrays import Bytes, Key, address

LIBRARY: Final = "libcrypto.so.3"
_POINTER: Final = ctypes.c_void_p


@cache
def _library() -> ctypes.PyDLL | None:
    """Loaded so that calls keep the interpreter's lock: each is about a microsecond."""
    try:
        library = ctypes.PyDLL(LIBRARY)
        library.EVP_CIPHER_fetch.restype = library.EVP_CIPHER_CTX_new.restype = _POINTER
    except (OSError, AttributeError):
        return None
    library.EVP_CIPHER_fetch.argtypes = [_POINTER, ctypes.c_char_p, ctypes.c_char_p]
    library.EVP_CipherInit_ex.argtypes = [_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, ctypes.c_int]
    library.EVP_Cipher.argtypes = [_POINTER, _POINTER, _POINTER, ctypes.c_uint]
    library.EVP_CIPHER_CTX_free.argtypes = [_POINTER]
    library.EVP_CIPHER_free.argtypes = [_POINTER]
    return library


class Context:
    """A cipher with its key in one direction. Its memory is wiped by libcrypto when it goes."""

    def __init__(self, library: ctypes.PyDLL, cipher: int, key: Key, *, encrypt: bool) -> None:
        self._library = library
        self._context = library.EVP_CIPHER_CTX_new()
        self._iv = (ctypes.c_uint64 * 2)()
        self._iv_at = ctypes.addressof(self._iv)
        secret, iv = np.frombuffer(key, np.uint8), np.zeros(16, np.uint8)
        started = library.EVP_CipherInit_ex(self._context, cipher, None, address(secret), address(iv), int(encrypt))
        self.usable = started == 1

    def run(self, ivs: Bytes, source: Bytes, target: Bytes) -> None:
        """Each row of `source` with its IV into the same row of `target`."""
        start, crypt, context = self._library.EVP_CipherInit_ex, self._library.EVP_Cipher, self._context
        width, iv, origin, result = source.shape[1], address(ivs), address(source), address(target)
        for number in range(len(source)):
            at = number * width
            started = start(context, None, None, None, iv + 16 * number, -1)
            if started != 1 or crypt(context, result + at, origin + at, width) <= 0:
                raise RuntimeError("libcrypto failed to encrypt or decrypt a sector")

    def run_plain64(self, number: int, step: int, width: int, source: Any, target: Any) -> None:
        """As `run` for IVs that are plain64 numbers, `number` and every `step` on, without any arrays."""
        start, crypt, context = self._library.EVP_CipherInit_ex, self._library.EVP_Cipher, self._context
        iv, iv_at = self._iv, self._iv_at
        result = ctypes.addressof(ctypes.c_char.from_buffer(target))
        origin = result if source is target else address(np.frombuffer(source, np.uint8))
        for at in range(0, len(target), width):
            iv[0] = number
            if start(context, None, None, None, iv_at, -1) != 1 or crypt(context, result + at, origin + at, width) <= 0:
                raise RuntimeError("libcrypto failed to encrypt or decrypt a sector")
            number += step

    def __del__(self) -> None:
        self._library.EVP_CIPHER_CTX_free(self._context)


class OpenSsl:
    """A Mode: AES in cbc or xts."""

    iv_size = 16

    def __init__(self, encryptor: Context, decryptor: Context) -> None:
        self.encrypt = encryptor.run
        self.decrypt = decryptor.run
        self.encryptor = encryptor
        self.decryptor = decryptor


def find_mode(chain_mode: str, key: Key) -> OpenSsl | None:
    """AES in `chain_mode` with `key`; None where there is no such library, or it refuses the key (xts with equal halves)."""
    library = _library()
    bits = len(key) * 8 // (2 if chain_mode == "xts" else 1)
    if library is None:
        return None
    cipher = library.EVP_CIPHER_fetch(None, f"AES-{bits}-{chain_mode.upper()}".encode(), None)
    if not cipher:
        return None
    encryptor, decryptor = (Context(library, cipher, key, encrypt=encrypt) for encrypt in (True, False))
    library.EVP_CIPHER_free(cipher)
    return OpenSsl(encryptor, decryptor) if encryptor.usable and decryptor.usable else None

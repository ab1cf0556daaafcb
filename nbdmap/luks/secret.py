"""Secrets in memory: bytearrays that are wiped by whoever made them.

    with wiping(kdf.derive(passphrase, 64)) as key: ...

Python copies `bytes` and numbers as it likes, so that no secret is kept as either where it can be avoided; what a library has
copied for itself is beyond reach. Secrets are never logged, shown by `repr`, or put into an exception.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager


def wipe(secret: bytearray) -> None:
    """Overwrites `secret` with zeroes, where it lies; it keeps its length."""
    if secret:
        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(secret)), 0, len(secret))


@contextmanager
def wiping(secret: bytearray) -> Iterator[bytearray]:
    """Hands out `secret` and wipes it at the end of the block."""
    try:
        yield secret
    finally:
        wipe(secret)

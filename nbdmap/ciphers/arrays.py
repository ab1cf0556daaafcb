"""The arrays that all of the ciphers work on."""

from typing import Final

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]
Key = bytes | bytearray | memoryview
"""A key, or a part of one: passed on without copies, so that who made it can wipe it."""

SPARE: Final = 16
"""Bytes that `cryptography` wants a target to have beyond what it fills."""


def words(rows: Bytes) -> Words:
    """The same memory as 64-bit little-endian words."""
    return rows.view(np.uint64)


def address(array: Bytes) -> int:
    """Where its first byte is, for calls of C; the array must be contiguous, and live as long as it is used."""
    where: int = array.__array_interface__["data"][0]
    return where

"""What cryptsetup does when it is not told otherwise, and the command line promises; it imports nothing."""

from typing import Final

CIPHER: Final = "aes-xts-plain64"
KDFS: Final = ("argon2id", "argon2i", "pbkdf2")
TIME_MS: Final = 2000
"""That a key slot's KDF takes."""
HEADER_SIZE: Final = 16 << 10
"""Bytes of one copy of a LUKS2 header, JSON included."""

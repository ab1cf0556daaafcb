"""The key derivation functions of LUKS: PBKDF2 (both versions), argon2i and argon2id (version 0x13; LUKS2).

    Pbkdf2("sha256", 1000, salt).derive(passphrase, 64)

They take seconds of a processor by intention and leave the interpreter to others meanwhile: never run them on the loop.
Their parameters come from a header on disk, so that the memory they ask for has a limit.
"""

import errno
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.argon2 import Argon2i, Argon2id
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

from nbdmap.errors import CorruptMetadata, InvalidArgument, IoFailed
from nbdmap.luks import whirlpool
from nbdmap.luks.whirlpool import Whirlpool

MAX_MEMORY_KIB: Final = 4 << 20
"""Of argon2: cryptsetup's own limit, 4 GiB."""
MAX_LANES: Final = 64
MAX_SALT: Final = 1024
"""Bytes. cryptsetup writes 32."""
U32: Final = (1 << 32) - 1

_OPENSSL: Final[dict[str, hashes.HashAlgorithm]] = {
    "sha1": hashes.SHA1(), "sha224": hashes.SHA224(), "sha256": hashes.SHA256(), "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(), "sha3-224": hashes.SHA3_224(), "sha3-256": hashes.SHA3_256(),
    "sha3-384": hashes.SHA3_384(), "sha3-512": hashes.SHA3_512(), "blake2b-512": hashes.BLAKE2b(64),
    "blake2s-256": hashes.BLAKE2s(32), "sm3": hashes.SM3(),
}  # fmt: skip
_HASHLIB: Final = {"ripemd160": "ripemd160"} | {name: name.replace("sha3-", "sha3_") for name in _OPENSSL}
HASHES: Final = (*_HASHLIB, "whirlpool")
_ARGON2: Final[dict[str, type[Argon2i] | type[Argon2id]]] = {"argon2i": Argon2i, "argon2id": Argon2id}


def check_hash(name: str) -> str:
    """`name` as it is used here (`SHA256` is sha256). Raises InvalidArgument for a hash that there is not."""
    known = name.lower()
    if known == "whirlpool":
        whirlpool.library()
        return known
    if known not in _HASHLIB:
        raise InvalidArgument(f"the hash {name!r} is not available here (there are: {', '.join(HASHES)})")
    try:
        hashlib.new(_HASHLIB[known])
    except ValueError:
        raise InvalidArgument(f"the hash {name!r} is not available from this machine's OpenSSL") from None
    return known


def hash_function(name: str) -> Callable[[bytes], "hashlib._Hash | Whirlpool"]:
    """The constructor of a hash that `check_hash` has seen."""
    if name == "whirlpool":
        return Whirlpool
    found: Callable[[bytes], hashlib._Hash] = getattr(hashlib, _HASHLIB[name], None) or partial(hashlib.new, _HASHLIB[name])
    return found


@dataclass(frozen=True)
class Pbkdf2:
    """PBKDF2-HMAC with this hash."""

    hash: str
    iterations: int
    salt: bytes = field(repr=False)

    def __post_init__(self) -> None:
        check_hash(self.hash)
        _check("iterations", self.iterations, 1, U32)
        _check("bytes of salt", len(self.salt), 1, MAX_SALT)

    def derive(self, passphrase: bytearray, length: int) -> bytearray:
        """`length` bytes of key material, the caller's to wipe."""
        key = bytearray(length)
        if algorithm := _OPENSSL.get(self.hash):
            PBKDF2HMAC(algorithm, length, self.salt, self.iterations).derive_into(passphrase, key)  # twice as fast as hashlib's
        elif self.hash == "whirlpool":
            whirlpool.pbkdf2(passphrase, self.salt, self.iterations, key)
        else:
            key[:] = hashlib.pbkdf2_hmac(_HASHLIB[self.hash], passphrase, self.salt, self.iterations, length)
        return key


@dataclass(frozen=True)
class Argon2:
    """argon2i or argon2id: passes over `memory_kib` KiB in this many lanes."""

    kind: str
    time: int
    memory_kib: int
    lanes: int
    salt: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if self.kind not in _ARGON2:
            raise CorruptMetadata(f"{self.kind!r} is no kind of argon2 that LUKS knows")
        _check("time", self.time, 1, U32)
        _check("cpus", self.lanes, 1, MAX_LANES)
        _check("memory (KiB)", self.memory_kib, 8 * self.lanes, MAX_MEMORY_KIB)
        _check("bytes of salt", len(self.salt), 8, MAX_SALT)

    def derive(self, passphrase: bytearray, length: int) -> bytearray:
        """As Pbkdf2.derive. Raises IoFailed (ENOMEM) when there is not the memory."""
        key = bytearray(length)
        function = _ARGON2[self.kind](
            salt=self.salt, length=length, iterations=self.time, lanes=self.lanes, memory_cost=self.memory_kib
        )
        try:
            function.derive_into(passphrase, key)  # type: ignore[arg-type]  # takes any buffer
        except MemoryError:
            raise IoFailed(f"{self.kind} needs {self.memory_kib} KiB of memory", errno.ENOMEM) from None
        return key


Kdf = Pbkdf2 | Argon2


def _check(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise CorruptMetadata(f"key derivation: {value} {what} is not in the range {low} to {high}")

"""Key derivation: against hashlib, against RFC 6070's and libargon2's vectors, and parameters that cannot be."""

import hashlib

import pytest

from nbdmap.errors import CorruptMetadata, InvalidArgument, IoFailed, NbdmapError
from nbdmap.luks import kdf, whirlpool
from nbdmap.luks.kdf import HASHES, Argon2, Kdf, Pbkdf2, check_hash, hash_function


@pytest.mark.parametrize("name", [name for name in HASHES if name != "whirlpool"])
def test_pbkdf2_is_hashlibs(name: str) -> None:
    wanted = hashlib.pbkdf2_hmac(name.replace("sha3-", "sha3_"), b"pass", b"salt", 7, 50)
    assert Pbkdf2(name, 7, b"salt").derive(bytearray(b"pass"), 50) == wanted
    assert Pbkdf2(name, 7, b"salt").derive(bytearray(), 50) != wanted


def test_vectors() -> None:
    derived = Pbkdf2("sha1", 4096, b"salt").derive(bytearray(b"password"), 20)
    assert derived.hex() == "4b007901b765489abead49d926f721d065a429c1"
    # phc-winner-argon2, src/test.c: version 0x13, t=2, m=2^8, p=1
    vectors = {"argon2i": "89e9029f4637b295beb027056a7336c414fadd43f6b208645281cb214a56452f",
               "argon2id": "9dfeb910e80bad0311fee20f9c0e2b12c17987b4cac90c2ef54d5b3021c68bfe"}  # fmt: skip
    for kind, wanted in vectors.items():
        assert Argon2(kind, 2, 256, 1, b"somesalt").derive(bytearray(b"password"), 32).hex() == wanted


@pytest.mark.parametrize(
    "make",
    [
        lambda: Pbkdf2("sha256", 0, b"salt"),
        lambda: Pbkdf2("sha256", 1 << 32, b"salt"),
        lambda: Pbkdf2("sha256", 1, b""),
        lambda: Argon2("argon2d", 4, 64, 1, bytes(32)),
        lambda: Argon2("argon2id", 0, 64, 1, bytes(32)),
        lambda: Argon2("argon2id", 4, 7, 1, bytes(32)),
        lambda: Argon2("argon2id", 4, 64, 9, bytes(32)),
        lambda: Argon2("argon2id", 4, 64, 0, bytes(32)),
        lambda: Argon2("argon2id", 4, kdf.MAX_MEMORY_KIB + 1, 1, bytes(32)),
        lambda: Argon2("argon2id", 4, 64, 1, b"short"),
        lambda: Argon2("argon2id", 4, 1 << 20, 65, bytes(32)),
    ],
)
def test_what_cannot_be(make: object) -> None:
    assert callable(make)
    with pytest.raises(CorruptMetadata, match=r"key derivation|kind of argon2"):
        make()


def test_unknown_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_hash("SHA512") == "sha512"
    with pytest.raises(InvalidArgument, match="the hash 'tiger' is not available here"):
        check_hash("tiger")
    with pytest.raises(InvalidArgument, match="the hash 'md5' is not"):
        Pbkdf2("md5", 1000, b"salt")
    monkeypatch.setitem(kdf._HASHLIB, "sha1", "nosuch")
    with pytest.raises(InvalidArgument, match="this machine's OpenSSL"):
        check_hash("sha1")


def test_digests() -> None:
    for name in HASHES[:-1]:
        assert hash_function(name)(b"x").digest() == hashlib.new(name, b"x").digest()


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Greedy:
        def __init__(self, **_: object) -> None: ...

        def derive_into(self, passphrase: bytearray, key: bytearray) -> None:
            raise MemoryError

    monkeypatch.setitem(kdf._ARGON2, "argon2id", Greedy)
    with pytest.raises(IoFailed, match="argon2id needs 64 KiB of memory") as caught:
        Argon2("argon2id", 4, 64, 1, bytes(32)).derive(bytearray(b"x"), 32)
    assert caught.value.errno == 12


def test_no_salt_in_repr() -> None:
    some: list[Kdf] = [Pbkdf2("sha256", 1, b"salty"), Argon2("argon2i", 4, 64, 1, b"saltsalt")]
    assert "salt" not in repr(some)
    assert isinstance(CorruptMetadata(""), NbdmapError)


def test_whirlpool(monkeypatch: pytest.MonkeyPatch) -> None:
    """ISO's vector of the empty string, and HMAC and PBKDF2 made of the hash by hand."""
    function = hash_function("whirlpool")
    assert function(b"").digest().hex()[:48] == "19fa61d75522a4669b44e39c1d2e1726c530232130d407f8"
    assert function(b"").digest_size == 64

    def hmac(key: bytes, data: bytes) -> bytes:
        inner = function(bytes(byte ^ 0x36 for byte in key.ljust(64, b"\0")) + data).digest()
        return function(bytes(byte ^ 0x5C for byte in key.ljust(64, b"\0")) + inner).digest()

    for passphrase in (b"pass", b""):
        first = hmac(passphrase, b"salt\0\0\0\1")
        wanted = bytes(a ^ b for a, b in zip(first, hmac(passphrase, first), strict=True))
        assert Pbkdf2("whirlpool", 2, b"salt").derive(bytearray(passphrase), 50) == wanted[:50]

    def missing(_name: str) -> object:
        raise OSError

    whirlpool.library.cache_clear()
    monkeypatch.setattr("ctypes.CDLL", missing)
    with pytest.raises(InvalidArgument, match="needs libgcrypt"):
        check_hash("whirlpool")

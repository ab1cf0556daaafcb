"""nbdmap.ciphers where one of the libraries is missing."""

from collections.abc import Iterator

import numpy as np
import pytest

from nbdmap.ciphers import libbotan, libcrypto, libgcrypt
from nbdmap.ciphers.blocks import make_block
from nbdmap.ciphers.cipher import SectorCipher
from nbdmap.ciphers.spec import CipherSpec
from nbdmap.errors import NotFound

KEY = bytes(range(64))


@pytest.fixture(autouse=True)
def found_anew() -> Iterator[None]:
    """No library is remembered from before the test, nor after it."""
    for module in (libbotan, libcrypto, libgcrypt):
        module._library.cache_clear()
    yield
    for module in (libbotan, libcrypto, libgcrypt):
        module._library.cache_clear()


def encrypted(name: str) -> bytes:
    target = bytearray(8192)
    SectorCipher(CipherSpec.parse(name), KEY).encrypt(5, bytes(8192), target)
    return bytes(target)


def test_without_libgcrypt_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libgcrypt, "LIBRARY", "libgcrypt.so.gone")
    with pytest.raises(NotFound, match=r"needs libgcrypt \(Debian: package libgcrypt20\)") as caught:
        SectorCipher(CipherSpec.parse("serpent-xts-plain64"), KEY)
    assert KEY.hex() not in str(caught.value)
    assert encrypted("aes-xts-plain64")  # which needs it not


@pytest.mark.parametrize("name", ["cast6-xts-plain64", "twofish-cbc-plain"])
def test_without_botan_the_error_names_the_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libbotan, "LIBRARY", "libbotan.so.gone")
    key = KEY[:24] if "cbc" in name else KEY
    with pytest.raises(NotFound, match=r"needs Botan \(Debian: package libbotan-2-19\)") as caught:
        SectorCipher(CipherSpec.parse(name), key)
    assert key.hex() not in str(caught.value)


def test_cast6_is_that_of_rfc_2612() -> None:
    for key, wanted in (
        ("2342bb9efa38542c0af75647f29f615d", "c842a08972b43d20836c91d1b7530f6b"),
        ("2342bb9efa38542cbed0ac83940ac298bac77a7717942863", "1b386c0210dcadcbdd0e41aa08a7a7e8"),
        ("2342bb9efa38542cbed0ac83940ac2988d7c47ce264908461cc1b5137ae6b604", "4f6a2038286897b9c9870136553317fa"),
    ):
        block, room = make_block("cast6", bytes.fromhex(key)), np.zeros(32, np.uint8)
        block.encrypt(np.zeros(16, np.uint8), room)
        assert room[:16].tobytes().hex() == wanted
        block.decrypt(room[:16].copy(), room)
        assert not room.any()


def test_without_libcrypto_aes_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    before = encrypted("aes-xts-plain64")
    libcrypto._library.cache_clear()
    monkeypatch.setattr(libcrypto, "LIBRARY", "libcrypto.so.gone")
    assert libcrypto.find_mode("xts", KEY) is None
    assert encrypted("aes-xts-plain64") == before

"""nbdmap.ciphers where one of the libraries is missing."""

from collections.abc import Iterator

import pytest

from nbdmap.ciphers import libcrypto, libgcrypt
from nbdmap.ciphers.cipher import SectorCipher
from nbdmap.ciphers.spec import CipherSpec
from nbdmap.errors import NotFound

KEY = bytes(range(64))


@pytest.fixture(autouse=True)
def found_anew() -> Iterator[None]:
    """No library is remembered from before the test, nor after it."""
    for module in (libcrypto, libgcrypt):
        module._library.cache_clear()
    yield
    for module in (libcrypto, libgcrypt):
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


def test_without_libcrypto_aes_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    before = encrypted("aes-xts-plain64")
    libcrypto._library.cache_clear()
    monkeypatch.setattr(libcrypto, "LIBRARY", "libcrypto.so.gone")
    assert libcrypto.find_mode("xts", KEY) is None
    assert encrypted("aes-xts-plain64") == before

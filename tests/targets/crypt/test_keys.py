"""nbdmap.targets.crypt.keys: words, the keyring's files, wiping."""

import errno
from pathlib import Path

import pytest

from nbdmap.errors import InvalidArgument, IoFailed, NbdmapError, NoKey
from nbdmap.targets.crypt.keys import MAX_KEY, Keyring, KeyWord, wipe


def test_words() -> None:
    assert (KeyWord("00ffA0").size, KeyWord("00ffA0").read()) == (3, bytes.fromhex("00ffa0"))
    assert (KeyWord("-").size, KeyWord("-").read()) == (0, b"")
    assert (KeyWord(":32:logon:a:b").size, KeyWord(":32:logon:a:b").reference) == (32, ":32:logon:a:b")
    assert repr(KeyWord("deadbeef")) == "KeyWord(4 bytes)"


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("0", "odd number of hexadecimal digits, 1"),
        ("0g", "not hexadecimal"),
        ("٠٠", "not hexadecimal"),
        ("00" * (MAX_KEY + 1), "longer than"),
        (":32:logon:", "is not ':<bytes>:<type>:<description>'"),
        (":32:logon", "is not ':<bytes>:<type>:<description>'"),
        (":x:logon:a", "is not ':<bytes>:<type>:<description>'"),
        (":-1:logon:a", "is not ':<bytes>:<type>:<description>'"),
        (":9999999999:logon:a", "is not ':<bytes>:<type>:<description>'"),
        (":5000:logon:a", "longer than"),
        (":32:logon:a b", "has a blank in it"),
        (":32:trusted:a", "are the kernel's own"),
        (":32:other:a", "unknown type 'other'"),
    ],
)
def test_words_that_are_none(word: str, complaint: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        KeyWord(word)
    assert complaint in caught.value.message


def test_the_keyring(tmp_path: Path) -> None:
    ring, path = Keyring(), tmp_path / "key"
    with pytest.raises(NoKey) as caught:
        ring.read("logon:a", 4)
    assert caught.value.errno == errno.ENOKEY
    ring.replace({"logon:a": str(path), "user:directory": str(tmp_path)})
    with pytest.raises(IoFailed) as failed:
        ring.read("logon:a", 4)
    assert failed.value.errno == errno.ENOENT
    path.write_bytes(b"abcd")
    assert ring.read("logon:a", 4) == b"abcd"
    for size in (3, 5):
        with pytest.raises(InvalidArgument, match=f"has 4 bytes, not {size}"):
            ring.read("logon:a", size)
    with pytest.raises(NbdmapError):
        ring.read("user:directory", 4)


def test_wiping() -> None:
    key = bytearray(b"secret")
    wipe(key)
    assert key == bytes(6)

"""LUKS1 headers: made, read again, keys added and removed, damage told, and the power failing at every write."""

import random
from dataclasses import replace

import pytest

from nbdmap.errors import Busy, CorruptMetadata, InvalidArgument, IoFailed, NbdmapError, NoKey, NotFound, PassphraseRefused
from nbdmap.luks import luks1, volume
from nbdmap.luks.keyslot import Segment
from nbdmap.luks.luks1 import DISABLED, ENABLED, Header, Luks1, SlotRecord, Wanted1
from tests.support.luks import CHEAP, KDFS, KEY, MemoryImage, Torn, made, new_luks1, opens, passphrase

SLOT = SlotRecord.layout.size


def read(image: MemoryImage) -> Luks1:
    header = volume.read(image)
    assert isinstance(header, Luks1)
    return header


def test_made_and_read() -> None:
    image = made(1)
    header = read(image)
    assert header.segment() == Segment("aes-xts-plain64", 2 << 20, None, 0, 512, ())
    assert sorted(header.slots) == [0]
    assert opens(image, "secret") == 0
    assert header.uuid == "6c7083e7-8854-4234-bea6-09164338c040"
    assert header.is_key(bytearray(KEY))
    assert not header.is_key(bytearray(KEY[:32]))
    assert not header.is_key(bytearray(64))


@pytest.mark.parametrize(
    ("encryption", "size", "hash_name"),
    [
        ("aes-cbc-essiv:sha256", 32, "sha1"),
        ("aes-cbc-plain", 16, "ripemd160"),
        ("aes-xts-plain64", 32, "sha512"),
        ("aes-ecb", 24, "sha256"),
    ],
)
def test_ciphers_and_hashes(encryption: str, size: int, hash_name: str) -> None:
    header = new_luks1(encryption=encryption, key=KEY[:size], hash_name=hash_name)
    assert header.encryption == encryption
    assert header.unlock(passphrase("secret")).key == KEY[:size]


def test_keys_are_added_and_removed() -> None:
    image = made(1)
    assert read(image).add_key(bytearray(KEY), passphrase("two"), CHEAP) == 1
    assert read(image).add_key(bytearray(KEY), passphrase("six"), CHEAP, 6) == 6
    assert [opens(image, text) for text in ("secret", "two", "six")] == [0, 1, 6]
    with pytest.raises(Busy, match="key slot 6 is in use"):
        read(image).add_key(bytearray(KEY), passphrase("x"), CHEAP, 6)
    with pytest.raises(InvalidArgument, match="no 8"):
        read(image).add_key(bytearray(KEY), passphrase("x"), CHEAP, 8)
    header = read(image)
    area = slice(header.entries[0].start_sectors * 512, header.entries[0].start_sectors * 512 + 256000)
    before = bytes(image.bytes[area])
    header.remove_key(0)
    after = bytes(image.bytes[area])
    assert sum(a == b for a, b in zip(before, after, strict=True)) < 2000, "the area is overwritten"
    with pytest.raises(PassphraseRefused):
        opens(image, "secret")
    with pytest.raises(NotFound, match="key slot 0 is not in use"):
        read(image).remove_key(0)
    assert opens(image, "two") == 1
    assert read(image).add_key(bytearray(KEY), passphrase("again"), CHEAP) == 0


def test_all_slots() -> None:
    image = made(1)
    for number in range(1, 8):
        assert read(image).add_key(bytearray(KEY), passphrase(str(number)), CHEAP) == number
    with pytest.raises(Busy, match="all 8 key slots"):
        read(image).add_key(bytearray(KEY), passphrase("x"), CHEAP)
    assert [opens(image, str(number)) for number in range(1, 8)] == list(range(1, 8))


def test_which_slots_are_tried() -> None:
    image = made(1)
    read(image).add_key(bytearray(KEY), passphrase("two"), CHEAP)
    assert opens(image, "two", 1) == 1
    with pytest.raises(PassphraseRefused, match="in key slot 1"):
        opens(image, "secret", 1)
    with pytest.raises(NotFound, match="key slot 5 is not in use"):
        opens(image, "secret", 5)
    with pytest.raises(PassphraseRefused):
        read(image).unlock(passphrase("two"), without=1)
    header = read(image)
    header.remove_key(0)
    header.remove_key(1)
    with pytest.raises(NoKey, match="no key slot can be used"):
        read(image).unlock(passphrase("secret"))


def test_argon2_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="LUKS1 takes pbkdf2"):
        read(made(1)).add_key(bytearray(KEY), passphrase("x"), KDFS["argon2id"])


@pytest.mark.parametrize("torn_at", [0, 512, 1024])
@pytest.mark.parametrize("removing", [False, True])
def test_the_power_fails(torn_at: int, removing: bool) -> None:
    """Whenever it does, the passphrases that are not changed open the disk."""
    for writes in range(3):
        image = made(1)
        for slot in (1, 2, 6):  # the entry of slot 6 lies on two sectors
            read(image).add_key(bytearray(KEY), passphrase(str(slot)), CHEAP, slot)
        header = read(image)
        image.writes_left, image.torn_at = writes, torn_at
        try:
            if removing:
                header.remove_key(6)
            else:
                header.add_key(bytearray(KEY), passphrase("new"), CHEAP, 7)
        except Torn:
            pass
        else:
            assert writes == 2, "an area and a header"
        image.writes_left = None
        assert [opens(image, text) for text in ("secret", "1", "2")] == [0, 1, 2]


def test_the_area_is_durable_before_the_header() -> None:
    image = made(1)
    image.log.clear()
    order = [("write", 4096 + 258048), ("flush", 0), ("write", 0), ("flush", 0)]
    header = read(image)
    header.add_key(bytearray(KEY), passphrase("two"), CHEAP)
    assert [(kind, offset) for kind, offset, _ in image.log] == order
    image.log.clear()
    header.remove_key(1)
    assert [(kind, offset) for kind, offset, _ in image.log] == order


def test_detached() -> None:
    header = new_luks1(detached=True)
    assert header.segment().offset == 0
    assert opens(header.image, "secret") == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"key_size": 0}, "a key of 0 bytes"),
        ({"key_size": 513}, "a key of 513 bytes"),
        ({"payload_sectors": 9}, "not where it should be"),
        ({"cipher_name": b"a b"}, "cipher 'a b-xts"),
        ({"cipher_mode": b"x" * 32}, "the cipher mode is"),
        ({"uuid": b"\xff\0"}, "the uuid is"),
        ({"uuid": b""}, "uuid ''"),
        ({"hash_name": b"sha2"}, "the hash 'sha2' is not available"),
        ({"digest_iterations": 0}, "0 iterations"),
        ({"cipher_name": b"aes\n0 1 zero"}, "the cipher name is"),
    ],
)
def test_damaged_fields(change: dict[str, object], said: str) -> None:
    image = made(1)
    header = replace(Header.unpack(image.bytes), **change)  # type: ignore[arg-type]
    image.bytes[: Header.layout.size] = header.pack()
    with pytest.raises(NbdmapError, match=said):
        volume.read(image)


@pytest.mark.parametrize(
    ("slot", "change", "said"),
    [
        (3, {"active": 7}, "key slot 3 is neither enabled nor disabled, but 0x00000007"),
        (0, {"iterations": 0}, "0 iterations"),
        (2, {"stripes": 0}, "key slot 2 has 0 stripes"),
        (2, {"stripes": 1 << 31}, "key slot 2 has"),
        (1, {"start_sectors": 9}, "key slots 0 and 1 overlap"),
        (7, {"start_sectors": 1 << 31}, "not where it should be"),
        (0, {"start_sectors": 0}, "not where it should be"),
    ],
)
def test_damaged_slots(slot: int, change: dict[str, int], said: str) -> None:
    image = made(1)
    at = Header.layout.size + slot * SLOT
    image.bytes[at : at + SLOT] = replace(SlotRecord.unpack(image.bytes, at), **change).pack()  # type: ignore[arg-type]
    with pytest.raises(CorruptMetadata, match=said):
        volume.read(image)


def test_a_disk_that_ends_early() -> None:
    image = made(1)
    image.size = 700
    with pytest.raises(IoFailed, match="beyond the end of the disk"):
        volume.read(image)
    image.size = 100000
    with pytest.raises(IoFailed, match="key slot 0 at 4096"):
        opens(image, "secret")


def test_damage_anywhere_is_told_or_harmless() -> None:
    chance = random.Random(6)
    for _ in range(100):
        image = made(1)
        for _ in range(chance.randint(1, 4)):
            image.bytes[chance.randrange(592)] = chance.choice((0, 1, 255, chance.randrange(256)))
        try:
            header = volume.read(image)
            if max([slot.kdf.iterations for slot in header.slots.values()], default=0) <= 1000:  # type: ignore[union-attr]
                header.unlock(passphrase("wrong"))
        except NbdmapError:
            pass


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (Wanted1("aes-xts-plain64", 64, "sha256", "u", 1000, 4096), "the data cannot begin at byte 4096"),
        (Wanted1("aes-xts-plain64", 64, "sha256", "u", 1000, 2097153), "the data cannot begin"),
        (Wanted1("aes-" + "x" * 32, 64, "sha256", "u", 1000), "the cipher mode"),
        (Wanted1("aes", 64, "sha256", "u", 1000), "the cipher mode ''"),
    ],
)
def test_what_cannot_be_made(wanted: Wanted1, said: str) -> None:
    image = MemoryImage()
    with pytest.raises(InvalidArgument, match=said):
        luks1.create(image, wanted, bytearray(KEY))
    assert not image.log


def test_constants() -> None:
    """Of the specification."""
    assert (Header.layout.size, SLOT, ENABLED, DISABLED) == (208, 48, 0x00AC71F3, 0x0000DEAD)

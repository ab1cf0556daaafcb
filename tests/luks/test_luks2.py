"""LUKS2: both copies, their order, keys added and removed, tokens kept, and the power failing at every write."""

import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest

from nbdmap.errors import (
    Busy,
    CorruptMetadata,
    InvalidArgument,
    NbdmapError,
    NoKey,
    NotFound,
    PassphraseRefused,
    Unsupported,
)
from nbdmap.luks import af, luks2, volume
from nbdmap.luks.kdf import Kdf, Pbkdf2
from nbdmap.luks.keyslot import Segment
from nbdmap.luks.luks2 import AreaChoice, Header, Luks2, Wanted2
from nbdmap.luks.metadata import Metadata, Node
from tests.support.luks import CHEAP, KDFS, KEY, MemoryImage, Torn, made, new_luks2, opens, passphrase

SIZE = 16384
WANTED = Wanted2("aes-xts-plain64", 512, "sha256", "u", "", "", 1000)


def read(image: MemoryImage) -> Luks2:
    header = volume.read(image)
    assert isinstance(header, Luks2)
    return header


def changed(image: MemoryImage, change: dict[str, Any]) -> None:
    """Writes both copies with some of the JSON replaced."""
    header = read(image)
    plain = header.metadata.root.plain | change
    header.metadata = Metadata(Node(plain, "test"), header.metadata.headers)
    header.write()


@pytest.mark.parametrize("kdf", KDFS.values(), ids=KDFS)
@pytest.mark.parametrize("sector_size", [512, 4096])
def test_made_and_read(kdf: Kdf, sector_size: int) -> None:
    image = new_luks2(kdf=kdf, sector_size=sector_size).image
    assert isinstance(image, MemoryImage)
    header = read(image)
    assert header.segment() == Segment("aes-xts-plain64", 2 << 20, None, 0, sector_size, ())
    assert (header.problems, header.label, header.subsystem) == ([], "a label", "")
    assert header.metadata.slots[0].kdf == kdf
    assert opens(image, "secret") == 0
    assert header.key_description() == "cryptsetup:6c7083e7-8854-4234-bea6-09164338c040-d0"
    with pytest.raises(PassphraseRefused):
        opens(image, "other")


def test_an_area_of_its_own_cipher() -> None:
    image = made(2)
    header = read(image)
    choice = AreaChoice("sha512", "aes-cbc-plain64", 32)
    assert header.add_key(bytearray(KEY), passphrase("two"), CHEAP, area=choice) == 1
    slot = read(image).metadata.slots[1]
    assert (slot.af_hash, slot.encryption, slot.area_key_size) == ("sha512", "aes-cbc-plain64", 32)
    assert opens(image, "two") == 1


def test_keys_are_added_and_removed_in_gaps() -> None:
    image = made(2)
    for number in (1, 2, 3):
        assert read(image).add_key(bytearray(KEY), passphrase(str(number)), CHEAP) == number
    with pytest.raises(Busy, match="no room for another key slot of 258048 bytes"):
        read(image).add_key(bytearray(KEY), passphrase("x"), CHEAP)
    place = read(image).metadata.area(1)
    read(image).remove_key(1)
    with pytest.raises(PassphraseRefused):
        opens(image, "1")
    assert read(image).add_key(bytearray(KEY), passphrase("30"), CHEAP, 30) == 30
    assert read(image).metadata.area(30) == place
    assert [opens(image, text) for text in ("secret", "2", "3", "30")] == [0, 2, 3, 30]
    for slot, kind in ((2, Busy), (32, InvalidArgument), (-1, InvalidArgument)):
        with pytest.raises(kind):
            read(image).add_key(bytearray(KEY), passphrase("x"), CHEAP, slot)
    with pytest.raises(NotFound):
        read(image).remove_key(7)


def test_priorities() -> None:
    image = made(2)
    read(image).add_key(bytearray(KEY), passphrase("secret"), CHEAP)
    read(image).add_key(bytearray(KEY), passphrase("hidden"), CHEAP)
    keyslots = read(image).metadata.root.plain["keyslots"]
    keyslots["1"]["priority"] = 2
    keyslots["2"]["priority"] = 0
    changed(image, {"keyslots": keyslots})
    assert opens(image, "secret") == 1, "the preferred one first"
    with pytest.raises(PassphraseRefused):
        opens(image, "hidden")
    assert opens(image, "hidden", 2) == 2


def test_a_wrong_passphrase_costs_one_derivation_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one of the digest, for each that is tried; a right one stops there."""
    image = made(2)
    read(image).add_key(bytearray(KEY), passphrase("two"), CHEAP)
    derived: list[int] = []
    derive = Pbkdf2.derive

    def counted(kdf: Pbkdf2, passphrase: bytearray, length: int) -> bytearray:
        derived.append(length)
        return derive(kdf, passphrase, length)

    monkeypatch.setattr(Pbkdf2, "derive", counted)
    for text, slot, wanted in (("wrong", None, 2), ("wrong", 1, 1), ("two", None, 2), ("secret", None, 1)):
        derived.clear()
        with contextlib.suppress(PassphraseRefused):
            opens(image, text, slot)
        assert derived == [64, 32] * wanted


def test_secrets_are_wiped_wherever_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Area keys and key material, and the volume keys that are none."""
    image = made(2)
    read(image).add_key(bytearray(KEY), passphrase("two"), CHEAP)
    derived: list[bytearray] = []
    merged: list[bytearray] = []
    derive, merge = Pbkdf2.derive, af.merge

    def derives(kdf: Pbkdf2, passphrase: bytearray, length: int) -> bytearray:
        derived.append(derive(kdf, passphrase, length))
        return derived[-1]

    def merges(material: bytearray, stripes: int, hash_name: str) -> bytearray:
        merged.extend((material, merge(material, stripes, hash_name)))
        return merged[-1]

    monkeypatch.setattr(Pbkdf2, "derive", derives)
    monkeypatch.setattr(af, "merge", merges)
    with pytest.raises(PassphraseRefused):
        opens(image, "wrong")
    area_keys = [key for key in derived if len(key) == 64]
    assert len(area_keys) == 2
    assert not any(map(any, [*area_keys, *merged]))
    unlocked = read(image).unlock(passphrase("two"))
    assert unlocked.key == KEY
    assert merged[-1] is unlocked.key, "whoever asked has it"
    assert not any(map(any, merged[:-1]))


def test_no_key() -> None:
    image = made(2)
    read(image).remove_key(0)
    with pytest.raises(NoKey):
        opens(image, "secret")
    header = read(image)
    assert header.is_key(bytearray(KEY))
    header.add_key(bytearray(KEY), passphrase("back"), CHEAP)
    assert opens(image, "back") == 0


def test_tokens_and_what_is_unknown_are_kept() -> None:
    image = made(2)
    tokens = {
        "0": {"type": "luks2-keyring", "keyslots": ["0"], "key_description": "d"},
        "3": {"type": "mine", "keyslots": ["0"], "x": [1]},
    }
    other = {"type": "of the future", "area": {"offset": str(2 * SIZE + 3 * 258048), "size": "4096"}, "more": {"y": 2}}
    keyslots = read(image).metadata.root.plain["keyslots"] | {"5": other}
    changed(image, {"tokens": tokens, "keyslots": keyslots, "new": {"z": "é"}})
    header = read(image)
    assert header.metadata.unusable == {5: "the type 'of the future' is unknown"}
    header.add_key(bytearray(KEY), passphrase("two"), CHEAP)
    read(image).remove_key(0)
    plain = read(image).metadata.root.plain
    assert plain["tokens"]["3"] == {"type": "mine", "keyslots": [], "x": [1]}
    assert plain["keyslots"]["5"] == other
    assert plain["new"] == {"z": "é"}
    assert opens(image, "two") == 1


def test_a_hash_that_is_not_available_spoils_one_slot_only() -> None:
    image = made(2)
    read(image).add_key(bytearray(KEY), passphrase("two"), CHEAP)
    keyslots = read(image).metadata.root.plain["keyslots"]
    keyslots["0"]["kdf"]["hash"] = "tiger"
    changed(image, {"keyslots": keyslots})
    assert opens(image, "two") == 1
    with pytest.raises(InvalidArgument, match="key slot 0: the hash 'tiger'"):
        opens(image, "secret", 0)
    read(image).remove_key(0)
    assert sorted(read(image).metadata.keyslots) == [1]


def test_an_unbound_slot_is_not_tried() -> None:
    image = made(2)
    digests = read(image).metadata.root.plain["digests"]
    digests["1"] = digests["0"] | {"segments": []}
    digests["0"] = digests["0"] | {"keyslots": []}
    changed(image, {"digests": digests})
    with pytest.raises(NoKey):
        opens(image, "secret")


# --- two copies ------------------------------------------------------------------------------------------------------------


def test_either_copy_is_enough() -> None:
    for spoiled in (0, SIZE):
        image = made(2)
        image.bytes[spoiled + 5000] ^= 1
        assert [text.partition(": ")[2] for text in read(image).problems] == [f"LUKS2 header at {spoiled}: the checksum is wrong"]
        assert opens(image, "secret") == 0
        read(image).add_key(bytearray(KEY), passphrase("two"), CHEAP)
        assert read(image).problems == [], "both are good again"
        assert opens(image, "two") == 1


def test_the_higher_seqid_counts() -> None:
    image = made(2)
    old = bytes(image.bytes[:SIZE])
    read(image).add_key(bytearray(KEY), passphrase("two"), CHEAP)
    image.bytes[:SIZE] = old
    assert opens(image, "two") == 1
    assert [text.partition(": ")[2] for text in read(image).problems] == ["LUKS2 header at 0: older than the other"]
    new = made(2)
    old = bytes(new.bytes[SIZE : 2 * SIZE])
    read(new).add_key(bytearray(KEY), passphrase("two"), CHEAP)
    new.bytes[SIZE : 2 * SIZE] = old
    assert opens(new, "two") == 1
    assert [text.partition(": ")[2] for text in read(new).problems] == ["LUKS2 header at 16384: older than the other"]


def test_no_copy_is_enough() -> None:
    image = made(2)
    image.bytes[120] ^= 1
    image.bytes[SIZE + 5000] ^= 1
    with pytest.raises(CorruptMetadata, match="at 0: the checksum is wrong; disk: LUKS2 header at 16384: the checksum is wrong"):
        volume.read(image)


@pytest.mark.parametrize("lost", [None, 0, SIZE])
@pytest.mark.parametrize("torn_at", [0, 512, 4096, 8192])
def test_the_power_fails(lost: int | None, torn_at: int) -> None:
    """Whenever it does, and whichever copy was damaged before, the old passphrase opens the disk; so does one that is added."""
    for writes in range(4):
        image = made(2)
        if lost is not None:
            image.bytes[lost + 5000] ^= 1
        header = read(image)
        image.writes_left, image.torn_at = writes, torn_at
        done = False
        try:
            header.add_key(bytearray(KEY), passphrase("new"), CHEAP)
            done = True
        except Torn:
            pass
        assert done == (writes == 3), "an area and two headers"
        image.writes_left = None
        assert opens(image, "secret") == 0
        if done:
            assert opens(image, "new") == 1


def test_the_order_of_writes() -> None:
    image = made(2)
    image.log.clear()
    read(image).add_key(bytearray(KEY), passphrase("two"), CHEAP)
    area = 2 * SIZE + 258048
    assert [(kind, at) for kind, at, _ in image.log if kind == "write"] == [("write", area), ("write", SIZE), ("write", 0)]
    assert [kind for kind, _, _ in image.log] == ["write", "flush"] * 3
    image.log.clear()
    image.bytes[0] = 0
    read(image).remove_key(1)
    assert [at for kind, at, _ in image.log if kind == "write"] == [area, 0, SIZE], "first the one that is lost"


# --- damage ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": 16385}, "its size, 16385"),
        ({"size": 32768}, "the checksum is wrong"),
        ({"offset": 4096}, "or place, 4096, is wrong"),
        ({"checksum_name": b"md5"}, "the checksum 'md5' is unknown"),
        ({"version": 3}, "there is none"),
        ({"size": 4 << 20}, "the disk ends before it"),
    ],
)
def test_damaged_binary_headers(change: dict[str, object], said: str) -> None:
    image = made(2)
    image.bytes[SIZE : SIZE + 6] = bytes(6)
    header = replace(Header.unpack(image.bytes), **change)  # type: ignore[arg-type]
    image.bytes[:4096] = header.pack()
    with pytest.raises(NbdmapError, match=said):
        luks2.Luks2.read(image)


@pytest.mark.parametrize("field", ["uuid", "label", "subsystem"])
def test_texts_without_an_end(field: str) -> None:
    header = read(made(2))
    header.header = replace(header.header, **{field: b"x" * 48})  # type: ignore[arg-type]
    header.write()
    with pytest.raises(CorruptMetadata, match=f"the {field} has no end"):
        volume.read(header.image)


def test_requirements() -> None:
    for name, said in (("online-reencrypt-v2", "a reencryption is in progress"), ("inline-hw-tags", "requires 'inline-hw-tags'")):
        image = made(2)
        config = read(image).metadata.root.plain["config"] | {"requirements": {"mandatory": [name]}}
        changed(image, {"config": config})
        header = read(image)  # it can be shown
        for attempt in (header.segment, lambda h=header: h.unlock(passphrase("secret")), lambda h=header: h.remove_key(0),
                        lambda h=header: h.add_key(bytearray(KEY), passphrase("x"), CHEAP)):  # fmt: skip
            with pytest.raises(Unsupported, match=said):
                attempt()


def test_flags_become_options() -> None:
    image = made(2)
    config = read(image).metadata.root.plain["config"] | {"flags": ["no-read-workqueue", "allow-discards", "unknown"]}
    changed(image, {"config": config})
    assert read(image).segment().options == ("allow_discards", "no_read_workqueue")


def test_a_full_json_area() -> None:
    image = made(2)
    changed(image, {"more": "x" * (12288 - 1 - len(json.dumps(read(image).metadata.root.plain, separators=(",", ":"))) - 10)})
    image.log.clear()
    with pytest.raises(Busy, match="the JSON area is full"):
        read(image).add_key(bytearray(KEY), passphrase("x"), CHEAP)
    assert not image.log


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (replace(WANTED, header_size=5000), "a header of 5000 bytes"),
        (replace(WANTED, data_offset=4096), "not 0 to"),
        (replace(WANTED, keyslots_size=100), "100 bytes for key slots"),
        (replace(WANTED, data_offset=(16 << 20) + 100), "cannot begin"),
        (replace(WANTED, keyslots_size=1 << 20, data_offset=65536), "the key slots end at"),
        (replace(WANTED, label="x" * 48), "the label"),
        (replace(WANTED, subsystem="a\0b"), "the subsystem"),
        (replace(WANTED, keyslots_size=129 << 20), "bytes for key slots"),
    ],
)
def test_what_cannot_be_made(wanted: Wanted2, said: str) -> None:
    image = MemoryImage()
    with pytest.raises(InvalidArgument, match=said):
        luks2.create(image, wanted, bytearray(KEY))
    assert not image.log


def test_detached() -> None:
    image = MemoryImage()
    header = new_luks2(image, detached=True)
    assert header.segment().offset == 0
    assert opens(image, "secret") == 0

"""The JSON of LUKS2: every rule it must keep, told with its place."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from nbdmap.errors import CorruptMetadata, InvalidArgument, NbdmapError, Unsupported
from nbdmap.luks.metadata import Metadata, Node, kdf_json, parse, read_kdf
from tests.support.luks import KDFS, new_luks2

HEADERS = 32768
GOOD: dict[str, Any] = json.loads(json.dumps(new_luks2().metadata.root.plain))
Change = Callable[[dict[str, Any]], object]


def checked(plain: object) -> Metadata:
    return Metadata(Node(plain, "x"), HEADERS)


def with_change(change: Change) -> dict[str, Any]:
    plain = copy.deepcopy(GOOD)
    change(plain)
    return plain


def put(path: str, value: object) -> Change:
    def change(plain: dict[str, Any]) -> None:
        *way, last = path.split(".")
        for step in way:
            plain = plain[step]
        plain[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("keyslots", [], "x.keyslots should be an object"),
        ("keyslots", {"a": {}}, "x.keyslots should be an object with at most 32"),
        ("keyslots", {"01": {}}, "x.keyslots should be"),
        ("segments", 3, "x.segments should be"),
        ("digests", None, "x.digests"),
        ("tokens", {"0": {}}, "x.tokens.0.type should be text"),
        ("tokens", {"0": {"type": "t", "keyslots": ["9"]}}, "'9' is none"),
        ("keyslots.0.type", 1, "x.keyslots.0.type should be text"),
        ("keyslots.0.key_size", "64", "key_size should be a number"),
        ("keyslots.0.key_size", True, "key_size should be"),
        ("keyslots.0.key_size", 513, "in the range 1 to 512"),
        ("keyslots.0.priority", 3, "priority should be a number in the range 0 to 2"),
        ("keyslots.0.af.type", "af2", "should be luks1"),
        ("keyslots.0.af.stripes", 0, "stripes"),
        ("keyslots.0.area.type", "file", "should be raw"),
        ("keyslots.0.area.offset", 32768, "should be text"),
        ("keyslots.0.area.offset", "32760", "between 32768"),
        ("keyslots.0.area.size", "0", "and not empty"),
        ("keyslots.0.area.size", "9999999999", "between 32768"),
        ("keyslots.0.area.size", "4096", "at least 256000"),
        ("keyslots.0.area.size", "1" * 30, "a decimal number up to"),
        ("keyslots.0.area.encryption", "aes xts", "a cipher specification"),
        ("keyslots.0.kdf.salt", "%%", "x.keyslots.0.kdf.salt should be base64"),
        ("keyslots.0.kdf.salt", "", "1 to 1024 bytes"),
        ("keyslots.0.kdf.salt", "é", "base64"),
        ("keyslots.0.kdf.iterations", 0, "iterations"),
        ("keyslots.0.kdf.type", "scrypt", "time should be"),
        (
            "keyslots.0.kdf",
            {"type": "scrypt", "salt": "AAAA", "time": 1, "memory": 9, "cpus": 1},
            "x.keyslots.0.kdf: 'scrypt' is no kind",
        ),
        ("segments.0.type", 1, "type should be text"),
        ("segments.0.offset", "x", "a decimal number"),
        ("segments.0.flags", "y", "a list of text"),
        ("digests.0.segments", ["4"], "a list of segments that there are, '4' is none"),
        ("digests.0.keyslots", [0], "a list of text"),
        ("config.json_size", "4096", "x.config.json_size should be 12288"),
        ("config.keyslots_size", "5", "a multiple of 4096"),
        ("config.flags", {}, "a list of text"),
        ("config.requirements", [], "x.config.requirements should be an object"),
        ("config", {}, "json_size"),
    ],
)
def test_damage_is_told(path: str, value: object, said: str) -> None:
    with pytest.raises(CorruptMetadata) as caught:
        checked(with_change(put(path, value)))
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("path", "value", "said", "kind"),
    [
        ("segments.0.type", "linear", "the type 'linear' is not understood", Unsupported),
        ("segments.0.integrity", {}, "integrity tags", Unsupported),
        ("segments.0.sector_size", 1536, "512, 1024, 2048 or 4096", CorruptMetadata),
        ("segments.0.sector_size", 8192, "sector_size", CorruptMetadata),
        ("segments.0.offset", "1000", "whole sectors", CorruptMetadata),
        ("segments.0.size", "0", "a multiple of sector_size", CorruptMetadata),
        ("segments.0.size", "700", "a multiple of sector_size", CorruptMetadata),
        ("segments.0.iv_tweak", 0, "iv_tweak should be text", CorruptMetadata),
        ("segments.0.encryption", "a\nb", "a cipher specification", CorruptMetadata),
        ("segments", {}, "0 data segments", Unsupported),
        ("segments.0.flags", ["backup-final"], "0 data segments", Unsupported),
        ("segments.1", {"type": "crypt", "offset": "0"}, "2 data segments", Unsupported),
    ],
)
def test_segments_that_cannot_be_opened(path: str, value: object, said: str, kind: type[NbdmapError]) -> None:
    plain = with_change(put(path, value))
    plain["digests"]["0"]["segments"] = [name for name in plain["digests"]["0"]["segments"] if name in plain["segments"]]
    content = checked(plain)
    with pytest.raises(kind, match=said):
        content.segment()


def test_a_segment_of_a_size_with_an_iv_offset() -> None:
    plain = with_change(put("segments.0.size", "8192"))
    plain["segments"]["0"]["iv_tweak"] = str((1 << 64) - 1)
    number, segment = checked(plain).segment()
    assert (number, segment.size, segment.iv_offset_sectors) == (0, 8192, (1 << 64) - 1)
    with pytest.raises(CorruptMetadata, match="iv_tweak"):
        checked(with_change(put("segments.0.iv_tweak", str(1 << 64)))).segment()


@pytest.mark.parametrize(
    ("path", "value", "said", "kind"),
    [
        ("digests.0.segments", [], "no digest belongs to segment 0", CorruptMetadata),
        ("digests.0.type", "sha", "is unknown here", Unsupported),
        ("digests.0.hash", "md4", "the hash 'md4' is not available", InvalidArgument),
        ("digests.0.digest", "!", "base64", CorruptMetadata),
    ],
)
def test_digests_that_cannot_be_used(path: str, value: object, said: str, kind: type[NbdmapError]) -> None:
    content = checked(with_change(put(path, value)))
    with pytest.raises(kind, match=said):
        content.digest_of_segment(0)


def test_overlapping_areas() -> None:
    plain = copy.deepcopy(GOOD)
    plain["keyslots"]["4"] = copy.deepcopy(plain["keyslots"]["0"])
    plain["keyslots"]["4"]["area"]["offset"] = str(HEADERS + 4096)
    with pytest.raises(CorruptMetadata, match=r"x.keyslots.0.area should be apart from that of key slot 4"):
        checked(plain)


def test_reencryption() -> None:
    plain = copy.deepcopy(GOOD)
    plain["keyslots"]["1"] = {"type": "reencrypt", "area": {"offset": str(HEADERS + 258048), "size": "4096"}}
    with pytest.raises(Unsupported, match="key slot 1: a reencryption is in progress"):
        checked(plain).check_requirements()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b" {}\0",
        b"{}\0x",
        b"[]\0",
        b"{} \0",
        b"{\0",
        b'{"a":NaN}\0',
        b'{"a":' * 100000 + b"1" + b"}" * 100000 + b"\0",
        b"{\xff}\0",
        b'{"a":' + b"9" * 5000 + b"}\0",
        b"{'a':1}\0",
    ],
)
def test_what_is_no_json_area(text: bytes) -> None:
    with pytest.raises(CorruptMetadata, match="x: the JSON area is not"):
        parse(text, "x")


def test_json_areas() -> None:
    assert parse(b'{"a":1}\0\0\0', "x").plain == {"a": 1}
    assert parse(b'{"a":"\\u00e9"}' + b"\0", "x").plain == {"a": "é"}


@pytest.mark.parametrize("kind", KDFS)
def test_kdfs_are_written_as_they_are_read(kind: str) -> None:
    assert read_kdf(Node(kdf_json(KDFS[kind]), "x")) == KDFS[kind]


def test_anything_is_refused_in_good_order() -> None:
    """Values replaced at random by others: what is wrong is an error of ours, wherever it stands."""
    chance = random.Random(8)
    others: list[Any] = [
        None,
        True,
        0,
        -1,
        1 << 70,
        1.5,
        "",
        "0",
        "4096",
        "x",
        [],
        ["0"],
        [None],
        {},
        {"0": {}},
        {"0": None},
        "dynamic",
        "AAAA",
    ]
    for _ in range(3000):
        plain: Any = copy.deepcopy(GOOD)
        for _ in range(chance.randint(1, 3)):
            place: Any = plain
            while True:
                keys = list(place) if isinstance(place, dict) else list(range(len(place)))
                if not keys:
                    break
                key = chance.choice(keys)
                if isinstance(place[key], dict | list) and chance.random() < 0.8:
                    place = place[key]
                    continue
                place[key] = copy.deepcopy(chance.choice(others))
                break
        try:
            content = checked(plain)
            content.check_requirements()
            content.digest_of_segment(content.segment()[0])
        except NbdmapError:
            pass

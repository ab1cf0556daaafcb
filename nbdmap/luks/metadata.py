"""The JSON of a LUKS2 header: checked as a whole when it is read, then changed in place, so that what is not known here
(tokens, other kinds of key slots, keys of newer versions) is kept as it was.

    {"keyslots": {"0": {"type": "luks2", "area": {...}, "kdf": {...}, ...}}, "tokens": {}, "segments": {...}, "digests": {...},
     "config": {"json_size": "12288", "keyslots_size": "16744448"}}

Specification: LUKS2 On-Disk Format 1.0.0. Numbers of 64 bits are strings, binary is base64. Every complaint names the place.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

from nbdmap.errors import CorruptMetadata, InvalidArgument, Unsupported
from nbdmap.luks.kdf import MAX_SALT, U32, Argon2, Kdf, Pbkdf2, check_hash
from nbdmap.luks.keyslot import IGNORED, MAX_KEY, NORMAL, PREFERRED, STRIPES, Digest, KeySlot, Segment
from nbdmap.luks.luks1 import CIPHER_WORD
from nbdmap.units import MAX_SIZE, SECTOR

MAX_SLOTS: Final = 32
"""Of key slots, digests, segments and tokens each, as cryptsetup's."""
MAX_DIGEST: Final = 64
OPTIONS: Final[Mapping[str, str]] = {
    "allow-discards": "allow_discards", "same-cpu-crypt": "same_cpu_crypt", "submit-from-crypt-cpus": "submit_from_crypt_cpus",
    "no-read-workqueue": "no_read_workqueue", "no-write-workqueue": "no_write_workqueue", "high-priority": "high_priority",
}  # fmt: skip
"""Flags of the configuration, and the options of the crypt target that they stand for."""

_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,19}")


class Node:
    """An object of the JSON, with the name of its place."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise CorruptMetadata(f"{where} should be an object")
        self.plain: dict[str, Any] = value
        self.where = where

    def wrong(self, key: str, should: str) -> CorruptMetadata:
        """What to raise about the value of `key`."""
        return CorruptMetadata(f"{self.where}.{key} should be {should}")

    def node(self, key: str) -> "Node":
        """The object under `key`."""
        return Node(self.plain.get(key), f"{self.where}.{key}")

    def numbered(self, key: str) -> dict[int, "Node"]:
        """The objects under the numbers of the object under `key`."""
        outer = self.node(key)
        if len(outer.plain) > MAX_SLOTS or not all(_NUMBER.fullmatch(name) for name in outer.plain):
            raise self.wrong(key, f"an object with at most {MAX_SLOTS} numbered objects")
        return {int(name): outer.node(name) for name in sorted(outer.plain, key=int)}

    def text(self, key: str) -> str:
        """A string."""
        value = self.plain.get(key)
        if not isinstance(value, str):
            raise self.wrong(key, "text")
        return value

    def number(self, key: str, low: int, high: int) -> int:
        """A number of JSON."""
        value = self.plain.get(key)
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(key, f"a number in the range {low} to {high}")
        return value

    def long(self, key: str, high: int = MAX_SIZE) -> int:
        """A number that is a string."""
        value = self.text(key)
        if _NUMBER.fullmatch(value) is None or int(value) > high:
            raise self.wrong(key, f"a decimal number up to {high}, in quotes")
        return int(value)

    def binary(self, key: str, most: int) -> bytes:
        """Bytes in base64."""
        try:
            value = base64.b64decode(self.text(key), validate=True)
        except (binascii.Error, ValueError):
            raise self.wrong(key, "base64") from None
        if not 1 <= len(value) <= most:
            raise self.wrong(key, f"1 to {most} bytes in base64")
        return value

    def names(self, key: str) -> list[str]:
        """A list of strings; an absent one is empty."""
        value = self.plain.get(key, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.wrong(key, "a list of text")
        return value


def parse(text: bytes, where: str) -> Node:
    """The JSON in `text`, which NULs fill up. Raises CorruptMetadata for anything else."""
    body, end, rest = text.partition(b"\0")
    if not end or rest.strip(b"\0") or body[:1] != b"{" or body[-1:] != b"}":
        raise CorruptMetadata(f"{where}: the JSON area is not one object and zeroes behind it")
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise CorruptMetadata(f"{where}: the JSON area is not JSON") from None
    return Node(value, where)


def _no_constant(name: str) -> None:
    raise ValueError(name)


class Metadata:
    """The checked content. `headers` is the size of both copies: where the key slots' areas begin."""

    def __init__(self, root: Node, headers: int) -> None:
        self.root = root
        self.headers = headers
        config = root.node("config")
        if config.long("json_size") != headers // 2 - 4096:
            raise config.wrong("json_size", f"{headers // 2 - 4096}, as the binary header has it")
        self.keyslots_size = config.long("keyslots_size")
        if self.keyslots_size % 4096:
            raise config.wrong("keyslots_size", "a multiple of 4096")
        self.requirements = config.node("requirements").names("mandatory") if "requirements" in config.plain else []
        self.flags = config.names("flags")
        self.keyslots = root.numbered("keyslots")
        self.segments = root.numbered("segments")
        self.digests = root.numbered("digests")
        self.tokens = root.numbered("tokens")
        self._check_areas()
        self._check_references()
        self.unusable: dict[int, str] = {}
        """Key slots that can be kept but not opened here, and why."""
        self.slots = self._slots()

    # --- checks --------------------------------------------------------------------------------------------------------

    def area(self, number: int) -> tuple[int, int]:
        """Where the area of a key slot begins and ends."""
        node = self.keyslots[number].node("area")
        start = node.long("offset")
        return start, start + node.long("size")

    def _check_areas(self) -> None:
        end_of_all = self.headers + self.keyslots_size
        areas = sorted((*self.area(number), number) for number in self.keyslots)
        for start, end, number in areas:
            if start < self.headers or end > end_of_all or start == end:
                raise self.keyslots[number].wrong("area", f"between {self.headers} and {end_of_all}, and not empty")
        for (_, end, number), (start, _, other) in pairwise(areas):
            if start < end:
                raise self.keyslots[number].wrong("area", f"apart from that of key slot {other}")

    def _check_references(self) -> None:
        for token in self.tokens.values():
            token.text("type")
            self._refer(token, "keyslots", self.keyslots)
        for digest in self.digests.values():
            digest.text("type")
            self._refer(digest, "keyslots", self.keyslots)
            self._refer(digest, "segments", self.segments)
        for segment in self.segments.values():
            segment.text("type")
            segment.long("offset")
            segment.names("flags")

    @staticmethod
    def _refer(node: Node, key: str, there: Mapping[int, Node]) -> None:
        for name in node.names(key):
            if _NUMBER.fullmatch(name) is None or int(name) not in there:
                raise node.wrong(key, f"a list of {key} that there are, {name!r} is none")

    def check_requirements(self) -> None:
        """Raises Unsupported when the header asks for what is not known here, a reencryption that has not ended for one."""
        for name in self.requirements:
            if "reencrypt" in name:
                raise Unsupported(
                    f"{self.root.where}: a reencryption is in progress ({name}); end it with `cryptsetup reencrypt` first"
                )
            raise Unsupported(f"{self.root.where}: the header requires {name!r}, which is unknown here")
        for number, node in self.keyslots.items():
            if node.text("type") == "reencrypt":
                raise Unsupported(f"{self.root.where}: key slot {number}: a reencryption is in progress")

    # --- what it says --------------------------------------------------------------------------------------------------

    def _slots(self) -> dict[int, KeySlot]:
        """Those that can be opened."""
        found = {}
        for number, node in self.keyslots.items():
            kind = node.text("type")
            if kind != "luks2":
                self.unusable[number] = f"the type {kind!r} is unknown"
                continue
            try:
                found[number] = self._slot(number, node)
            except InvalidArgument as error:  # a hash that is not available
                self.unusable[number] = error.message
        return found

    def _slot(self, number: int, node: Node) -> KeySlot:
        splitter, area = node.node("af"), node.node("area")
        if splitter.text("type") != "luks1":
            raise splitter.wrong("type", "luks1")
        if area.text("type") != "raw":
            raise area.wrong("type", "raw")
        slot = KeySlot(
            number, read_kdf(node.node("kdf")), node.number("key_size", 1, MAX_KEY),
            splitter.number("stripes", 1, 2 * STRIPES), check_hash(splitter.text("hash")), cipher(area, "encryption"),
            area.number("key_size", 1, MAX_KEY), area.long("offset"),
            node.number("priority", IGNORED, PREFERRED) if "priority" in node.plain else NORMAL,
        )  # fmt: skip
        if slot.material_size > area.long("size"):
            raise area.wrong("size", f"at least {slot.material_size}")
        return slot

    def segment(self) -> tuple[int, Segment]:
        """The one segment of data, and its number. Raises Unsupported for what only a kernel can do."""
        real = {number: node for number, node in self.segments.items()
                if not any(flag.startswith("backup-") for flag in node.names("flags"))}  # fmt: skip
        if len(real) != 1:
            raise Unsupported(f"{self.root.where}: {len(real)} data segments; one is understood here")
        number, node = next(iter(real.items()))
        if node.text("type") != "crypt":
            raise Unsupported(f"{node.where}: the type {node.text('type')!r} is not understood here, only crypt")
        if "integrity" in node.plain:
            raise Unsupported(f"{node.where}: its sectors have integrity tags, which need the kernel's dm-integrity")
        sector_size = node.number("sector_size", 512, 4096)
        size = None if node.text("size") == "dynamic" else node.long("size")
        if sector_size & (sector_size - 1):
            raise node.wrong("sector_size", "512, 1024, 2048 or 4096")
        if node.long("offset") % SECTOR:
            raise node.wrong("offset", "whole sectors")
        if size is not None and (size == 0 or size % sector_size):
            raise node.wrong("size", "a multiple of sector_size, or dynamic")
        options = tuple(OPTIONS[flag] for flag in OPTIONS if flag in self.flags)
        iv_offset = node.long("iv_tweak", (1 << 64) - 1)
        return number, Segment(cipher(node, "encryption"), node.long("offset"), size, iv_offset, sector_size, options)

    def digest_of_segment(self, number: int) -> tuple[int, Digest, list[int]]:
        """The digest of the volume key of a segment: its number, itself, and the key slots that have this key."""
        for digest_number, node in self.digests.items():
            if str(number) in node.names("segments"):
                if node.text("type") != "pbkdf2":
                    raise Unsupported(f"{node.where}: a digest of the type {node.text('type')!r} is unknown here")
                kdf = Pbkdf2(check_hash(node.text("hash")), node.number("iterations", 1, U32), node.binary("salt", MAX_SALT))
                slots = [int(name) for name in node.names("keyslots")]
                return digest_number, Digest(kdf, node.binary("digest", MAX_DIGEST)), slots
        raise CorruptMetadata(f"{self.root.where}: no digest belongs to segment {number}")


def cipher(node: Node, key: str) -> str:
    """A cipher specification: it is to stand in a table."""
    text = node.text(key)
    if CIPHER_WORD.fullmatch(text) is None:
        raise node.wrong(key, "a cipher specification")
    return text


def read_kdf(node: Node) -> Kdf:
    """A key slot's `kdf`."""
    kind, salt = node.text("type"), node.binary("salt", MAX_SALT)
    try:
        if kind == "pbkdf2":
            return Pbkdf2(check_hash(node.text("hash")), node.number("iterations", 1, U32), salt)
        return Argon2(kind, node.number("time", 1, U32), node.number("memory", 1, U32), node.number("cpus", 1, U32), salt)
    except CorruptMetadata as error:
        raise error if error.message.startswith(node.where) else CorruptMetadata(f"{node.where}: {error.message}") from None


def kdf_json(kdf: Kdf) -> dict[str, object]:
    """`kdf` as it stands in a key slot."""
    salt = base64.b64encode(kdf.salt).decode()
    if isinstance(kdf, Pbkdf2):
        return {"type": "pbkdf2", "hash": kdf.hash, "iterations": kdf.iterations, "salt": salt}
    return {"type": kdf.kind, "time": kdf.time, "memory": kdf.memory_kib, "cpus": kdf.lanes, "salt": salt}

"""Targets that read LUKS headers, as they come from a disk that somebody else has written.

What is read is shown, written again, and tried with a passphrase where that is cheap; its table line has as many words as it
should, whatever the header says.
"""

import copy
import hashlib
import re
from collections.abc import Sequence
from typing import Final

from nbdmap.dm.args import split_words
from nbdmap.errors import NbdmapError
from nbdmap.luks import luks1, luks2, volume
from nbdmap.luks.dump import dump
from nbdmap.luks.kdf import Kdf, Pbkdf2
from nbdmap.luks.keyslot import KeySlot
from nbdmap.luks.luks1 import Luks1
from nbdmap.luks.luks2 import Luks2
from tests.fuzz.mutate import Pieces
from tests.support.luks import MemoryImage, made

SIZE: Final = 1 << 16
"""Of the disk: there is no need for areas that can be read."""
CHEAP: Final = 64
"""Iterations and KiB that are tried."""


def _cheap(kdf: Kdf) -> bool:
    return kdf.iterations <= CHEAP if isinstance(kdf, Pbkdf2) else kdf.time * kdf.memory_kib <= CHEAP


def _small(slot: KeySlot) -> bool:
    return _cheap(slot.kdf) and slot.material_size <= 4096


def _use(image: MemoryImage) -> object:
    """Does everything with a header; what happened, in few words."""
    header = volume.read(image)
    outcome = [type(header).__name__, len(dump(header).splitlines()) // 8]
    assert all(line.replace("\t", "").isprintable() for line in dump(header).split("\n"))
    segment = header.segment()
    line = volume.table_line(segment, 4096, "KEY", "a b")
    words = split_words(line)
    assert words[:3] == ["0", "8", "crypt"]
    assert words[4:5] + words[6:7] == ["KEY", "a b"]
    options = len(segment.options) + (segment.sector_size != 512)
    assert words[8:9] == ([str(options)] if options else [])
    assert len(words) == (9 + options if options else 8)
    digest = header.digest if isinstance(header, Luks1) else header.metadata.digest_of_segment(header.metadata.segment()[0])[1]
    if _cheap(digest.kdf) and all(map(_small, header.slots.values())):
        try:
            header.unlock(bytearray(b"x"))
        except NbdmapError as error:
            outcome.append(type(error).__name__)
    header.write()
    again = volume.read(image)
    assert dump(again).splitlines()[3:] == dump(header).splitlines()[3:]
    if isinstance(again, Luks2):
        assert not again.problems
    return (*outcome, segment.encryption[:8], segment.sector_size, len(header.slots), segment.options)


class _Headers:
    def join(self, pieces: Pieces) -> bytes:
        return b"".join(pieces)

    def run(self, data: bytes) -> object:
        image = MemoryImage(SIZE)
        self.place(image, data)
        try:
            return _use(image)
        except NbdmapError as error:
            return re.sub("[0-9]+|'.*?'", "", error.message)[:50]

    def place(self, image: MemoryImage, data: bytes) -> None:
        """Puts the input on the disk."""
        raise NotImplementedError


def _cut(data: bytes, *sizes: int) -> Pieces:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(data[at : at + size])
        at += size
    return pieces


def _luks1_seeds() -> list[Pieces]:
    fields = (6, 2, 32, 32, 32, 4, 4, 20, 32, 4, 40)
    whole = bytes(made(1).bytes[:1024])
    seed = _cut(whole, *fields, *[4, 4, 32, 4, 4] * 8)
    cheap = list(seed)
    cheap[9] = (7).to_bytes(4, "big")
    cheap[12], cheap[15] = (5).to_bytes(4, "big"), (2).to_bytes(4, "big")
    return [seed, cheap]


class Headers1(_Headers):
    """A LUKS1 header: its 592 bytes."""

    name = "luks1"
    seeds: Sequence[Pieces] = _luks1_seeds()
    words: Sequence[bytes] = [
        b"aes".ljust(32, b"\0"), b"cbc-essiv:sha256".ljust(32, b"\0"), b"sha1".ljust(32, b"\0"), b"\0\0\0\x08", b"\0\xac\x71\xf3",
        b"\0\0\xde\xad", b"\0\0\x0f\xa0", luks1.MAGIC, b"\0\1", b"\0\2", b"\xde\xad",
    ]  # fmt: skip

    def place(self, image: MemoryImage, data: bytes) -> None:
        image.bytes[: len(data[:SIZE])] = data[:SIZE]


def _luks2_seeds() -> list[Pieces]:
    image = made(2)
    fields = _cut(bytes(image.bytes[:512]), 6, 2, 8, 8, 48, 32, 64, 40, 48, 8, 184, 64)
    header = volume.read(image)
    assert isinstance(header, Luks2)
    plain = header.metadata.root.plain
    cheap = copy.deepcopy(plain)
    cheap["keyslots"]["0"]["af"]["stripes"] = 2
    cheap["keyslots"]["0"]["kdf"]["iterations"] = cheap["digests"]["0"]["iterations"] = 3
    argon2 = copy.deepcopy(cheap)
    argon2["keyslots"]["0"]["kdf"] = {"type": "argon2id", "time": 1, "memory": 8, "cpus": 1, "salt": "c29tZXNhbHQ="}
    argon2["tokens"] = {"0": {"type": "luks2-keyring", "keyslots": ["0"], "key_description": "x"}}
    argon2["config"]["flags"] = ["allow-discards"]
    texts = [luks2._text(one) for one in (plain, cheap, argon2)]
    return [[b"\1", *fields, *re.findall(rb"[^,{]*[,{]|[^,{]+$", text)] for text in texts]


class Headers2(_Headers):
    """A LUKS2 header: a byte that says whether its checksum is made right, the first 512 bytes of it, and the JSON."""

    name = "luks2"
    seeds: Sequence[Pieces] = _luks2_seeds()
    words: Sequence[bytes] = [
        *(b'"1":{', b'"0":', b'"type":"crypt",', b'"type":"linear",', b'"requirements":{"mandatory":["online-reencrypt"]},'),
        *(b"}", b"},", b"]", b'"priority":2,', b'"integrity":{},', b'"flags":["backup-x"],', b'"offset":"32768",', b"null,"),
        *(b'"size":"dynamic",', b'"keyslots":["0","1"],', b'"hash":"sha1",', b'"memory":4194304,', b'"stripes":1,', b"true,"),
        *(b'"sector_size":4096,', b'"label\x1b[2J",', b"\0", b"\1", b"\2"),
    ]

    def place(self, image: MemoryImage, data: bytes) -> None:
        header, text = data[1:513], data[513:12800]
        image.bytes[: len(header)] = header
        image.bytes[4096 : 4096 + len(text)] = text
        second = 16384
        image.bytes[second : 2 * second] = image.bytes[:second]
        image.bytes[second : second + 6] = luks2.MAGICS[1]
        image.bytes[second + 256 : second + 264] = second.to_bytes(8, "big")
        if data[:1] == b"\1":
            for offset in (0, second):
                place = slice(offset + 448, offset + 512)
                image.bytes[place] = bytes(64)
                checksum = hashlib.sha256(image.bytes[offset : offset + second]).digest()
                image.bytes[place] = checksum.ljust(64, b"\0")

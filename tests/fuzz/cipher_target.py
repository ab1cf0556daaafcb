"""Cipher strings: parsed, given keys of many lengths, and a sector there and back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from nbdmap.ciphers.cipher import SectorCipher
from nbdmap.ciphers.spec import CHAIN_MODES, HASHES, IV_MODES, CipherSpec
from nbdmap.errors import InvalidArgument, NotFound
from tests.fuzz.mutate import Pieces

TABLES: Final = Path(__file__).parent.parent / "vm" / "crypt_tables.txt"
PLAIN: Final = bytes(range(256)) * 16


def _seeds() -> list[Pieces]:
    """The ciphers that are compared with the kernel, with their keys' lengths."""
    lines = [line.split("|") for line in TABLES.read_text().splitlines() if "|" in line and line[0] != "#"]
    return [[*(piece.encode() for piece in name.replace("-", " - ").replace(":", " : ").split()), b" ", size.encode()]
            for name, size, *_ in lines]  # fmt: skip


class Ciphers:
    """`<cipher string> <bytes of the key>`; 512 or 4096 is the sector, by the length of the string."""

    name = "cipher"
    seeds: Sequence[Pieces] = _seeds()
    words: Sequence[bytes] = [
        *(word.encode() for word in (*CHAIN_MODES, *IV_MODES, *HASHES)), b"capi", b":", b"-", b"(", b")", b",", b"xts(aes)",
        b"essiv(cbc(aes),sha256)", b"authenc(hmac(sha256),xts(aes))", b"xchacha12,aes", b"2", b"3", b"64", b"1024", b"4096",
        b"\0", b"\xff",
    ]  # fmt: skip

    def join(self, pieces: Pieces) -> bytes:
        return b"".join(pieces)

    def run(self, data: bytes) -> object:
        text, _, size = data.decode(errors="replace").rpartition(" ")
        length = int(size) if size.isascii() and size.isdigit() and len(size) < 5 else 32
        sector_size = 4096 if len(text) % 2 else 512
        try:
            spec = CipherSpec.parse(text)
            cipher = SectorCipher(spec, bytes(i % 256 for i in range(length)), sector_size=sector_size)
        except (InvalidArgument, NotFound) as error:
            return error.message.rpartition(":")[2][:24]
        assert spec.text == text
        encrypted, back = bytearray(len(PLAIN)), bytearray(len(PLAIN))
        cipher.encrypt(8, PLAIN, encrypted)
        cipher.decrypt(8, encrypted, back)
        assert back == PLAIN
        assert encrypted != PLAIN or spec.cipher == "cipher_null"
        return spec.cipher, spec.chain_mode, spec.iv_mode, spec.key_count > 1

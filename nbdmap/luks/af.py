"""The anti-forensic splitter of LUKS: a key becomes many stripes, each as long as it, all of which are needed to get it back.

So it is enough that a disk forgets one sector of them. Layout and diffusion as in the LUKS1 specification, section 2.4.
"""

from collections.abc import Callable

from nbdmap.luks.kdf import hash_function
from nbdmap.luks.secret import wipe


def merge(material: bytearray, stripes: int, hash_name: str) -> bytearray:
    """The key whose `stripes` stripes fill `material`."""
    size = len(material) // stripes
    key = _fold(material, size, stripes, hash_name)
    _xor(key, material, (stripes - 1) * size)
    return key


def split(key: bytearray, stripes: int, hash_name: str, random_bytes: Callable[[int], bytes]) -> bytearray:
    """Material from which `merge` makes `key`: random but for its last stripe."""
    size = len(key)
    material = bytearray(random_bytes(size * (stripes - 1))) + key
    last = _fold(material, size, stripes, hash_name)
    _xor(last, key, 0)
    material[size * (stripes - 1) :] = last
    wipe(last)
    return material


def _fold(material: bytearray, size: int, stripes: int, hash_name: str) -> bytearray:
    """All stripes but the last, diffused into one another."""
    function = hash_function(hash_name)
    step = function(b"").digest_size
    pieces = [(start, number.to_bytes(4, "big")) for number, start in enumerate(range(0, size, step))]
    folded = bytearray(size)
    for start in range(0, (stripes - 1) * size, size):
        _xor(folded, material, start)
        for at, number in pieces:  # each piece becomes the digest of its number and itself; the last may be shorter
            folded[at : at + step] = function(number + folded[at : at + step]).digest()[: size - at]
    return folded


def _xor(target: bytearray, source: bytearray, start: int) -> None:
    """In place: `target` XOR as many bytes of `source` from `start` on."""
    size = len(target)
    mixed = int.from_bytes(target, "little") ^ int.from_bytes(source[start : start + size], "little")
    target[:] = mixed.to_bytes(size, "little")

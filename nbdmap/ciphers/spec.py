"""The names of sector ciphers, in dm-crypt's two grammars (dm-reference b.2).

    aes-xts-plain64   aes-cbc-essiv:sha256   aes:64-cbc-lmk   twofish-ecb   aes   xchacha12,aes-adiantum-plain64
    capi:xts(aes)-plain64   capi:essiv(cbc(aes),sha256)-plain64

Legacy is `cipher[:keycount]-chainmode[-ivmode[:ivopts]]`; only `cipher`, or `cipher-plain`, means cbc with IV plain. The
other is `capi:<name in the kernel's crypto API>-<ivmode>[:<ivopts>]`. What is refused has the kernel's errno: EINVAL for the
grammar, ENOENT for a cipher, mode or hash that does not exist.
"""

import re
from dataclasses import dataclass
from typing import Final

from nbdmap.errors import InvalidArgument, NotFound

MAX_SPEC: Final = 256
"""The longest cipher string."""
MAX_KEY_COUNT: Final = 1 << 10

CHAIN_MODES: Final = ("cbc", "xts", "ecb", "ctr", "lrw", "adiantum")
IV_MODES: Final = ("plain", "plain64", "plain64be", "essiv", "benbi", "null", "eboiv", "elephant", "lmk", "tcw", "random")
HASHES: Final = {"md5": 16, "sha1": 20, "sha224": 28, "sha256": 32, "sha384": 48, "sha512": 64, "rmd160": 20}
"""Those that essiv may use, with the bytes of their digest."""

_CAPI: Final = re.compile(r"(\w+)\((\w+(?:,\w+)*)\)")
_ESSIV: Final = re.compile(r"essiv\((\w+\(\w+\)),(\w+)\)")


@dataclass(frozen=True, slots=True)
class CipherSpec:
    """A cipher string, taken apart. `text` is as it was written."""

    text: str
    cipher: str
    chain_mode: str
    iv_mode: str
    iv_options: str = ""
    key_count: int = 1
    essiv_hash: str = ""
    """Of the ESSIV that the crypto API's name itself asks for; it encrypts the IV that `iv_mode` makes."""

    @classmethod
    def parse(cls, text: str) -> "CipherSpec":
        """Takes a cipher string apart.

        Raises InvalidArgument for what the grammar does not have and NotFound for modes that there are not. Whether the
        cipher itself is there shows when it gets its key.

        >>> CipherSpec.parse("aes-cbc-essiv:sha256").iv_options
        'sha256'
        """
        if len(text) > MAX_SPEC or not text.isascii() or not text.isprintable():
            raise InvalidArgument(f"cipher {text[:40]!r} is not a cipher's name")
        spec = _parse_capi(text) if text.startswith("capi:") else _parse_legacy(text)
        if spec.chain_mode not in CHAIN_MODES:
            raise NotFound(f"cipher {text!r}: there is no mode {spec.chain_mode}({spec.cipher})")
        if spec.iv_mode and spec.iv_mode not in IV_MODES:
            raise InvalidArgument(f"cipher {text!r}: unknown IV mode {spec.iv_mode!r}")
        if spec.iv_mode == "essiv" and not spec.iv_options:
            raise InvalidArgument(f"cipher {text!r}: essiv needs a hash, as in essiv:sha256")
        if spec.iv_mode == "random":
            raise InvalidArgument(f"cipher {text!r}: random IVs need integrity metadata, which is not supported")
        return spec


def _parse_legacy(text: str) -> CipherSpec:
    if "(" in text:
        raise InvalidArgument(f"cipher {text!r}: a name of the crypto API needs 'capi:' before it")
    name, _, rest = text.partition("-")
    cipher, colon, count = name.partition(":")
    key_count = 1
    if colon:
        key_count = int(count) if count.isdigit() and len(count) < 6 else 0
        if key_count.bit_count() != 1 or key_count > MAX_KEY_COUNT:
            raise InvalidArgument(f"cipher {text!r}: the key count {count!r} is not a power of two up to {MAX_KEY_COUNT}")
    if not cipher:
        raise InvalidArgument(f"cipher {text!r} has no name")
    chain_mode, dash, iv = rest.partition("-")
    if not chain_mode or (chain_mode == "plain" and not dash):
        chain_mode, iv = "cbc", "plain"
    iv_mode, _, iv_options = iv.partition(":")
    if not iv_mode and chain_mode != "ecb":
        raise InvalidArgument(f"cipher {text!r}: mode {chain_mode} needs an IV mode, as in {cipher}-{chain_mode}-plain64")
    return CipherSpec(text, cipher, chain_mode, iv_mode, iv_options, key_count)


def _parse_capi(text: str) -> CipherSpec:
    """The last `:` splits off the IV's options, the last `-` before it the IV mode."""
    rest = text.removeprefix("capi:")
    name, dash, iv = rest.rpartition("-")
    if ":" in name:
        raise InvalidArgument(f"cipher {text!r} is not 'capi:<cipher>-<IV mode>[:<options>]'")
    if not dash:
        name, iv = iv, ""
    iv_mode, _, iv_options = iv.partition(":")
    essiv_hash = ""
    if inner := _ESSIV.fullmatch(name):
        name, essiv_hash = inner[1], inner[2]
    match = _CAPI.fullmatch(name)
    if match is None:
        if name.startswith(("authenc(", "rfc7539", "gcm(", "ccm(")):
            raise InvalidArgument(f"cipher {text!r}: authenticated encryption needs integrity metadata, which is not supported")
        raise NotFound(f"cipher {text!r}: the crypto API has no cipher {name!r}")
    if not iv_mode and match[1] != "ecb":
        raise InvalidArgument(f"cipher {text!r}: mode {match[1]} needs an IV mode, as in {name}-plain64")
    return CipherSpec(text, match[2], match[1], iv_mode, iv_options, 64 if iv_mode == "lmk" else 1, essiv_hash)

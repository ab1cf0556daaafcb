"""nbdmap.ciphers.spec: both grammars, and what is refused with which errno."""

import errno

import pytest

from nbdmap.ciphers.spec import CipherSpec
from nbdmap.errors import NbdmapError


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("aes", ("aes", "cbc", "plain", "", 1, "")),
        ("aes-plain", ("aes", "cbc", "plain", "", 1, "")),
        ("aes-cbc-plain", ("aes", "cbc", "plain", "", 1, "")),
        ("aes:4", ("aes", "cbc", "plain", "", 4, "")),
        ("twofish-ecb", ("twofish", "ecb", "", "", 1, "")),
        ("aes-cbc-essiv:sha256", ("aes", "cbc", "essiv", "sha256", 1, "")),
        ("aes:64-cbc-lmk", ("aes", "cbc", "lmk", "", 64, "")),
        ("aes-xts-plain64:ignored", ("aes", "xts", "plain64", "ignored", 1, "")),
        ("xchacha12,aes-adiantum-plain64", ("xchacha12,aes", "adiantum", "plain64", "", 1, "")),
        ("capi:xts(aes)-plain64", ("aes", "xts", "plain64", "", 1, "")),
        ("capi:cbc(aes)-essiv:sha256", ("aes", "cbc", "essiv", "sha256", 1, "")),
        ("capi:cbc(aes)-lmk", ("aes", "cbc", "lmk", "", 64, "")),
        ("capi:essiv(cbc(aes),sha256)-plain64", ("aes", "cbc", "plain64", "", 1, "sha256")),
        ("capi:adiantum(xchacha12,aes)-plain64", ("xchacha12,aes", "adiantum", "plain64", "", 1, "")),
    ],
)
def test_grammar(text: str, parts: tuple[object, ...]) -> None:
    spec = CipherSpec.parse(text)
    assert (spec.cipher, spec.chain_mode, spec.iv_mode, spec.iv_options, spec.key_count, spec.essiv_hash) == parts
    assert spec.text == text


@pytest.mark.parametrize(
    ("text", "number", "complaint"),
    [
        ("", errno.EINVAL, "has no name"),
        (":2", errno.EINVAL, "has no name"),
        ("aes:3-cbc-plain", errno.EINVAL, "the key count '3' is not a power of two"),
        ("aes:0-cbc-plain", errno.EINVAL, "the key count '0' is not a power of two"),
        ("aes:x-cbc-plain", errno.EINVAL, "the key count 'x' is not a power of two"),
        ("aes-xts", errno.EINVAL, "mode xts needs an IV mode"),
        ("aes-cbc-", errno.EINVAL, "mode cbc needs an IV mode"),
        ("aes-cbc-essiv", errno.EINVAL, "essiv needs a hash"),
        ("aes-cbc-other", errno.EINVAL, "unknown IV mode 'other'"),
        ("aes-cbc-random", errno.EINVAL, "random IVs need integrity metadata"),
        ("xts(aes)-plain64", errno.EINVAL, "needs 'capi:' before it"),
        ("aes-nomode-plain", errno.ENOENT, "there is no mode nomode(aes)"),
        ("capi:nomode(aes)-plain", errno.ENOENT, "there is no mode nomode(aes)"),
        ("capi:nonsense-plain", errno.ENOENT, "the crypto API has no cipher 'nonsense'"),
        ("capi:xts(aes)", errno.EINVAL, "mode xts needs an IV mode"),
        ("capi:authenc(hmac(sha256),xts(aes))-random", errno.EINVAL, "needs integrity metadata"),
        ("aes-xts-plain64\0", errno.EINVAL, "is not a cipher's name"),
        ("a" * 300, errno.EINVAL, "is not a cipher's name"),
    ],
)
def test_refused(text: str, number: int, complaint: str) -> None:
    with pytest.raises(NbdmapError, match="cipher") as caught:
        CipherSpec.parse(text)
    assert complaint in caught.value.message
    assert caught.value.errno == number

"""nbdmap.targets.crypt.target: the table line, requests, messages, what is refused."""

import errno
import logging
from pathlib import Path

import pytest

from nbdmap.block.device import Limits
from nbdmap.block.io import DISCARD, FUA, WRITE, WRITE_ZEROES, Io
from nbdmap.ciphers.cipher import SectorCipher
from nbdmap.ciphers.spec import CipherSpec
from nbdmap.dm.args import Args
from nbdmap.dm.device import MappedDevice
from nbdmap.dm.table import parse_table
from nbdmap.errors import InvalidArgument, IoFailed, NbdmapError, NotReady, Unsupported
from nbdmap.targets.crypt.keys import KEYRING
from tests.support.disks import FakeDisk, FakeOpener, build, eio, mapped, read, write

KEY = bytes(range(32)).hex()
OTHER = bytes(range(32, 64)).hex()
LINE = f"0 64 crypt aes-xts-plain64 {KEY} 0 7:0 0"


def encrypted(data: bytes, sector: int = 0, key: str = KEY, spec: str = "aes-xts-plain64") -> bytes:
    target = bytearray(len(data))
    SectorCipher(CipherSpec.parse(spec), bytes.fromhex(key)).encrypt(sector, data, target)
    return bytes(target)


def some(length: int, seed: int = 1) -> bytes:
    return bytes((seed * 7 + i * i // 3) % 256 for i in range(length))


async def test_the_documents_example() -> None:
    """crypt.txt: "0 ... crypt aes-cbc-essiv:sha256 babe... 0 $1 0"."""
    disk, key = FakeDisk("7:0"), "babebabebabebabebabebabebabebabe"
    table = await build(f"0 1024 crypt aes-cbc-essiv:sha256 {key} 0 7:0 0", disk)
    await write(table, 512, some(1024))
    assert disk.bytes[512:1536] == encrypted(some(1024), 1, key, "aes-cbc-essiv:sha256")
    assert await read(table, 512, 1024) == some(1024)
    assert [line.params for line in table.table_lines()] == [f"aes-cbc-essiv:sha256 {key} 0 7:0 0"]
    assert [line.params for line in table.status_lines()] == [""]
    await table.close()


async def test_where_it_stands_and_what_it_counts_from() -> None:
    """Sector 0 of the IVs is the target's first, plus iv_offset, wherever the target and its disk's range begin."""
    disk = FakeDisk("7:0")
    table = await build(f"0 8 error\n8 64 crypt aes-xts-plain64 {KEY} 100 7:0 16", disk)
    await write(table, 10 * 512, some(512))
    assert disk.bytes[18 * 512 : 19 * 512] == encrypted(some(512), 102)
    assert await read(table, 10 * 512, 512) == some(512)
    await table.close()


@pytest.mark.parametrize("length", [512, 4096, 48 << 10, 64 << 10, 256 << 10])
async def test_every_way_of_working_gives_the_same_bytes(length: int) -> None:
    disk = FakeDisk("7:0", 1024)
    table = await build(f"0 1024 crypt aes-xts-plain64 {KEY} 0 7:0 0", disk)
    data = some(length)
    payload = bytearray(data)
    await table.submit(Io(WRITE, length, memoryview(payload), FUA), 2048)
    assert payload == data  # the caller's
    assert disk.log == [("write", 2048, length, FUA)]
    assert disk.bytes[2048 : 2048 + length] == encrypted(data, 4)
    assert await read(table, 2048, length) == data
    await table.close()


async def test_sector_size_and_limits() -> None:
    disk = FakeDisk("7:0")
    line = f"0 64 crypt aes-xts-plain64 {KEY} 8 7:0 0 3 iv_large_sectors allow_discards sector_size:4096"
    table = await build(line, disk)
    assert table.limits == Limits(logical_block=4096, discard=True, cache=True, io_min=4096)
    words = "3 allow_discards sector_size:4096 iv_large_sectors"
    assert [one.params for one in table.table_lines()] == [f"aes-xts-plain64 {KEY} 8 7:0 0 {words}"]
    await write(table, 8192, some(4096))
    spec, expected = CipherSpec.parse("aes-xts-plain64"), bytearray(4096)
    cipher = SectorCipher(spec, bytes.fromhex(KEY), sector_size=4096, iv_offset=8, large_sectors=True)
    cipher.encrypt(16, some(4096), expected)
    assert disk.bytes[8192:12288] == expected
    await table.submit(Io(DISCARD, 4096), 8192)
    assert disk.log[-1] == ("discard", 8192, 4096, 0)
    await table.close()


async def test_what_it_cannot_do() -> None:
    disk = FakeDisk("7:0")
    table = await build(LINE, disk)
    assert table.limits == Limits(cache=True)
    for op in (DISCARD, WRITE_ZEROES):
        with pytest.raises(Unsupported):
            await table.submit(Io(op, 512), 0)
    disk.runs = [(disk.size, 3)]
    assert await table.extents(0, 4096) == [(4096, 0)]  # a hole below does not read as zeroes
    disk.failure = eio
    with pytest.raises(IoFailed):
        await read(table, 0, 512)
    with pytest.raises(IoFailed):
        await write(table, 0, bytes(512))
    await table.close()


async def test_construct_of_table_is_the_same() -> None:
    disk = FakeDisk("7:0")
    for words in (
        f"aes-cbc-essiv:sha256 {KEY} 5 7:0 8 4 allow_discards same_cpu_crypt high_priority submit_from_crypt_cpus",
        "cipher_null-ecb - 0 7:0 0",
        f"capi:xts(aes)-plain64 {KEY.upper()} 0 7:0 0 2 no_read_workqueue no_write_workqueue",
    ):
        table = await build(f"0 64 crypt {words}", disk)
        first = table.table_lines()[0].params
        assert first.lower() == words.lower()
        again = await build(f"0 64 crypt {first}", disk)
        assert again.table_lines()[0].params == first
        await table.close()
        await again.close()


async def device(line: str = LINE) -> tuple[MappedDevice, FakeDisk]:
    disk = FakeDisk("7:0")
    return await mapped("a", line, disk), disk


async def test_key_set_and_wipe() -> None:
    crypt, disk = await device()
    await write(crypt, 0, some(512))
    assert disk.bytes[:512] == encrypted(some(512))
    await crypt.suspend()
    await crypt.message(0, ["KEY", "Wipe"])
    assert crypt.live is not None
    assert crypt.live.table_lines()[0].params == f"aes-xts-plain64 {'0' * 64} 0 7:0 0"
    with pytest.raises(NotReady) as caught:
        await crypt.resume()
    assert caught.value.errno == errno.EAGAIN
    assert crypt.suspended
    await crypt.message(0, ["key", "wipe"])  # twice does no harm
    with pytest.raises(InvalidArgument, match="the key has 16 bytes, the one before has 32"):
        await crypt.message(0, ["key", "set", KEY[:32]])
    with pytest.raises(InvalidArgument):
        await crypt.message(0, ["key", "set", "zz" * 32])
    await crypt.message(0, ["key", "set", OTHER])
    await crypt.resume()
    await write(crypt, 0, some(512))
    assert disk.bytes[:512] == encrypted(some(512), key=OTHER)
    await crypt.close()


async def test_a_refused_key_changes_nothing() -> None:
    crypt, disk = await device(f"0 64 crypt aes-cbc-plain {KEY} 0 7:0 0")
    await crypt.suspend()
    with pytest.raises(NbdmapError):
        await crypt.message(0, ["key", "set", ":32:logon:nowhere"])
    await crypt.resume()
    await write(crypt, 0, some(512))
    assert disk.bytes[:512] == encrypted(some(512), spec="aes-cbc-plain")
    await crypt.close()


@pytest.mark.parametrize("words", [["key", "set", OTHER], ["key", "wipe"]])
async def test_keys_only_while_suspended(words: list[str]) -> None:
    crypt, disk = await device()
    with pytest.raises(InvalidArgument, match="only while the device is suspended"):
        await crypt.message(0, words)
    await crypt.suspend()
    await crypt.resume()
    with pytest.raises(InvalidArgument, match="only while the device is suspended"):
        await crypt.message(0, words)
    await write(crypt, 0, some(512))
    assert disk.bytes[:512] == encrypted(some(512))
    await crypt.close()


@pytest.mark.parametrize("words", ["other", "key", "key get", "key set", f"key set {KEY} x", "key wipe x"])
async def test_other_messages(words: str) -> None:
    crypt, _ = await device()
    await crypt.suspend()
    with pytest.raises(InvalidArgument, match="crypt takes the messages"):
        await crypt.message(0, words.split())
    await crypt.close()


async def test_a_key_of_the_keyring(tmp_path: Path) -> None:
    (tmp_path / "home.key").write_bytes(bytes.fromhex(KEY))
    (tmp_path / "next.key").write_bytes(bytes.fromhex(OTHER))
    KEYRING.replace({"logon:home": str(tmp_path / "home.key"), "user:a:b": str(tmp_path / "next.key")})
    try:
        crypt, disk = await device("0 64 crypt aes-xts-plain64 :32:logon:home 0 7:0 0")
        assert crypt.live is not None
        assert crypt.live.table_lines()[0].params == "aes-xts-plain64 :32:logon:home 0 7:0 0"
        await write(crypt, 0, some(512))
        assert disk.bytes[:512] == encrypted(some(512))
        await crypt.suspend()
        await crypt.message(0, ["key", "set", ":32:user:a:b"])
        await crypt.resume()
        assert crypt.live.table_lines()[0].params == "aes-xts-plain64 :32:user:a:b 0 7:0 0"
        assert await read(crypt, 0, 512) != some(512)
        await crypt.suspend()
        await crypt.message(0, ["key", "wipe"])
        assert crypt.live.table_lines()[0].params == f"aes-xts-plain64 {'0' * 64} 0 7:0 0"
        await crypt.close()
    finally:
        KEYRING.replace({})


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("", "cipher is missing"),
        ("aes", "key is missing"),
        (f"aes {KEY} 0 7:0", "start sector is missing"),
        (f"aes {KEY} x 7:0 0", "iv_offset: 'x' is not a decimal number"),
        (f"aes {KEY} 0 7:0 x", "start sector: 'x' is not a decimal number"),
        (f"aes {KEY[:-1]} 0 7:0 0", "the key has an odd number of hexadecimal digits, 63"),
        (f"aes {KEY[:-1]}g 0 7:0 0", "the key is not hexadecimal"),
        (f"aes {KEY[:-2]} 0 7:0 0", "cannot have a key of 31 bytes"),
        ("aes - 0 7:0 0", "cannot have a key of 0 bytes"),
        (f"aes {KEY} 0 7:0 0 1 sector_size:4096", "length 65 is not a multiple of sector_size 4096"),
        (f"aes {KEY} 0 7:0 0 1 integrity:28:aead", "integrity metadata is not supported"),
        (f"aes {KEY} 0 7:0 0 0 x", "unexpected word 'x'"),
        (f"aes {KEY} 0 7:0 2000", "beyond the end"),
    ],
)
async def test_bad_words(words: str, complaint: str) -> None:
    disk = FakeDisk("7:0")
    with pytest.raises(InvalidArgument) as caught:
        await build(f"0 65 crypt {words}", disk)
    assert f"line 1: crypt: {complaint}" in caught.value.message or complaint in caught.value.message
    assert disk.openers == 0


async def test_no_word_of_a_key_gets_out(caplog: pytest.LogCaptureFixture) -> None:
    """Neither in messages of errors nor in what objects say of themselves nor in the log."""
    caplog.set_level(logging.DEBUG)
    disk = FakeDisk("7:0")
    table = await build(LINE, disk)
    said = [repr(table.targets[0]), repr(table.targets[0]._engine)]  # type: ignore[attr-defined]
    for start in (f"aes {KEY}00", f"aes {KEY}z", f"aes {KEY[:-1]}", f"nothing {KEY}", f"aes {KEY} x", f"aes - {KEY}"):
        words = f"{start} 0 7:0 0"
        with pytest.raises(NbdmapError) as caught:
            await build(f"0 64 crypt {words}", disk)
        said += [caught.value.message, repr(caught.value), str(caught.value)]
    for words in (
        f"{KEY} aes 0 7:0 0", f"aes {KEY} {KEY} 7:0 0", f"aes {KEY} 0 {KEY} 0", f"aes {KEY} 0 7:0 {KEY}", f"aes :{KEY} 0 7:0 0",
        f"aes {KEY} 0 7:0 0 {KEY}", f"aes {KEY} 0 7:0 0 1 {KEY}", f"capi:{KEY} {KEY} 0 7:0 0", f"aes :32:{KEY}:a 0 7:0 0",
    ):  # fmt: skip
        with pytest.raises(NbdmapError) as caught:
            await build(f"0 64 crypt {words}", disk)
        said += [caught.value.message, repr(caught.value), str(caught.value)]
    with pytest.raises(InvalidArgument, match=r"not '\(64 hexadecimal digits\)'") as misplaced:
        await table.targets[0].message(Args((KEY, "set")))
    said.append(str(misplaced.value))
    await table.close()
    assert not [text for text in [*said, caplog.text] if KEY[8:24] in text]
    assert bytes(table.targets[0]._key) == bytes(32)  # type: ignore[attr-defined]


async def test_a_load_that_fails_leaves_no_thread_and_no_opener() -> None:
    crypt, disk = await device()
    with pytest.raises(NbdmapError):
        await crypt.load(parse_table("0 64 crypt aes-cbc-nothing 00 0 7:0 0"), FakeOpener(disk), read_only=False)
    assert await read(crypt, 0, 512) != bytes(512)
    await crypt.close()

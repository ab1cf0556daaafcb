"""Every command, flag and error of the NBD protocol as libnbd sees them, through nbdsh with its own checks switched off.

The rules are those of proto.md: which error, that refused payloads are read to their end, and that after every refusal
the connection goes on.
"""

from collections.abc import Iterator

import pytest

from tests.support.clients import nbdsh
from tests.support.server import Server, serving

CONFIG = """
disks:
  ram0: {memory: 32MiB}
  ram1: {memory: 32MiB}
  file: {file: a.img, size: 32MiB, create: true}
  sparse: {file: huge.img, size: 1TiB, create: true}
  wide: {memory: 1TiB}
devices:
  ram: {table: 0 65536 linear ram0 0}
  file0: {table: 0 65536 linear file 0}
  ro: {table: 0 65536 linear ram1 0, read_only: true}
  mostly: {table: 0 65536 linear ram1 0, export: {name: looks, read_only: true}}
  zero: {table: 0 65536 zero}
  bad: {table: "0 2048 linear ram1 0\\n2048 2048 error\\n4096 2048 linear ram1 4096"}
  huge: {table: 0 2147483648 linear sparse 0}
  wide0: {table: 0 2147483648 linear wide 0}
  wide2: {table: 0 2147483648 striped 2 128 sparse 0 wide 0}
"""

STRICT_OFF = "h.set_strict_mode(0)\n"
STILL_ALIVE = "\nassert h.pread(512, 0) is not None\nh.shutdown()\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(CONFIG) as running:
        yield running


def loose(server: Server, export: str, script: str, *, before: str = "") -> None:
    """Runs a script with libnbd's checks off; the connection must be alive at its end."""
    connect = f"{before}\nh.add_meta_context('base:allocation'); h.connect_uri(URI)\n"
    nbdsh(connect + STRICT_OFF + script + STILL_ALIVE, server.uri(export), connect=False)


# --- ranges ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("export", ["ram", "file0"])
def test_beyond_the_end(server: Server, export: str) -> None:
    script = """
SIZE = h.get_size()
extent = lambda *ignored: 0
for offset, length in ((SIZE, 512), (SIZE - 512, 1024), (SIZE + 512, 512), (2**64 - 512, 1024), (2**63, 512), (2**64 - 512, 512)):
    said = fails(errno.EINVAL, h.pread, length, offset)
    assert f"READ of {length} bytes at {offset} reaches beyond the end, {SIZE}" in said, said
    fails(errno.ENOSPC, h.pwrite, bytes(length), offset)
    fails(errno.ENOSPC, h.zero, length, offset)
    fails(errno.EINVAL, h.trim, length, offset)
    fails(errno.EINVAL, h.cache, length, offset)
    fails(errno.EINVAL, h.block_status, length, offset, extent)
fails(errno.ENOSPC, h.zero, 2**32 - 512, 512)
fails(errno.EINVAL, h.trim, 2**32 - 512, 512)
assert h.pread(512, SIZE - 512) == bytes(512)
"""
    loose(server, export, script)


def test_unaligned(server: Server) -> None:
    script = """
h.pwrite(b"a" * 1024, 0)
for offset, length in ((1, 512), (0, 511), (0, 513), (256, 256), (511, 1)):
    assert "is not aligned to blocks of 512" in fails(errno.EINVAL, h.pread, length, offset)
    fails(errno.EINVAL, h.pwrite, b"b" * length, offset)
    fails(errno.EINVAL, h.zero, length, offset)
    fails(errno.EINVAL, h.trim, length, offset)
    fails(errno.EINVAL, h.block_status, length, offset, lambda *ignored: 0)
assert h.pread(1024, 0) == b"a" * 1024
"""
    loose(server, "ram", script)


def test_too_large(server: Server) -> None:
    """Reads and writes of more than 32 MiB; libnbd itself sends at most 64 MiB."""
    script = """
MOST = 32 << 20
h.pwrite(b"a" * MOST, 0)
assert h.pread(MOST, 0) == b"a" * MOST
for length in (MOST + 512, 64 << 20):
    fails(errno.EINVAL, h.pread, length, 0)
    fails(errno.EOVERFLOW, h.pread, length, 0, nbd.CMD_FLAG_DF)
    fails(errno.EINVAL, h.pwrite, bytes(length), 0)
assert h.pread(MOST, 0) == b"a" * MOST
"""
    loose(server, "wide0", script)


@pytest.mark.parametrize("export", ["ram", "zero", "bad", "wide2"])
def test_a_request_for_nothing_succeeds(server: Server, export: str) -> None:
    script = """
for offset in (0, 1 << 20, h.get_size()):
    assert h.pread(0, offset) == b""
    h.pwrite(b"", offset)
    h.trim(0, offset)
    h.cache(0, offset)
    if h.can_zero():
        h.zero(0, offset)
"""
    loose(server, export, script)


# --- flags and commands ----------------------------------------------------------------------------------------------------


def test_flags_that_do_not_belong_to_a_command(server: Server) -> None:
    script = """
FUA, NO_HOLE, DF, REQ_ONE, FAST, PAYLOAD = 1, 2, 4, 8, 16, 32
extent = lambda *ignored: 0
calls = (
    (h.pread, (512, 0), (NO_HOLE, REQ_ONE, FAST)),
    (h.pwrite, (b"x" * 512, 0), (NO_HOLE, DF, REQ_ONE, FAST)),
    (h.flush, (), (NO_HOLE, DF, REQ_ONE, FAST)),
    (h.trim, (512, 0), (NO_HOLE, DF, REQ_ONE, FAST)),
    (h.cache, (512, 0), (NO_HOLE, DF, REQ_ONE, FAST)),
    (h.zero, (512, 0), (DF, REQ_ONE)),
    (h.block_status, (512, 0, extent), (NO_HOLE, DF, FAST)),
)
h.zero(512, 0)
for call, arguments, flags in calls:
    for flag in (*flags, 64, 1 << 15):
        assert "do not belong to" in fails(errno.EINVAL, call, *arguments, flags=flag)
        fails(errno.EINVAL, call, *arguments, flags=flag | FUA)
assert h.pread(512, 0) == bytes(512)
"""
    loose(server, "ram", script)


@pytest.mark.parametrize("export", ["ram", "file0", "wide2"])
def test_fua_is_legal_on_every_command(server: Server, export: str) -> None:
    script = """
FUA = nbd.CMD_FLAG_FUA
h.pwrite(b"x" * 4096, 0, FUA)
assert h.pread(4096, 0, FUA) == b"x" * 4096
h.flush(FUA)
h.cache(4096, 0, FUA)
h.block_status(4096, 0, lambda *ignored: 0, FUA)
h.trim(4096, 0, FUA)
h.zero(4096, 0, FUA)
h.zero(4096, 0, FUA | nbd.CMD_FLAG_NO_HOLE)
assert h.pread(4096, 0) == bytes(4096)
"""
    loose(server, export, script)


def test_what_is_not_offered_is_refused(server: Server) -> None:
    """The zero target takes no write-zeroes, as the kernel's; FAST_ZERO is refused with it."""
    script = """
assert not h.can_zero() and not h.can_fast_zero()
assert "WRITE_ZEROES is not offered" in fails(errno.EINVAL, h.zero, 512, 0)
fails(errno.EINVAL, h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO)
h.pwrite(b"x" * 512, 0)
assert h.pread(512, 0) == bytes(512)
"""
    loose(server, "zero", script)


@pytest.mark.parametrize("export", ["ram", "file0", "wide2"])
def test_zeroes(server: Server, export: str) -> None:
    script = """
NO_HOLE, FAST = nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO
def extents():
    found = []
    h.block_status(1 << 20, 0, lambda name, offset, entries, error: found.extend(entries) or 0)
    return found
assert h.can_fast_zero()
for flags in (0, NO_HOLE, FAST, FAST | NO_HOLE):
    h.pwrite(b"x" * (1 << 20), 0)
    assert extents()[1] == 0
    h.zero(1 << 20, 0, flags)
    assert h.pread(1 << 20, 0) == bytes(1 << 20)
    if not flags & NO_HOLE:
        assert extents() == [1 << 20, 3], (flags, extents())
"""
    loose(server, export, script)


def test_no_hole_keeps_the_space(server: Server) -> None:
    """Of a file: it stays allocated, so that a write there cannot meet a full disk."""

    def sectors() -> int:
        return (server.directory / "a.img").stat().st_blocks

    loose(server, "file0", "h.trim(32 << 20, 0)")
    assert sectors() == 0
    loose(server, "file0", "h.zero(8 << 20, 0, nbd.CMD_FLAG_NO_HOLE)")
    assert sectors() >= 8 * 2048
    loose(server, "file0", "h.zero(8 << 20, 0)")
    assert sectors() == 0


@pytest.mark.parametrize("export", ["ro", "looks"])
def test_read_only(server: Server, export: str) -> None:
    script = """
assert h.is_read_only() and not h.can_trim() and not h.can_zero()
for length in (512, 1 << 20):
    assert "the export is read-only" in fails(errno.EPERM, h.pwrite, b"x" * length, 0)
    fails(errno.EPERM, h.pwrite, b"x" * length, 0, nbd.CMD_FLAG_FUA)
    fails(errno.EPERM, h.zero, length, 0)
    fails(errno.EPERM, h.trim, length, 0)
assert h.pread(1 << 20, 0) == bytes(1 << 20)
h.flush()
h.cache(512, 0)
"""
    loose(server, export, script)


# --- reads -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("export", ["ram", "file0", "wide2"])
def test_large_reads_say_their_holes(server: Server, export: str) -> None:
    script = """
h.trim(32 << 20, 0)
h.pwrite(b"a" * 65536, 1 << 20)
h.pwrite(b"b" * 65536, 3 << 20)
def chunks(length, offset, flags=0):
    found = []
    def chunk(buffer, at, status, error):
        assert not error.value
        found.append((at, len(buffer), status))
    return found, h.pread_structured(length, offset, chunk, flags)
DATA, HOLE = nbd.READ_DATA, nbd.READ_HOLE
wanted = bytes(1 << 20) + b"a" * 65536 + bytes((2 << 20) - 65536) + b"b" * 65536 + bytes(65536)
found, data = chunks(len(wanted), 0)
assert data == wanted
assert sorted(found) == [
    (0, 1 << 20, HOLE),
    (1 << 20, 65536, DATA),
    ((1 << 20) + 65536, (2 << 20) - 65536, HOLE),
    (3 << 20, 65536, DATA),
    ((3 << 20) + 65536, 65536, HOLE),
], found
found, data = chunks(len(wanted), 0, nbd.CMD_FLAG_DF)
assert data == wanted and found == [(0, len(wanted), DATA)], found
found, data = chunks(32 << 20, 0, nbd.CMD_FLAG_DF)
assert data == wanted.ljust(32 << 20, bytes(1)) and found == [(0, 32 << 20, DATA)], found
found, data = chunks(4096, 0)
assert data == bytes(4096) and found == [(0, 4096, DATA)], found
"""
    loose(server, export, script)


def test_an_error_in_the_middle_has_errno_and_text(server: Server) -> None:
    script = """
said = fails(errno.EIO, h.pread_structured, 3 << 20, 0, lambda *ignored: 0)
assert "the error target fails every request" in said, said
said = fails(errno.EIO, h.pwrite, bytes(1 << 20), (2 << 20) - 512)
assert "write of" in said and "error target" in said, said
fails(errno.EIO, h.pread, 512, 1 << 20)
assert h.pread(512, (1 << 20) - 512) == bytes(512)
h.flush()
"""
    loose(server, "bad", script)


def test_without_structured_replies(server: Server) -> None:
    script = """
assert not h.get_structured_replies_negotiated() and not h.can_df()
h.pwrite(b"x" * 4096, 0)
assert h.pread(4096, 0) == b"x" * 4096
assert len(h.pread(8 << 20, 0)) == 8 << 20
fails(errno.EINVAL, h.pread, 512, h.get_size())
fails(errno.EINVAL, h.pread, 512, 0, nbd.CMD_FLAG_DF)
fails(errno.ENOSPC, h.pwrite, bytes(1024), h.get_size() - 512)
"""
    loose(server, "ram", script, before="h.set_request_structured_replies(False)")


@pytest.mark.parametrize("flags", ["0", "nbd.HANDSHAKE_FLAG_NO_ZEROES", "nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE"])
def test_old_clients(server: Server, flags: str) -> None:
    """Those that know EXPORT_NAME only, and those that cannot do without its 124 zeroes."""
    script = """
assert h.get_size() == 32 << 20
h.pwrite(b"y" * 4096, 4096)
assert h.pread(4096, 4096) == b"y" * 4096
"""
    loose(server, "ram", script, before=f"h.set_handshake_flags({flags})")


# --- block status ----------------------------------------------------------------------------------------------------------


def test_block_status_of_one_extent_and_of_all(server: Server) -> None:
    script = """
h.trim(32 << 20, 0)
h.pwrite(b"a" * 65536, 1 << 20)
def extents(length, offset, flags=0):
    found = []
    h.block_status(length, offset, lambda name, at, entries, error: found.append((name, at, entries)) or 0, flags)
    assert len(found) == 1 and found[0][:2] == ("base:allocation", offset)
    return found[0][2]
M = 1 << 20
assert extents(4 * M, 0) == [M, 3, 65536, 0, 3 * M - 65536, 3]
assert extents(4 * M, 0, nbd.CMD_FLAG_REQ_ONE) == [M, 3]
assert extents(512, 0, nbd.CMD_FLAG_REQ_ONE) == [512, 3]
assert extents(512, M) == [512, 0]
assert extents(32 * M, 0)[0::2][-1] + 65536 + M == 32 * M
"""
    loose(server, "ram", script)


def test_block_status_needs_a_context(server: Server) -> None:
    script = """
h.connect_uri(URI)
h.set_strict_mode(0)
fails(errno.EINVAL, h.block_status, 512, 0, lambda *ignored: 0)
assert len(h.pread(512, 0)) == 512
"""
    nbdsh(script, server.uri("ram"), connect=False)


@pytest.mark.parametrize("export", ["huge", "wide0", "wide2"])
def test_block_status_of_almost_4_gib(server: Server, export: str) -> None:
    """CVE-2025-47711 and -47712: the largest length that 32 bits can say, on a larger extent."""
    script = """
h.trim(64 << 20, 0)
h.trim(1 << 20, 1 << 39)
h.trim(1 << 20, (1 << 40) - (1 << 20))
for offset in (0, 512, 1 << 39, (1 << 40) - (1 << 32) + 512):
    found = []
    h.block_status(2**32 - 512, offset, lambda name, at, entries, error: found.extend(entries) or 0)
    assert found[1] == 3 and 0 < found[0] <= 2**32 - 512 and found[0] % 512 == 0, found
    assert sum(found[0::2]) >= 2**31, found
"""
    loose(server, export, script)


@pytest.mark.parametrize("export", ["huge", "wide0", "wide2"])
def test_the_whole_terabyte_is_trimmed_and_zeroed_at_once(server: Server, export: str) -> None:
    script = """
import time
T, STEP = 1 << 40, (1 << 32) - (1 << 20)
for place in (0, T // 2, T - (1 << 20)):
    h.pwrite(b"x" * (1 << 20), place)
begun = time.monotonic()
for call in (h.aio_trim, h.aio_zero):
    cookies = [call(min(STEP, T - at), at) for at in range(0, T, STEP)]
    while cookies:
        cookies = [one for one in cookies if not h.aio_command_completed(one)]
        if cookies:
            h.poll(-1)
assert time.monotonic() - begun < 5
for place in (0, T // 2, T - (1 << 20)):
    assert h.pread(1 << 20, place) == bytes(1 << 20)
"""
    loose(server, export, script)


# --- many at once ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("export", ["ram", "file0", "wide2"])
def test_hundreds_of_requests_in_flight(server: Server, export: str) -> None:
    """More than the server takes at once: it must neither lose one nor stop."""
    script = """
COUNT, BLOCK = 400, 16384
def finish(cookies):
    while cookies:
        cookies = [one for one in cookies if not h.aio_command_completed(one)]
        if cookies:
            h.poll(-1)
blocks = [number.to_bytes(4, "big") * (BLOCK // 4) for number in range(COUNT)]
out = [nbd.Buffer.from_bytearray(bytearray(block)) for block in blocks]
finish([h.aio_pwrite(buffer, number * BLOCK) for number, buffer in enumerate(out)])
read = [nbd.Buffer(BLOCK) for _ in blocks]
finish([h.aio_pread(buffer, number * BLOCK) for number, buffer in enumerate(read)] + [h.aio_flush() for _ in range(20)])
assert [bytes(buffer.to_bytearray()) for buffer in read] == blocks
"""
    loose(server, export, script)


def test_a_client_that_does_not_read_its_replies_stops_nobody(server: Server) -> None:
    script = """
h.pwrite(b"d" * (8 << 20), 0)
deaf = nbd.NBD()
deaf.connect_uri(URI)
buffers = [nbd.Buffer(8 << 20) for _ in range(60)]
for buffer in buffers:
    deaf.aio_pread(buffer, 0)
for number in range(200):
    h.pwrite(number.to_bytes(4, "big") * 1024, 4096 * number)
    assert h.pread(4096, 4096 * number) == number.to_bytes(4, "big") * 1024
del deaf
"""
    loose(server, "ram", script)


def test_a_client_that_goes_away_with_requests_in_flight(server: Server) -> None:
    script = """
for round in range(5):
    other = nbd.NBD()
    other.connect_uri(URI)
    for _ in range(50):
        other.aio_pread(nbd.Buffer(1 << 18), 0)
        other.aio_pwrite(nbd.Buffer(1 << 18), 1 << 20)
    del other
h.pwrite(b"z" * 4096, 0)
assert h.pread(4096, 0) == b"z" * 4096
"""
    loose(server, "file0", script)

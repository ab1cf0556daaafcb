"""nbdmap.server.door: every rule of proto.md for what may go in, and with which error it stays out."""

from typing import Final

import pytest

from nbdmap.nbd import constants as nbd
from nbdmap.nbd.constants import MAX_PAYLOAD, Cmd, Error
from nbdmap.nbd.handshake import Export, Session
from nbdmap.nbd.transmission import PayloadRequest, Request
from nbdmap.server.door import Door, Refusal

SIZE: Final = 1 << 30
BLOCK: Final = 512
FUA, DF, NO_HOLE = nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_DF, nbd.CMD_FLAG_NO_HOLE
FAST_ZERO, REQ_ONE, PAYLOAD_LEN = nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_REQ_ONE, nbd.CMD_FLAG_PAYLOAD_LEN
EVERY_FLAG: Final = (FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN, 1 << 6, 1 << 15)
ALL: Final = (
    nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.SEND_FUA | nbd.SEND_TRIM | nbd.SEND_WRITE_ZEROES | nbd.SEND_FAST_ZERO
    | nbd.SEND_CACHE | nbd.SEND_DF | nbd.BLOCK_STATUS_PAYLOAD
)  # fmt: skip
CONTEXTS: Final = {1: nbd.BASE_ALLOCATION}


def door(flags: int = ALL, *, extended: bool = False, contexts: bool = True, size: int = SIZE, block: int = BLOCK) -> Door:
    export = Export("disk", "", size, flags, block, 4096, MAX_PAYLOAD)
    return Door(Session(export, not extended, extended, CONTEXTS if contexts else {}))


def ask(at: Door, command: int, offset: int = 0, length: int = BLOCK, flags: int = 0, oversize: bool = False) -> Refusal | None:
    if command != Cmd.WRITE and not flags & PAYLOAD_LEN:
        return at.check(Request(flags, command, 1, offset, length))
    request = PayloadRequest(flags, command, 1, offset, length)
    request.oversize = oversize
    return at.check(request)


def refused(at: Door, command: int, offset: int = 0, length: int = BLOCK, flags: int = 0, oversize: bool = False) -> Refusal:
    refusal = ask(at, command, offset, length, flags, oversize)
    assert refusal is not None
    assert refusal.text
    return refusal


LEGAL: Final = {
    Cmd.READ: FUA | DF,
    Cmd.WRITE: FUA,
    Cmd.FLUSH: FUA,
    Cmd.TRIM: FUA,
    Cmd.CACHE: FUA,
    Cmd.WRITE_ZEROES: FUA | NO_HOLE | FAST_ZERO,
    Cmd.BLOCK_STATUS: FUA | REQ_ONE,
}


@pytest.mark.parametrize("command", LEGAL)
def test_each_command_takes_its_own_flags_and_no_others(command: Cmd) -> None:
    at = door()
    assert ask(at, command) is None
    for flag in EVERY_FLAG:
        if flag & LEGAL[command]:
            assert ask(at, command, flags=flag) is None
        else:
            assert refused(at, command, flags=flag) == (Error.EINVAL, f"flags {flag:#x} do not belong to {command.name}")
    assert ask(at, command, flags=LEGAL[command]) is None
    assert refused(at, command, flags=LEGAL[command] | 1 << 15).text.startswith("flags 0x8000 ")  # only what is wrong


@pytest.mark.parametrize(
    ("without", "command", "flag"),
    [
        (nbd.SEND_FUA, Cmd.READ, FUA),
        (nbd.SEND_FUA, Cmd.WRITE, FUA),
        (nbd.SEND_FUA, Cmd.FLUSH, FUA),
        (nbd.SEND_FUA, Cmd.BLOCK_STATUS, FUA),
        (nbd.SEND_DF, Cmd.READ, DF),
        (nbd.SEND_FAST_ZERO, Cmd.WRITE_ZEROES, FAST_ZERO),
    ],
)
def test_a_flag_that_was_not_offered_is_refused(without: int, command: Cmd, flag: int) -> None:
    assert refused(door(ALL & ~without), command, flags=flag).error is Error.EINVAL
    assert ask(door(ALL & ~without), command) is None


@pytest.mark.parametrize(
    ("without", "command"),
    [
        (nbd.SEND_FLUSH, Cmd.FLUSH),
        (nbd.SEND_TRIM, Cmd.TRIM),
        (nbd.SEND_WRITE_ZEROES, Cmd.WRITE_ZEROES),
        (nbd.SEND_CACHE, Cmd.CACHE),
    ],
)
def test_a_command_that_was_not_offered_is_refused(without: int, command: Cmd) -> None:
    assert refused(door(ALL & ~without), command) == (Error.EINVAL, f"{command.name} is not offered by this export")


def test_unknown_commands_are_refused() -> None:
    assert refused(door(), 99, length=2**32 - 1) == (Error.EINVAL, "command 99 is unknown")
    assert refused(door(), Cmd.RESIZE) == (Error.EINVAL, "RESIZE is not offered by this export")


@pytest.mark.parametrize("command", [Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES])
@pytest.mark.parametrize("flags", [nbd.HAS_FLAGS | nbd.READ_ONLY, ALL | nbd.READ_ONLY])
def test_nothing_changes_a_read_only_export(command: Cmd, flags: int) -> None:
    assert refused(door(flags), command) == (Error.EPERM, f"{command.name}: the export is read-only")
    assert refused(door(flags), command, offset=SIZE).error is Error.EPERM  # whatever else is wrong with it
    assert ask(door(flags), Cmd.READ) is None


@pytest.mark.parametrize("command", [Cmd.READ, Cmd.WRITE, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES, Cmd.BLOCK_STATUS])
def test_the_range_lies_inside_the_export(command: Cmd) -> None:
    at = door()
    error = Error.ENOSPC if command in (Cmd.WRITE, Cmd.WRITE_ZEROES) else Error.EINVAL
    assert ask(at, command, SIZE - BLOCK, BLOCK) is None
    assert ask(at, command, SIZE, 0) is None
    beyond = [(SIZE, BLOCK), (SIZE - BLOCK, 2 * BLOCK), (SIZE + BLOCK, 0), (2**64 - BLOCK, 2 * BLOCK), (2**64 - 1, 1)]
    for offset, length in beyond:
        refusal = refused(at, command, offset, length)
        assert refusal == (error, f"{command.name} of {length} bytes at {offset} reaches beyond the end, {SIZE}")
    assert refused(door(size=0), command, 0, BLOCK).error is error
    assert ask(door(size=0), command, 0, 0) is None


@pytest.mark.parametrize(("offset", "length"), [(1, BLOCK), (0, 511), (513, 511), (256, 256)])
def test_requests_are_aligned(offset: int, length: int) -> None:
    refusal = refused(door(), Cmd.WRITE, offset, length)
    assert refusal == (Error.EINVAL, f"WRITE of {length} bytes at {offset} is not aligned to blocks of {BLOCK}")
    assert ask(door(block=1), Cmd.WRITE, offset, length) is None
    assert refused(door(block=4096), Cmd.READ, 512, 512).error is Error.EINVAL


def test_payloads_have_a_largest_size() -> None:
    at = door()
    assert ask(at, Cmd.READ, 0, MAX_PAYLOAD) is None
    too_much = f"of {MAX_PAYLOAD + BLOCK} bytes: at most {MAX_PAYLOAD} go in one request"
    assert refused(at, Cmd.READ, 0, MAX_PAYLOAD + BLOCK) == (Error.EINVAL, f"READ {too_much}")
    assert refused(at, Cmd.READ, 0, MAX_PAYLOAD + BLOCK, DF) == (Error.EOVERFLOW, f"READ {too_much}")
    assert refused(at, Cmd.WRITE, 0, MAX_PAYLOAD + BLOCK, oversize=True) == (Error.EINVAL, f"WRITE {too_much}")


@pytest.mark.parametrize("command", [Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES, Cmd.BLOCK_STATUS])
def test_what_moves_no_data_may_be_as_long_as_the_export(command: Cmd) -> None:
    assert ask(door(size=1 << 62, extended=True), command, 0, 1 << 62) is None


def test_block_status_needs_a_context() -> None:
    refusal = refused(door(contexts=False), Cmd.BLOCK_STATUS)
    assert refusal == (Error.EINVAL, "BLOCK_STATUS: no metadata context was negotiated")


def test_payloads_are_announced_only_with_extended_headers() -> None:
    at = door(extended=True)
    assert ask(at, Cmd.WRITE, flags=PAYLOAD_LEN) is None
    assert ask(at, Cmd.BLOCK_STATUS, length=12, flags=PAYLOAD_LEN) is None
    for command in (Cmd.READ, Cmd.FLUSH, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES):
        assert refused(at, command, flags=PAYLOAD_LEN).error is Error.EINVAL
    at = door(ALL & ~nbd.BLOCK_STATUS_PAYLOAD, extended=True)
    assert refused(at, Cmd.BLOCK_STATUS, 0, 12, PAYLOAD_LEN).error is Error.EINVAL


@pytest.mark.parametrize("length", [0, 4, 8, 11, 13, 14])
def test_a_block_status_payload_is_a_length_and_ids(length: int) -> None:
    refusal = refused(door(extended=True), Cmd.BLOCK_STATUS, 0, length, PAYLOAD_LEN)
    assert refusal == (Error.EINVAL, f"BLOCK_STATUS: a payload of {length} bytes is not a length and context ids")


def test_a_block_status_payload_is_not_the_length_of_the_range() -> None:
    at = door(size=BLOCK, extended=True)
    assert ask(at, Cmd.BLOCK_STATUS, 0, 8 + 4 * 1000, PAYLOAD_LEN) is None
    assert refused(at, Cmd.BLOCK_STATUS, 0, MAX_PAYLOAD + 12, PAYLOAD_LEN, oversize=True).error is Error.EINVAL
    assert refused(at, Cmd.BLOCK_STATUS, 2 * BLOCK, 12, PAYLOAD_LEN).error is Error.EINVAL  # begins beyond the end

"""The door of an export: each request is checked here once, against what was negotiated; inside it is trusted.

The rules are proto.md's: a flag that is not documented for a command, a command that was not advertised and a range
beyond the export are answered with the right error and change nothing; a request for nothing succeeds.
"""

from typing import Final, NamedTuple

from nbdmap.nbd import constants as nbd
from nbdmap.nbd.constants import MAX_PAYLOAD, Cmd, Error
from nbdmap.nbd.handshake import Session
from nbdmap.nbd.transmission import Request

READ: Final = int(Cmd.READ)
WRITE: Final = int(Cmd.WRITE)
TRIM: Final = int(Cmd.TRIM)
WRITE_ZEROES: Final = int(Cmd.WRITE_ZEROES)
BLOCK_STATUS: Final = int(Cmd.BLOCK_STATUS)
_CHANGING: Final = frozenset((WRITE, TRIM, WRITE_ZEROES))


class Refusal(NamedTuple):
    """Why a request is not let in."""

    error: Error
    text: str


class Door:
    """Checks the requests of one session. `sizes` are those the client was told, even if the device changes later."""

    def __init__(self, session: Session) -> None:
        export = session.export
        self._size = export.size
        self._block_mask = export.minimum_block - 1
        self._block = export.minimum_block
        self._read_only = bool(export.flags & nbd.READ_ONLY)
        self._has_contexts = bool(session.contexts)
        self._allowed = _allowed_flags(session)

    def check(self, request: Request) -> Refusal | None:
        """None if the request may go in."""
        command, length = request.command, request.length
        allowed = self._allowed.get(command)
        if allowed is None:
            return self._unknown(command)
        if request.flags & ~allowed:
            return Refusal(Error.EINVAL, f"flags {request.flags & ~allowed:#x} do not belong to {Cmd(command).name}")
        if command == BLOCK_STATUS and request.flags & nbd.CMD_FLAG_PAYLOAD_LEN:
            if length < 12 or length % 4 or request.oversize:
                return Refusal(Error.EINVAL, f"BLOCK_STATUS: a payload of {length} bytes is not a length and context ids")
            length = 0  # that of the payload; the range stands in it
        if command in _CHANGING:
            if self._read_only:
                return Refusal(Error.EPERM, f"{Cmd(command).name}: the export is read-only")
            if request.oversize:
                return Refusal(Error.EINVAL, f"WRITE of {length} bytes: at most {MAX_PAYLOAD} go in one request")
        elif command == READ and length > MAX_PAYLOAD:
            error = Error.EOVERFLOW if request.flags & nbd.CMD_FLAG_DF else Error.EINVAL
            return Refusal(error, f"READ of {length} bytes: at most {MAX_PAYLOAD} go in one request")
        if length > self._size or request.offset > self._size - length:
            error = Error.ENOSPC if command in (WRITE, WRITE_ZEROES) else Error.EINVAL
            text = f"{Cmd(command).name} of {length} bytes at {request.offset} reaches beyond the end, {self._size}"
            return Refusal(error, text)
        if (request.offset | length) & self._block_mask:
            text = f"{Cmd(command).name} of {length} bytes at {request.offset} is not aligned to blocks of {self._block}"
            return Refusal(Error.EINVAL, text)
        if command == BLOCK_STATUS and not self._has_contexts:
            return Refusal(Error.EINVAL, "BLOCK_STATUS: no metadata context was negotiated")
        return None

    def _unknown(self, command: int) -> Refusal:
        if command in _CHANGING and self._read_only:
            return Refusal(Error.EPERM, f"{Cmd(command).name}: the export is read-only")
        try:
            return Refusal(Error.EINVAL, f"{Cmd(command).name} is not offered by this export")
        except ValueError:
            return Refusal(Error.EINVAL, f"command {command} is unknown")


def _allowed_flags(session: Session) -> dict[int, int]:
    """For each command that is offered, the flags that may be set."""
    flags = session.export.flags
    fua = nbd.CMD_FLAG_FUA if flags & nbd.SEND_FUA else 0
    fast = nbd.CMD_FLAG_FAST_ZERO if flags & nbd.SEND_FAST_ZERO else 0
    payload = nbd.CMD_FLAG_PAYLOAD_LEN if session.extended else 0
    status_payload = payload if flags & nbd.BLOCK_STATUS_PAYLOAD else 0
    allowed = {
        int(Cmd.READ): fua | (nbd.CMD_FLAG_DF if flags & nbd.SEND_DF else 0),
        int(Cmd.WRITE): fua | payload,
        int(Cmd.BLOCK_STATUS): fua | nbd.CMD_FLAG_REQ_ONE | status_payload,
    }
    if flags & nbd.SEND_FLUSH:
        allowed[int(Cmd.FLUSH)] = fua
    if flags & nbd.SEND_TRIM:
        allowed[int(Cmd.TRIM)] = fua
    if flags & nbd.SEND_WRITE_ZEROES:
        allowed[int(Cmd.WRITE_ZEROES)] = fua | nbd.CMD_FLAG_NO_HOLE | fast
    if flags & nbd.SEND_CACHE:
        allowed[int(Cmd.CACHE)] = fua
    return allowed

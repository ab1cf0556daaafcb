"""The numbers of the NBD protocol (NetworkBlockDevice/nbd, doc/proto.md), named as there without the NBD_ prefix."""

from enum import IntEnum
from struct import Struct
from typing import Final

# --- handshake --------------------------------------------------
INIT_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
OLDSTYLE_MAGIC: Final = 0x00420281861253
REPLY_MAGIC: Final = 0x3E889045565A9

FLAG_FIXED_NEWSTYLE: Final = 1
FLAG_NO_ZEROES: Final = 2

GREETING: Final = Struct(">QQH")  # INIT_MAGIC, OPTION_MAGIC, handshake flags
OPTION: Final = Struct(">QII")  # OPTION_MAGIC, option, length
OPTION_REPLY: Final = Struct(">QIII")  # REPLY_MAGIC, option, reply type, length

MAX_STRING: Final = 4096


class Opt(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Rep(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 2**31 + 1
    ERR_POLICY = 2**31 + 2
    ERR_INVALID = 2**31 + 3
    ERR_PLATFORM = 2**31 + 4
    ERR_TLS_REQD = 2**31 + 5
    ERR_UNKNOWN = 2**31 + 6
    ERR_SHUTDOWN = 2**31 + 7
    ERR_BLOCK_SIZE_REQD = 2**31 + 8
    ERR_TOO_BIG = 2**31 + 9
    ERR_EXT_HEADER_REQD = 2**31 + 10


class Info(IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


# --- transmission flags --------------------------------------------------
HAS_FLAGS: Final = 1 << 0
READ_ONLY: Final = 1 << 1
SEND_FLUSH: Final = 1 << 2
SEND_FUA: Final = 1 << 3
ROTATIONAL: Final = 1 << 4
SEND_TRIM: Final = 1 << 5
SEND_WRITE_ZEROES: Final = 1 << 6
SEND_DF: Final = 1 << 7
CAN_MULTI_CONN: Final = 1 << 8
SEND_RESIZE: Final = 1 << 9
SEND_CACHE: Final = 1 << 10
SEND_FAST_ZERO: Final = 1 << 11
BLOCK_STATUS_PAYLOAD: Final = 1 << 12


# --- transmission --------------------------------------------------
class Cmd(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


CMD_FLAG_FUA: Final = 1
CMD_FLAG_NO_HOLE: Final = 2
CMD_FLAG_DF: Final = 4
CMD_FLAG_REQ_ONE: Final = 8
CMD_FLAG_FAST_ZERO: Final = 16
CMD_FLAG_PAYLOAD_LEN: Final = 32

REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

REQUEST: Final = Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
EXTENDED_REQUEST: Final = Struct(">IHHQQQ")
SIMPLE_REPLY: Final = Struct(">IIQ")  # magic, error, cookie
STRUCTURED_REPLY: Final = Struct(">IHHQI")  # magic, flags, type, cookie, length
EXTENDED_REPLY: Final = Struct(">IHHQQQ")  # magic, flags, type, cookie, offset, length

REPLY_FLAG_DONE: Final = 1


class Chunk(IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 2**15 + 1
    ERROR_OFFSET = 2**15 + 2


BASE_ALLOCATION: Final = "base:allocation"
STATE_HOLE: Final = 1
STATE_ZERO: Final = 2

DEFAULT_PORT: Final = 10809
MAX_PAYLOAD: Final = 32 << 20
"""The largest payload of a request or reply, in bytes; the maximum block size that is advertised."""


class Error(IntEnum):
    """The only errors that may be sent; the values are Linux's errnos."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108

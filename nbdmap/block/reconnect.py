"""What makes a remote disk outlive its connections: the policy of connecting again, requests that may take several
connections, and whether a server that comes back is still the same."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from nbdmap.block.device import Device
from nbdmap.nbd import constants as nbd
from nbdmap.nbd.client import Agreement
from nbdmap.nbd.constants import Cmd
from nbdmap.nbd.replies import Request
from nbdmap.units import round_down

_ABILITIES: Final = (
    nbd.SEND_FLUSH
    | nbd.SEND_FUA
    | nbd.SEND_TRIM
    | nbd.SEND_WRITE_ZEROES
    | nbd.SEND_CACHE
    | nbd.SEND_FAST_ZERO
)


@dataclass(frozen=True, slots=True)
class Reconnect:
    """How to connect again: at once, then with pauses from `first_pause_s`, doubled up to `longest_pause_s`, each with jitter.

    Requests wait `deadline_s` from the loss of the connection that carried them. A connection whose oldest request has got no
    answer for `silence_s` (None: for ever) is given up as lost. The functions are for tests.
    """

    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0
    deadline_s: float = 10.0
    silence_s: float | None = None
    random: Callable[[], float] = random.random
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    clock: Callable[[], float] = time.monotonic


class Waiting(Request):
    """A request of this disk: `answer` is done when it is finished, `lost_at` when its connection was lost first."""

    __slots__ = ("answer", "lost_at", "mark")

    def __init__(self, command: Cmd, offset: int, length: int, data: memoryview, flags: int) -> None:
        super().__init__(command, offset, length, data, flags)
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost_at: float | None = None
        self.mark = 0

    def end(self, error: Exception | None = None) -> None:
        if not self.answer.done():
            if error is None:
                self.answer.set_result(None)
            else:
                self.answer.set_exception(error)


def difference(old: Agreement, new: Agreement, disk: Device) -> str:
    """What forbids `disk` to go on with a server after another agreement, or "" for nothing."""
    if new.size != old.size:
        return f"it had {old.size} bytes and has {new.size}"
    if new.flags & nbd.READ_ONLY and not disk.read_only:
        return "it has become read-only"
    if old.flags & _ABILITIES & ~new.flags:
        return f"its flags were {old.flags:#x} and are {new.flags:#x}"
    block = disk.limits.logical_block
    if new.minimum_block > block or new.maximum_block < round_down(min(old.maximum_block, nbd.MAX_PAYLOAD), block):
        return f"it takes requests of {new.minimum_block} to {new.maximum_block} bytes"
    return ""

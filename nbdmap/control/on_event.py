"""The program of `on_event`: run once for every uevent, with the event's keys in its environment.

    on_event: [/usr/local/bin/path-event, --mail]     # ACTION, DM_NAME, DM_ACTION, DM_PATH, ... as `nbdmap events` prints them

Programs start in the order of the events and run side by side, at most MAX_RUNNING at once; events that wait meanwhile are
limited as those of any listener. One that takes longer than PROGRAM_SECONDS is killed, and so are all at the end, each with
the processes it started.
$NBDMAP_SOCKET is the admin socket. A program that fails is told in the log, and nothing else happens.
"""

import asyncio
import logging
import os
import signal
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

from nbdmap.control.events import Events

MAX_RUNNING: Final = 4
PROGRAM_SECONDS: Final = 60.0
STOP_SECONDS: Final = 0.3
"""What programs have after SIGTERM when the server stops; then they are killed."""

log = logging.getLogger(__name__)


class EventProgram:
    """Runs `command`, if there is one, for the events from now on."""

    def __init__(self, events: Events, command: tuple[str, ...] | None) -> None:
        self.command = command
        """The program and its arguments; may be changed."""
        self.socket = ""
        """The path of the admin socket."""
        self._events = events
        self._listener = events.subscribe()
        self._running: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Runs programs until it is cancelled; then ends those that still run."""
        free = asyncio.Semaphore(MAX_RUNNING)
        try:
            while True:
                event = await self._listener.next()
                if self.command is None:
                    continue
                await free.acquire()
                task = asyncio.get_running_loop().create_task(self._run_one(self.command, event))
                self._running.add(task)
                task.add_done_callback(self._running.discard)
                task.add_done_callback(lambda _: free.release())
        finally:
            self._events.unsubscribe(self._listener)
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def _run_one(self, command: tuple[str, ...], event: Mapping[str, str]) -> None:
        environment = {**os.environ, **event, **({"NBDMAP_SOCKET": self.socket} if self.socket else {})}
        try:
            process = await asyncio.create_subprocess_exec(
                *command, env=environment, stdin=DEVNULL, start_new_session=True
            )
        except (OSError, ValueError) as error:
            log.error("on_event: %s: %s", command[0], error)
            return
        try:
            async with asyncio.timeout(PROGRAM_SECONDS):
                status = await process.wait()
        except TimeoutError:
            log.error("on_event: %s took longer than %g s and was killed", command[0], PROGRAM_SECONDS)
            await _kill(process, signal.SIGKILL)
        except asyncio.CancelledError:
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_SECONDS):
                    await _kill(process, signal.SIGTERM)
            await _kill(process, signal.SIGKILL)
            raise
        else:
            if status:
                log.warning("on_event: %s ended with status %d", command[0], status)


async def _kill(process: Process, number: signal.Signals) -> None:
    """Sends a signal to the program and what it has started, and waits for its end."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    await process.wait()

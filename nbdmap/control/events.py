"""Uevents: what happens to mapped devices, as key and value pairs, for whoever listens.

The keys are those of the kernel's dm-uevent and block uevents: ACTION, DEVPATH, SUBSYSTEM, DM_NAME, DM_UUID, DM_SEQNUM,
MAJOR, MINOR, SEQNUM, and DM_TARGET, DM_ACTION, DM_PATH, DM_NR_VALID_PATHS where a target adds them. A listener that
does not keep up loses the oldest events and is told how many.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final

from nbdmap.dm.device import MappedDevice

MAX_WAITING: Final = 1024
"""Events kept for one listener that does not read."""


class Listener:
    """One subscriber's queue, bounded."""

    def __init__(self) -> None:
        self._events: deque[dict[str, str]] = deque()
        self._lost = 0
        self._arrived = asyncio.Event()

    def put(self, event: dict[str, str]) -> None:
        """Adds an event; the oldest goes when MAX_WAITING are waiting."""
        if len(self._events) == MAX_WAITING:
            self._events.popleft()
            self._lost += 1
        self._events.append(event)
        self._arrived.set()

    async def next(self) -> dict[str, str]:
        """Waits for the next event. LOST is the number of events that were dropped before it."""
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        if self._lost:
            event = {**event, "LOST": str(self._lost)}
            self._lost = 0
        return event


class Events:
    """Numbers events and hands them to every listener. `clock` gives seconds, for the time stamps."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._number = 0
        self._listeners: list[Listener] = []

    def publish(self, device: MappedDevice, action: str, keys: Mapping[str, str]) -> None:
        """Makes one event of `device`; `action` is add, change or remove."""
        self._number += 1
        major, minor = device.number.split(":")
        event = {"TIMESTAMP": f"{self._clock():.6f}", "ACTION": action, "DEVPATH": f"/block/dm-{minor}", "SUBSYSTEM": "block"}
        event |= keys
        event |= {"DM_NAME": device.name, "DM_UUID": device.uuid, "MINOR": minor, "MAJOR": major, "SEQNUM": str(self._number)}
        for listener in self._listeners:
            listener.put(event)

    def subscribe(self) -> Listener:
        """A listener that gets the events from now on, until `unsubscribe`."""
        listener = Listener()
        self._listeners.append(listener)
        return listener

    def unsubscribe(self, listener: Listener) -> None:
        """It gets no more."""
        self._listeners.remove(listener)

    async def listen(self) -> AsyncIterator[dict[str, str]]:
        """The events from now on, until the iterator is closed."""
        listener = self.subscribe()
        try:
            while True:
                yield await listener.next()
        finally:
            self.unsubscribe(listener)

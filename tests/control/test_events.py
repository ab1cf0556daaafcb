"""nbdmap.control.events: what an event says, who gets it, and what slow listeners lose."""

import asyncio

import pytest

from nbdmap.control import events as module
from nbdmap.control.events import Events, Listener
from nbdmap.dm.device import MappedDevice
from tests.support.disks import Uevents


def device(name: str = "joined", uuid: str = "LVM-x", minor: int = 3) -> MappedDevice:
    return MappedDevice(name, uuid, f"254:{minor}", {}, Uevents())


def numbers(listener: Listener) -> list[str]:
    return [event["SEQNUM"] for event in listener._events]


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_what_an_event_says() -> None:
    now = iter([1.5, 2.25])
    events = Events(lambda: next(now))
    listening = events.listen()
    first = asyncio.ensure_future(anext(listening))
    await turns()
    events.publish(device(), "add", {})
    events.publish(device(), "change", {"DM_TARGET": "multipath", "DM_ACTION": "PATH_FAILED", "DM_SEQNUM": "1"})
    assert await first == {
        "TIMESTAMP": "1.500000", "ACTION": "add", "DEVPATH": "/block/dm-3", "SUBSYSTEM": "block",
        "DM_NAME": "joined", "DM_UUID": "LVM-x", "MINOR": "3", "MAJOR": "254", "SEQNUM": "1",
    }  # fmt: skip
    second = await anext(listening)
    assert list(second) == [
        "TIMESTAMP", "ACTION", "DEVPATH", "SUBSYSTEM", "DM_TARGET", "DM_ACTION", "DM_SEQNUM",
        "DM_NAME", "DM_UUID", "MINOR", "MAJOR", "SEQNUM",
    ]  # fmt: skip
    assert (second["TIMESTAMP"], second["SEQNUM"]) == ("2.250000", "2")
    await listening.aclose()  # type: ignore[attr-defined]


async def test_every_listener_gets_what_happens_while_it_listens() -> None:
    events = Events(lambda: 0.0)
    events.publish(device("before"), "add", {})
    listening = [events.listen() for _ in range(2)]
    waiting = [asyncio.ensure_future(anext(one)) for one in listening]
    await turns()
    events.publish(device("a"), "add", {})
    events.publish(device("b"), "add", {})
    for one, first in zip(listening, waiting, strict=True):
        assert (await first)["DM_NAME"] == "a"
        assert (await anext(one))["DM_NAME"] == "b"
    for one in listening:
        await one.aclose()  # type: ignore[attr-defined]
    assert events._listeners == []
    events.publish(device("after"), "remove", {})


async def test_a_listener_that_is_cancelled_is_forgotten() -> None:
    events = Events(lambda: 0.0)
    waiting = asyncio.ensure_future(anext(events.listen()))
    await turns()
    assert len(events._listeners) == 1
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert events._listeners == []


async def test_a_slow_listener_loses_the_oldest_and_is_told_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    events, slow, quick = Events(lambda: 0.0), Listener(), Listener()
    events._listeners += [slow, quick]
    for number in range(1, 6):
        events.publish(device(), "change", {})
        assert (await quick.next())["SEQNUM"] == str(number)
    assert numbers(slow) == ["3", "4", "5"]
    told = await slow.next()
    assert (told["SEQNUM"], told["LOST"]) == ("3", "2")
    assert "LOST" not in await slow.next()  # told once
    events.publish(device(), "change", {})
    events.publish(device(), "change", {})
    events.publish(device(), "change", {})
    assert [(event["SEQNUM"], event.get("LOST")) for event in [await slow.next() for _ in range(3)]] == [
        ("6", "1"), ("7", None), ("8", None),
    ]  # fmt: skip
    assert numbers(quick) == ["6", "7", "8"]
    assert all("LOST" not in event for event in quick._events)  # what one lost is not told to another


async def test_nothing_is_lost_when_a_wait_is_cancelled() -> None:
    listener = Listener()
    waiting = asyncio.ensure_future(listener.next())
    await turns()
    listener.put({"SEQNUM": "1"})
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await listener.next() == {"SEQNUM": "1"}


async def test_two_readers_of_one_listener_each_get_their_own() -> None:
    listener = Listener()
    waiting = [asyncio.ensure_future(listener.next()) for _ in range(2)]
    await turns()
    listener.put({"SEQNUM": "1"})
    await turns()
    listener.put({"SEQNUM": "2"})
    assert [event["SEQNUM"] for event in await asyncio.gather(*waiting)] == ["1", "2"]

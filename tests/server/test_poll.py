"""nbdmap.server.poll: the loop does not sleep between two requests that come quickly."""

import asyncio
from dataclasses import dataclass

from nbdmap.server.poll import BusyPoll
from tests.support.nbd import Client, serving


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_one_request_by_itself_is_not_waited_for() -> None:
    poll = BusyPoll(100e-6, Clock(), cores=2)
    poll.served(0)
    assert not poll.active


async def test_after_a_quick_one_the_loop_stays_awake_for_so_long() -> None:
    clock = Clock()
    poll = BusyPoll(100e-6, clock, cores=2)
    poll.served(0)
    clock.now += 99e-6
    poll.served(0)
    assert poll.active
    clock.now += 99e-6
    await turns()
    assert poll.active
    clock.now += 2e-6
    await turns()
    assert not poll.active


async def test_each_quick_one_begins_it_anew() -> None:
    clock = Clock()
    poll = BusyPoll(100e-6, clock, cores=2)
    for _ in range(5):
        poll.served(0)
        await turns()
        clock.now += 90e-6
    await turns()
    assert poll.active


async def test_slow_ones_let_it_sleep() -> None:
    clock = Clock()
    poll = BusyPoll(100e-6, clock, cores=2)
    for _ in range(5):
        poll.served(0)
        assert not poll.active
        clock.now += 101e-6


async def test_what_waits_for_a_thread_ends_it() -> None:
    clock = Clock()
    poll = BusyPoll(100e-6, clock, cores=2)
    poll.served(0)
    poll.served(0)
    assert poll.active
    poll.served(1)
    await turns()
    assert not poll.active


async def test_a_single_core_is_left_to_the_client() -> None:
    poll = BusyPoll(100e-6, Clock(), cores=1)
    poll.served(0)
    poll.served(0)
    assert not poll.active


async def test_nobody_polls_unless_told_to() -> None:
    poll = BusyPoll(0.0, Clock(), cores=2)
    poll.served(0)
    poll.served(0)
    assert not poll.active


async def test_a_client_with_one_request_at_a_time_is_polled_for() -> None:
    async with serving() as stack:
        stack.listener.poll.seconds = 3600.0
        await stack.add("zero", "0 8 zero")
        client = await (await Client.connect(stack.socket)).greet()
        await client.go("zero")
        for cookie in range(3):
            client.ask(0, cookie, 0, 512)
            assert await client.simple(512) == (0, cookie, bytes(512))
        if not stack.listener.poll._alone:
            assert stack.listener.poll.active
        stack.listener.poll.served(1)

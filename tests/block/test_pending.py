"""nbdmap.block.io: what `submit` returns, in each of its kinds."""

import asyncio
from functools import partial
from typing import Any

import pytest

from nbdmap.block.io import DONE, READ, Continued, Deferred, Failed, Io, Pending, Plug, run_all
from nbdmap.errors import IoFailed


async def test_done_can_be_awaited_again_and_again() -> None:
    await DONE
    await DONE
    await asyncio.create_task(DONE)
    with pytest.raises(StopIteration):
        DONE.send(None)
    assert run_all([DONE, DONE]) is DONE


async def test_failed_raises_however_it_is_run() -> None:
    with pytest.raises(IoFailed, match="broken"):
        await Failed(IoFailed("broken"))
    with pytest.raises(IoFailed, match="broken"):
        Failed(IoFailed("broken")).send(None)
    with pytest.raises(IoFailed, match="broken"):
        await asyncio.create_task(Failed(IoFailed("broken")))
    with pytest.raises(IoFailed, match="first"):
        await run_all([DONE, Failed(IoFailed("first")), Failed(IoFailed("second"))])


async def test_deferred_calls_back_in_order_and_at_once_when_it_has_ended() -> None:
    seen: list[tuple[str, BaseException | None]] = []
    pending = Deferred()
    pending.then(lambda error: seen.append(("a", error)))
    pending.then(lambda error: seen.append(("b", error)))
    error = IoFailed("late")
    pending.finish(error)
    pending.then(lambda error: seen.append(("c", error)))
    assert seen == [("a", error), ("b", error), ("c", error)]


async def test_deferred_is_awaited_like_a_coroutine() -> None:
    pending, failing, over = Deferred(), Deferred(), Deferred()
    over.finish()
    asyncio.get_running_loop().call_soon(pending.finish)
    asyncio.get_running_loop().call_soon(failing.finish, IoFailed("late"))
    await over
    await pending
    with pytest.raises(IoFailed, match="late"):
        await failing


async def test_deferred_goes_on_in_a_task() -> None:
    pending = Deferred()
    yielded = pending.send(None)
    task: asyncio.Task[None] = asyncio.create_task(Continued(pending, yielded))
    await asyncio.sleep(0)
    assert not task.done()
    pending.finish()
    await task


async def test_a_cancelled_wait_for_a_deferred_lasts_until_it_has_ended() -> None:
    """Its buffer is in use until then."""
    asked: list[int] = []
    pending = Deferred(lambda: asked.append(1))
    task: asyncio.Task[None] = asyncio.ensure_future(pending)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert asked == [1]
    assert not task.done()
    pending.finish()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_run_all_with_deferred_and_failed() -> None:
    first, second = Deferred(), Deferred()
    running: asyncio.Task[Any] = asyncio.ensure_future(run_all([first, DONE, second]))
    await asyncio.sleep(0)
    second.finish(IoFailed("the second"))
    await asyncio.sleep(0)
    assert not running.done()
    first.finish()
    with pytest.raises(IoFailed, match="the second"):
        await running


def test_plug_runs_what_was_parked_and_what_that_parks() -> None:
    plug = Plug()
    seen: list[str] = []

    def outer() -> None:
        seen.append("outer")
        assert plug.active
        plug.add(lambda: seen.append("inner"))

    plug.active = True
    plug.add(outer)
    plug.add(lambda: seen.append("second"))
    plug.pull()
    assert seen == ["outer", "second", "inner"]
    assert not plug.active


def test_pulling_the_plug_runs_all_and_raises_the_last_failure() -> None:
    plug = Plug()
    seen: list[str] = []

    def broken(name: str) -> None:
        seen.append(name)
        raise RuntimeError(name)

    plug.active = True
    plug.add(partial(broken, "first"))
    plug.add(partial(broken, "second"))
    plug.add(lambda: seen.append("third"))
    with pytest.raises(RuntimeError, match="second"):
        plug.pull()
    assert seen == ["first", "second", "third"]
    assert not plug.active
    plug.pull()  # all is done


def test_a_part_keeps_the_plug() -> None:
    plug = Plug()
    io = Io(READ, 1024, memoryview(bytearray(1024)), 0, plug)
    assert io.part(512, 512).plug is plug
    assert not Io(READ, 1024).plug.active
    plug.active = True
    alone = io.unplugged()
    assert not alone.plug.active
    assert (alone.op, alone.length, alone.data, alone.flags) == (READ, 1024, io.data, 0)


async def test_a_deferred_follows_whatever_it_is_given() -> None:
    def ended(pending: Pending) -> Deferred:
        deferred = Deferred()
        deferred.follow(pending)
        return deferred

    async def fails() -> None:
        raise IoFailed("at once")

    async def waits(gate: asyncio.Event, error: Exception | None = None) -> None:
        await gate.wait()
        if error:
            raise error

    assert ended(DONE).ended
    for failed in (ended(Failed(IoFailed("at once"))), ended(fails())):
        with pytest.raises(IoFailed, match="at once"):
            await failed
    below = Deferred()
    above = ended(below)
    assert not above.ended
    below.finish()
    assert above.ended
    gate = asyncio.Event()
    good, bad = ended(waits(gate)), ended(waits(gate, IoFailed("later")))
    assert (good.ended, bad.ended) == (False, False)
    gate.set()
    await good
    with pytest.raises(IoFailed, match="later"):
        await bad


async def test_a_cancellation_reaches_what_is_followed() -> None:
    below = Deferred()
    below.on_cancel = below.finish
    above = Deferred()
    above.follow(below)
    above.cancel()
    assert (below.ended, above.ended) == (True, True)
    waiting = Deferred()
    waiting.follow(asyncio.Event().wait())  # type: ignore[arg-type]
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

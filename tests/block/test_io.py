import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from nbdmap.block.io import DISCARD, FLUSH, FUA, READ, WRITE, Continued, Io, Op, Pending, run_all

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    runner: Run = request.param
    return runner


async def eagerly(request: Pending) -> None:
    """What a connection does with a request that waits, in one place."""
    try:
        yielded = request.send(None)
    except StopIteration:
        return
    await asyncio.create_task(Continued(request, yielded))


async def wait_in_executor() -> None:
    await asyncio.get_running_loop().run_in_executor(None, int)


async def wait_for_sleep() -> None:
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def wait_for_gather() -> None:
    await asyncio.gather(wait_for_sleep(), wait_in_executor())


async def wait_for_event() -> None:
    event = asyncio.Event()
    asyncio.get_running_loop().call_soon(event.set)
    await event.wait()


async def wait_for_shield() -> None:
    await asyncio.shield(asyncio.ensure_future(wait_for_sleep()))


async def wait_with_timeout() -> None:
    await asyncio.sleep(0)  # has a task of its own from here on
    async with asyncio.timeout(10):
        await wait_in_executor()


WAITS = [wait_in_executor, wait_for_sleep, wait_for_gather, wait_for_event, wait_for_shield, wait_with_timeout]


def test_an_io_is_what_it_was_made_of() -> None:
    io = Io(READ, 512)
    assert (io.op, io.length, len(io.data), io.flags) == (Op.READ, 512, 0, 0)
    assert repr(Io(WRITE, 4096, flags=FUA)) == "Io(WRITE, 4096, flags=0x1)"


def test_a_part_shares_the_buffer() -> None:
    buffer = bytearray(8)
    part = Io(WRITE, 8, memoryview(buffer), FUA).part(2, 4)
    part.data[:] = b"abcd"
    assert buffer == b"\0\0abcd\0\0"
    assert (part.op, part.length, part.flags) == (WRITE, 4, FUA)
    assert Io(DISCARD, 8, flags=FUA).part(2, 4).length == 4
    assert len(Io(FLUSH, 0).part(0, 0).data) == 0


@pytest.mark.parametrize("wait", WAITS)
def test_a_request_that_waits_is_continued_in_a_task(run: Run, wait: Callable[[], Pending]) -> None:
    steps: list[object] = []

    async def request() -> None:
        steps.append("begun")
        await wait()
        steps.append(asyncio.current_task())
        await wait()
        steps.append("ended")

    async def main() -> None:
        await eagerly(request())
        assert steps[0] == "begun"
        assert steps[1] is not asyncio.current_task()
        assert steps[2] == "ended"

    run(main())


@pytest.mark.parametrize("wait", WAITS)
def test_an_error_after_waiting_reaches_who_awaits(run: Run, wait: Callable[[], Pending]) -> None:
    async def request() -> None:
        await wait()
        raise ValueError("late")

    async def main() -> None:
        with pytest.raises(ValueError, match="late"):
            await eagerly(request())

    run(main())


def test_an_error_of_what_is_waited_for_reaches_the_request(run: Run) -> None:
    seen: list[str] = []

    async def request(future: asyncio.Future[None]) -> None:
        try:
            await future
        except OSError as error:
            seen.append(str(error))
            await asyncio.sleep(0)

    async def main() -> None:
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_exception, OSError("bad"))
        await eagerly(request(future))
        assert seen == ["bad"]

    run(main())


def test_locks_taken_eagerly_exclude_and_are_given_in_order(run: Run) -> None:
    order: list[int] = []
    inside = 0

    async def request(lock: asyncio.Lock, number: int) -> None:
        nonlocal inside
        async with lock:
            assert inside == 0
            inside += 1
            await asyncio.sleep(0)
            inside -= 1
            order.append(number)

    async def main() -> None:
        lock = asyncio.Lock()
        await run_all(request(lock, number) for number in range(5))
        assert not lock.locked()
        assert order == list(range(5))

    run(main())


def test_a_request_can_be_cancelled_after_it_waited(run: Run) -> None:
    steps: list[str] = []

    async def request() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # cleaning up may wait
            steps.append("cleaned up")
            raise

    async def main() -> None:
        pending = request()
        task: asyncio.Task[None] = asyncio.create_task(Continued(pending, pending.send(None)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert steps == ["cleaned up"]

    run(main())


def test_a_request_whose_task_is_cancelled_before_it_runs_is_told(run: Run) -> None:
    told: list[str] = []

    async def request() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            told.append("cancelled")
            raise

    async def main() -> None:
        pending = request()
        task: asyncio.Task[None] = asyncio.create_task(Continued(pending, pending.send(None)))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        pending.close()
        assert told == ["cancelled"]

    run(main())


async def test_dropping_a_continued_request_closes_it() -> None:
    steps: list[str] = []

    async def request() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            steps.append("closed")

    pending = request()
    continued = Continued(pending, pending.send(None))
    continued.send(None)
    continued.close()
    assert steps == ["closed"]


def test_run_all_starts_in_order_and_waits_for_all(run: Run) -> None:
    started: list[int] = []
    ended: set[int] = set()

    async def request(number: int) -> None:
        started.append(number)
        if number % 2:
            await (wait_in_executor if number % 4 == 1 else wait_for_sleep)()
        ended.add(number)

    async def main() -> None:
        await run_all(request(number) for number in range(10))
        assert started == list(range(10))
        assert ended == set(range(10))

    run(main())


def test_run_all_of_requests_that_do_not_wait_is_done_at_once() -> None:
    async def request() -> None:
        pass

    with pytest.raises(StopIteration):
        run_all([request() for _ in range(3)]).send(None)
    with pytest.raises(StopIteration):
        run_all([]).send(None)


@pytest.mark.parametrize(
    ("early", "late", "first"), [(True, False, "early"), (False, True, "late 1"), (True, True, "early")]
)
def test_run_all_raises_the_first_error_when_all_have_ended(run: Run, early: bool, late: bool, first: str) -> None:
    ended: list[str] = []

    async def at_once(fails: bool) -> None:
        if fails:
            raise ValueError("early")

    async def later(number: int, fails: bool) -> None:
        for _ in range(number):
            await asyncio.sleep(0)
        ended.append(f"late {number}")
        if fails:
            raise ValueError(f"late {number}")

    async def main() -> None:
        with pytest.raises(ValueError, match=first):
            await run_all([later(1, late), at_once(early), later(5, late), at_once(False)])
        assert ended == ["late 1", "late 5"]

    run(main())


def test_cancelling_run_all_cancels_and_waits_for_those_that_wait(run: Run) -> None:
    cleaned_up: list[int] = []

    async def request(number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned_up.append(number)

    async def main() -> None:
        task = asyncio.create_task(run_all(request(number) for number in range(3)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cleaned_up == [0, 1, 2]

    run(main())


def test_run_all_can_itself_be_run_eagerly_and_nested(run: Run) -> None:
    ended: list[int] = []
    main_thread = threading.get_ident()

    async def leaf(number: int) -> None:
        await wait_in_executor()
        assert threading.get_ident() == main_thread
        ended.append(number)

    async def main() -> None:
        await eagerly(run_all(run_all(leaf(outer * 3 + inner) for inner in range(3)) for outer in range(3)))
        assert sorted(ended) == list(range(9))

    run(main())

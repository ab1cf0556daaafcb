import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from nbdmap.block.threads import MAX_THREADS, Threads
from tests.support.gate import Gate


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("nbdmap")]


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_job_runs_in_a_thread_named_after_the_device(run: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    async def main() -> None:
        threads = Threads("sda")
        assert names() == []
        assert await threads.run(threading.current_thread) is not threading.main_thread()
        assert names() == ["nbdmap sda_0"]
        with pytest.raises(ZeroDivisionError):
            await threads.run(divmod, 1, 0)
        await threads.close()
        assert names() == []

    run(main())


async def test_there_are_at_most_so_many_threads() -> None:
    threads = Threads("sda")
    gate = Gate(int)
    async with asyncio.TaskGroup() as group:
        for _ in range(MAX_THREADS + 3):
            group.create_task(threads.run(gate))
        await gate.entered.wait()
        assert len(names()) <= MAX_THREADS
        gate.open()
    assert gate.calls == MAX_THREADS + 3
    await threads.close()


async def test_a_cancelled_run_ends_when_its_job_has_ended() -> None:
    threads = Threads("sda")
    gate = Gate(int)
    task = asyncio.create_task(threads.run(gate))
    await gate.entered.wait()
    for _ in range(3):  # once more while it waits for the job
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    await threads.close()


async def test_a_cancelled_run_hides_the_error_of_its_job() -> None:
    threads = Threads("sda")
    gate = Gate(lambda: 1 // 0)
    task = asyncio.create_task(threads.run(gate))
    await gate.entered.wait()
    task.cancel()
    await asyncio.sleep(0)
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    await threads.close()


async def test_a_job_still_waiting_for_a_thread_is_dropped_when_cancelled() -> None:
    threads = Threads("sda")
    gate = Gate(int)
    busy = [asyncio.create_task(threads.run(gate)) for _ in range(MAX_THREADS)]
    await gate.entered.wait()
    ran: list[int] = []
    waiting = asyncio.create_task(threads.run(ran.append, 1))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.open()
    await asyncio.gather(*busy)
    await threads.close()
    assert ran == []


async def test_close_waits_for_the_jobs_under_way() -> None:
    threads = Threads("sda")
    gate = Gate(int)
    job = asyncio.create_task(threads.run(gate))
    await gate.entered.wait()
    closing = asyncio.create_task(threads.close())
    await asyncio.sleep(0)
    assert not closing.done()
    gate.open()
    await closing
    assert await job == 0
    assert names() == []

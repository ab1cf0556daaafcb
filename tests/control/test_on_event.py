"""nbdmap.control.on_event: real programs, their environment, their number at once, and their end."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from nbdmap.control import on_event as module
from nbdmap.control.events import Events
from nbdmap.control.on_event import EventProgram
from tests.control.test_events import device


@asynccontextmanager
async def running(*command: str) -> AsyncIterator[tuple[Events, EventProgram, "asyncio.Future[None]"]]:
    events = Events(lambda: 1.5)
    program = EventProgram(events, command or None)
    job = asyncio.ensure_future(program.run())
    try:
        yield events, program, job
    finally:
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)
        assert program._running == set()
        assert events._listeners == []


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - files and processes set no event
            await asyncio.sleep(0.01)


async def idle(program: EventProgram) -> None:
    """Until all events were taken and all programs have ended."""
    await until(lambda: not program._listener._events and not program._running)


def alive(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def test_the_keys_are_in_its_environment(tmp_path: Path) -> None:
    script = f"env > {tmp_path}/part; echo args: $1 >> {tmp_path}/part; mv {tmp_path}/part {tmp_path}/seen"
    async with running("/bin/sh", "-c", script, "name", "a b") as (events, program, _):
        program.socket = "/run/x.sock"
        events.publish(device(), "change", {"DM_TARGET": "multipath", "DM_ACTION": "PATH_FAILED", "DM_SEQNUM": "1"})
        await until((tmp_path / "seen").exists)
        await idle(program)
    seen = (tmp_path / "seen").read_text().splitlines()
    for line in (
        "ACTION=change", "DM_TARGET=multipath", "DM_ACTION=PATH_FAILED", "DM_SEQNUM=1", "DM_NAME=joined", "DM_UUID=LVM-x",
        "MAJOR=254", "MINOR=3", "SEQNUM=1", "TIMESTAMP=1.500000", "NBDMAP_SOCKET=/run/x.sock", "args: a b",
    ):  # fmt: skip
        assert line in seen
    assert f"PATH={os.environ['PATH']}" in seen


async def test_events_that_came_before_it_ran_are_told_too(tmp_path: Path) -> None:
    events = Events(lambda: 0.0)
    program = EventProgram(events, ("/bin/sh", "-c", f"echo $DM_NAME >> {tmp_path}/seen"))
    events.publish(device("early"), "add", {})
    job = asyncio.ensure_future(program.run())
    await until((tmp_path / "seen").exists)
    await idle(program)
    job.cancel()
    await asyncio.gather(job, return_exceptions=True)
    assert (tmp_path / "seen").read_text() == "early\n"


async def test_without_a_program_events_are_not_kept_and_a_new_one_is_for_those_that_follow(tmp_path: Path) -> None:
    async with running() as (events, program, _):
        events.publish(device("a"), "add", {})
        await idle(program)
        program.command = ("/bin/sh", "-c", f"echo $DM_NAME >> {tmp_path}/seen")
        events.publish(device("b"), "add", {})
        await until((tmp_path / "seen").exists)
        await idle(program)
    assert (tmp_path / "seen").read_text() == "b\n"


async def test_only_so_many_at_once_and_in_order(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    script = f"echo $SEQNUM >> {tmp_path}/began; read line < {tmp_path}/go"
    async with running("/bin/sh", "-c", script) as (events, program, _):
        for _ in range(10):
            events.publish(device(), "change", {})

        def began() -> int:
            return len((tmp_path / "began").read_text().split()) if (tmp_path / "began").exists() else 0

        await until(lambda: began() == module.MAX_RUNNING)
        await asyncio.sleep(0.1)
        assert began() == module.MAX_RUNNING == len(program._running)
        while program._running or program._listener._events:
            with suppress(OSError):  # nobody reads at this moment
                go = os.open(tmp_path / "go", os.O_WRONLY | os.O_NONBLOCK)
                with os.fdopen(go, "wb", buffering=0) as pipe:
                    pipe.write(b"x\n" * 10)
            await asyncio.sleep(0.01)
        assert began() == 10
        order = list(map(int, (tmp_path / "began").read_text().split()))
        assert all(abs(place + 1 - number) < module.MAX_RUNNING for place, number in enumerate(order))


async def test_at_the_end_they_are_killed_with_what_they_started(tmp_path: Path) -> None:
    script = f"trap '' TERM; sleep 1000 & echo $$ $! > {tmp_path}/part; mv {tmp_path}/part {tmp_path}/pids; wait; sleep 1000"
    async with running("/bin/sh", "-c", script) as (events, _, job):
        events.publish(device(), "change", {})
        await until((tmp_path / "pids").exists)
        pids = list(map(int, (tmp_path / "pids").read_text().split()))
        assert all(map(alive, pids))
        loop = asyncio.get_running_loop()
        began = loop.time()
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)
        assert loop.time() - began < module.STOP_SECONDS + 1
        await until(lambda: not any(map(alive, pids)))


async def test_one_that_takes_too_long_is_killed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "PROGRAM_SECONDS", 0.1)
    async with running("/bin/sleep", "1000") as (events, program, _):
        events.publish(device(), "change", {})
        await until(lambda: bool(program._running))
        await idle(program)
    assert "on_event: /bin/sleep took longer than 0.1 s and was killed" in caplog.messages


async def test_failures_are_told_and_the_next_event_is_served(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    async with running("/nowhere/program") as (events, program, _):
        for name in ("a", "b"):
            events.publish(device(name), "change", {})
        await until(lambda: len(caplog.messages) == 2)
        program.command = ("/bin/sh", "-c", "exit 3")
        events.publish(device(), "change", {})
        await until(lambda: len(caplog.messages) == 3)
        await idle(program)
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.ERROR, logging.WARNING]
    assert "/nowhere/program" in caplog.messages[0]
    assert caplog.messages[2] == "on_event: /bin/sh ended with status 3"


async def test_many_events_leave_no_process_behind(tmp_path: Path) -> None:
    async with running("/bin/true") as (events, program, _):
        for _ in range(60):
            events.publish(device(), "change", {})
        await idle(program)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # noqa: ASYNC222 - it does not wait

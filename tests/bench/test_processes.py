"""Sessions of processes: what they use, and that they end."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest

from bench.processes import Failed, Process, running, session, usage

FORKS: Final = """
import os, time
if os.fork() == 0:
    end = time.process_time() + 0.2
    while time.process_time() < end: pass
    os._exit(0)
os.wait()
if os.fork() == 0:
    time.sleep(100)
print("up", flush=True)
time.sleep(100)
"""
STUBBORN: Final = "trap '' TERM; echo up; while :; do sleep 0.1; done"


def alive(number: int) -> list[int]:
    """The processes of a session; who ended and was not reaped by whom it fell to is none."""
    return [one.pid for one in session(number) if not one.zombie]


def up(process: Process) -> None:
    assert process.popen.stdout is not None
    assert process.popen.stdout.readline() == b"up\n"


def test_a_session_counts_and_ends_with_its_children(tmp_path: Path) -> None:
    with running([sys.executable, "-c", FORKS], tmp_path / "log", stdout=subprocess.PIPE) as process:
        up(process)
        assert len(alive(process.pid)) == 2
        assert process.cpu_seconds() >= 0.19  # of a child that was reaped, too
        assert process.rss() > 1 << 20
        assert process.alive()
    assert alive(process.pid) == []
    assert not process.alive()
    assert usage(process.pid) is None


def test_who_does_not_listen_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.processes.END_SECONDS", 0.2)
    with running(["sh", "-c", STUBBORN], tmp_path / "log", stdout=subprocess.PIPE) as process:
        up(process)
    assert alive(process.pid) == []


def test_an_error_in_the_block_ends_it_too(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), running(["sleep", "100"], tmp_path / "log") as process:
        raise ZeroDivisionError
    assert alive(process.pid) == []


def test_a_daemon_is_followed_by_its_pidfile(tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    daemon = f"setsid sh -c 'echo $$ > {pidfile}; exec sleep 100' &"
    with running(["sh", "-c", daemon], tmp_path / "log", pidfile=pidfile) as process:
        assert process.pid == int(pidfile.read_text()) != process.popen.pid
        deadline = time.monotonic() + 10
        while b"sleep" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            assert time.monotonic() < deadline
    assert alive(process.pid) == []


def test_a_daemon_that_never_comes_up_says_why(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="no such port"):
        Process(["sh", "-c", "echo no such port; exit 1"], tmp_path / "log", pidfile=tmp_path / "pid")


def test_it_dies_with_who_started_it(tmp_path: Path) -> None:
    """As far as setpriv can see to that."""
    script = (
        "import sys, time; from pathlib import Path; from bench.processes import Process; "
        f"print(Process(['sleep', '100'], Path({str(tmp_path / 'log')!r})).pid, flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        deadline = time.monotonic() + 10
        while b"setpriv" in Path(f"/proc/{pid}/cmdline").read_bytes():
            assert time.monotonic() < deadline
        starter.send_signal(signal.SIGKILL)
    while (one := usage(pid)) is not None and not one.zombie:
        assert time.monotonic() < deadline
        time.sleep(0.01)

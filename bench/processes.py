"""Processes that a benchmark starts: each in a session of its own, measured and ended with all that it started.

The CPU time of a server is that of its whole session from /proc (utime + stime, and what its reaped children used): forked
workers and helpers count, and nothing else does. Nothing outlives its `with` block; SIGKILL of the benchmark itself ends
those that were started by `setpriv --pdeathsig`, which is all but a server that makes itself a daemon.
"""

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Final, NamedTuple

END_SECONDS: Final = 4.0
"""From SIGTERM to SIGKILL."""
_TICK: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_SET_CHILD_SUBREAPER: Final = 36


class Failed(Exception):
    """A server or a client did not do what was asked; the message holds what it wrote."""


class Usage(NamedTuple):
    """One process as /proc tells it. Of a zombie only the CPU time is left."""

    pid: int
    parent: int
    session: int
    zombie: bool
    cpu_seconds: float
    rss: int


def adopt_orphans() -> None:
    """Daemons that our children leave behind become our own children, so that they can be reaped."""
    ctypes.CDLL(None, use_errno=True).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def raise_descriptor_limit() -> int:
    """Allows ourselves and what we start as many descriptors as we may have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def usage(pid: int) -> Usage | None:
    """What /proc says of one process, or None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    words = text[text.rindex(")") + 2 :].split()  # the name may hold blanks and brackets
    ticks = sum(int(word) for word in words[11:15])
    return Usage(pid, int(words[1]), int(words[3]), words[0] in "ZX", ticks / _TICK, int(words[21]) * _PAGE)


def session(number: int) -> list[Usage]:
    """The processes of a session."""
    found = (usage(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return [one for one in found if one is not None and one.session == number]


class Process:
    """A running program. `pid` leads the session; `log` is what it writes."""

    def __init__(
        self, command: Sequence[str], log: Path, *, environment: Mapping[str, str] | None = None, pidfile: Path | None = None,
        stdin: int = subprocess.DEVNULL, stdout: int | IO[bytes] | None = None,
    ) -> None:  # fmt: skip
        self.command = command
        self._log = log
        tied = () if pidfile or not shutil.which("setpriv") else ("setpriv", "--pdeathsig", "TERM", "--")
        with log.open("ab") as errors:
            self.popen = subprocess.Popen(
                [*tied, *command], stdin=stdin, stdout=errors if stdout is None else stdout, stderr=errors,
                cwd=log.parent, env={**os.environ, **(environment or {})}, start_new_session=True,
            )  # fmt: skip
        self.pid = self.popen.pid
        if pidfile is not None:
            self._follow(pidfile)

    def _follow(self, pidfile: Path) -> None:
        """The program makes itself a daemon: its pid is in a file."""
        try:
            if self.popen.wait(END_SECONDS):
                raise Failed(self.said())
            deadline = time.monotonic() + END_SECONDS
            while not (pidfile.exists() and pidfile.read_text().strip()):
                if time.monotonic() > deadline:
                    raise Failed(f"it wrote no {pidfile.name}: {self.said()}")
                time.sleep(0.01)
        except BaseException:
            self.end()
            raise
        self.pid = int(pidfile.read_text())

    def said(self) -> str:
        """The command, and the end of what it wrote."""
        return f"{' '.join(self.command)}: {self._log.read_text(errors='replace')[-2000:].strip()}"

    def alive(self) -> bool:
        """Whether the leader still runs."""
        one = usage(self.pid)
        return one is not None and not one.zombie

    def cpu_seconds(self) -> float:
        """Used by the whole session until now."""
        return sum(one.cpu_seconds for one in session(self.pid))

    def rss(self) -> int:
        """Resident memory of the whole session, in bytes."""
        return sum(one.rss for one in session(self.pid))

    def end(self) -> None:
        """Ends the session: SIGTERM, and SIGKILL for what is left of it."""
        for number in {self.pid, self.popen.pid}:
            end_session(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(END_SECONDS)
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def end_session(number: int) -> None:
    """Ends all processes of a session that we started, and reaps those that are our children."""
    deadline = time.monotonic() + END_SECONDS
    sign = signal.SIGTERM
    told: set[int] = set()
    while left := session(number):
        for one in left:
            if one.zombie or one.pid in told:
                continue
            told.add(one.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, sign)
        _reap(left)
        if all(one.zombie and one.parent != os.getpid() for one in left):
            return  # somebody else's to reap
        if time.monotonic() > deadline and sign == signal.SIGTERM:
            sign, deadline = signal.SIGKILL, deadline + END_SECONDS
            told.clear()
        elif time.monotonic() > deadline:
            raise Failed(f"processes {[one.pid for one in left]} do not end")
        time.sleep(0.01)


def _reap(processes: Sequence[Usage]) -> None:
    """Popen bears it when its child was reaped here: it then takes the status for 0."""
    for one in processes:
        if one.zombie and one.parent == os.getpid():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(one.pid, os.WNOHANG)


@contextlib.contextmanager
def running(command: Sequence[str], log: Path, **options: object) -> Iterator[Process]:
    """A process for the length of a block."""
    process = Process(command, log, **options)  # type: ignore[arg-type]
    try:
        yield process
    finally:
        process.end()


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the program as Ctrl-C does, so that every `with` ends what it started; once is enough."""

    def leave(number: int, frame: object) -> None:
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Where the server's log lines go: stderr, for people, for the journal (with its priorities) or as JSON.

A thread writes them: whoever stops reading our stderr does not stop the server. At most MAX_LINES wait; the next ones are
lost, and counted.
"""

import json
import logging
import os
import queue
import threading
from typing import Final

from nbdmap.cli.flood import FloodGate

MAX_LINES: Final = 10_000
LAST_SECONDS: Final = 0.2
"""What the last lines have to be written when the process ends."""

_WORDS: Final = {logging.WARNING: "warning: ", logging.ERROR: "error: ", logging.CRITICAL: "error: "}
_PRIORITIES: Final = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class _Lines(logging.Formatter):
    """`nbdmap: warning: text`; for the journal `<4>text`."""

    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if self._journal:
            return f"<{_PRIORITIES.get(record.levelno, 6)}>{text}"
        return f"nbdmap: {_WORDS.get(record.levelno, '')}{text}"


class _Json(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": round(record.created, 6), "level": record.levelname.lower(), "logger": record.name,
            "message": record.getMessage(),
        }  # fmt: skip
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class _Background(logging.Handler):
    """Formats at once, writes in a thread."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[str | threading.Event | None] = queue.Queue(MAX_LINES)
        self._lost = 0
        self._thread = threading.Thread(target=self._write, name="nbdmap log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Puts a line into the queue."""
        line = self.format(record)
        try:
            if self._lost:
                self._lines.put_nowait(f"nbdmap: {self._lost} lines of the log are lost")
                self._lost = 0
            self._lines.put_nowait(line)
        except queue.Full:
            self._lost += 1

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            if isinstance(line, threading.Event):
                line.set()
                continue
            rest = memoryview(f"{line}\n".encode(errors="backslashreplace"))
            try:
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
            except OSError:
                pass  # nobody can be told

    def flush(self) -> None:
        """Waits until what was logged is written, LAST_SECONDS at most."""
        written = threading.Event()
        try:
            self._lines.put_nowait(written)
        except queue.Full:
            return
        written.wait(LAST_SECONDS)

    def close(self) -> None:
        """Gives the last lines a moment."""
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            pass
        self._thread.join(LAST_SECONDS)
        super().close()


def set_up(style: str, level: int) -> None:
    """Sends everything from `level` on to stderr."""
    handler = _Background(2)
    handler.setFormatter(_Json() if style == "json" else _Lines(journal=_is_journal()))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("nbdmap").setLevel(level)
    logging.getLogger("nbdmap.server.connection").filters[:] = [FloodGate()]


def flush() -> None:
    """Sees to it that what was logged can be read."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def _is_journal() -> bool:
    """Whether stderr is the journal's."""
    status = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"

"""Runs real NBD clients: each call ends within a time limit and, unless told otherwise, must succeed."""

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from tests.support.programs import need

CLIENT_SECONDS: Final = 40.0
PACKAGES: Final = {
    "nbdinfo": "libnbd-bin",
    "nbdcopy": "libnbd-bin",
    "nbdsh": "python3-libnbd",
    "nbdfuse": "nbdfuse",
    "nbdkit": "nbdkit",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "fio": "fio",
    "cryptsetup": "cryptsetup-bin",
    "losetup": "mount",
    "mkfs.ext4": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "perl": "perl-base",
}

# nbdsh runs the first python3 of PATH, which must be Debian's: only that has the nbd module
_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin:"

PRELUDE: Final = """
import errno, nbd
def fails(number, call, *arguments, **keywords):
    "Calls and wants this errno of the server; what the server said for humans, too."
    said = []
    h.set_debug(True)
    h.set_debug_callback(lambda context, message: said.append(message) and 0 or 0)
    try:
        call(*arguments, **keywords)
    except nbd.Error as error:
        assert error.errnum == number, f"{error.errno}: {error.string}, wanted {errno.errorcode[number]}"
        return "\\n".join(said)
    else:
        raise AssertionError(f"{call.__name__}{arguments} worked, wanted {errno.errorcode[number]}")
    finally:
        h.clear_debug_callback()
        h.set_debug(False)
"""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for Debian's programs."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return {**clean, "LC_ALL": "C.UTF-8", "PATH": _PATH + os.environ.get("PATH", ""), **(extra or {})}


def attempt(
    *command: str | Path,
    stdin: str = "",
    timeout: float = CLIENT_SECONDS,
    extra: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a program, however it ends."""
    name = str(command[0])
    if name in PACKAGES:
        need(name, PACKAGES[name])
    return subprocess.run(
        [str(word) for word in command], input=stdin, timeout=timeout, env=environment(extra), cwd=cwd,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def run(
    *command: str | Path,
    stdin: str = "",
    timeout: float = CLIENT_SECONDS,
    extra: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """What a program that must succeed prints on stdout."""
    done = attempt(*command, stdin=stdin, timeout=timeout, extra=extra, cwd=cwd)
    text = " ".join(map(str, command))
    assert done.returncode == 0, f"{text[-1000:]}\nexit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[Any] | None" = None, seconds: float = 20) -> None:
    """Returns as soon as `condition` holds. AssertionError when `process` ends first, or in the end."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"{process.args!r} has ended with {process.returncode}"
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.01)


def nbdsh(script: str, uri: str = "", *, connect: bool = True, extra: Mapping[str, str] | None = None) -> str:
    """Runs a script on a handle `h`, connected to `uri` with base:allocation unless told otherwise; it sees URI, too."""
    ready = "h.add_meta_context('base:allocation'); h.connect_uri(URI)" if connect else ""
    done = attempt("nbdsh", "-c", PRELUDE, "-c", f"URI = {uri!r}", "-c", ready, "-c", script, extra=extra)
    assert done.returncode == 0, f"nbdsh -u {uri}\n{script}\nexit status {done.returncode}\n{done.stdout}{done.stderr[-4000:]}"
    return done.stdout

"""An export as a file (nbdfuse), and mounted file systems, for tests that run as root."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients import PACKAGES, environment, run, wait_until
from tests.support.programs import need


@contextlib.contextmanager
def fuse_file(uri: str, directory: Path) -> Iterator[Path]:
    """A file whose bytes are the export's."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("mounting by FUSE needs root and /dev/fuse")
    need("nbdfuse", PACKAGES["nbdfuse"])
    point, pidfile = directory / "fuse", directory / "fuse.pid"
    point.mkdir()
    pidfile.unlink(missing_ok=True)
    process = subprocess.Popen(
        ["nbdfuse", "-P", str(pidfile), f"{point}/disk", uri], env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: pidfile.exists() and (point / "disk").exists(), process)
        yield point / "disk"
        run("umount", point)
    except BaseException:
        process.terminate()  # it unmounts
        raise
    finally:
        _, said = process.communicate(timeout=10)
        point.rmdir()
    assert process.returncode == 0, said


@contextlib.contextmanager
def mounted(device: str | Path, directory: Path, *options: str) -> Iterator[Path]:
    """A mounted file system."""
    point = directory / "mnt"
    point.mkdir()
    run("mount", *options, device, point)
    try:
        yield point
    finally:
        run("umount", point)
        point.rmdir()

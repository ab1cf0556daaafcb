"""Real programs that tests drive: there, or the test says which Debian package is missing."""

import os
import shutil

import pytest


def need(program: str, package: str) -> str:
    """The path of `program`. Without it the test is skipped, naming the Debian package; in CI it fails."""
    path = shutil.which(program)
    if path is None:
        reason = f"{program} is missing: apt-get install {package}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path

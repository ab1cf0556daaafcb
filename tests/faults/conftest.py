"""Thousands of directories for sockets: in memory, where there is a place."""

import os
import tempfile

import pytest


@pytest.fixture(autouse=True)
def sockets_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removing a directory from a disk costs as much as half a run."""
    if os.access("/dev/shm", os.W_OK):
        monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")

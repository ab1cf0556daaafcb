"""The `kernel` fixture; each test that uses it gets the mark `vm`, one xdist group a file, and time to wait in line."""

import os
from pathlib import Path

import pytest

from tests.vm.harness import Kernel, Unavailable, prepare

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE and "kernel" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.vm)
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(900))    # one guest runs at a time: see harness.py


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    """Debian's kernel: skipped where the machine cannot boot it, which fails in CI."""
    try:
        return prepare()
    except Unavailable as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))

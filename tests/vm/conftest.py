"""The fixtures `kernel` and `newer`; a test of one has the mark `vm`, one xdist group a file, and time to wait in line."""

import os
from pathlib import Path

import pytest

from tests.vm.harness import Kernel, Unavailable, prepare

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE and {"kernel", "newer"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.vm)
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(900))    # one guest runs at a time: see harness.py


def booted(*, backports: bool) -> Kernel:
    """A kernel of Debian's: skipped where the machine cannot boot it, which fails in CI."""
    try:
        return prepare(backports=backports)
    except Unavailable as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    """The stock one, 6.1."""
    return booted(backports=False)


@pytest.fixture(scope="session")
def newer() -> Kernel:
    """The backport, 6.12."""
    return booted(backports=True)

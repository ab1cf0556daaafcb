"""Every test here drives real clients against a real `nbdmap serve`."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks them."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.system)

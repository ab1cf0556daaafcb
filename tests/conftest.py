"""What all tests share: every asynchronous test runs on uvloop, as the server does."""

from asyncio import AbstractEventLoop
from collections.abc import Callable, Mapping

import pytest
import uvloop


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Mapping[str, Callable[[], AbstractEventLoop]]:
    """pytest-asyncio's hook: the loops that a test runs on."""
    return {"uvloop": uvloop.new_event_loop}

"""The shell is tried on the loop that it runs on."""

from collections.abc import Callable, Mapping
from typing import Any

import uvloop


def pytest_asyncio_loop_factories(config: Any, item: Any) -> Mapping[str, Callable[[], Any]]:
    """Return uvloop for every test here."""
    del config, item
    return {"uvloop": uvloop.new_event_loop}

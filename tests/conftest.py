"""Settings of all tests, and the API server that those marked `real_apiserver` share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.cluster.apiserver import ApiServer

if TYPE_CHECKING:
    from collections.abc import Iterator

# Properties are about values; on a machine that is busy with other things, time says nothing about them.
settings.register_profile("sidegate", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sidegate")


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A real API server; each test makes namespaces of its own, and removes what belongs to none."""
    with ApiServer(tmp_path_factory.mktemp("apiserver")) as running:
        yield running

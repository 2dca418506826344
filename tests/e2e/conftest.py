"""One cluster and one SPIRE for the whole end-to-end session; what a failed test leaves to read goes to build/e2e/.

`SIDEGATE_E2E_CLUSTER=DIR` uses the cluster that `python -m tests.cluster DIR` keeps running.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.spire import Spire
from tests.e2e.governed import Governed

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

_REPORTS = Path(__file__).parents[2] / "build" / "e2e"
_RUNNING = os.getenv("SIDEGATE_E2E_CLUSTER")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real one-node cluster with DNS and enforced NetworkPolicy."""
    if _RUNNING:
        yield Cluster.attach(Path(_RUNNING))
        return
    run_dir = tmp_path_factory.mktemp("cluster")
    try:
        with Cluster(run_dir) as running:
            yield running
    finally:
        shutil.copytree(run_dir / "logs", _REPORTS / "node", dirs_exist_ok=True)


@pytest.fixture(scope="session")
def spire(cluster: Cluster) -> Spire:
    """SPIRE in that cluster, trust domain sidegate.test."""
    spire = Spire(cluster)
    spire.start()
    return spire


@pytest.fixture(scope="session")
def governed(cluster: Cluster, spire: Spire) -> Governed:
    """Sidegate installed, two servers running in the namespace demo, then that namespace labelled and they restarted.

    Shared by all modules: a test that takes something away brings it back.
    """
    governed = Governed(cluster, spire)
    try:
        governed.install()
        governed.label_and_restart()
    except BaseException:
        cluster.dump(_REPORTS / "governed")
        raise
    return governed


@pytest.fixture
def namespace(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty namespace of this test's own, ready for pods."""
    name = re.sub("[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower())[:63].strip("-")
    cluster.make_namespace(name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Dump the cluster when a test fails, before its fixtures take away what it looked at."""
    report = yield
    running = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and call.when != "teardown" and isinstance(running, Cluster):
        running.dump(_REPORTS / item.name)
    return report

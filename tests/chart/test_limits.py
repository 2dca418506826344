"""What the API server itself says to an MCPLimit that contradicts itself; no webhook is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.cluster.apiserver import ApiServer

pytestmark = pytest.mark.real_apiserver
CRD = Path(__file__).parents[2] / "charts" / "sidegate" / "crds" / "mcplimits.yaml"
NAMESPACE = "limited"
RATE = {"ratePerSecond": 5, "burst": 10}
QUOTA = {"amount": 100, "period": "day", "warnAtPercent": [80]}
GLOBAL = {"scope": "global"}


@pytest.fixture(scope="module")
def server(api_server: ApiServer) -> ApiServer:
    """The API server, which knows MCPLimits."""
    api_server.make_namespace(NAMESPACE)
    api_server.kubectl("apply", "--filename", CRD)
    api_server.kubectl("wait", "--for=condition=Established", "crd/mcplimits.sidegate.dev", "--timeout=60s")
    return api_server


def refusal(server: ApiServer, spec: dict[str, Any]) -> str:
    """Return why *spec* is not taken; nothing when it is."""
    body = {
        "apiVersion": "sidegate.dev/v1alpha1",
        "kind": "MCPLimit",
        "metadata": {"name": "x", "namespace": NAMESPACE},
        "spec": {"selector": {}, **spec},
    }
    path = f"/apis/sidegate.dev/v1alpha1/namespaces/{NAMESPACE}/mcplimits?dryRun=All&fieldValidation=Strict"
    answer = server.call("POST", path, body)
    return "" if answer.status == 201 else answer.refusal


@pytest.mark.parametrize(
    "spec",
    [
        RATE,
        {"ratePerSecond": 0.5, "burst": 10, "per": ["user"], "tools": ["a"]},
        {"quotas": [QUOTA], "weight": {"tools": {"query": 10}}},
        {"concurrent": 4, "per": ["user", "agent_session", "server"]},
        {"maxBytes": 65536, "mode": "shadow"},
        {**RATE, **GLOBAL, "whenUnavailable": "open"},
        {**RATE, **GLOBAL, "whenUnavailable": "local", "replicas": 4},
    ],
)
def test_limits_that_make_sense_are_taken(server: ApiServer, spec: dict[str, Any]) -> None:
    """Those that were written before there was more than a rate, too."""
    assert refusal(server, spec) == ""


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, "at least one of ratePerSecond, quotas, concurrent and maxBytes is needed"),
        ({"quotas": []}, "at least one of ratePerSecond, quotas, concurrent and maxBytes is needed"),
        ({"burst": 1, "concurrent": 1}, "ratePerSecond and burst go together"),
        ({"maxBytes": 1, "weight": {"default": 2}}, "weight needs ratePerSecond or quotas"),
        ({**RATE, "whenUnavailable": "open"}, "whenUnavailable and replicas only with scope global"),
        ({**RATE, "replicas": 2}, "whenUnavailable and replicas only with scope global"),
        ({**RATE, **GLOBAL, "whenUnavailable": "local"}, "replicas and whenUnavailable local go together"),
        ({**RATE, "per": ["team"]}, 'supported values: "user", "workload", "session"'),
        ({"quotas": [{"amount": 1, "period": "year"}]}, 'supported values: "minute", "hour", "day", "week", "month"'),
        ({"quotas": [{**QUOTA, "warnAtPercent": [100]}]}, "less than or equal to 99"),
        ({"concurrent": 0}, "greater than or equal to 1"),
        ({**RATE, "bursts": 2}, 'unknown field "spec.bursts"'),
    ],
)
def test_a_limit_that_contradicts_itself_is_refused(server: ApiServer, spec: dict[str, Any], said: str) -> None:
    """With the field and what is allowed."""
    assert said in refusal(server, spec)

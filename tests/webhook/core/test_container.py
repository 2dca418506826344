"""What is put into a pod."""

from dataclasses import replace
from typing import Any

import pytest

from sidecar.config import Capture, Role, Settings
from tests.webhook.core.golden_cases import TEMPLATE
from webhook.core import container
from webhook.core.annotations import Overrides
from webhook.core.container import Amounts, Plan


def a_plan(**changes: Any) -> Plan:
    """Return a plan for a workload called ledger."""
    values: dict[str, Any] = {"workload": "ledger", "capture": Capture.REDIRECT, "asked": Overrides(), "probes": "{}"}
    return Plan(**values | changes)


def rendered(capture: Capture = Capture.REDIRECT, **changes: Any) -> dict[str, Any]:
    """Return our init containers by name."""
    return {each["name"]: each for each in container.init_containers(TEMPLATE, a_plan(capture=capture, **changes))}


def test_sidecar_reads_back_what_it_is_given() -> None:
    """The environment is one that the sidecar accepts, with the pod's own name and namespace from the kubelet."""
    sidecar = rendered()[container.SIDECAR]
    literal = {each["name"]: each["value"] for each in sidecar["env"] if "value" in each}
    settings = Settings.from_env(literal | {"SIDEGATE_POD": "ledger-0", "SIDEGATE_NAMESPACE": "payments"})

    assert settings.workload == "ledger"
    assert settings.capture is Capture.REDIRECT
    assert settings.bundle_dir == container.CACHE_DIR
    assert [each["name"] for each in sidecar["env"] if "valueFrom" in each] == ["SIDEGATE_NAMESPACE", "SIDEGATE_POD"]


def test_sidecar_meets_the_restricted_standard_by_its_own_fields() -> None:
    """Pod-level settings cannot leak in, and PodSecurity `restricted` is met because of us, not in spite."""
    security = rendered(Capture.REMAP)[container.SIDECAR]["securityContext"]

    assert security == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "runAsGroup": 15100,
        "runAsNonRoot": True,
        "runAsUser": 15100,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert all("hostPath" not in volume for volume in container.volumes())


def test_remap_needs_no_privileged_container() -> None:
    """Only the redirect rules need NET_ADMIN."""
    assert list(rendered(Capture.REMAP)) == [container.SIDECAR]
    assert list(rendered(Capture.REDIRECT)) == [container.NET, container.SIDECAR]
    assert rendered()[container.NET]["securityContext"]["capabilities"] == {"add": ["NET_ADMIN"], "drop": ["ALL"]}


def test_startup_probe_holds_the_application_back() -> None:
    """Only a startup probe keeps the next container waiting (KEP-753), so it must be there."""
    probe = rendered()[container.SIDECAR]["startupProbe"]

    assert probe["httpGet"]["path"] == "/startupz"
    assert probe["failureThreshold"] * probe["periodSeconds"] >= 60


def test_api_token_and_workload_api_stay_apart() -> None:
    """No container of ours has the API token; only the sidecar has the Workload API."""
    for each in rendered().values():
        assert {m["mountPath"]: m["name"] for m in each["volumeMounts"]}[
            container.TOKEN_DIR
        ] == container.NO_TOKEN_VOLUME
    assert [m["name"] for m in rendered()[container.NET]["volumeMounts"]] == [container.NO_TOKEN_VOLUME]


def test_guaranteed_pod_gets_requests_equal_to_limits() -> None:
    """Every injected container keeps the pod's class."""
    for each in rendered(guaranteed=True).values():
        assert each["resources"]["requests"] == each["resources"]["limits"]


def test_every_container_has_requests_and_limits() -> None:
    """Namespaces with a quota reject a container without."""
    for each in rendered().values():
        assert {"cpu", "memory"} == each["resources"]["requests"].keys() == each["resources"]["limits"].keys()


@pytest.mark.parametrize(
    ("asked", "amounts"),
    [
        (Overrides(), (50, 1000, 100, 200)),
        (Overrides(cpu_m=2000), (2000, 2000, 100, 200)),
        (Overrides(memory_bytes=300), (50, 1000, 300, 300)),
        (Overrides(cpu_limit_m=60, memory_limit_bytes=150), (50, 60, 100, 150)),
    ],
)
def test_pod_adjusts_amounts(asked: Overrides, amounts: tuple[int, int, int, int]) -> None:
    """A request above the default limit raises the limit, or the pod would be invalid."""
    base = Amounts(cpu_m=50, cpu_limit_m=1000, memory_bytes=100, memory_limit_bytes=200)
    got = base.adjusted(asked)

    assert (got.cpu_m, got.cpu_limit_m, got.memory_bytes, got.memory_limit_bytes) == amounts


def test_hash_tells_templates_apart() -> None:
    """Two templates that would make different pods have different hashes, and equal ones the same."""
    assert replace(TEMPLATE).hash == TEMPLATE.hash
    assert replace(TEMPLATE, image="other").hash != TEMPLATE.hash
    assert replace(TEMPLATE, sidecar=replace(TEMPLATE.sidecar, bundle_keys="x")).hash != TEMPLATE.hash


def test_the_volume_holds_all_records_that_are_kept() -> None:
    """And a reserve: a pod that holds more than its volume's size is evicted."""
    (cache,) = [each for each in container.volumes(audit_bytes=256 * 2**20) if each["name"] == container.CACHE_VOLUME]

    assert cache["emptyDir"] == {"sizeLimit": "384Mi"}
    assert {"name": container.CACHE_VOLUME, "emptyDir": {"sizeLimit": "64Mi"}} in container.volumes()


def test_servers_learn_the_password_of_the_limits_store_from_their_namespace() -> None:
    """It stands in no manifest; without the Secret the pod starts; agents, whose calls are judged elsewhere, learn none."""
    store = replace(TEMPLATE.sidecar, limits_store="redis://valkey.limits")
    template = replace(TEMPLATE, sidecar=store, limits_store_secret="limits-store")
    server, agent = (
        {each["name"]: each for each in container.init_containers(template, a_plan(role=role))[-1]["env"]}
        for role in (Role.SERVER, Role.AGENT)
    )

    assert server["SIDEGATE_LIMITS_STORE"]["value"] == "redis://valkey.limits"
    assert server["SIDEGATE_LIMITS_STORE_PASSWORD"]["valueFrom"] == {
        "secretKeyRef": {"name": "limits-store", "key": "password", "optional": True}
    }
    assert not [name for name in agent if "LIMITS_STORE" in name]


def test_sidecar_alone_gets_the_variables_of_telemetry() -> None:
    """The application's own OpenTelemetry is not ours to set up."""
    template = replace(TEMPLATE, otel=(("OTEL_TRACES_SAMPLER", "always_off"),))
    made = container.init_containers(template, a_plan())
    having = [
        each["name"] for each in made if {"name": "OTEL_TRACES_SAMPLER", "value": "always_off"} in each.get("env", ())
    ]

    assert having == [container.SIDECAR]

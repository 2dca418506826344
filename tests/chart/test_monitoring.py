"""Requirements on what the chart gives to Prometheus and Grafana, where it is asked to."""

import json
from typing import Any

import pytest
import yaml

from sidecar.config import HEALTH_PORT
from tests.chart.render import CHART, NAMESPACE, VALUES, helm, manifests
from webhook.core import annotations

MINIMAL = next(each for each in VALUES if each.stem == "minimal")
ON = [f"--set=monitoring.{each}.enabled=true" for each in ("dashboards", "rules", "podMonitors")]


@pytest.fixture(scope="module")
def rendered() -> list[dict[str, Any]]:
    """All of it switched on."""
    done = helm("template", "sidegate", CHART, "--namespace", NAMESPACE, "--values", MINIMAL, *ON)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def _of(rendered: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in rendered if each["kind"] == kind]


def test_nothing_of_it_is_there_unasked() -> None:
    """Clusters without the operator's resources could not install the chart."""
    kinds = {each["kind"] for each in manifests(MINIMAL)}

    assert not kinds & {"PrometheusRule", "PodMonitor"}


def test_dashboards_are_what_the_files_hold(rendered: list[dict[str, Any]]) -> None:
    """Found by their label; helm's templates leave Grafana's braces alone."""
    dashboards = [each for each in _of(rendered, "ConfigMap") if each["metadata"]["labels"].get("grafana_dashboard")]
    found = {name: json.loads(text) for each in dashboards for name, text in each["data"].items()}
    files = {each.name: json.loads(each.read_text()) for each in (CHART / "dashboards").glob("*.json")}

    assert found == files
    assert len({each["uid"] for each in found.values()}) == len(files)


def test_rules_are_what_the_file_holds(rendered: list[dict[str, Any]]) -> None:
    """The same rules, whoever loads them."""
    (rule,) = _of(rendered, "PrometheusRule")

    assert rule["spec"] == yaml.safe_load((CHART / "rules" / "sidegate.yaml").read_text())


def test_monitors_find_governed_pods_by_label_and_named_port(rendered: list[dict[str, Any]]) -> None:
    """The port that every sidecar has, in any namespace."""
    sidecars = next(each for each in _of(rendered, "PodMonitor") if each["metadata"]["name"].endswith("-sidecars"))
    (endpoint,) = sidecars["spec"]["podMetricsEndpoints"]

    assert sidecars["spec"]["namespaceSelector"] == {"any": True}
    assert sidecars["spec"]["selector"]["matchExpressions"][0]["key"] == annotations.INJECTED
    assert (endpoint["port"], HEALTH_PORT) == ("sidegate-health", 15020)

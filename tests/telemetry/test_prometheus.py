"""Every query of the dashboards and every alert runs on a real Prometheus that scraped a real sidecar under calls."""

import asyncio
import json
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web

from certs.embedded import EmbeddedDomain, Identity
from certs.spiffe import SpiffeId
from sidecar.core.conventions import INSTRUMENTS
from tests.certs.agents import a_socket, an_agent, running
from tests.certs.pki import A_TEST
from tests.parts import part
from tests.sidecar.receivers import HttpReceiver
from tests.telemetry.rig import PATIENCE_S, ROOT, a_client, a_server, a_sidecar
from webhook.shell.metrics import CONTENT_TYPE, Metrics

pytestmark = pytest.mark.e2e  # Prometheus is fetched

CHART = ROOT / "charts" / "sidegate"
RULES = CHART / "rules" / "sidegate.yaml"
# No part of this rig makes these; promtool shows their alerts (alerts.yaml), test_metrics.py their exposition.
ELSEWHERE = {
    "sidegate_bundle_age_seconds": "there is no control plane here: the bundle is given",
    "sidegate_limit_store_unanswered_total": "there is no store here",
}
# Queries that return nothing while all is well.
FAULTS = re.compile(r"decision=~\"deny\|error\"|state=\"ungoverned\"")


def panels() -> Iterator[tuple[str, str]]:
    """Yield title and query of every panel of every dashboard."""
    for path in sorted((CHART / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                yield f"{path.stem}: {panel['title']}", target["expr"]


def concrete(query: str) -> str:
    """Return *query* with Grafana's variables filled in."""
    return query.replace("$namespace", ".*").replace("$__rate_interval", "1m").replace("$__range", "5m")


@asynccontextmanager
async def a_control_plane() -> AsyncIterator[int]:
    """Serve the control plane's metrics after some events; give the port."""
    metrics = Metrics()
    metrics.admissions.labels("inject", "label").inc()
    metrics.admission_seconds.observe(0.01)
    metrics.bundle_requests.labels("304").inc()
    metrics.compilations.labels("ok").inc()
    metrics.leaf_expiry.set(2e9)
    metrics.pods.labels("pay", "governed").set(3)

    async def render(_: web.Request) -> web.Response:
        metrics.admissions.labels("inject", "label").inc()
        return web.Response(body=metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    application = web.Application()
    application.router.add_get("/metrics", render)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@asynccontextmanager
async def a_prometheus(folder: Path, targets: Mapping[str, int]) -> AsyncIterator[str]:
    """Run it against *targets*, with our rules; give its URL."""
    jobs = [
        {
            "job_name": name,
            "honor_labels": name == "control-plane",  # as its PodMonitor
            "static_configs": [{"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "pay", "pod": f"{name}-7f"}}],
        }
        for name, port in targets.items()
    ]
    config = folder / "prometheus.yml"
    config.write_text(
        json.dumps(
            {
                "global": {"scrape_interval": "500ms", "evaluation_interval": "1s"},
                "rule_files": [str(RULES)],
                "scrape_configs": jobs,
            }
        )
    )
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    options = (f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address={address}")
    program = await asyncio.create_subprocess_exec(
        *(part("prometheus") / "prometheus", *options, "--enable-feature=exemplar-storage", "--log.level=error")
    )
    try:
        yield f"http://{address}"
    finally:
        program.terminate()
        await program.wait()


async def _ask(session: aiohttp.ClientSession, base: str, path: str, **parameters: str) -> Any:
    """Return the answer's data; None while Prometheus is not there yet."""
    try:
        async with session.get(f"{base}/api/v1/{path}", params=parameters) as response:
            answer = await response.json()
    except aiohttp.ClientError:
        return None
    assert answer["status"] == "success", (parameters, answer)
    return answer["data"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What Prometheus says: `queries` by text, `exemplars`, and the `rules` as it read them."""
    folder = tmp_path_factory.mktemp("prometheus")
    found: dict[str, Any] = {"queries": {}}

    async def collect() -> None:
        receiver = HttpReceiver()
        with a_socket() as path:
            agent = an_agent(
                path,
                domain=EmbeddedDomain(A_TEST),
                identities=[Identity(spiffe_id=SpiffeId.parse("spiffe://a.test/ns/pay/sa/billing"))],
            )
            async with (
                asyncio.timeout(2 * PATIENCE_S),
                receiver.listening() as base,
                running(agent),
                a_server(base) as server,
                a_sidecar({"OTEL_EXPORTER_OTLP_ENDPOINT": base}, server, folder, spiffe_socket=agent.address) as (
                    port,
                    health,
                ),
                a_control_plane() as control_plane,
                a_prometheus(folder, {"sidecar": health, "control-plane": control_plane}) as prometheus,
                aiohttp.ClientSession() as session,
            ):
                while not await _ask(session, prometheus, "query", query="sidegate_ready == 1"):  # noqa: ASYNC110 - real
                    await asyncio.sleep(0.2)
                for _ in range(2):  # a rate needs what was there before
                    await a_client(base, port, calls=5)
                waiting = {query: concrete(query) for _, query in panels()}
                for _ in range(10):
                    await asyncio.sleep(1)
                    for query in list(waiting):
                        data = await _ask(session, prometheus, "query", query=waiting[query])
                        found["queries"][query] = data["result"]
                        if any(each["value"][1] != "NaN" for each in data["result"]):
                            del waiting[query]
                    if not waiting:
                        break
                series = "mcp_server_operation_duration_seconds_bucket"
                found["exemplars"] = await _ask(
                    session, prometheus, "query_exemplars", query=series, start="0", end="4e9"
                )
                found["rules"] = await _ask(session, prometheus, "rules")
                found["names"] = await _ask(session, prometheus, "label/__name__/values")

    asyncio.run(collect())
    return found


def test_every_query_of_every_panel_returns_data(answers: Mapping[str, Any]) -> None:
    """But those about what this rig has not, each for its reason, and those that return only faults."""
    empty = {
        title: query
        for title, query in panels()
        if not answers["queries"][query] and not any(name in query for name in ELSEWHERE) and not FAULTS.search(query)
    }

    assert empty == {}


def test_panels_ask_only_for_metrics_that_there_are(answers: Mapping[str, Any]) -> None:
    """A name that nobody exposes would be an empty panel for ever."""
    ours = {each.exposed for each in INSTRUMENTS}
    known = set(answers["names"]) | ours | {f"{name}_{end}" for name in ours for end in ("bucket", "sum", "count")}
    asked = {
        name
        for query in [query for _, query in panels()]
        + [rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
        for name in re.findall(r"\b(?:sidegate|mcp)_[a-z_]+", query)
    }

    assert asked - known == set()


def test_every_rule_is_evaluated_without_error(answers: Mapping[str, Any]) -> None:
    """By Prometheus itself, on what it scraped; and nothing fires while all is well."""
    rules = [rule for group in answers["rules"]["groups"] for rule in group["rules"]]

    assert len(rules) == 17
    assert {rule["name"]: rule["lastError"] for rule in rules if rule.get("lastError")} == {}
    assert {rule["name"] for rule in rules if rule["state"] == "firing"} <= {"SidegateQuotaNearlySpent"}


def test_exemplars_lead_from_a_bucket_to_a_trace(answers: Mapping[str, Any]) -> None:
    """Prometheus keeps the trace ids that OpenMetrics gave it."""
    labels = [each["labels"] for series in answers["exemplars"] for each in series["exemplars"]]

    assert labels
    assert all(re.fullmatch("[0-9a-f]{32}", each["trace_id"]) for each in labels)


def test_rules_are_well_formed_and_fire_on_their_faults() -> None:
    """The rules are read by promtool which finds each alert where alerts.yaml has a fault, and nowhere else."""
    promtool = part("prometheus") / "promtool"
    for command in (("check", "rules", RULES), ("test", "rules", ROOT / "tests" / "telemetry" / "alerts.yaml")):
        done = subprocess.run([promtool, *command], capture_output=True, text=True, check=False, timeout=60)  # noqa: S603 - the part

        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_shown_to_fire() -> None:
    """An alert that nobody has seen fire may never do so."""
    alerts = {rule["alert"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}
    shown = {
        test["alertname"]
        for each in yaml.safe_load((ROOT / "tests" / "telemetry" / "alerts.yaml").read_text())["tests"]
        for test in each["alert_rule_test"]
        if test.get("exp_alerts")
    }

    assert shown == alerts

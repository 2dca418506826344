"""Each judgement of `sidegate check`, with what it says to do."""

import base64
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509

from certs.authority import Authority, make_key
from webhook.core import preflight, resources
from webhook.core.preflight import Finding, Level

CRDS = Path(__file__).parents[3] / "charts" / "sidegate" / "crds"
NOW = datetime(2026, 11, 22, tzinfo=UTC)
ESTABLISHED = {"conditions": [{"type": "Established", "status": "True"}]}


def ca(start: datetime = NOW, name: str = "webhook CA") -> bytes:
    """Return the certificate of a CA that is good for a day."""
    authority = Authority.make(
        name=name, key=make_key(), now=start, lifetime=timedelta(days=1), serial=x509.random_serial_number()
    )
    return authority.certificate_pem


def named(name: str, **more: Any) -> Any:
    """Return an object."""
    return {"metadata": {"name": name, "namespace": "sidegate-system"}, **more}


def levels(findings: Iterable[Finding]) -> list[tuple[str, str]]:
    """Return names and levels."""
    return [(each.name, each.level) for each in findings]


@pytest.mark.parametrize(
    ("version", "level", "said"),
    [
        ("v1.33.0", Level.OK, "native sidecars are stable"),
        ("v1.35.2-gke.100", Level.OK, "v1.35.2-gke.100"),
        ("v2.0.0", Level.OK, "v2.0.0"),
        ("v1.32.9", Level.FAIL, "too old"),
        ("unknown", Level.WARN, "cannot be read"),
    ],
)
def test_an_old_api_server_is_found(version: str, level: Level, said: str) -> None:
    """The chart refuses it as well."""
    found = preflight.api_version({"gitVersion": version})

    assert found.level is level
    assert said in found.text


def test_missing_permissions_are_named() -> None:
    """All of them at once."""
    answers = dict.fromkeys(preflight.NEEDED, True)
    assert preflight.permissions(answers).level is Level.OK

    answers["apps", "deployments", "create"] = answers["", "secrets", "create"] = False
    assert preflight.permissions(answers).text == "you may not create deployments, create secrets"


def test_pods_need_the_workload_api() -> None:
    """A driver on every node; on OpenShift one that restricted pods may mount."""
    node = named("a", spec={"drivers": [{"name": "csi.spiffe.io"}]})
    bare = named("b", spec={"drivers": None})
    driver = named("csi.spiffe.io")
    labelled = {"metadata": {"name": "csi.spiffe.io", "labels": {preflight.OPENSHIFT_LABEL: "restricted"}}}

    assert preflight.csi_driver(None, [node], is_openshift=False).level is Level.FAIL
    assert preflight.csi_driver(driver, [node], is_openshift=False).level is Level.OK
    assert preflight.csi_driver(driver, [node, bare], is_openshift=False).text == "1 of 2 nodes have no driver: b"
    assert "for privileged" in preflight.csi_driver(driver, [node], is_openshift=True).text
    assert preflight.csi_driver(labelled, [node], is_openshift=True).level is Level.OK


def test_an_agent_is_not_guessed_at() -> None:
    """What the API does not know is said to be unknown."""
    assert preflight.spire_agent([], []).level is Level.WARN
    assert preflight.spire_agent([named("a")], [named("sidegate")]).level is Level.OK


def definitions() -> dict[str, Any]:
    """Return the CRDs of this version, as an API server has them."""
    read = (yaml.safe_load(path.read_text()) for path in CRDS.iterdir())
    return {each["spec"]["names"]["plural"]: each | {"status": ESTABLISHED} for each in read}


def test_our_own_crds_are_well() -> None:
    """Of every kind."""
    found = list(preflight.crds(definitions()))

    assert {each.level for each in found} == {Level.OK}
    assert len(found) == len(resources.KINDS)


def test_an_old_crd_is_found_by_what_it_lacks() -> None:
    """Helm upgrades none; the API server would drop the field without a word."""
    known: dict[str, Any] = definitions()
    del known["mcppolicies"]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"][
        "mode"
    ]
    known["mcplimits"] = None
    known["identityproviders"]["status"] = {}
    known["mcpserverprofiles"]["spec"]["versions"][0]["served"] = False
    texts = {each.name: each.text for each in preflight.crds(known) if each.level is Level.FAIL}

    assert texts == {
        "crd-mcppolicies": "older than this program: no mode",
        "crd-mcplimits": "not installed",
        "crd-identityproviders": "not established",
        "crd-mcpserverprofiles": "does not serve v1alpha1",
    }


def a_configuration(bundle: bytes | None, policy: str = "Fail") -> Any:
    """Return a configuration of one webhook."""
    text = base64.b64encode(bundle).decode() if bundle else None
    return {"webhooks": [{"name": "w", "failurePolicy": policy, "clientConfig": {"caBundle": text}}]}


def test_the_webhook_must_be_trusted_and_fail_closed() -> None:
    """Our CA, in time, in every webhook."""
    ours, other = ca(), ca(name="other")

    def said(configuration: Any, secret: bytes | None = ours, now: datetime = NOW) -> tuple[str, str]:
        found = preflight.webhook_configuration(configuration, secret, now)
        return found.level, found.text

    assert said(a_configuration(ours)) == ("ok", "1 webhooks fail closed and trust our CA")
    assert said(a_configuration(other + ours))[0] == "ok"
    assert said(a_configuration(ours), None)[1].endswith("(not compared with the Secret, which you may not read)")
    assert said(None)[1].startswith("no MutatingWebhookConfiguration")
    assert said(a_configuration(ours, "Ignore")) == ("fail", "w: fails open")
    assert said(a_configuration(None)) == ("fail", "w: no caBundle")
    assert said(a_configuration(other)) == ("fail", "w: caBundle is not our CA")
    assert said(a_configuration(b"garbage"))[1].startswith("w: caBundle cannot be read")
    late = NOW + timedelta(days=2)
    assert said(a_configuration(ours), now=late) == ("fail", "w: every certificate of the caBundle has expired")


def test_the_backstop_must_be_there_and_deny() -> None:
    """A policy that is bound to nothing denies nothing."""
    policies = [named("sidegate-pods"), named("sidegate-live-pods")]

    def said(known: list[Any], *actions: list[str]) -> str:
        bindings = [
            named(f"b{index}", spec={"policyName": policies[index]["metadata"]["name"], "validationActions": each})
            for index, each in enumerate(actions)
        ]
        return preflight.backstop(known, bindings, "sidegate").text

    assert said(policies, ["Deny", "Audit"], ["Deny"]).startswith("pods without their sidecar are denied")
    assert said(policies[:1], ["Deny"]) == "no ValidatingAdmissionPolicy sidegate-live-pods"
    assert said(policies, ["Audit"], ["Deny"]) == "no binding lets ValidatingAdmissionPolicy sidegate-pods deny"
    assert said(policies, ["Deny"]) == "no binding lets ValidatingAdmissionPolicy sidegate-live-pods deny"


@pytest.mark.parametrize(
    ("wanted", "ready", "level", "said"),
    [
        (2, 2, Level.OK, "all replicas are ready"),
        (2, 1, Level.WARN, "1 of 2 replicas are ready"),
        (1, 1, Level.WARN, "one replica"),
        (2, 0, Level.FAIL, "none of 2 replicas is ready"),
    ],
)
def test_the_control_plane_must_answer(wanted: int, ready: int, level: Level, said: str) -> None:
    """And go on answering when a node goes."""
    found = preflight.control_plane([named("sidegate", spec={"replicas": wanted}, status={"readyReplicas": ready})])

    assert found.level is level
    assert said in found.text
    assert preflight.control_plane([]).level is Level.FAIL


def test_enforcement_of_network_policies_is_not_claimed() -> None:
    """The API takes policies that nobody enforces."""
    assert preflight.network_policy([named("kube-proxy")]).level is Level.WARN
    assert "must be tried" in preflight.network_policy([named("calico-node")]).text


def test_other_webhooks_are_judged() -> None:
    """A mesh that captures the same pods, and one that must answer before any pod is created."""
    rules = [{"operations": ["CREATE"], "resources": ["pods"]}]
    selector = {"matchLabels": {"a": "b"}}
    mesh = named("istio-sidecar-injector", webhooks=[{"name": "i", "rules": rules, "namespaceSelector": selector}])
    wide = named("everything", webhooks=[{"name": "e", "rules": rules}])
    soft = named("soft", webhooks=[{"name": "s", "rules": rules, "failurePolicy": "Ignore"}])
    services = named(
        "linkerd", webhooks=[{"name": "l", "rules": [{"operations": ["CREATE"], "resources": ["services"]}]}]
    )
    ours = named("sidegate", webhooks=[{"name": "o", "rules": rules}])

    assert [each.text for each in preflight.other_webhooks([mesh, wide, soft, services, ours], "sidegate")] == [
        "istio-sidecar-injector: Istio changes pods, too",
        "e must answer before any pod is created, ours too",
    ]


def test_labels_that_govern_nothing_are_found() -> None:
    """A misspelt value, Pod Security that refuses the capture mode, an exception that was left open."""

    def space(name: str, **labels: str) -> Any:
        keys = {
            "injection": "sidegate.dev/injection",
            "level": preflight.POD_SECURITY,
            "glass": "sidegate.dev/break-glass",
        }
        return {"metadata": {"name": name, "labels": {keys[key]: value for key, value in labels.items()}}}

    spaces = [
        space("a", injection="true"),
        space("b", injection="enabled", level="restricted"),
        space("c", injection="enforced", glass="allowed"),
        space("d", injection="enabled", level="privileged"),
    ]
    texts = [each.text for each in preflight.namespaces(spaces, "redirect")]

    assert texts == [
        "a: sidegate.dev/injection=true governs nothing",
        "b: Pod Security restricted refuses capture mode redirect, which needs NET_ADMIN",
        "c: break-glass is open",
        "3 namespaces are governed",
    ]
    assert levels(preflight.namespaces([spaces[1]], "remap")) == [("namespaces", "ok")]


def test_platforms_have_their_traps() -> None:
    """Known by the version or by an API group."""
    found = preflight.platform({"gitVersion": "v1.35.2-gke.1"}, ["apps", "security.openshift.io"])

    assert levels(found) == [("gke", "warn"), ("openshift", "warn")]
    assert list(preflight.platform({"gitVersion": "v1.35.2"}, ["apps"])) == []


def test_aks_is_known_by_its_nodes() -> None:
    """Its enforcer is told of before the installation."""
    (found,) = preflight.aks([named("aks-pool-1"), named("aks-pool-2")])

    assert found.level is Level.WARN
    assert "admissions.enforcer/disabled" in found.fix
    assert list(preflight.aks([named("ip-10-0-0-1")])) == []


def test_selectors_that_somebody_rewrote_are_found() -> None:
    """What the chart writes is no rewriting; what AKS adds, or a vendor's label at those that enforce, is."""

    def webhook(name: str, *expressions: Any) -> Any:
        return {"name": f"{name}.inject.sidegate.dev", "namespaceSelector": {"matchExpressions": list(expressions)}}

    ours = {"key": "control-plane", "operator": "NotIn", "values": ["true"]}
    azure = {"key": "control-plane", "operator": "DoesNotExist"}
    plain = {"key": "sidegate.dev/injection", "operator": "In", "values": ["enforced"]}
    good = {"webhooks": [webhook("optional", ours), webhook("enforced", plain), {"name": "bare"}]}
    bad = {"webhooks": [webhook("optional", ours, azure), webhook("enforced", plain, ours)]}

    assert list(preflight.selectors(good)) == list(preflight.selectors(None)) == []
    assert levels(preflight.selectors(bad)) == [("webhook-selectors", "fail")] * 2


def test_the_worst_level_decides() -> None:
    """The exit status follows it."""
    ok, warn, fail = (Finding("x", level, "") for level in Level)

    assert preflight.worst([ok]) is Level.OK
    assert preflight.worst([ok, warn]) is Level.WARN
    assert preflight.worst([warn, fail, ok]) is Level.FAIL


def test_a_setting_is_read_from_the_deployment() -> None:
    """Where a value comes from elsewhere, it is not known."""
    env = [{"name": "A", "value": "x"}, {"name": "B", "valueFrom": {}}]
    deployment = named("sidegate", spec={"template": {"spec": {"containers": [{"name": "c", "env": env}]}}})

    assert preflight.environment([deployment], "A") == "x"
    assert preflight.environment([deployment], "B") is preflight.environment([deployment], "C") is None

"""The custom resources, and that their definitions in the chart say the same."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from sidecar.core import profile
from webhook.core import resources
from webhook.core.resources import KINDS, Kind, Selector
from webhook.errors import BadResource

CRDS = Path(__file__).parents[3] / "charts" / "sidegate" / "crds"


RATE = {"ratePerSecond": 1, "burst": 10}
QUOTA = {"amount": 100, "period": "day"}
RULE = {"name": "x", "regex": "a1"}
ROWS = {"tool": "query", "path": "rows", "maximum": 5}
LOCAL = {"scope": "global", "whenUnavailable": "local"}


def a_resource(**spec: Any) -> Any:
    """Return a resource with *spec*."""
    return {"metadata": {"name": "x", "namespace": "n"}, "spec": spec}


def definition(kind: Kind) -> Any:
    """Return the CustomResourceDefinition of *kind*."""
    return yaml.safe_load((CRDS / f"{kind.plural}.yaml").read_text())


def shape(schema: Any, components: Any) -> Any:
    """Return what a JSON schema allows, without descriptions and references."""
    if "$ref" in schema:
        schema = components[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:  # a field that may be left out
        (schema,) = [each for each in schema["anyOf"] if each.get("type") != "null"]
        return shape(schema, components)
    bounds = ("minimum", "maximum", "pattern", "maxLength", "minLength", "minItems", "type")
    kept: dict[str, Any] = {key: schema[key] for key in bounds if key in schema}
    if "pattern" in kept:  # $ is the very end in RE2, which the API server uses; Python needs \Z to say so
        kept["pattern"] = kept["pattern"].replace(r"\Z", "$")
    if schema.get("exclusiveMinimum") is True:  # OpenAPI 3.0, as CRDs have it
        kept["exclusiveMinimum"] = kept.pop("minimum")
    elif "exclusiveMinimum" in schema:
        kept["exclusiveMinimum"] = schema["exclusiveMinimum"]
    if "enum" in schema:
        kept["enum"] = sorted(schema["enum"])
        kept["type"] = "string"
    if "properties" in schema:
        kept["properties"] = {key: shape(each, components) for key, each in schema["properties"].items()}
        kept["required"] = sorted(schema.get("required", ()))
    if "items" in schema:
        kept["items"] = shape(schema["items"], components)
    if isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = shape(schema["additionalProperties"], components)
    return kept


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_definition_allows_what_we_read(kind: Kind) -> None:
    """Names, types, bounds and enums of the CRD are those of the code; neither can be changed alone."""
    (ours,), components = msgspec.json.schema_components([kind.spec])
    crd = definition(kind)["spec"]
    (version,) = crd["versions"]

    assert version["name"] == resources.VERSION
    assert (crd["names"]["kind"], crd["names"]["plural"]) == (kind.name, kind.plural)
    assert shape(version["schema"]["openAPIV3Schema"]["properties"]["spec"], {}) == shape(ours, components)


@pytest.mark.parametrize(
    ("selector", "labels", "matches"),
    [
        ({}, {}, True),
        ({"matchLabels": {"a": "1"}}, {"a": "1", "b": "2"}, True),
        ({"matchLabels": {"a": "1"}}, {"a": "2"}, False),
        ({"matchLabels": {"a": "1"}}, {}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1", "2"]}]}, {"a": "2"}, True),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1"]}]}, {}, False),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, {}, True),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, {"a": "1"}, False),
        ({"matchExpressions": [{"key": "a", "operator": "Exists"}]}, {"a": ""}, True),
        ({"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}, {"a": ""}, False),
        ({"matchLabels": {"a": "1"}, "matchExpressions": [{"key": "b", "operator": "Exists"}]}, {"a": "1"}, False),
    ],
)
def test_selector_matches_as_kubernetes_does(selector: Any, labels: dict[str, str], *, matches: bool) -> None:
    """All lines must hold; a missing label is in no set."""
    assert msgspec.convert(selector, type=Selector).matches(labels) is matches


@pytest.mark.parametrize(
    ("kind", "spec", "said"),
    [
        (resources.SERVER_PROFILE, {}, "selector"),
        (resources.SERVER_PROFILE, {"selector": {}, "sever": {}}, "sever"),
        (resources.SERVER_PROFILE, {"selector": {}, "server": {"port": 0}}, r"\$\.server\.port"),
        (resources.SERVER_PROFILE, {"selector": {}, "server": {"paths": ["x"]}}, "paths"),
        (resources.SERVER_PROFILE, {"selector": {}, "server": {"hosts": ["MCP.test"]}}, "hosts"),
        (resources.SERVER_PROFILE, {"selector": {}, "server": {"hosts": ["https://mcp.test"]}}, "hosts"),
        (resources.SERVER_PROFILE, {"selector": {}, "server": {"origins": ["app.test"]}}, "origins"),
        (resources.SERVER_PROFILE, {"selector": {}, "server": {"origins": ["https://app.test/"]}}, "origins"),
        (resources.SERVER_PROFILE, {"selector": {}, "server": {"origins": ["*"]}}, "origins"),
        (resources.SERVER_PROFILE, {"selector": {}, "denied": "quietly"}, "denied"),
        (resources.SERVER_PROFILE, {"selector": {}, "identity": {"callers": ["http://x"]}}, r"callers\[0\]"),
        (resources.SERVER_PROFILE, {"selector": {}, "identity": {"mtls": "loose"}}, "mtls"),
        (resources.POLICY, {"selector": {}}, "one of cedar, rego, bundle and content"),
        (resources.POLICY, {"selector": {}, "content": [{"name": "x"}]}, r"content\[0\]: a content rule needs fields"),
        (
            resources.POLICY,
            {"selector": {}, "content": [RULE, {**RULE, "regex": "b"}]},
            r"\[1\].name: x is the name of",
        ),
        (resources.POLICY, {"selector": {}, "content": [{**RULE, "regex": "("}]}, r"regex: missing \)"),
        (
            resources.POLICY,
            {"selector": {}, "content": [{**RULE, "patterns": ["phone"]}]},
            r"Invalid enum value 'phone'",
        ),
        (resources.CLUSTER_POLICY, {"selector": {}, "content": [{**RULE, "action": "hide"}]}, "action"),
        (resources.LIMIT, {"selector": {}, "ratePerSecond": 0, "burst": 1}, "ratePerSecond"),
        (resources.LIMIT, {"selector": {}, "ratePerSecond": 9e-7, "burst": 1}, "ratePerSecond"),
        (resources.LIMIT, {"selector": {}}, "at least one of ratePerSecond, quotas, concurrent and maxBytes"),
        (resources.LIMIT, {"selector": {}, "burst": 1}, "ratePerSecond and burst go together"),
        (resources.LIMIT, {"selector": {}, "quotas": [{"amount": 1, "period": "year"}]}, r"quotas\[.*period"),
        (resources.LIMIT, {"selector": {}, "quotas": [QUOTA, QUOTA]}, "quotas: one for each period"),
        (resources.LIMIT, {"selector": {}, "quotas": [{**QUOTA, "warnAtPercent": [100]}]}, "warnAtPercent"),
        (resources.LIMIT, {"selector": {}, "concurrent": 0}, "concurrent"),
        (resources.LIMIT, {"selector": {}, "maxBytes": 1, "weight": {"default": 2}}, "weight: needs ratePerSecond or"),
        (
            resources.LIMIT,
            {"selector": {}, **RATE, "weight": {"tools": {"a": 11}}},
            "burst: 10 units, and one message can",
        ),
        (
            resources.LIMIT,
            {"selector": {}, **RATE, "tools": ["b"], "weight": {"tools": {"a": 2}}},
            "a is none of tools",
        ),
        (resources.LIMIT, {"selector": {}, **RATE, "weight": {"arguments": [ROWS, ROWS]}}, "one for each tool"),
        (resources.LIMIT, {"selector": {}, **RATE, "per": ["team"]}, "team"),
        (resources.LIMIT, {"selector": {}, **RATE, "replicas": 2}, "only with scope global"),
        (resources.LIMIT, {"selector": {}, **RATE, "whenUnavailable": "open"}, "only with scope global"),
        (resources.LIMIT, {"selector": {}, **RATE, "scope": "global", "whenUnavailable": "local"}, "replicas and"),
        (resources.LIMIT, {"selector": {}, **RATE, **LOCAL, "replicas": 11}, "10 units of 11 replicas are 0 for each"),
        (resources.LIMIT, {"selector": {}, "concurrent": 3, **LOCAL, "replicas": 4}, "less than one for each"),
        (resources.IDENTITY_PROVIDER, {"issuer": "ftp://x"}, "issuer"),
        (resources.IDENTITY_PROVIDER, {"issuer": "https://x", "algorithms": ["HS256"]}, "algorithms"),
    ],
)
def test_unusable_resource_is_refused_by_field(kind: Kind, spec: Any, said: str) -> None:
    """The message names the resource and the field."""
    with pytest.raises(BadResource, match=said) as refused:
        resources.decode(kind, a_resource(**spec), kind.spec)

    assert str(refused.value).startswith(f"{kind.name} n/x: spec")


def test_resource_without_spec_is_refused() -> None:
    """Nothing at all is not an empty spec."""
    with pytest.raises(BadResource, match="IdentityProvider"):
        resources.decode(resources.IDENTITY_PROVIDER, {}, resources.IdentityProviderSpec)


@pytest.mark.parametrize("host", ["records", "records.demo", "records.demo.svc", "records.demo.svc.cluster.local."])
def test_a_service_needs_no_pattern(host: str) -> None:
    """Its namespace says whom an agent must meet there."""
    spec = {"selector": {}, "agent": {"servers": [{"host": host, "port": 8000}]}}

    assert resources.decode(resources.SERVER_PROFILE, a_resource(**spec), resources.ServerProfileSpec).agent


@pytest.mark.parametrize(
    ("server", "why"),
    [
        ({"host": "tools.partner.example", "port": 443}, r"agent.servers\[0\].id: needed"),
        ({"host": "10.0.0.1", "port": 443}, "needed"),
        ({"host": "records.demo", "port": 443, "id": "partner.example"}, r"agent.servers\[0\].id: SPIFFE ID"),
        ({"host": "records demo", "port": 443}, "host"),
        ({"host": "records.demo"}, "port"),
    ],
)
def test_a_server_that_an_agent_could_not_recognise_is_refused(server: Any, why: str) -> None:
    """Where no namespace says it, the profile must."""
    spec = {"selector": {}, "agent": {"servers": [server]}}

    with pytest.raises(BadResource, match=why):
        resources.decode(resources.SERVER_PROFILE, a_resource(**spec), resources.ServerProfileSpec)


def test_a_limit_says_to_sidecars_what_its_author_wrote() -> None:
    """Every field arrives, under the names of the profile."""
    spec = {
        "selector": {},
        **RATE,
        "quotas": [{**QUOTA, "warnAtPercent": [80]}],
        "concurrent": 4,
        "maxBytes": 1000,
        "per": ["user", "agent_session", "server"],
        "methods": ["tools/call"],
        "tools": ["query"],
        "weight": {"default": 1, "tools": {"query": 2}, "arguments": [{**ROWS, "per": 100}]},
        "mode": "shadow",
        **LOCAL,
        "replicas": 2,
    }
    limit = resources.decode(resources.LIMIT, a_resource(**spec), resources.LimitSpec).limit("budget")

    assert limit == profile.Limit(
        name="budget",
        rate_per_s=1.0,
        burst=10,
        quotas=(profile.Quota(amount=100, period="day", warn_at_percent=(80,)),),
        concurrent=4,
        max_bytes=1000,
        per=("user", "agent_session", "server"),
        tools=("query",),
        weight=profile.Weight(
            tools={"query": 2},
            arguments=(profile.ArgumentWeight(tool="query", path="rows", per=100.0, maximum=5),),
        ),
        mode="shadow",
        scope="global",
        when_unavailable="local",
        replicas=2,
    )

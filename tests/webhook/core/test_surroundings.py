"""Requirements on the NetworkPolicies around governed servers; tests/e2e sends real packets."""

from dataclasses import replace
from typing import Any

import pytest

from sidecar.config import Capture
from webhook.core import resources
from webhook.core.resources import IdentityProviderSpec, PeerSpec, ReachSpec, ServerProfileSpec
from webhook.core.surroundings import Surroundings, decode_peers, decode_reach, policies, undeclared
from webhook.errors import BadResource

SETTINGS = Surroundings(
    name="sidegate",
    namespace="sidegate-system",
    trust_domain="example.org",
    dns=(ReachSpec(namespace="kube-system", pod_labels={"k8s-app": "kube-dns"}),),
    metrics_from=(PeerSpec(namespace="*"),),
)
CALLER = "spiffe://example.org/ns/agents/sa/planner"
AGENTS = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "agents"}}}
TCP = [{"protocol": "TCP"}]
PROVIDER = {"issuer": "https://oidc.identity.svc.cluster.local:8443", "audiences": ["a"]}


def a_profile(**spec: Any) -> ServerProfileSpec:
    """A profile that selects the ledger."""
    whole = {"selector": {"matchLabels": {"app": "ledger"}}} | spec
    return resources.decode(resources.SERVER_PROFILE, {"metadata": {"name": "p"}, "spec": whole}, ServerProfileSpec)


def a_provider(**spec: Any) -> dict[str, IdentityProviderSpec]:
    """An identity provider called corp."""
    whole = {"metadata": {"name": "corp"}, "spec": PROVIDER | spec}
    return {"corp": resources.decode(resources.IDENTITY_PROVIDER, whole, IdentityProviderSpec)}


def specs(settings: Surroundings = SETTINGS, /, **profiles: ServerProfileSpec) -> dict[str, Any]:
    """The specs of the policies of namespace team, by name."""
    return {name: each["spec"] for name, each in policies("team", profiles, a_provider(), settings).items()}


def with_callers(*callers: str, **identity: Any) -> ServerProfileSpec:
    """A profile whose callers these are."""
    return a_profile(identity={"callers": list(callers), **identity})


def test_servers_are_cut_off_before_anybody_says_anything() -> None:
    """The base is there without a profile: health may be read, DNS and the control plane be asked, and no more."""
    (base,) = policies("team", {}, {}, SETTINGS).values()

    assert base["metadata"] == {
        "name": "sidegate",
        "namespace": "team",
        "labels": {"app.kubernetes.io/instance": "sidegate", "app.kubernetes.io/managed-by": "sidegate"},
    }
    assert base["spec"]["podSelector"]["matchExpressions"] == [
        {"key": "sidegate.dev/injected", "operator": "Exists"},
        {"key": "sidegate.dev/agent", "operator": "NotIn", "values": ["true"]},
    ]
    assert base["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert base["spec"]["ingress"] == [
        {"from": [{"namespaceSelector": {}}], "ports": [{"protocol": "TCP", "port": 15020}]}
    ]
    dns, control_plane = base["spec"]["egress"]
    assert dns["to"][0]["podSelector"] == {"matchLabels": {"k8s-app": "kube-dns"}}
    assert dns["ports"] == [{"protocol": "TCP", "port": 53}, {"protocol": "UDP", "port": 53}]
    assert control_plane["to"][0]["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": "sidegate-system"
    }
    assert control_plane["ports"] == [{"protocol": "TCP", "port": 8443}]


def test_callers_get_in_from_their_namespaces() -> None:
    """By TCP on any port, for netfilter in the pod sends all of them to the sidecar; the selector is the profile's."""
    made = specs(ledger=with_callers(CALLER, "spiffe://example.org/ns/agents/sa/other"))["sidegate.ledger"]

    assert made["ingress"] == [{"from": [AGENTS], "ports": TCP}]
    assert made["podSelector"]["matchLabels"] == {"app": "ledger"}
    assert {"key": "sidegate.dev/capture", "operator": "NotIn", "values": ["remap"]} in made["podSelector"][
        "matchExpressions"
    ]


def test_in_mode_remap_only_the_sidecars_port_is_open() -> None:
    """Where the mode is allowed, its pods have a policy of their own; elsewhere there is none."""
    profile = with_callers(CALLER)
    both = specs(replace(SETTINGS, weakest_capture=Capture.REMAP), ledger=profile)

    assert both["sidegate-remap.ledger"]["ingress"] == [
        {"from": [AGENTS], "ports": [{"protocol": "TCP", "port": 15443}]}
    ]
    assert {"key": "sidegate.dev/capture", "operator": "In", "values": ["remap"]} in both["sidegate-remap.ledger"][
        "podSelector"
    ]["matchExpressions"]
    assert "sidegate-remap.ledger" not in specs(ledger=profile)


@pytest.mark.parametrize(
    ("caller", "namespace"),
    [
        ("spiffe://example.org/ns/agents/**", "agents"),
        ("spiffe://example.org/ns/agents/sa/*", "agents"),
        ("spiffe://example.org/ns/*/sa/planner", None),
        ("spiffe://example.org/**", None),
    ],
)
def test_patterns_mean_the_namespaces_that_they_can_match(caller: str, namespace: str | None) -> None:
    """A wildcard in the namespace is every namespace of the cluster."""
    ((source,),) = [rule["from"] for rule in specs(ledger=with_callers(caller))["sidegate.ledger"]["ingress"]]

    assert source == (AGENTS if namespace else {"namespaceSelector": {}})


@pytest.mark.parametrize("caller", ["spiffe://partner.example/ns/agents/sa/a", "spiffe://example.org/workload/gateway"])
def test_a_caller_of_unknown_place_is_said_and_not_guessed(caller: str) -> None:
    """Until spec.ingress says where it comes from."""
    profile = with_callers(caller)

    assert "ingress" not in specs(ledger=profile)["sidegate.ledger"]
    (line,) = undeclared({"ledger": profile}, {}, SETTINGS)
    assert line == f"MCPServerProfile ledger: caller {caller}: no namespace is known of it; name one in spec.ingress"
    named = a_profile(identity={"callers": [caller]}, ingress=[{"cidr": "192.0.2.7/32"}])
    assert specs(ledger=named)["sidegate.ledger"]["ingress"][0]["from"] == [{"ipBlock": {"cidr": "192.0.2.7/32"}}]
    assert undeclared({"ledger": named}, {}, SETTINGS) == []


def test_who_needs_no_identity_may_come_from_anywhere() -> None:
    """Where the cluster permits it, and unless the profile is strict itself."""
    permissive = replace(SETTINGS, is_permissive=True)

    assert specs(permissive, ledger=a_profile())["sidegate.ledger"]["ingress"] == [{"ports": TCP}]
    assert "ingress" not in specs(permissive, ledger=a_profile(identity={"mtls": "strict"}))["sidegate.ledger"]
    assert "ingress" not in specs(ledger=a_profile(identity={"mtls": "permissive"}))["sidegate.ledger"]


def test_the_sidecar_reaches_what_the_profile_has_it_call() -> None:
    """Providers and collectors that are Services of the cluster, or addresses, need not be named twice."""
    profile = a_profile(identity={"providers": [{"name": "corp"}]}, telemetry={"otlpEndpoint": "http://192.0.2.9:4318"})
    urls = replace(SETTINGS, urls=("http://collector.telemetry:4318",))
    places = [rule["to"][0] for rule in specs(urls, ledger=profile)["sidegate.ledger"]["egress"]]

    assert places == [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "identity"}}},
        {"ipBlock": {"cidr": "192.0.2.9/32"}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "telemetry"}}},
    ]


@pytest.mark.parametrize(("issuer", "is_said"), [
    ("https://gitlab.com", True),
    ("https://gitlab.com:443", True),
    ("https://keycloak.identity:8443", False),
    ("https://keycloak.identity.svc", False),
    ("https://[2001:db8::1]", False),
])  # fmt: skip
def test_a_short_name_of_the_web_is_not_taken_for_a_service_in_silence(issuer: str, *, is_said: bool) -> None:
    """Two labels name a Service and its namespace, or a site and its top-level domain."""
    profile = a_profile(identity={"providers": [{"name": "corp"}]})

    assert bool(undeclared({"ledger": profile}, a_provider(issuer=issuer), SETTINGS)) == is_said


def test_a_destination_outside_the_cluster_is_to_be_named() -> None:
    """No policy holds a host's name; whoever names addresses has thought of it."""
    outside = a_provider(issuer="https://login.example.com/tenant")
    profile = a_profile(identity={"providers": [{"name": "corp"}]})
    named = a_profile(identity={"providers": [{"name": "corp"}]}, egress=[{"cidr": "203.0.113.0/24", "ports": [443]}])

    assert undeclared({"ledger": profile}, outside, SETTINGS) == [
        "MCPServerProfile ledger: https://login.example.com/tenant: outside the cluster; name its addresses in spec.egress"
    ]
    assert undeclared({"ledger": named}, outside, SETTINGS) == []
    assert undeclared({"ledger": profile}, outside, replace(SETTINGS, mode="ingress")) == []
    assert undeclared({"ledger": profile}, outside, replace(SETTINGS, mode="off")) == []


def test_declared_destinations_are_reached() -> None:
    """As they are written, and those of the operator by all."""
    egress = [
        {"namespace": "db", "podLabels": {"app": "postgres"}, "ports": [5432]},
        {"cidr": "203.0.113.0/24", "except": ["203.0.113.128/25"]},
    ]
    made = specs(
        replace(SETTINGS, egress=(ReachSpec(cidr="198.51.100.0/24", ports=(443,)),)), ledger=a_profile(egress=egress)
    )

    database, network = made["sidegate.ledger"]["egress"]
    assert database["ports"] == [{"protocol": "TCP", "port": 5432}]
    assert database["to"][0]["podSelector"] == {"matchLabels": {"app": "postgres"}}
    assert network == {"to": [{"ipBlock": {"cidr": "203.0.113.0/24", "except": ["203.0.113.128/25"]}}], "ports": TCP}
    assert made["sidegate"]["egress"][-1]["to"] == [{"ipBlock": {"cidr": "198.51.100.0/24"}}]


def test_modes_take_less() -> None:
    """`ingress` leaves what goes out alone, `off` everything."""
    inward = specs(replace(SETTINGS, mode="ingress"), ledger=with_callers(CALLER))

    assert {tuple(each["policyTypes"]) for each in inward.values()} == {("Ingress",)}
    assert not any("egress" in each for each in inward.values())
    assert specs(replace(SETTINGS, mode="off"), ledger=a_profile()) == {}


def test_agents_are_not_servers() -> None:
    """A profile for agents makes no policy."""
    agents = a_profile(agent={"servers": [{"host": "ledger.team", "port": 8000}]})

    assert set(specs(planner=agents)) == {"sidegate"}
    assert undeclared({"planner": agents}, {}, SETTINGS) == []


def test_expressions_of_the_selector_are_kept() -> None:
    """The policy is about the pods that the profile selects."""
    expressions = [{"key": "tier", "operator": "In", "values": ["a"]}, {"key": "old", "operator": "DoesNotExist"}]
    made = specs(ledger=a_profile(selector={"matchExpressions": expressions}))["sidegate.ledger"]["podSelector"]

    assert made["matchExpressions"][:2] == expressions
    assert "matchLabels" not in made


def test_a_long_name_is_shortened_to_another() -> None:
    """Names of policies have the length of those of profiles."""
    names = set(specs(**{"a" * 253: a_profile(), "a" * 252 + "b": a_profile()})) - {"sidegate"}

    assert len(names) == 2
    assert max(map(len, names)) <= 253


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ({"ingress": [{}]}, r"spec\.ingress\[0\]: one of namespace and cidr must be given"),
        ({"egress": [{"namespace": "a", "cidr": "192.0.2.0/24"}]}, r"spec\.egress\[0\]: one of namespace and cidr"),
        (
            {"egress": [{"namespace": "a"}, {"cidr": "example.com"}]},
            r"spec\.egress\[1\]: 'example.com' does not appear",
        ),
        ({"egress": [{"hosts": ["api.example.com"], "cidr": "192.0.2.0/24"}]}, r"hosts goes with ports alone"),
        ({"egress": [{"hosts": ["192.0.2.1"]}]}, r"hosts"),
        ({"egress": [{"hosts": ["*.com"]}]}, r"hosts"),
        ({"egress": [{"hosts": ["API.example.com"]}]}, r"hosts"),
        ({"egress": [{"hosts": ["a.example"]}], "capture": "remap"}, r"spec\.egress: hosts need capture redirect"),
        (
            {"egress": [{"hosts": ["a.example"]}], "agent": {"servers": [{"host": "a.b", "port": 1}]}},
            r"spec\.egress: hosts are for servers",
        ),
        ({"egress": [{"cidr": "192.0.2.1/24"}]}, r"192.0.2.1/24 has host bits set"),
        ({"egress": [{"cidr": "192.0.2.0/24", "except": ["198.51.100.0/24"]}]}, "is no part of"),
        ({"egress": [{"cidr": "192.0.2.0/24", "except": ["::/0"]}]}, "is no part of"),
        ({"egress": [{"namespace": "a", "except": ["192.0.2.0/24"]}]}, "except goes with cidr"),
        ({"ingress": [{"cidr": "192.0.2.0/24", "podLabels": {"a": "b"}}]}, "podLabels goes with namespace"),
        ({"ingress": [{"namespace": "a", "ports": [1]}]}, "unknown field `ports`"),
    ],
)
def test_a_peer_that_means_nothing_is_refused(spec: dict[str, Any], complaint: str) -> None:
    """The message names the field and what is wrong."""
    with pytest.raises(BadResource, match=complaint):
        a_profile(**spec)


def test_settings_are_read_as_profiles_are() -> None:
    """JSON lists, with the same checks."""
    assert decode_reach('[{"cidr": "192.0.2.0/24", "ports": [443]}]') == (ReachSpec(cidr="192.0.2.0/24", ports=(443,)),)
    assert decode_peers("[]") == ()
    for text in ("{}", "[{}]", "none", '[{"cidr": "example.com"}]'):
        with pytest.raises(ValueError, match="a JSON list of namespaces and address ranges"):
            decode_peers(text)


def test_hosts_open_public_addresses_to_pods_that_reach_them_by_the_sidecar_alone() -> None:
    """On the ports of all hosts together, without what is the cluster's own; the others keep what is declared."""
    profile = a_profile(
        egress=[{"hosts": ["a.example"]}, {"hosts": ["b.example"], "ports": [8443, 443]}, {"namespace": "db"}]
    )
    made = specs(replace(SETTINGS, private=("203.0.113.0/24", "2001:db8::/32")), ledger=profile)
    opened = made["sidegate-hosts.ledger"]
    blocks = [rule["to"][0]["ipBlock"] for rule in opened["egress"]]

    assert {"key": "sidegate.dev/egress", "operator": "In", "values": ["hosts"]} in opened["podSelector"][
        "matchExpressions"
    ]
    assert opened["podSelector"]["matchLabels"] == {"app": "ledger"}
    assert [each["cidr"] for each in blocks] == ["0.0.0.0/0", "2000::/3"]
    assert {"10.0.0.0/8", "169.254.0.0/16", "203.0.113.0/24"} < set(blocks[0]["except"])
    assert blocks[1]["except"] == ["2001::/32", "2002::/16", "2001:db8::/32"]
    assert opened["egress"][0]["ports"] == [{"protocol": "TCP", "port": 443}, {"protocol": "TCP", "port": 8443}]
    assert "ingress" not in opened
    assert [rule["to"][0] for rule in made["sidegate.ledger"]["egress"]] == [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "db"}}}
    ]


def test_without_hosts_or_policies_nothing_is_opened() -> None:
    """Nothing is made where nothing holds connections back."""
    hosts = a_profile(egress=[{"hosts": ["a.example"]}])

    assert "sidegate-hosts.ledger" not in specs(ledger=a_profile(egress=[{"cidr": "192.0.2.0/24"}]))
    assert "sidegate-hosts.ledger" not in specs(replace(SETTINGS, mode="ingress"), ledger=hosts)


def test_a_provider_outside_is_reached_where_hosts_are_named() -> None:
    """The sidecar's own calls go the way that is open then."""
    named = a_profile(identity={"providers": [{"name": "corp"}]}, egress=[{"hosts": ["a.example"]}])

    assert undeclared({"ledger": named}, a_provider(issuer="https://login.example.com/tenant"), SETTINGS) == []

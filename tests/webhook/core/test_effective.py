"""What one workload gets."""

from typing import Any

import msgspec
import pytest

from sidecar.config import STDIO_PORT
from sidecar.core import profile as profiles
from sidecar.core.profile import (
    Audit,
    Client,
    EgressRules,
    Identity,
    NamedHosts,
    Network,
    StepUp,
    Telemetry,
    TokenExchange,
)
from webhook.core import pod as pods
from webhook.core import resources
from webhook.core.annotations import Overrides
from webhook.core.effective import Defaults, Effective, NamespaceResources, combine, resolve_port, select_profile
from webhook.core.resources import ClusterPolicySpec, IdentityProviderSpec, LimitSpec, PolicySpec, ServerProfileSpec
from webhook.errors import BadResource, Denial, DenyCode

CORP = msgspec.convert({"issuer": "https://idp.test"}, type=IdentityProviderSpec)
NARROW = msgspec.convert({"issuer": "https://idp.test", "audiences": ["a", "b"]}, type=IdentityProviderSpec)


def a_pod(
    labels: dict[str, str] | None = None, *, ports: Any = ({"containerPort": 8080},), **metadata: Any
) -> pods.Pod:
    """Return a pod of the workload ledger."""
    metadata = {"name": "ledger", "labels": labels or {"app": "ledger"}} | metadata
    return pods.read({"metadata": metadata, "spec": {"containers": [{"name": "app", "ports": list(ports)}]}})


def a_profile(**spec: Any) -> ServerProfileSpec:
    """Return a profile for every pod."""
    return msgspec.convert({"selector": {}} | spec, type=ServerProfileSpec)


def combined(
    profile: ServerProfileSpec | None = None,
    *,
    pod: pods.Pod | None = None,
    defaults: Defaults | None = None,
    **others: Any,
) -> Effective:
    """Return what the pod gets from *profile*."""
    given = NamespaceResources(
        profiles={"p": profile} if profile else {},
        policies=others.get("policies", {}),
        limits=others.get("limits", {}),
    )
    return combine(
        pod or a_pod(),
        "payments",
        given,
        {"corp": CORP, "narrow": NARROW},
        defaults or Defaults(),
        others.get("guard_rails"),
    )


def test_workload_that_nobody_described_lets_nobody_in() -> None:
    """No profile, no policy: strict mTLS, no caller, no provider, no rule."""
    got = combined()

    assert got.profile.identity == Identity(mtls="strict", user="required", callers=(), providers=())
    assert got.policies == ()
    assert (got.profile.server.namespace, got.profile.server.workload, got.profile.server.name) == (
        "payments",
        "ledger",
        "ledger",
    )


@pytest.mark.parametrize("field", ["mtls", "user"])
@pytest.mark.parametrize("cluster", ["strict", "loose"])
@pytest.mark.parametrize("wish", [None, "strict", "loose"])
def test_namespace_can_only_tighten(field: str, cluster: str, wish: str | None) -> None:
    """The stricter of the two holds, and a looser wish that is overruled is said so."""
    words = {"mtls": {"strict": "strict", "loose": "permissive"}, "user": {"strict": "required", "loose": "optional"}}
    word = words[field]
    profile = a_profile(identity={} if wish is None else {field: word[wish]})
    got = combined(profile, defaults=Defaults(**{field: word[cluster]}))
    strict = "strict" in (cluster, wish)

    assert getattr(got.profile.identity, field) == word["strict" if strict else "loose"]
    assert bool(got.notes) == (cluster == "strict" and wish == "loose")


def test_audit_holds_no_more_than_the_cluster_allows() -> None:
    """Content can be left out and fields redacted by either, brought back by neither."""
    defaults = Defaults(audit=Audit(arguments="hash", results="full", redact=("password",), max_bytes=100))
    wish = a_profile(audit={"arguments": "full", "results": "hash", "redact": ["iban", "password"], "maxBytes": 1000})

    assert combined(wish, defaults=defaults).profile.audit == Audit(
        arguments="hash", results="hash", redact=("password", "iban"), max_bytes=100
    )
    assert combined(a_profile(audit={"maxBytes": 5}), defaults=defaults).profile.audit.max_bytes == 5
    assert combined(a_profile(), defaults=defaults).profile.audit == defaults.audit


@pytest.mark.parametrize(
    ("cluster", "wish", "got"),
    [
        (("changes", "refuse"), (None, None), ("changes", "refuse")),
        (("changes", "refuse"), ("off", "drop"), ("changes", "refuse")),
        (("off", "drop"), ("all", "refuse"), ("all", "refuse")),
        (("all", "drop"), ("changes", None), ("all", "drop")),
    ],
)
def test_a_namespace_can_have_more_recorded_and_never_less(
    cluster: tuple[Any, Any], wish: tuple[Any, Any], got: tuple[str, str]
) -> None:
    """Before a call is sent, and when no record can be kept."""
    defaults = Defaults(audit=Audit(before=cluster[0], when_full=cluster[1]))
    asked = {name: value for name, value in zip(("before", "whenFull"), wish, strict=True) if value}

    audit = combined(a_profile(audit=asked), defaults=defaults).profile.audit
    assert (audit.before, audit.when_full) == got


def test_telemetry_goes_where_the_profile_says() -> None:
    """The namespace may have a collector of its own; content is its own choice."""
    defaults = Defaults(telemetry=Telemetry(otlp_endpoint="http://all:4318"))
    own = a_profile(telemetry={"otlpEndpoint": "http://own:4318", "content": True})

    assert combined(own, defaults=defaults).profile.telemetry == Telemetry(
        otlp_endpoint="http://own:4318", content=True
    )
    assert combined(a_profile(), defaults=defaults).profile.telemetry == defaults.telemetry


@pytest.mark.parametrize(
    ("name", "wished", "audiences"),
    [("corp", ["x"], ("x",)), ("narrow", [], ("a", "b")), ("narrow", ["b", "x"], ("b",))],
)
def test_audiences_are_those_that_both_allow(name: str, wished: list[str], audiences: tuple[str, ...]) -> None:
    """A profile chooses from what the provider allows."""
    got = combined(a_profile(identity={"providers": [{"name": name, "audiences": wished}]}))

    assert got.profile.identity.providers[0].audiences == audiences


@pytest.mark.parametrize(
    ("name", "wished", "said"),
    [
        ("corp", [], "no audience is left"),
        ("narrow", ["x"], "no audience is left"),
        ("none", ["x"], "no such provider"),
    ],
)
def test_provider_that_cannot_be_used_is_an_error(name: str, wished: list[str], said: str) -> None:
    """A token for anybody, or of nobody known, is not accepted by accident."""
    with pytest.raises(BadResource, match=said):
        combined(a_profile(identity={"providers": [{"name": name, "audiences": wished}]}))


def test_policies_and_limits_are_those_that_select_the_pod() -> None:
    """Others of the namespace are left out; each kind in order of name."""
    mine, other = {"matchLabels": {"app": "ledger"}}, {"matchLabels": {"app": "other"}}
    policies = {
        name: msgspec.convert({"selector": selector, "cedar": "permit(principal, action, resource);"}, type=PolicySpec)
        for name, selector in (("b", mine), ("a", mine), ("c", other))
    }
    limits = {
        name: msgspec.convert({"selector": selector, "ratePerSecond": 5, "burst": 10}, type=LimitSpec)
        for name, selector in (("y", mine), ("x", other))
    }
    got = combined(policies=policies, limits=limits)

    assert [each.name for each in got.policies] == ["namespace/a", "namespace/b"]
    assert [(each.name, each.rate_per_s, each.burst) for each in got.profile.limits] == [("y", 5.0, 10)]


def rule(**spec: Any) -> Any:
    """Return the spec of a policy that selects every pod."""
    kind = ClusterPolicySpec if "namespaces" in spec else PolicySpec
    return msgspec.convert({"selector": {}, "cedar": "permit(principal, action, resource);"} | spec, type=kind)


def test_one_policy_alone_lies_where_opas_tools_look_for_it() -> None:
    """At the root of the bundle; in shadow it is not the one that decides."""
    assert [each.path for each in combined(policies={"a": rule()}).policies] == [""]
    assert [each.path for each in combined(policies={"a": rule(mode="shadow")}).policies] == ["sets/namespace/a/"]


def test_each_of_several_policies_is_a_set_of_its_own() -> None:
    """Guard rails among them grant nothing, and are those of the pod's namespace."""
    rails = {"here": rule(namespaces=["payments"]), "all": rule(namespaces=[]), "elsewhere": rule(namespaces=["x"])}

    got = combined(policies={"a": rule(vocabulary="toolhive", rego="package mcp.authz")}, guard_rails=rails).policies

    assert [(each.name, each.path, each.grants) for each in got] == [
        ("namespace/a", "sets/namespace/a/", True),
        ("cluster/all", "sets/cluster/all/", False),
        ("cluster/here", "sets/cluster/here/", False),
    ]
    assert (list(got[0].cedar), list(got[0].rego), got[0].vocabulary) == (["a.cedar"], ["a.rego"], "toolhive")


def test_content_rules_of_all_policies_add_up() -> None:
    """A namespace cannot take a guard rail's rule away, and a policy that has nothing else judges nothing."""
    content = [{"name": "keys", "patterns": ["aws-key"]}]
    rails = {"r": msgspec.convert({"selector": {}, "content": content}, ClusterPolicySpec)}
    own = rule(mode="shadow", cedar=None, content=[{"name": "keys", "regex": "x", "action": "deny"}])
    got = combined(policies={"a": own, "b": rule(cedar="permit(principal,action,resource);")}, guard_rails=rails)

    assert [(each.name, each.action, each.mode) for each in got.profile.content] == [
        ("cluster/r/keys", "mask", "enforce"),
        ("namespace/a/keys", "deny", "shadow"),
    ]
    assert [each.name for each in got.policies] == ["namespace/b"]


def test_two_profiles_for_one_pod_are_refused() -> None:
    """Neither author could see which one is the stricter."""
    given = NamespaceResources(profiles={"a": a_profile(), "b": a_profile()}, policies={}, limits={})
    with pytest.raises(Denial, match="a, b all select this pod") as refused:
        combine(a_pod(), "payments", given, {}, Defaults())

    assert refused.value.code is DenyCode.PROFILE_AMBIGUOUS


MCP, WEB, DNS = (
    {"containerPort": 8080, "name": "mcp"},
    {"containerPort": 80, "name": "web"},
    {"containerPort": 53, "protocol": "UDP"},
)


@pytest.mark.parametrize(
    ("asked", "profile", "ports", "port"),
    [
        (Overrides(port=1), a_profile(server={"port": 2}), [MCP], 1),
        (Overrides(), a_profile(server={"port": 2}), [MCP], 2),
        (Overrides(), a_profile(), [WEB, MCP], 8080),
        (Overrides(), None, [WEB], 80),
        (Overrides(), None, [DNS, WEB], 80),
        (Overrides(transport="stdio"), None, [MCP], STDIO_PORT),
        (Overrides(transport="stdio", port=1), None, [MCP], 1),
        (Overrides(), a_profile(server={"transport": "stdio", "port": 2}), [], 2),
        (Overrides(transport="http"), a_profile(server={"transport": "stdio"}), [MCP], 8080),
    ],
)
def test_port_is_found(asked: Overrides, profile: Any, ports: Any, port: int) -> None:
    """Annotation before profile before the name mcp before the only TCP port; a stdio server's own ports are not it."""
    assert resolve_port(a_pod(ports=ports), asked, profile) == port


@pytest.mark.parametrize(
    "ports", [[], [DNS], [WEB, {"containerPort": 81}], [MCP, {"containerPort": 81, "name": "mcp"}]]
)
def test_port_is_not_guessed(ports: Any) -> None:
    """With none or several the author is asked."""
    with pytest.raises(Denial, match="which port speaks MCP") as refused:
        resolve_port(a_pod(ports=ports), Overrides(), None)

    assert refused.value.code is DenyCode.PORT_UNKNOWN


def test_pod_may_narrow_the_paths() -> None:
    """The annotation replaces the profile's paths."""
    pod = a_pod(annotations={"sidegate.dev/path": "/rpc"})

    assert combined(a_profile(server={"paths": ["/a"]}), pod=pod).profile.server.paths == ("/rpc",)
    assert combined(a_profile(server={"paths": ["/a"]})).profile.server.paths == ("/a",)


def test_the_transport_is_the_pods_word_before_the_profiles() -> None:
    """How many processes there are is the profile's alone."""
    pod = a_pod(annotations={"sidegate.dev/transport": "sse"})
    profile = a_profile(server={"transport": "stdio", "processes": "shared"})
    got, said, bare = (combined(profile), combined(profile, pod=pod), combined())

    assert [each.profile.server.transport for each in (got, said, bare)] == ["stdio", "sse", "http"]
    assert [each.profile.server.processes for each in (got, said, bare)] == ["shared", "shared", "session"]


def test_a_stdio_server_can_be_told_nothing_of_the_user() -> None:
    """What the profile would hand on is a header; the author is told, and nothing is silently left out."""
    profile = a_profile(server={"transport": "stdio"}, identity={"upstream": "header"})

    with pytest.raises(BadResource, match="a pipe has no headers"):
        combined(profile)


def test_names_pages_and_the_shape_of_denials_are_the_profiles() -> None:
    """They are about this server alone; without a profile there are none, and a denial is said."""
    got = combined(a_profile(denied="conceal", server={"hosts": ["mcp.test"], "origins": ["https://app.test"]})).profile
    bare = combined().profile

    assert (got.server.hosts, got.server.origins, got.denied) == (("mcp.test",), ("https://app.test",), "conceal")
    assert (bare.server.hosts, bare.server.origins, bare.denied) == ((), (), "error")


def test_kinds_have_their_own_specs() -> None:
    """The list of kinds is complete."""
    assert len({kind.spec for kind in resources.KINDS}) == 5


AGENT = {"app": "ledger", "sidegate.dev/agent": "true"}
SERVERS = [{"host": "records.demo", "port": 8000}, {"host": "tools.b.example", "port": 443, "id": "spiffe://b.test/**"}]


def test_an_agent_gets_the_servers_it_may_meet_and_no_policy() -> None:
    """What it may do there is judged there; without a port of its own, there is none to guess."""
    profile = a_profile(agent={"servers": SERVERS}, audit={"arguments": "hash"})
    policy = msgspec.convert({"selector": {}, "cedar": "permit(principal, action, resource);"}, type=PolicySpec)
    got = combined(profile, pod=a_pod(AGENT, ports=()), policies={"all": policy})

    assert got.profile.agent is not None
    assert [(each.host, each.port, each.id) for each in got.profile.agent.servers] == [
        ("records.demo", 8000, ""), ("tools.b.example", 443, "spiffe://b.test/**"),
    ]  # fmt: skip
    assert (got.profile.server.namespace, got.profile.server.workload) == ("payments", "ledger")
    assert got.profile.audit.arguments == "hash"
    assert got.policies == ()


def test_profiles_for_agents_and_for_servers_do_not_meet() -> None:
    """Each selects every pod; each pod gets the one for its role."""
    agents, servers = a_profile(agent={"servers": SERVERS}), a_profile(server={"port": 9000})
    given = {"agents": agents, "servers": servers}

    assert select_profile(AGENT, given) is agents
    assert select_profile({"app": "ledger"}, given) is servers


@pytest.mark.parametrize(
    ("cluster", "wish", "expected"),
    [("off", "allowed", "off"), ("allowed", "allowed", "allowed"), ("allowed", "off", "off")],
)
def test_jwt_svids_need_both_words(cluster: Any, wish: str, expected: str) -> None:
    """A bearer token is weaker than mutual TLS: a namespace cannot choose it alone."""
    got = combined(a_profile(identity={"jwtSvid": wish}), defaults=Defaults(jwt_svid=cluster))

    assert got.profile.identity.jwt_svid == expected
    assert any("jwtSvid" in note for note in got.notes) is ((cluster, wish) == ("off", "allowed"))


PROVIDER = {
    "issuer": "https://id.test",
    "audiences": ["a"],
    "client": {"assertionType": "urn:x", "audience": "y"},
    "introspection": True,
    "claims": {"roles": "realm_access.roles", "scopes": "scp"},
}
USERS = {
    "providers": [{"name": "keycloak"}],
    "resource": "https://mcp.test/mcp",
    "scopes": ["mcp"],
    "stepUp": [{"scopes": ["write"], "tools": ["execute"]}],
    "dpop": "required",
    "upstream": "exchange",
    "exchange": {"provider": "keycloak", "audience": "api", "scopes": ["read"], "actor": True},
}


def with_users(**changes: Any) -> Identity:
    """The identity of a profile that says everything of users."""
    spec = msgspec.convert(PROVIDER, type=IdentityProviderSpec)
    profile = a_profile(identity={**USERS, **changes})
    given = NamespaceResources(profiles={"p": profile}, policies={}, limits={})
    return combine(a_pod(), "pay", given, {"keycloak": spec}, Defaults()).profile.identity


def test_what_a_profile_says_of_users_arrives() -> None:
    """Field by field: what is lost here is not enforced there."""
    identity = with_users()

    assert (identity.resource, identity.scopes, identity.dpop) == ("https://mcp.test/mcp", ("mcp",), "required")
    assert identity.step_up == (StepUp(scopes=("write",), tools=("execute",)),)
    assert identity.exchange == TokenExchange(provider="keycloak", audience="api", scopes=("read",), actor=True)
    assert identity.providers[0].client == Client(assertion_type="urn:x", audience="y")
    assert (identity.providers[0].introspection, identity.providers[0].claims.scopes) == (True, "scp")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"resource": None}, "resource is needed"),
        ({"exchange": None}, "go together"),
        ({"upstream": "none"}, "go together"),
        ({"exchange": {"provider": "okta"}}, "one of providers, with a client"),
    ],
)
def test_what_contradicts_itself_is_an_error(changes: dict[str, Any], said: str) -> None:
    """Where it is written, not in every pod."""
    with pytest.raises(BadResource, match=said):
        with_users(**changes)


def test_hosts_reach_the_sidecar_with_everything_that_is_declared_by_address() -> None:
    """What passed by address goes on to: the profile's, and what the operator lets all servers reach."""
    everybody = (Network(cidr="198.51.100.0/24"), Network(cidr="192.0.2.53/32", ports=(53,)))
    profile = a_profile(
        egress=[
            {"hosts": ["a.example"]},
            {"hosts": ["*.b.example"], "ports": [80]},
            {"cidr": "203.0.113.0/24", "except": ["203.0.113.1/32"], "ports": [5432]},
            {"namespace": "db"},
        ]
    )
    got = combined(profile, defaults=Defaults(networks=everybody, private=("25.0.0.0/8",))).profile

    assert got.egress == EgressRules(
        hosts=(NamedHosts(hosts=("a.example",), ports=(443,)), NamedHosts(hosts=("*.b.example",), ports=(80,))),
        networks=(Network(cidr="203.0.113.0/24", excluded=("203.0.113.1/32",), ports=(5432,)), *everybody),
        private=("25.0.0.0/8",),
    )
    assert profiles.decode(profiles.encode(got)) == got


def test_without_hosts_the_sidecar_hears_nothing_of_egress() -> None:
    """Nothing is in the bundle that an older sidecar would not know."""
    got = combined(a_profile(egress=[{"cidr": "203.0.113.0/24"}]), defaults=Defaults(private=("25.0.0.0/8",))).profile

    assert got.egress is msgspec.UNSET
    assert b"egress" not in profiles.encode(got)

"""What one workload gets: its pod, the resources that select it, their providers and the cluster's defaults.

A namespace can only tighten what the cluster set; a looser wish is overruled and said so in `notes`. Two profiles for
one pod are refused: neither is the stricter by any rule that their authors could see. Without profile nobody may call,
without policy nothing that needs a rule is allowed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Final, Literal

import msgspec

from sidecar.config import EGRESS_PORT, STDIO_PORT
from sidecar.core.profile import (
    AgentRole,
    Audit,
    ClaimPaths,
    Client,
    ContentRule,
    Destination,
    EgressRules,
    Identity,
    NamedHosts,
    Network,
    Profile,
    Provider,
    Server,
    StepUp,
    Telemetry,
    TokenExchange,
    Transport,
)
from webhook.core import annotations
from webhook.core.compile import Policies
from webhook.core.external import Fetched
from webhook.core.pod import Pod, workload
from webhook.core.resources import (
    CLUSTER_POLICY,
    HOST_PORTS,
    POLICY,
    BundleSpec,
    ClusterPolicySpec,
    IdentityProviderSpec,
    LimitSpec,
    PolicySpec,
    ProviderReference,
    ReachSpec,
    ServerProfileSpec,
    ServerSpec,
)
from webhook.errors import BadResource, Denial, DenyCode

MCP_PORT_NAME: Final = "mcp"  # the name by which a container port says that it speaks MCP


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What the operator set for the cluster (Helm values)."""

    mtls: Literal["strict", "permissive"] = "strict"
    user: Literal["required", "optional"] = "required"
    jwt_svid: Literal["off", "allowed"] = "off"
    networks: tuple[Network, ...] = ()  # that all servers may connect to
    private: tuple[str, ...] = ()  # ranges of the cluster that look public
    audit: Audit = field(default_factory=Audit)
    telemetry: Telemetry = field(default_factory=Telemetry)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceResources:
    """The decoded resources of one namespace, by name."""

    profiles: Mapping[str, ServerProfileSpec]
    policies: Mapping[str, PolicySpec]
    limits: Mapping[str, LimitSpec]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effective:
    """What is compiled into one bundle. *notes* are for the authors of the resources."""

    profile: Profile
    policies: tuple[Policies, ...]
    notes: tuple[str, ...] = ()


def is_agent(labels: Mapping[str, str]) -> bool:
    """Say whether a pod with *labels* calls MCP servers, and is none."""
    return labels.get(annotations.AGENT) == "true"


def select_profile(labels: dict[str, str], profiles: Mapping[str, ServerProfileSpec]) -> ServerProfileSpec | None:
    """Return the profile for a pod with *labels*, if any; raises Denial(PROFILE_AMBIGUOUS) when there are two.

    A profile with `agent` is for agents, and every other for servers.
    """
    names = sorted(
        name
        for name, spec in profiles.items()
        if (spec.agent is not None) is is_agent(labels) and spec.selector.matches(labels)
    )
    if len(names) > 1:
        raise Denial(
            DenyCode.PROFILE_AMBIGUOUS,
            f"MCPServerProfiles {', '.join(names)} all select this pod; narrow their selectors until one is left",
        )
    return profiles[names[0]] if names else None


def resolve_transport(asked: annotations.Overrides, profile: ServerProfileSpec | None) -> Transport:
    """Return how the application speaks MCP."""
    return asked.transport or (profile.server.transport if profile else "http")


def resolve_port(pod: Pod, asked: annotations.Overrides, profile: ServerProfileSpec | None) -> int:
    """Return the port on which *pod* (without our own parts) speaks MCP; raises Denial(PORT_UNKNOWN)."""
    if asked.port:
        return asked.port
    if profile and profile.server.port:
        return profile.server.port
    if resolve_transport(asked, profile) == "stdio":
        return STDIO_PORT
    ports = _tcp_ports(pod)
    named = sorted({number for number, name in ports if name == MCP_PORT_NAME})
    numbers = named or sorted({number for number, _ in ports})
    if len(numbers) == 1:
        return numbers[0]
    found = ", ".join(str(number) for number in numbers) or "none"
    raise Denial(
        DenyCode.PORT_UNKNOWN,
        f"which port speaks MCP? declared: {found}. Set annotation {annotations.GROUP}/port, or the profile's "
        f"spec.server.port, or name one container port {MCP_PORT_NAME}",
    )


def combine(
    pod: Pod,
    namespace: str,
    resources: NamespaceResources,
    providers: Mapping[str, IdentityProviderSpec],
    defaults: Defaults,
    guard_rails: Mapping[str, ClusterPolicySpec] | None = None,
    external: Callable[[BundleSpec], Fetched] | None = None,
) -> Effective:
    """Return what *pod* (without our own parts) of *namespace* gets. Raises BadResource or Denial.

    *external* returns what is in a bundle from elsewhere.
    """
    asked = annotations.read(pod.annotations)
    profile = select_profile(pod.labels, resources.profiles)
    if is_agent(pod.labels):
        return _agent(pod, namespace, profile, defaults)
    server = profile.server if profile else ServerSpec()
    name = workload(pod).name
    identity, notes = _identity(profile, providers, defaults)
    transport = resolve_transport(asked, profile)
    if transport == "stdio" and identity.upstream != "none":
        raise BadResource(
            "MCPServerProfile", "spec.identity.upstream: must be none for a stdio server: a pipe has no headers"
        )
    return Effective(
        profile=Profile(
            server=Server(
                namespace=namespace,
                workload=name,
                name=server.name or name or namespace,
                version=server.version,
                port=resolve_port(pod, asked, profile),
                transport=transport,
                processes=server.processes,
                paths=asked.paths or server.paths,
                hosts=server.hosts,
                origins=server.origins,
                max_body_bytes=server.max_body_bytes,
            ),
            identity=identity,
            limits=tuple(
                spec.limit(key) for key, spec in sorted(resources.limits.items()) if spec.selector.matches(pod.labels)
            ),
            audit=_audit(profile, defaults.audit),
            telemetry=_telemetry(profile, defaults.telemetry),
            content=_content(pod.labels, namespace, resources.policies, guard_rails or {}),
            egress=_egress(profile, defaults),
            denied=profile.denied if profile else "error",
        ),
        policies=_policies(pod.labels, namespace, resources.policies, guard_rails or {}, external),
        notes=notes,
    )


def _agent(pod: Pod, namespace: str, profile: ServerProfileSpec | None, defaults: Defaults) -> Effective:
    """Return what an agent gets: whom it may meet. What it may do there is judged at the servers."""
    name = workload(pod).name
    servers = profile.agent.servers if profile and profile.agent else ()
    return Effective(
        profile=Profile(
            server=Server(namespace=namespace, workload=name, name=name or namespace, port=EGRESS_PORT),
            agent=AgentRole(servers=tuple(Destination(host=each.host, port=each.port, id=each.id) for each in servers)),
            audit=_audit(profile, defaults.audit),
            telemetry=_telemetry(profile, defaults.telemetry),
        ),
        policies=(),
    )


def _policies(
    labels: dict[str, str],
    namespace: str,
    policies: Mapping[str, PolicySpec],
    guard_rails: Mapping[str, ClusterPolicySpec],
    external: Callable[[BundleSpec], Fetched] | None,
) -> tuple[Policies, ...]:
    """Return what selects the pod, each by itself: what one forbids, no other allows. Raises BadResource."""
    own, rails = (
        [(key, spec) for key, spec in found if spec.cedar or spec.rego or spec.bundle]
        for found in _selected(labels, namespace, policies, guard_rails)
    )
    # One policy alone lies where OPA's own tools look for it.
    is_alone = len(own) == 1 and not rails and own[0][1].mode == "enforce"
    fetched = {key: _fetched(key, spec, external) for key, spec in (*own, *rails)}
    return tuple(
        Policies(
            name=key,
            path="" if is_alone else f"sets/{key}/",
            mode=spec.mode,
            grants=key.startswith("namespace/"),
            vocabulary=spec.vocabulary,
            cedar={f"{key.partition('/')[2]}.cedar": spec.cedar} if spec.cedar else {},
            rego=fetched[key].rego,
            data=fetched[key].data,
        )
        for key, spec in (*own, *rails)
    )


def _fetched(key: str, spec: PolicySpec, external: Callable[[BundleSpec], Fetched] | None) -> Fetched:
    """Return the Rego of the policy *key*, its own or from elsewhere. Raises BadResource."""
    if spec.bundle is None:
        return Fetched(rego={f"{key.partition('/')[2]}.rego": spec.rego} if spec.rego else {})
    label = f"{(CLUSTER_POLICY if key.startswith('cluster/') else POLICY).name} {key.partition('/')[2]}"
    if external is None:
        raise BadResource(label, "spec.bundle: nothing is fetched here")
    try:
        return external(spec.bundle)
    except BadResource as error:
        raise BadResource(label, str(error)) from error


def _selected(
    labels: dict[str, str],
    namespace: str,
    policies: Mapping[str, PolicySpec],
    guard_rails: Mapping[str, ClusterPolicySpec],
) -> tuple[list[tuple[str, PolicySpec]], list[tuple[str, PolicySpec]]]:
    """Return the namespace's policies and the cluster's that select the pod."""
    own = [(f"namespace/{name}", spec) for name, spec in sorted(policies.items()) if spec.selector.matches(labels)]
    rails: list[tuple[str, PolicySpec]] = [
        (f"cluster/{name}", spec)
        for name, spec in sorted(guard_rails.items())
        if spec.selector.matches(labels) and (not spec.namespaces or namespace in spec.namespaces)
    ]
    return own, rails


def _content(
    labels: dict[str, str],
    namespace: str,
    policies: Mapping[str, PolicySpec],
    guard_rails: Mapping[str, ClusterPolicySpec],
) -> tuple[ContentRule, ...]:
    """Return all content rules that select the pod: none takes another away."""
    own, rails = _selected(labels, namespace, policies, guard_rails)
    return tuple(each.rule(f"{key}/{each.name}", spec.mode) for key, spec in (*rails, *own) for each in spec.content)


def _egress(profile: ServerProfileSpec | None, defaults: Defaults) -> EgressRules | msgspec.UnsetType:
    """Return where the server's own connections may go, if it names hosts: all else is NetworkPolicies' alone."""
    named = [each for each in profile.egress if each.hosts] if profile else []
    if profile is None or not named:
        return msgspec.UNSET
    return EgressRules(
        hosts=tuple(NamedHosts(hosts=each.hosts, ports=each.ports or HOST_PORTS) for each in named),
        networks=(*(network for each in profile.egress if (network := network_of(each))), *defaults.networks),
        private=defaults.private,
    )


def network_of(reach: ReachSpec, ports: tuple[int, ...] = ()) -> Network | None:
    """Return the addresses that *reach* means, on its own ports or *ports*; None when it means pods or hosts."""
    if reach.cidr is None:
        return None
    return Network(cidr=str(ip_network(reach.cidr)), excluded=reach.excluded, ports=reach.ports or ports)


def _tcp_ports(pod: Pod) -> list[tuple[int, str | None]]:
    return [
        (port.container_port, port.name)
        for container in pod.spec.containers
        for port in container.ports or ()
        if port.protocol in (None, "TCP")
    ]


def _identity(
    profile: ServerProfileSpec | None, providers: Mapping[str, IdentityProviderSpec], defaults: Defaults
) -> tuple[Identity, tuple[str, ...]]:
    if profile is None:
        return Identity(mtls=defaults.mtls, user=defaults.user), ()
    wish, notes = profile.identity, []
    if wish.mtls == "permissive" and defaults.mtls == "strict":
        notes.append("spec.identity.mtls: permissive is looser than the cluster's strict, which holds")
    if wish.jwt_svid == "allowed" and defaults.jwt_svid == "off":
        notes.append("spec.identity.jwtSvid: allowed is looser than the cluster's off, which holds")
    if wish.user == "optional" and defaults.user == "required":
        notes.append("spec.identity.user: optional is looser than the cluster's required, which holds")
    exchange = None if wish.exchange is None else TokenExchange(**msgspec.structs.asdict(wish.exchange))
    try:
        identity = Identity(
            mtls="strict" if "strict" in (wish.mtls, defaults.mtls) else "permissive",
            user="required" if "required" in (wish.user, defaults.user) else "optional",
            callers=wish.callers,
            jwt_svid="allowed" if wish.jwt_svid == defaults.jwt_svid == "allowed" else "off",
            providers=tuple(_provider(each, providers) for each in wish.providers),
            resource=wish.resource,
            scopes=wish.scopes,
            step_up=tuple(StepUp(**msgspec.structs.asdict(each)) for each in wish.step_up),
            dpop=wish.dpop,
            dpop_nonce=wish.dpop_nonce,
            upstream=wish.upstream,
            exchange=exchange,
        )
    except ValueError as error:  # it contradicts itself
        raise BadResource("MCPServerProfile", f"spec.identity: {error}") from error
    return identity, tuple(notes)


def _provider(reference: ProviderReference, providers: Mapping[str, IdentityProviderSpec]) -> Provider:
    """Return the provider with the audiences that both it and the reference allow. Raises BadResource."""
    label = f"IdentityProvider {reference.name}"
    if reference.name not in providers:
        raise BadResource(label, f"no such provider; there are {', '.join(sorted(providers)) or 'none'}")
    spec = providers[reference.name]
    allowed, wished = spec.audiences or reference.audiences, reference.audiences or spec.audiences
    audiences = tuple(each for each in wished if each in allowed)
    if not audiences:
        raise BadResource(
            label, f"no audience is left: the provider allows {list(allowed)}, the profile wants {list(wished)}"
        )
    return Provider(
        name=reference.name,
        issuer=spec.issuer,
        audiences=audiences,
        jwks_uri=spec.jwks_uri,
        ca_pem=spec.ca_pem,
        algorithms=spec.algorithms,
        leeway_s=spec.leeway_seconds,
        claims=ClaimPaths(**msgspec.structs.asdict(spec.claims)),
        id_tokens=spec.id_tokens,
        introspection=spec.introspection,
        introspection_endpoint=spec.introspection_endpoint,
        token_endpoint=spec.token_endpoint,
        client=None if spec.client is None else Client(**msgspec.structs.asdict(spec.client)),
    )


_BEFORE: Final = ("off", "changes", "all")


def _audit(profile: ServerProfileSpec | None, default: Audit) -> Audit:
    """Return what is recorded: less content, more redaction and more records than the cluster's default, never less."""
    if profile is None:
        return default
    wish = profile.audit
    return Audit(
        before=max((default.before, wish.before or default.before), key=_BEFORE.index),
        when_full="refuse" if "refuse" in (wish.when_full, default.when_full) else "drop",
        arguments="hash" if "hash" in (wish.arguments, default.arguments) else "full",
        results="hash" if "hash" in (wish.results, default.results) else "full",
        redact=tuple(dict.fromkeys((*default.redact, *wish.redact))),
        max_bytes=default.max_bytes if wish.max_bytes is None else min(wish.max_bytes, default.max_bytes),
    )


def _telemetry(profile: ServerProfileSpec | None, default: Telemetry) -> Telemetry:
    if profile is None:
        return default
    wish = profile.telemetry
    return Telemetry(
        otlp_endpoint=wish.otlp_endpoint or default.otlp_endpoint, content=wish.content, sample_ratio=wish.sample_ratio
    )

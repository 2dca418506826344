"""The NetworkPolicies around governed MCP servers: nobody gets in but callers, nothing gets out but to what is named.

One for all injected servers of a namespace, there before the first of them is, takes everything away but health, DNS
and what sidecars need; one for each MCPServerProfile gives its callers and destinations. Refuses to guess: a caller or
destination that no namespace and no address is known of is not let through, and `undeclared` says so. Policies are judged
on the node, before a pod redirects: a pod in capture mode `redirect` is reached on any TCP port, and all lead to the
sidecar; one in mode `remap` on the sidecar's port alone. Host names are unknown to policies: for those of a profile the
public addresses are opened, to pods whose own network leads there by the sidecar alone.
Source: networking.k8s.io/v1 (policies add up; a named port of a native sidecar is missed by some, so ports are numbers).
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any, Final, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec

from certs.spiffe import ANY_REST, ONE_SEGMENT, SpiffePattern
from sidecar.config import HEALTH_PORT, INBOUND_PORT, PUBLIC_RANGES, Capture, WayOut
from webhook.core.annotations import AGENT, CAPTURED, EGRESS, INJECTED
from webhook.core.pod import JSON
from webhook.core.resources import HOST_PORTS, IdentityProviderSpec, PeerSpec, ReachSpec, ServerProfileSpec

API_VERSION: Final = "networking.k8s.io/v1"
NAMESPACE_NAME: Final = "kubernetes.io/metadata.name"
MANAGED_BY: Final = "app.kubernetes.io/managed-by"
INSTANCE: Final = "app.kubernetes.io/instance"
ANY_NAMESPACE: Final = "*"
BUNDLES_PORT: Final = 8443
DNS_PORT: Final = 53
_MAX_NAME: Final = 253
# As the API server writes them, for what is there is compared with what ought to be.
_SERVERS: Final[list[JSON]] = [
    {"key": INJECTED, "operator": "Exists"},
    {"key": AGENT, "operator": "NotIn", "values": ["true"]},
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the operator decided for all governed servers. *name* is the release's, which its policies are known by."""

    name: str
    namespace: str  # of the control plane
    trust_domain: str
    mode: Literal["enforce", "ingress", "off"] = "enforce"
    is_permissive: bool = False  # whether profiles may let callers in that show no identity
    weakest_capture: Capture = Capture.REDIRECT
    urls: tuple[str, ...] = ()  # that every sidecar calls
    dns: tuple[ReachSpec, ...] = ()
    egress: tuple[ReachSpec, ...] = ()
    metrics_from: tuple[PeerSpec, ...] = ()
    private: tuple[str, ...] = ()  # ranges of the cluster that look public

    @property
    def labels(self) -> dict[str, str]:
        """The labels that tell this release's policies from all others."""
        return {INSTANCE: self.name, MANAGED_BY: "sidegate"}


def decode_peers(text: str) -> tuple[PeerSpec, ...]:
    """Return the peers in the JSON list *text*; raises ValueError saying what is wrong with it."""
    return _decoded(text, msgspec.json.Decoder(tuple[PeerSpec, ...]))


def decode_reach(text: str) -> tuple[ReachSpec, ...]:
    """Return the destinations in the JSON list *text*; raises ValueError saying what is wrong with it."""
    return _decoded(text, msgspec.json.Decoder(tuple[ReachSpec, ...]))


Peer = TypeVar("Peer", PeerSpec, ReachSpec)


def _decoded(text: str, decoder: msgspec.json.Decoder[tuple[Peer, ...]]) -> tuple[Peer, ...]:
    try:
        peers = decoder.decode(text)
        for peer in peers:
            peer.check()
    except ValueError as error:  # msgspec's errors are such
        raise ValueError(f"a JSON list of namespaces and address ranges ({error})") from error
    return peers


def policies(
    namespace: str,
    profiles: Mapping[str, ServerProfileSpec],
    providers: Mapping[str, IdentityProviderSpec],
    surroundings: Surroundings,
) -> dict[str, JSON]:
    """Return the NetworkPolicies that the governed *namespace* ought to have, by name."""
    if surroundings.mode == "off":
        return {}
    made = [_base(surroundings)]
    for name, profile in profiles.items():
        if profile.agent is None:
            made.extend(_of_profile(name, profile, providers, surroundings))
    return {
        name: {
            "apiVersion": API_VERSION,
            "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": namespace, "labels": surroundings.labels},
            "spec": spec,
        }
        for name, spec in made
    }


def undeclared(
    profiles: Mapping[str, ServerProfileSpec],
    providers: Mapping[str, IdentityProviderSpec],
    surroundings: Surroundings,
) -> list[str]:
    """Return what profiles name and no policy can let through, with what to do."""
    said: list[str] = []
    for name, profile in sorted(profiles.items()):
        if profile.agent is not None or surroundings.mode == "off":
            continue
        if not (profile.ingress or _is_open(profile, surroundings)):
            said.extend(
                f"MCPServerProfile {name}: caller {caller}: no namespace is known of it; name one in spec.ingress"
                for caller in profile.identity.callers
                if _caller(caller, surroundings) is None
            )
        if surroundings.mode == "enforce" and not _reaches_out(profile, surroundings):
            said.extend(
                f"MCPServerProfile {name}: {url}: outside the cluster; name its addresses in spec.egress"
                for url in sorted(set(_needs(profile, providers, surroundings)))
                if _service(url) is None or _is_ambiguous(url)
            )
    return said


def _reaches_out(profile: ServerProfileSpec, surroundings: Surroundings) -> bool:
    return any(each.hosts for each in profile.egress) or any(
        each.cidr for each in (*profile.egress, *surroundings.egress)
    )


def _base(surroundings: Surroundings) -> tuple[str, JSON]:
    control_plane = ReachSpec(namespace=surroundings.namespace, ports=(BUNDLES_PORT,))
    egress = [_out(each, each.ports or (DNS_PORT,), ("TCP", "UDP")) for each in surroundings.dns]
    egress += [_out(each, each.ports) for each in (control_plane, *surroundings.egress)]
    ingress = [_in(surroundings.metrics_from, HEALTH_PORT)] if surroundings.metrics_from else []
    return surroundings.name, _spec({"matchExpressions": _SERVERS}, ingress, egress, surroundings)


def _of_profile(
    name: str,
    profile: ServerProfileSpec,
    providers: Mapping[str, IdentityProviderSpec],
    surroundings: Surroundings,
) -> Iterator[tuple[str, JSON]]:
    callers = [_caller(caller, surroundings) for caller in profile.identity.callers]
    known = _unique((*(each for each in callers if each), *profile.ingress))
    is_open = _is_open(profile, surroundings)
    services = (_service(url) for url in _needs(profile, providers, surroundings))
    reach = _unique((*(each for each in services if each), *(each for each in profile.egress if not each.hosts)))
    egress = [_out(each, each.ports) for each in reach]
    for capture, operator, port in (("", "NotIn", None), ("-remap", "In", INBOUND_PORT)):
        if capture and surroundings.weakest_capture is not Capture.REMAP:
            continue
        captured = {"key": CAPTURED, "operator": operator, "values": [str(Capture.REMAP)]}
        ingress = [_in(() if is_open else known, port)] if is_open or known else []
        selector = _selector(profile, captured)
        yield _name(surroundings.name + capture, name), _spec(selector, ingress, egress, surroundings)

    ports = sorted({port for each in profile.egress if each.hosts for port in each.ports or HOST_PORTS})
    if ports and surroundings.mode == "enforce":
        # Only pods whose network has the rules that bring all of this to the sidecar, which knows the names.
        by_name = {"key": EGRESS, "operator": "In", "values": [str(WayOut.HOSTS)]}
        opened = [_out(each, ports) for each in _public(surroundings.private)]
        yield _name(f"{surroundings.name}-hosts", name), _spec(_selector(profile, by_name), [], opened, surroundings)


def _public(private: Iterable[str]) -> Iterator[ReachSpec]:
    """Yield the public addresses of both families without those that are *private* to the cluster."""
    own = [ip_network(each) for each in private]
    for whole, excluded in PUBLIC_RANGES.items():
        version = ip_network(whole).version
        yield ReachSpec(cidr=whole, excluded=(*excluded, *(str(each) for each in own if each.version == version)))


def _name(prefix: str, profile: str) -> str:
    name = f"{prefix}.{profile}"
    digest = hashlib.sha256(profile.encode()).hexdigest()[:16]
    return name if len(name) <= _MAX_NAME else f"{prefix}.{digest}"


def _selector(profile: ServerProfileSpec, captured: JSON) -> JSON:
    expressions = [
        {"key": each.key, "operator": each.operator} | ({"values": list(each.values)} if each.values else {})
        for each in profile.selector.match_expressions
    ]
    labels = {"matchLabels": dict(profile.selector.match_labels)} if profile.selector.match_labels else {}
    return labels | {"matchExpressions": [*expressions, *_SERVERS, captured]}


def _spec(selector: JSON, ingress: list[JSON], egress: list[JSON], surroundings: Surroundings) -> JSON:
    kinds = {"ingress": ingress, "egress": egress if surroundings.mode == "enforce" else []}
    types = ["Ingress", "Egress"] if surroundings.mode == "enforce" else ["Ingress"]
    return {"podSelector": selector, "policyTypes": types} | {key: rules for key, rules in kinds.items() if rules}


def _in(peers: Iterable[PeerSpec], port: int | None) -> JSON:
    """Return the rule that lets *peers* in, everybody if there are none, on *port* or on every TCP port: UDP passes by."""
    sources = [_peer(each) for each in peers]
    ports = [{"protocol": "TCP"} | ({"port": port} if port else {})]
    return ({"from": sources} if sources else {}) | {"ports": ports}


def _out(peer: PeerSpec, ports: Iterable[int], protocols: Iterable[str] = ("TCP",)) -> JSON:
    listed = [{"protocol": protocol, "port": port} for port in ports for protocol in protocols]
    return {"to": [_peer(peer)], "ports": listed or [{"protocol": protocol} for protocol in protocols]}


def _peer(peer: PeerSpec) -> JSON:
    if peer.cidr is not None:
        excluded = {"except": [str(ip_network(each)) for each in peer.excluded]} if peer.excluded else {}
        return {"ipBlock": {"cidr": str(ip_network(peer.cidr)), **excluded}}
    named = {} if peer.namespace == ANY_NAMESPACE else {"matchLabels": {NAMESPACE_NAME: peer.namespace}}
    pods = {"podSelector": {"matchLabels": dict(peer.pod_labels)}} if peer.pod_labels else {}
    return {"namespaceSelector": named} | pods


def _is_open(profile: ServerProfileSpec, surroundings: Surroundings) -> bool:
    """Say whether callers need no identity, so that none can be told from others by where it is."""
    return surroundings.is_permissive and profile.identity.mtls != "strict"


def _caller(pattern: str, surroundings: Surroundings) -> PeerSpec | None:
    """Return where the workloads of *pattern* run, by the SPIFFE IDs that the chart has SPIRE give; None: not known."""
    parsed = SpiffePattern.parse(pattern)
    if str(parsed.trust_domain) != surroundings.trust_domain:
        return None
    match parsed.segments:
        case ("ns", namespace, *_) if namespace not in (ONE_SEGMENT, ANY_REST):
            return PeerSpec(namespace=namespace)
        case ("ns" | "*" | "**", *_):
            return PeerSpec(namespace=ANY_NAMESPACE)
        case _:
            return None


def _needs(
    profile: ServerProfileSpec, providers: Mapping[str, IdentityProviderSpec], surroundings: Surroundings
) -> Iterator[str]:
    """Yield the URLs that the sidecar calls for this profile."""
    identity = profile.identity
    names = [*(each.name for each in identity.providers), *([identity.exchange.provider] if identity.exchange else [])]
    for each in (providers[name] for name in names if name in providers):
        urls = (each.issuer, each.jwks_uri, each.token_endpoint, each.introspection_endpoint)
        yield from (url for url in urls if url)
    if endpoint := profile.telemetry.otlp_endpoint:
        yield endpoint
    yield from surroundings.urls


def _service(url: str) -> ReachSpec | None:
    """Return the namespace of the Service that *url* names, or its address; None for a name outside the cluster.

    Not the port: a policy is about the pods', which need not be the Service's.
    """
    host = (urlsplit(url).hostname or "").removesuffix(".")
    try:
        return ReachSpec(cidr=str(ip_network(ip_address(host))))
    except ValueError:
        labels = host.split(".")
    is_service = len(labels) == 2 or labels[2:3] == ["svc"]
    return ReachSpec(namespace=labels[1]) if is_service else None


def _is_ambiguous(url: str) -> bool:
    """Say whether `https://gitlab.com` may be meant: two labels, as a Service has them, and the port of the web."""
    parts = urlsplit(url)
    return parts.scheme == "https" and parts.port in (None, 443) and (parts.hostname or "").count(".") == 1


def _unique(peers: Iterable[Any]) -> list[Any]:
    kept: list[Any] = []
    for peer in peers:
        if peer not in kept:
            kept.append(peer)
    return kept

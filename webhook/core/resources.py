"""The custom resources as typed values: what `sidegate.dev/v1alpha1` can say, and whom it says it to.

Refuses unknown fields, wrong types and values out of range, naming resource and field, although the API server has
checked the same schema (charts/sidegate/crds): a CRD may be older than this program. Selectors are label selectors as
Kubernetes has them: an empty one selects every pod of its namespace, a missing one is an error.
"""

from ipaddress import ip_network
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec

from certs.errors import BadSpiffeId
from certs.spiffe import SpiffeId, SpiffePattern
from sidecar.core import profile
from sidecar.core.bundle import public_keys
from sidecar.core.content import Content
from sidecar.errors import BundleError
from webhook.core.pod import JSON
from webhook.errors import BadResource

VERSION: Final = "v1alpha1"
HOST_PORTS: Final = (443,)  # of hosts without ports
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=253)]
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Base: immutable, by keyword, nothing unknown, camel case as in every Kubernetes resource."""


class Requirement(Record, frozen=True, kw_only=True):
    """One line of `matchExpressions`."""

    key: Name
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: tuple[str, ...] = ()

    def matches(self, labels: dict[str, str]) -> bool:
        """Return whether *labels* meet the requirement; an absent label is not in any set."""
        match self.operator:
            case "In":
                return labels.get(self.key) in self.values
            case "NotIn":
                return labels.get(self.key) not in self.values
            case "Exists":
                return self.key in labels
            case "DoesNotExist":
                return self.key not in labels


class Selector(Record, frozen=True, kw_only=True):
    """A label selector: all of it must match."""

    match_labels: dict[str, str] = {}
    match_expressions: tuple[Requirement, ...] = ()

    def matches(self, labels: dict[str, str]) -> bool:
        """Return whether a pod with *labels* is meant."""
        return all(labels.get(key) == value for key, value in self.match_labels.items()) and all(
            each.matches(labels) for each in self.match_expressions
        )


class ServerSpec(Record, frozen=True, kw_only=True):
    """The MCP server behind the sidecar; None: found out from the pod."""

    name: Name | None = None
    version: str = ""
    port: profile.Port | None = None
    transport: profile.Transport = "http"
    processes: profile.Processes = "session"
    paths: Annotated[tuple[profile.Path, ...], msgspec.Meta(min_length=1)] = ("/mcp",)
    hosts: tuple[profile.Host, ...] = ()
    origins: tuple[profile.Origin, ...] = ()
    max_body_bytes: Annotated[int, msgspec.Meta(ge=1024, le=64 * 2**20)] = 4 * 2**20  # the SDKs' own limit


class ProviderReference(Record, frozen=True, kw_only=True):
    """An IdentityProvider, and which of its audiences this server is."""

    name: Name
    audiences: tuple[Name, ...] = ()


class StepUpSpec(Record, frozen=True, kw_only=True):
    """Scopes that some calls need."""

    scopes: Annotated[tuple[profile.Scope, ...], msgspec.Meta(min_length=1)]
    methods: tuple[Name, ...] = ("tools/call",)
    tools: tuple[Name, ...] = ()


class TokenExchangeSpec(Record, frozen=True, kw_only=True):
    """For which token the user's is exchanged before a call goes on to the server."""

    provider: Name
    grant: Literal["token_exchange", "on_behalf_of"] = "token_exchange"
    resource: Annotated[str, msgspec.Meta(max_length=2048)] | None = None
    audience: Annotated[str, msgspec.Meta(max_length=2048)] | None = None
    scopes: tuple[profile.Scope, ...] = ()
    actor: bool = False


class IdentitySpec(Record, frozen=True, kw_only=True):
    """Who may call at all."""

    mtls: Literal["strict", "permissive"] | None = None
    user: Literal["required", "optional"] | None = None
    callers: tuple[Annotated[str, msgspec.Meta(max_length=2048)], ...] = ()
    jwt_svid: Literal["off", "allowed"] = "off"
    providers: tuple[ProviderReference, ...] = ()
    resource: profile.Url | None = None
    scopes: tuple[profile.Scope, ...] = ()
    step_up: tuple[StepUpSpec, ...] = ()
    dpop: Literal["optional", "required"] = "optional"
    dpop_nonce: bool = False
    upstream: Literal["none", "token", "exchange", "header"] = "none"
    exchange: TokenExchangeSpec | None = None


class DestinationSpec(Record, frozen=True, kw_only=True):
    """An MCP server that agents call."""

    host: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._:-]+$", max_length=253)]
    port: profile.Port
    id: Annotated[str, msgspec.Meta(max_length=2048)] = ""


class AgentSpec(Record, frozen=True, kw_only=True):
    """The pods that are selected are agents: their calls to these servers leave with their identity."""

    servers: Annotated[tuple[DestinationSpec, ...], msgspec.Meta(min_length=1)]


class AuditSpec(Record, frozen=True, kw_only=True):
    """What audit records hold, and when they are written."""

    before: Literal["off", "changes", "all"] | None = None
    when_full: Literal["refuse", "drop"] | None = None
    arguments: Literal["full", "hash"] | None = None
    results: Literal["full", "hash"] | None = None
    redact: tuple[Name, ...] = ()
    max_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**20)] | None = None


class TelemetrySpec(Record, frozen=True, kw_only=True):
    """Where telemetry goes, and how much of it."""

    otlp_endpoint: str | None = None
    content: bool = False
    sample_ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None


class PeerSpec(Record, frozen=True, kw_only=True):
    """Who is at the other end of a connection: pods of a namespace (`*`: of any), or a range of addresses."""

    namespace: Name | None = None
    pod_labels: dict[str, str] = {}
    cidr: Annotated[str, msgspec.Meta(max_length=64)] | None = None
    excluded: tuple[Annotated[str, msgspec.Meta(max_length=64)], ...] = msgspec.field(default=(), name="except")

    def check(self) -> None:
        """Raise ValueError saying what of it cannot be used."""
        if (self.namespace is None) is (self.cidr is None):
            raise ValueError("one of namespace and cidr must be given (in spec.egress: or hosts)")
        if self.namespace is not None and self.excluded:
            raise ValueError("except goes with cidr")
        if self.cidr is not None:
            if self.pod_labels:
                raise ValueError("podLabels goes with namespace")
            whole = ip_network(self.cidr)
            for each in self.excluded:
                part = ip_network(each)
                if part.version != whole.version or not whole.supernet_of(part):  # type: ignore[arg-type]
                    raise ValueError(f"except: {each} is no part of {self.cidr}")


class ReachSpec(PeerSpec, frozen=True, kw_only=True):
    """Where connections may go to: on TCP ports, by default on all."""

    ports: tuple[profile.Port, ...] = ()


class EgressSpec(ReachSpec, frozen=True, kw_only=True):
    """Where a server's connections may go to; or to which hosts, by name: on port 443 unless others are named."""

    hosts: Annotated[tuple[profile.HostPattern, ...], msgspec.Meta(max_length=256)] = ()

    def check(self) -> None:
        """Raise ValueError saying what of it cannot be used."""
        if not self.hosts:
            super().check()
        elif self.namespace is not None or self.cidr is not None or self.pod_labels or self.excluded:
            raise ValueError("hosts goes with ports alone")


class ServerProfileSpec(Record, frozen=True, kw_only=True):
    """`MCPServerProfile`: which pods, and how."""

    selector: Selector
    capture: Literal["redirect", "remap"] | None = None
    denied: Literal["error", "tool_error", "conceal"] = "error"
    server: ServerSpec = ServerSpec()
    identity: IdentitySpec = IdentitySpec()
    agent: AgentSpec | None = None
    ingress: tuple[PeerSpec, ...] = ()
    egress: tuple[EgressSpec, ...] = ()
    audit: AuditSpec = AuditSpec()
    telemetry: TelemetrySpec = TelemetrySpec()


class ContentSpec(Record, frozen=True, kw_only=True):
    """What may not be in what a call carries: by fields, detectors or an RE2 expression, some of the three."""

    name: Name
    where: Literal["arguments", "results", "both"] = "both"
    tools: tuple[Name, ...] = ()
    fields: tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=256)], ...] = ()
    patterns: tuple[profile.Detected, ...] = ()
    regex: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)] | None = None
    action: Literal["deny", "mask", "redact"] = "mask"

    def rule(self, name: str, mode: Literal["enforce", "shadow"]) -> profile.ContentRule:
        """Return it as sidecars know it, under *name*; raises ValueError when it looks for nothing."""
        return profile.ContentRule(**{**msgspec.structs.asdict(self), "name": name, "mode": mode})


class BundleSpec(Record, frozen=True, kw_only=True):
    """An external OPA bundle whose Rego is the policy: where it is, and who must have signed it."""

    url: Annotated[str, msgspec.Meta(pattern="^https?://", max_length=2048)]
    keys: Annotated[str, msgspec.Meta(min_length=1, max_length=8192)]
    spiffe_id: Annotated[str, msgspec.Meta(max_length=2048)] = ""
    poll_seconds: Annotated[int, msgspec.Meta(ge=10, le=86_400)] = 60
    max_age_seconds: Annotated[int, msgspec.Meta(ge=0, le=31_536_000)] = 0


class PolicySpec(Record, frozen=True, kw_only=True):
    """`MCPPolicy`: rules in either language or both, each engine present must allow; and what content may not pass."""

    selector: Selector
    mode: Literal["enforce", "shadow"] = "enforce"
    vocabulary: Literal["sidegate", "toolhive"] = "sidegate"
    cedar: str | None = None
    rego: str | None = None
    bundle: BundleSpec | None = None
    content: Annotated[tuple[ContentSpec, ...], msgspec.Meta(max_length=64)] = ()


class ClusterPolicySpec(PolicySpec, frozen=True, kw_only=True):
    """`ClusterMCPPolicy`: a guard rail. It must allow as well; alone it opens nothing."""

    namespaces: tuple[Name, ...] = ()


class QuotaSpec(Record, frozen=True, kw_only=True):
    """At most `amount` units in any stretch of the period's length."""

    amount: profile.Units
    period: profile.Period
    warn_at_percent: tuple[Annotated[int, msgspec.Meta(ge=1, le=99)], ...] = ()


class ArgumentWeightSpec(Record, frozen=True, kw_only=True):
    """A tool's call costs a unit for each `per` of an argument."""

    tool: Name
    path: Name
    per: Annotated[float, msgspec.Meta(ge=1e-6, le=1e12)] = 1.0
    maximum: profile.Units


class WeightSpec(Record, frozen=True, kw_only=True):
    """What a message costs, in units."""

    default: profile.Units = 1
    tools: dict[str, profile.Units] = {}
    arguments: tuple[ArgumentWeightSpec, ...] = ()


class LimitSpec(Record, frozen=True, kw_only=True):
    """`MCPLimit`: what each combination of `per` may do."""

    selector: Selector
    rate_per_second: profile.Rate | None = None
    burst: profile.Units | None = None
    quotas: tuple[QuotaSpec, ...] = ()
    concurrent: profile.Units | None = None
    max_bytes: Annotated[int, msgspec.Meta(ge=1, le=64 * 2**20)] | None = None
    per: tuple[profile.Part, ...] = ("user", "workload")
    methods: tuple[Name, ...] = ("tools/call",)
    tools: tuple[Name, ...] = ()
    weight: WeightSpec = WeightSpec()
    mode: Literal["enforce", "shadow"] = "enforce"
    scope: Literal["pod", "global"] = "pod"
    when_unavailable: Literal["closed", "open", "local"] = "closed"
    replicas: Annotated[int, msgspec.Meta(ge=1, le=10_000)] | None = None

    def limit(self, name: str) -> profile.Limit:
        """Return the limit as sidecars read it; raises ValueError where it contradicts itself."""
        weight = self.weight
        return profile.Limit(
            name=name,
            rate_per_s=self.rate_per_second,
            burst=self.burst,
            quotas=tuple(profile.Quota(**msgspec.structs.asdict(each)) for each in self.quotas),
            concurrent=self.concurrent,
            max_bytes=self.max_bytes,
            per=self.per,
            methods=self.methods,
            tools=self.tools,
            weight=profile.Weight(
                default=weight.default,
                tools=weight.tools,
                arguments=tuple(profile.ArgumentWeight(**msgspec.structs.asdict(each)) for each in weight.arguments),
            ),
            mode=self.mode,
            scope=self.scope,
            when_unavailable=self.when_unavailable,
            replicas=self.replicas,
        )


class ClaimsSpec(Record, frozen=True, kw_only=True):
    """Which claim becomes which field of `input.user`."""

    id: str = "sub"
    email: str = "email"
    role: str = "role"
    roles: str = "roles"
    groups: str = "groups"
    scopes: str = "scope scp"


class ClientSpec(Record, frozen=True, kw_only=True):
    """How workloads prove to the provider who they are: by a JWT-SVID, so that nothing secret is stored."""

    id: Annotated[str, msgspec.Meta(max_length=2048)] = ""
    assertion_type: Annotated[str, msgspec.Meta(max_length=253)] = profile.JWT_BEARER
    audience: Annotated[str, msgspec.Meta(max_length=2048)] | None = None


class IdentityProviderSpec(Record, frozen=True, kw_only=True):
    """`IdentityProvider`: whose access tokens are accepted."""

    issuer: Annotated[str, msgspec.Meta(pattern="^https?://", max_length=2048)]
    audiences: tuple[Name, ...] = ()
    jwks_uri: Annotated[str, msgspec.Meta(pattern="^https?://", max_length=2048)] | None = None
    ca_pem: str | None = None
    algorithms: Annotated[tuple[Algorithm, ...], msgspec.Meta(min_length=1)] = ("RS256", "PS256", "ES256", "EdDSA")
    leeway_seconds: Annotated[int, msgspec.Meta(ge=0, le=120)] = 30
    claims: ClaimsSpec = ClaimsSpec()
    id_tokens: bool = False
    introspection: bool = False
    introspection_endpoint: profile.Url | None = None
    token_endpoint: profile.Url | None = None
    client: ClientSpec | None = None


Spec = TypeVar("Spec", ServerProfileSpec, PolicySpec, ClusterPolicySpec, LimitSpec, IdentityProviderSpec)


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """How a kind is addressed in the API."""

    name: str
    plural: str
    spec: type[Any]


SERVER_PROFILE: Final = Kind(name="MCPServerProfile", plural="mcpserverprofiles", spec=ServerProfileSpec)
POLICY: Final = Kind(name="MCPPolicy", plural="mcppolicies", spec=PolicySpec)
CLUSTER_POLICY: Final = Kind(name="ClusterMCPPolicy", plural="clustermcppolicies", spec=ClusterPolicySpec)
LIMIT: Final = Kind(name="MCPLimit", plural="mcplimits", spec=LimitSpec)
IDENTITY_PROVIDER: Final = Kind(name="IdentityProvider", plural="identityproviders", spec=IdentityProviderSpec)
KINDS: Final = (SERVER_PROFILE, POLICY, CLUSTER_POLICY, LIMIT, IDENTITY_PROVIDER)


def label_of(kind: Kind, resource: JSON) -> str:
    """Return `Kind namespace/name` for messages."""
    metadata = resource.get("metadata") or {}
    parts = (metadata.get("namespace"), metadata.get("name"))
    return f"{kind.name} {'/'.join(str(part) for part in parts if part)}"


def decode(kind: Kind, resource: JSON, spec: type[Spec]) -> Spec:
    """Return the spec of *resource*; raises BadResource naming the field and what is expected there."""
    label = label_of(kind, resource)
    try:
        decoded = msgspec.convert(resource.get("spec"), type=spec)
    except msgspec.ValidationError as error:
        raise BadResource(label, f"spec: {error}") from error
    match decoded:
        case ServerProfileSpec():
            _check_profile(label, decoded)
        case LimitSpec():
            _check_limit(label, decoded)
        case PolicySpec():
            if not (decoded.cedar or decoded.rego or decoded.bundle or decoded.content):
                raise BadResource(label, "spec: one of cedar, rego, bundle and content must be given")
            _check_bundle(label, decoded)
            _check_content(label, decoded.content)
    return decoded


def _check_bundle(label: str, spec: PolicySpec) -> None:
    if spec.bundle is None:
        return
    if spec.rego:
        raise BadResource(label, "spec.bundle: brings the Rego; leave out spec.rego")
    try:
        public_keys(spec.bundle.keys)
        if spec.bundle.spiffe_id:
            SpiffeId.parse(spec.bundle.spiffe_id)
    except BundleError as error:
        raise BadResource(label, f"spec.bundle.keys: {error}") from error
    except BadSpiffeId as error:
        raise BadResource(label, f"spec.bundle.spiffeId: {error}") from error


def _check_profile(label: str, spec: ServerProfileSpec) -> None:
    for index, caller in enumerate(spec.identity.callers):
        _check_pattern(label, f"spec.identity.callers[{index}]", caller)
    for index, server in enumerate(spec.agent.servers if spec.agent else ()):
        if server.id:
            _check_pattern(label, f"spec.agent.servers[{index}].id", server.id)
        elif not _is_service(server.host):
            raise BadResource(
                label, f"spec.agent.servers[{index}].id: needed, as {server.host} is no Service of this cluster"
            )
    for field, peers in (("ingress", spec.ingress), ("egress", spec.egress)):
        for index, peer in enumerate(peers):
            try:
                peer.check()
            except ValueError as error:
                raise BadResource(label, f"spec.{field}[{index}]: {error}") from error

    _check_hosts(label, spec)


def _check_hosts(label: str, spec: ServerProfileSpec) -> None:
    if any(each.hosts for each in spec.egress):
        if spec.agent is not None:
            raise BadResource(
                label, "spec.egress: hosts are for servers; an agent's other connections are not captured"
            )
        if spec.capture == "remap":
            raise BadResource(label, "spec.egress: hosts need capture redirect; in remap, name addresses (cidr)")


def _check_limit(label: str, spec: LimitSpec) -> None:
    try:
        spec.limit("any")
    except ValueError as error:  # it contradicts itself
        raise BadResource(label, f"spec: {error}") from error


def _check_content(label: str, content: tuple[ContentSpec, ...]) -> None:
    names = [each.name for each in content]
    for index, each in enumerate(content):
        field = f"spec.content[{index}]"
        if each.name in names[:index]:
            raise BadResource(label, f"{field}.name: {each.name} is the name of another rule here")
        try:
            Content([each.rule(each.name, "enforce")])
        except (ValueError, BundleError) as error:
            raise BadResource(label, f"{field}: {error}") from error


def _check_pattern(label: str, field: str, pattern: str) -> None:
    try:
        SpiffePattern.parse(pattern)
    except BadSpiffeId as error:
        raise BadResource(label, f"{field}: {error}") from error


def _is_service(host: str) -> bool:
    """Say whether *host* names a Service, whose namespace then says whom to expect there."""
    labels = host.lower().removesuffix(".").split(".")
    return len(labels) <= 2 or labels[2] == "svc"

"""What `sidegate.json` in a bundle says of one workload: identity, limits, audit, telemetry.

Written by the control plane (webhook/core/compile.py), read by the sidecar; unknown fields are refused, because a
misspelt restriction that is ignored is a hole. Format version 1; the reference page is generated from these types.
"""

from ipaddress import ip_network
from typing import Annotated, Literal

import msgspec

from sidecar.errors import BundleError

FORMAT: Literal[1] = 1

Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
Transport = Literal["http", "sse", "stdio"]
Processes = Literal["session", "shared"]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Path = Annotated[str, msgspec.Meta(pattern=r"^/[!-~]*\Z", max_length=512)]
Url = Annotated[str, msgspec.Meta(pattern=r"^https?://[!-~]+\Z", max_length=2048)]
Scope = Annotated[str, msgspec.Meta(pattern=r"^[!#-\[\]-~]+\Z", max_length=512)]  # RFC 6749, 3.3: one token of a scope
Host = Annotated[
    str, msgspec.Meta(pattern=r"^[a-z0-9._:\[\]-]+\Z", max_length=261)
]  # a name or address, with or without port
# RFC 1123, in lower case; two labels at least, and the last begins with a letter: no IP address looks like that.
HOST_NAME = r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]([a-z0-9-]{0,61}[a-z0-9])?"
HostPattern = Annotated[str, msgspec.Meta(pattern=rf"^(\*\.)?{HOST_NAME}\Z", max_length=253)]
Origin = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9+.-]*://[^/ ]+\Z", max_length=512)]  # as browsers write it
JWT_BEARER = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
Detected = Literal[
    "aws-key",
    "google-key",
    "github-token",
    "gitlab-token",
    "slack-token",
    "private-key",
    "jwt",
    "credit-card",
    "iban",
    "email",
    "us-ssn",
]  # sidecar/core/detectors.py
Rate = Annotated[float, msgspec.Meta(ge=1e-6)]  # once in twelve days; less would make waits infinite
Ratio = Annotated[float, msgspec.Meta(ge=0, le=1)]
Units = Annotated[int, msgspec.Meta(ge=1, le=10**12)]
Period = Literal["minute", "hour", "day", "week", "month"]
Part = Literal["user", "workload", "session", "agent_session", "tool", "server"]  # of what has an account of its own


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=False):
    """Base of every record here: immutable, by keyword, nothing unknown."""


class Server(Record, frozen=True, kw_only=True):
    """The MCP server behind the sidecar."""

    namespace: str
    workload: str
    name: str
    version: str = ""
    port: Port
    transport: Transport = "http"  # Streamable HTTP; HTTP+SSE of 2024-11-05; stdio behind a relay
    processes: Processes = "session"  # stdio: a process for each session, or one for all
    paths: tuple[Path, ...] = ("/mcp",)  # sse: those of the event stream; the server announces where to post
    hosts: tuple[Host, ...] = ()  # authorities under which callers know this server, judged in Host; empty: any
    origins: tuple[Origin, ...] = ()  # browsers' origins that may call, such as https://app.example; empty: none
    max_body_bytes: Annotated[int, msgspec.Meta(ge=1024, le=64 * 2**20)] = 4 * 2**20  # the SDKs' own limit


class ClaimPaths(Record, frozen=True, kw_only=True):
    """Which claim of an access token becomes which field of `input.user`; dots step into objects.

    Several paths stand with a space between them: the first that holds something counts, of lists all of them do.
    """

    id: str = "sub"  # one path only: two would mix two name spaces of users
    email: str = "email"
    role: str = "role"
    roles: str = "roles"
    groups: str = "groups"
    scopes: str = "scope scp"  # a list, or text with spaces; scp is what Entra ID and Okta write


class Client(Record, frozen=True, kw_only=True):
    """How this workload proves to a provider's token and introspection endpoints who it is."""

    id: str = ""  # client_id; empty: the SPIFFE ID (jwt_svid only)
    method: Literal["jwt_svid", "private_key_jwt", "client_secret_basic", "client_secret_post"] = "jwt_svid"
    assertion_type: str = JWT_BEARER  # of a JWT-SVID; or …:jwt-spiffe
    audience: str | None = None  # of the assertion; None: the issuer
    file: str | None = None  # that holds the secret or the private key (PEM), in the sidecar's file system
    key_id: str | None = None  # of the private key, where the provider knows several


class Provider(Record, frozen=True, kw_only=True):
    """An OpenID provider whose access tokens are accepted."""

    name: str
    issuer: Annotated[str, msgspec.Meta(min_length=8)]
    audiences: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    jwks_uri: str | None = None  # None: read from <issuer>/.well-known/openid-configuration
    ca_pem: str | None = None  # None: the system's roots
    algorithms: Annotated[tuple[Algorithm, ...], msgspec.Meta(min_length=1)] = ("RS256", "PS256", "ES256", "EdDSA")
    leeway_s: Annotated[int, msgspec.Meta(ge=0, le=120)] = 30
    claims: ClaimPaths = ClaimPaths()
    id_tokens: bool = False  # also take ID tokens that name this server: Google issues no other JWTs
    introspection: bool = False  # ask about opaque tokens (RFC 7662); at most one provider can, they name no issuer
    introspection_endpoint: Url | None = None  # None: as discovered
    token_endpoint: Url | None = None  # None: as discovered
    client: Client | None = None  # needed to introspect and to exchange


class StepUp(Record, frozen=True, kw_only=True):
    """Scopes that some calls need; who lacks one is told which, and can ask the provider for it."""

    scopes: Annotated[tuple[Scope, ...], msgspec.Meta(min_length=1)]
    methods: tuple[str, ...] = ("tools/call",)
    tools: tuple[str, ...] = ()  # by exact name, of a tools/call; empty: every message of these methods


class TokenExchange(Record, frozen=True, kw_only=True):
    """For which token the user's is exchanged before a call goes on to the server."""

    provider: str  # one of `providers`, with a client
    grant: Literal["token_exchange", "on_behalf_of"] = "token_exchange"  # RFC 8693; Entra ID's own
    resource: str | None = None
    audience: str | None = None
    scopes: tuple[Scope, ...] = ()
    actor: bool = False  # name this workload as the actor, by a JWT-SVID


class Identity(Record, frozen=True, kw_only=True):
    """Who may call at all; what they may do is the policies' business."""

    mtls: Literal["strict", "permissive"] = "strict"  # permissive: callers without a SVID are let in as nobody
    user: Literal["required", "optional"] = "required"
    callers: tuple[str, ...] = ()  # SPIFFE ID patterns (certs.spiffe.SpiffePattern); empty: no workload may call
    jwt_svid: Literal["off", "allowed"] = "off"  # whether a JWT-SVID in Sidegate-Workload-Token stands in for mTLS
    providers: tuple[Provider, ...] = ()
    resource: Url | None = None  # the URL by which callers know this server (RFC 9728); None: no metadata, no DPoP
    scopes: tuple[Scope, ...] = ()  # that every user's token must hold
    step_up: tuple[StepUp, ...] = ()
    dpop: Literal["optional", "required"] = "optional"  # required: only tokens bound to a key, by DPoP or by mTLS
    dpop_nonce: bool = False  # proofs must carry a nonce of ours
    upstream: Literal["none", "token", "exchange", "header"] = "none"  # what the server learns of the user
    exchange: TokenExchange | None = None

    def __post_init__(self) -> None:
        """Refuse what contradicts itself; raises ValueError, which decoding turns into its own error."""
        named = {each.name: each for each in self.providers}
        if sum(each.introspection for each in self.providers) > 1:
            raise ValueError("introspection: at most one provider, because an opaque token names no issuer")
        if any(each.introspection and each.client is None for each in self.providers):
            raise ValueError("introspection needs a client")
        if self.resource is None and (self.dpop == "required" or self.dpop_nonce or self.upstream == "token"):
            raise ValueError("resource is needed for dpop required, dpop_nonce and upstream token")
        if (self.upstream == "exchange") != (self.exchange is not None):
            raise ValueError("upstream exchange and the field exchange go together")
        if self.exchange is not None:
            provider = named.get(self.exchange.provider)
            if provider is None or provider.client is None:
                raise ValueError("exchange.provider must be one of providers, with a client")


class Destination(Record, frozen=True, kw_only=True):
    """An MCP server that an agent calls."""

    host: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._:-]+\Z", max_length=253)]  # as the agent names it
    port: Port
    id: str = ""  # SPIFFE ID pattern that it must match; empty: any service account of the host's namespace


class AgentRole(Record, frozen=True, kw_only=True):
    """What a sidecar in agent role does: calls to these servers leave as mTLS, all others untouched."""

    servers: tuple[Destination, ...] = ()


class NamedHosts(Record, frozen=True, kw_only=True):
    """Hosts that the server may connect to."""

    hosts: Annotated[tuple[HostPattern, ...], msgspec.Meta(min_length=1)]  # `*.` in front stands for one label
    ports: Annotated[tuple[Port, ...], msgspec.Meta(min_length=1)] = (443,)


class Network(Record, frozen=True, kw_only=True):
    """Addresses that the server may connect to, whatever their names."""

    cidr: str
    excluded: tuple[str, ...] = ()
    ports: tuple[Port, ...] = ()  # empty: all

    def __post_init__(self) -> None:
        """Refuse what is no range; raises ValueError, which decoding turns into its own error."""
        for each in (self.cidr, *self.excluded):
            ip_network(each)


class EgressRules(Record, frozen=True, kw_only=True):
    """Where the server's own connections may go, if they pass the sidecar."""

    hosts: tuple[NamedHosts, ...] = ()
    networks: tuple[Network, ...] = ()
    private: tuple[str, ...] = ()  # ranges of the cluster that look public: NetworkPolicies judge them, and no name

    def __post_init__(self) -> None:
        """Refuse what is no range; raises ValueError, which decoding turns into its own error."""
        for each in self.private:
            ip_network(each)


class Quota(Record, frozen=True, kw_only=True):
    """At most `amount` units in any stretch of the period's length; a month is 30 days."""

    amount: Units
    period: Period
    warn_at_percent: Annotated[tuple[Annotated[int, msgspec.Meta(ge=1, le=99)], ...], msgspec.Meta(max_length=8)] = ()


class ArgumentWeight(Record, frozen=True, kw_only=True):
    """A tool's call costs a unit for each `per` of the number at `path`, or of the length of the list there."""

    tool: str
    path: Annotated[str, msgspec.Meta(min_length=1, max_length=253)]  # dots step into objects
    per: Annotated[float, msgspec.Meta(ge=1e-6, le=1e12)] = 1.0
    maximum: Units  # what a call costs whose argument is absent, negative, no number or more than that


class Weight(Record, frozen=True, kw_only=True):
    """What a message costs, in units."""

    default: Units = 1
    tools: dict[str, Units] = {}
    arguments: Annotated[tuple[ArgumentWeight, ...], msgspec.Meta(max_length=64)] = ()


class Limit(Record, frozen=True, kw_only=True):
    """What each combination of `per` may do: at a rate, within quotas, at a time, in one message. Some of the four."""

    name: str
    rate_per_s: Rate | None = None  # units that come into the token bucket
    burst: Units | None = None  # units that the bucket holds
    quotas: Annotated[tuple[Quota, ...], msgspec.Meta(max_length=5)] = ()  # one for each period
    concurrent: Units | None = None  # messages under way, until the end of their answers
    max_bytes: Annotated[int, msgspec.Meta(ge=1, le=64 * 2**20)] | None = None  # of a body
    per: tuple[Part, ...] = ("user", "workload")
    methods: tuple[str, ...] = ("tools/call",)
    tools: tuple[str, ...] = ()  # empty: every tool
    weight: Weight = Weight()
    mode: Literal["enforce", "shadow"] = "enforce"  # shadow: counted, and nothing is refused for it
    scope: Literal["pod", "global"] = "pod"  # global: all replicas together, by the store
    when_unavailable: Literal["closed", "open", "local"] = "closed"  # what holds while the store does not answer
    replicas: Annotated[int, msgspec.Meta(ge=1, le=10_000)] | None = None  # local: each grants this part of the limit

    def __post_init__(self) -> None:
        """Refuse what contradicts itself, in the words of MCPLimit; decoding turns ValueError into its own error."""
        capacities = {f"quotas of a {each.period}": each.amount for each in self.quotas}
        if self.burst is not None:
            capacities["burst"] = self.burst
        if (self.rate_per_s is None) != (self.burst is None):
            raise ValueError("ratePerSecond and burst go together")
        if not capacities and self.concurrent is None and self.max_bytes is None:
            raise ValueError("at least one of ratePerSecond, quotas, concurrent and maxBytes is needed")
        if len({each.period for each in self.quotas}) < len(self.quotas):
            raise ValueError("quotas: one for each period")
        if self.weight != Weight() and not capacities:
            raise ValueError("weight: needs ratePerSecond or quotas, which are counted in units")
        if len({each.tool for each in self.weight.arguments}) < len(self.weight.arguments):
            raise ValueError("weight.arguments: one for each tool")
        strange = {*self.weight.tools, *(each.tool for each in self.weight.arguments)} - set(self.tools)
        if self.tools and strange:
            raise ValueError(f"weight: {', '.join(sorted(strange))} is none of tools")
        if (self.scope == "pod") and (self.when_unavailable != "closed" or self.replicas is not None):
            raise ValueError("whenUnavailable and replicas: only with scope global")
        if (self.when_unavailable == "local") != (self.replicas is not None):
            raise ValueError("replicas and whenUnavailable local go together")
        self._check_room(capacities)

    def _check_room(self, capacities: dict[str, int]) -> None:
        """Refuse limits within which the heaviest message never fits."""
        weight, shares = self.weight, self.replicas or 1
        heaviest = max(1, weight.default, *weight.tools.values(), *(each.maximum for each in weight.arguments))
        for name, amount in capacities.items():
            if amount < heaviest:
                raise ValueError(f"{name}: {amount} units, and one message can cost {heaviest}: it would never pass")
            if amount // shares < heaviest:
                raise ValueError(
                    f"{name}: {amount} units of {shares} replicas are {amount // shares} for each, and one message can"
                    f" cost {heaviest}: raise it, or take whenUnavailable closed or open"
                )
        if self.concurrent is not None and self.concurrent < shares:
            raise ValueError(f"concurrent: {self.concurrent} of {shares} replicas is less than one for each")


class Audit(Record, frozen=True, kw_only=True):
    """What an audit record holds of a call's content; sizes and hashes are always there. And when there is one."""

    before: Literal["off", "changes", "all"] = "changes"  # one more record before sending: never, of tools/call, always
    when_full: Literal["refuse", "drop"] = "refuse"  # what no record can be kept of: not sent, or sent and counted
    arguments: Literal["full", "hash"] = "full"
    results: Literal["full", "hash"] = "full"
    redact: tuple[str, ...] = ("password", "secret", "token", "api_key", "authorization")  # field names, any depth
    max_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**20)] = 8192  # of each; more is cut, and said so


class ContentRule(Record, frozen=True, kw_only=True):
    """What may not be in what a call carries, and what happens where it is found."""

    name: str  # as its author knows it, such as namespace/policy/rule
    where: Literal["arguments", "results", "both"] = "both"  # what clients send; what the server says
    tools: tuple[str, ...] = ()  # by exact name; empty: all tools, and prompts and resources as well
    fields: tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=256)], ...] = ()  # names, or JSON pointers
    patterns: tuple[Detected, ...] = ()
    regex: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)] | None = None  # RE2
    action: Literal["deny", "mask", "redact"] = "mask"  # redact: in audit and telemetry only
    mode: Literal["enforce", "shadow"] = "enforce"  # shadow: counted, and nothing follows from it

    def __post_init__(self) -> None:
        """Refuse what finds nothing; raises ValueError, which decoding turns into its own error."""
        if not (self.fields or self.patterns or self.regex):
            raise ValueError("a content rule needs fields, patterns or regex")


class Telemetry(Record, frozen=True, kw_only=True):
    """Where spans go, and whether they carry content."""

    otlp_endpoint: str | None = None  # base URL of an OTLP/HTTP receiver, as OTEL_EXPORTER_OTLP_ENDPOINT
    content: bool = False  # tool arguments and results on spans (opt-in by the semantic conventions)
    sample_ratio: Ratio | None = None  # of traces begun here; None: as OTEL_TRACES_SAMPLER says


class PolicySet(Record, frozen=True, kw_only=True):
    """One policy as it was applied: which engines judge by it, and what they can read. Every set must allow."""

    name: str = "policies"  # as its author knows it, such as namespace/readers or cluster/no-deletes
    path: Annotated[str, msgspec.Meta(pattern=r"^(sets/(namespace|cluster)/[a-z0-9.-]{1,253}/)?\Z")] = (
        ""  # of its files
    )
    mode: Literal["enforce", "shadow"] = "enforce"  # shadow: judges beside the others, and nothing follows from it
    grants: bool = True  # False: a guard rail, which can deny; where nothing else grants, nothing is allowed
    vocabulary: Literal["sidegate", "toolhive"] = "sidegate"  # of its Cedar policies
    cedar: bool = False
    rego: bool = False
    reads: tuple[str, ...] | None = None  # input paths; None: not provable, hand over the whole document
    pure: bool = False  # no policy reads the time or another impure builtin: verdicts may be cached


class Profile(Record, frozen=True, kw_only=True):
    """All of `sidegate.json`."""

    format: Literal[1] = FORMAT
    server: Server
    identity: Identity = Identity()
    limits: tuple[Limit, ...] = ()
    audit: Audit = Audit()
    telemetry: Telemetry = Telemetry()
    content: Annotated[tuple[ContentRule, ...], msgspec.Meta(max_length=256)] = ()
    policies: tuple[PolicySet, ...] = ()
    agent: AgentRole | None = None  # in agent role; `server` is then the agent itself, and its port is not used
    egress: EgressRules | msgspec.UnsetType = msgspec.UNSET  # left out, as older sidecars know it not: nothing declared
    denied: Literal["error", "tool_error", "conceal"] = "error"  # a denied call: said, said to the model, or as unknown

    def __post_init__(self) -> None:
        """Refuse what contradicts itself; raises ValueError, which decoding turns into its own error."""
        if self.server.transport == "stdio" and self.identity.upstream != "none":
            raise ValueError("identity.upstream must be none for a stdio server: a pipe has no headers")


def decode(data: bytes) -> Profile:
    """Return the profile in *data*; raises BundleError naming the field and what is expected there."""
    try:
        return msgspec.json.decode(data, type=Profile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"sidegate.json: {error}") from error


def encode(profile: Profile) -> bytes:
    """Return the same bytes for the same profile: keys sorted, no white space."""
    return msgspec.json.encode(profile, order="sorted")

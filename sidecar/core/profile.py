"""What `sidegate.json` in a bundle says of one workload: identity, limits, audit, telemetry.

Written by the control plane (webhook/core/compile.py), read by the sidecar; unknown fields are refused, because a
misspelt restriction that is ignored is a hole. Format version 1; the reference page is generated from these types.
"""

from typing import Annotated, Literal

import msgspec

from sidecar.errors import BundleError

FORMAT: Literal[1] = 1

Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Path = Annotated[str, msgspec.Meta(pattern=r"^/[!-~]*\Z", max_length=512)]
Rate = Annotated[float, msgspec.Meta(ge=1e-6)]  # once in twelve days; less would make waits infinite


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=False):
    """Base of every record here: immutable, by keyword, nothing unknown."""


class Server(Record, frozen=True, kw_only=True):
    """The MCP server behind the sidecar."""

    namespace: str
    workload: str
    name: str
    version: str = ""
    port: Port
    transport: Literal["http", "sse", "stdio"] = "http"  # Streamable HTTP; HTTP+SSE of 2024-11-05; stdio behind a relay
    processes: Literal["session", "shared"] = "session"  # stdio: a process for each session, or one for all
    paths: tuple[Path, ...] = ("/mcp",)  # sse: those of the event stream; the server announces where to post
    hosts: tuple[str, ...] = ()  # authorities under which callers know this server, judged in Host; empty: any
    origins: tuple[str, ...] = ()  # browsers' origins that may call, such as https://app.example; empty: none
    max_body_bytes: Annotated[int, msgspec.Meta(ge=1024, le=64 * 2**20)] = 4 * 2**20  # the SDKs' own limit


class ClaimPaths(Record, frozen=True, kw_only=True):
    """Which claim of an access token becomes which field of `input.user`; dots step into objects."""

    id: str = "sub"
    email: str = "email"
    role: str = "role"
    roles: str = "roles"
    groups: str = "groups"


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


class Identity(Record, frozen=True, kw_only=True):
    """Who may call at all; what they may do is the policies' business."""

    mtls: Literal["strict", "permissive"] = "strict"  # permissive: callers without a SVID are let in as nobody
    user: Literal["required", "optional"] = "required"
    callers: tuple[str, ...] = ()  # SPIFFE ID patterns (certs.spiffe.SpiffePattern); empty: no workload may call
    providers: tuple[Provider, ...] = ()


class Limit(Record, frozen=True, kw_only=True):
    """A token bucket for each combination of `per`."""

    name: str
    rate_per_s: Rate
    burst: Annotated[int, msgspec.Meta(ge=1)]
    per: tuple[Literal["user", "workload", "session", "tool"], ...] = ("user", "workload")
    methods: tuple[str, ...] = ("tools/call",)
    tools: tuple[str, ...] = ()  # empty: every tool


class Audit(Record, frozen=True, kw_only=True):
    """What an audit record holds of a call's content; sizes and hashes are always there."""

    arguments: Literal["full", "hash"] = "full"
    results: Literal["full", "hash"] = "full"
    redact: tuple[str, ...] = ("password", "secret", "token", "api_key", "authorization")  # field names, any depth
    max_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**20)] = 8192  # of each; more is cut, and said so


class Telemetry(Record, frozen=True, kw_only=True):
    """Where spans go, and whether they carry content."""

    otlp_endpoint: str | None = None  # base URL of an OTLP/HTTP receiver, as OTEL_EXPORTER_OTLP_ENDPOINT
    content: bool = False  # tool arguments and results on spans (opt-in by the semantic conventions)


class Policies(Record, frozen=True, kw_only=True):
    """Which engines the bundle carries, and what they can read (`design`: projection)."""

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
    policies: Policies = Policies()
    denied: Literal["error", "tool_error", "conceal"] = "error"  # a denied call: said, said to the model, or as unknown


def decode(data: bytes) -> Profile:
    """Return the profile in *data*; raises BundleError naming the field and what is expected there."""
    try:
        return msgspec.json.decode(data, type=Profile)
    except msgspec.DecodeError as error:
        raise BundleError(f"sidegate.json: {error}") from error


def encode(profile: Profile) -> bytes:
    """Return the same bytes for the same profile: keys sorted, no white space."""
    return msgspec.json.encode(profile, order="sorted")

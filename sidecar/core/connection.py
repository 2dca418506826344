"""What the shell knows of one HTTP request before anyone judged it, and which of its headers may travel on.

Refuses nothing about identity. Hop-by-hop rules: RFC 9110, 7.6.1. Servers that listen on loopback demand a loopback
Host, so ours is written there after it was judged (sidecar/core/origin.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import compress
from typing import Final

from certs.verify import Peer
from sidecar.errors import Reason, Refusal

Headers = Sequence[tuple[bytes, bytes]]  # names in lower case, in the order of the wire

# RFC 9110, 7.6.1, and what belongs to this hop for other reasons.
HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"content-length",  # written anew from the bytes that are sent
        b"expect",  # answered here
        b"host",  # rewritten to the upstream's authority
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
# The token's audience is this server's sidecar, not the server (MCP authorization: no token passthrough); the origin
# was judged here; identity and encoding headers are this side's to write.
CONSUMED: Final = frozenset(
    {
        b"authorization",
        b"origin",
        b"accept-encoding",
        b"cookie",
        b"dpop",  # proves who sends the token that ends here
        b"forwarded",
        b"traceparent",  # ours names our span as the parent
        b"x-forwarded-for",
        b"x-forwarded-client-cert",
        b"x-http-method-override",  # these would have another request executed than the one that was judged
        b"x-original-url",
        b"x-real-ip",
        b"x-rewrite-url",
    }
)
# The server's own challenge may name another URL and other providers than the ones that are judged here: see
# `relayed` in sidecar/core/metadata.py.
_NOT_RETURNED: Final = HOP_BY_HOP | {
    b"www-authenticate",
    b"authentication-info",
    b"dpop-nonce",
    # Which pages may read an answer is judged here (sidecar/core/origin.py).
    b"access-control-allow-origin",
    b"access-control-allow-credentials",
    b"access-control-allow-methods",
    b"access-control-allow-headers",
    b"access-control-allow-private-network",
    b"access-control-expose-headers",
    b"access-control-max-age",
}
RESERVED_PREFIX: Final = b"sidegate-"  # headers of ours; from a caller they are forgeries
# By which proxies tell servers who the user is. From a caller they are forgeries, whoever the server believes.
IDENTITY: Final = frozenset(
    {
        b"remote-user",
        b"x-remote-user",
        b"x-remote-group",
        b"x-user",
        b"x-user-id",
        b"x-user-email",
        b"x-email",
        b"x-userinfo",
        b"x-id-token",
        b"x-access-token",
        b"x-username",
        b"x-apigateway-api-userinfo",
        b"x-endpoint-api-userinfo",
        b"x-jwt-payload",
        b"x-jwt-assertion",
    }
)
OURS: Final = frozenset({b"sidegate-agent-session", b"sidegate-workload-token"})  # that a caller may send
IDENTITY_PREFIXES: Final = (
    RESERVED_PREFIX,
    b"x-forwarded-user",
    b"x-forwarded-email",
    b"x-forwarded-groups",
    b"x-forwarded-preferred-username",
    b"x-forwarded-access-token",
    b"x-forwarded-id-token",
    b"x-auth-",  # request-user and its kin of oauth2-proxy and nginx
    b"x-authenticated-",
    b"x-authentik-",
    b"x-remote-",
    b"remote-",  # Authelia's
    b"oidc-",  # mod_auth_openidc's
    b"x-jwt-",
    b"x-user-",
    b"x-consumer-",  # Kong's
    b"x-credential-",
    b"x-forwarded-roles",
    b"x-forwarded-tls-client-cert",
    b"x-webauth-",
    b"x-goog-authenticated-",
    b"x-goog-iap-",
    b"x-ms-client-principal",
    b"x-ms-token-",
    b"x-amzn-oidc-",
    b"x-pomerium-",
    b"x-vouch-",
    b"x-spiffe-",
    b"x-ssl-client-",
    b"x-client-cert",
    b"ssl-client-",
    b"client-cert",  # and -chain: RFC 9440
    b"cf-access-",
    b"tailscale-user-",
    b"impersonate-",
)
MAX_CACHED_BYTES: Final = 1024  # of all names of a request; what is sorted out for longer ones is not kept
_NOT_FORWARDED: Final = HOP_BY_HOP | CONSUMED | IDENTITY


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """One request on one connection."""

    peer: Peer | None  # the verified workload at the other end; None without mTLS
    client: str  # address and port, for the record
    method: str
    path: str  # without query
    query: str
    headers: Headers
    body: bytes
    values: dict[bytes, bytes] = field(init=False, repr=False, compare=False)  # the last one of each name

    def __post_init__(self) -> None:
        """Look the headers through once: a request's are asked for ten times."""
        object.__setattr__(self, "values", dict(self.headers))

    @property
    def target(self) -> str:
        """Return path and query."""
        return f"{self.path}?{self.query}" if self.query else self.path

    def header(self, name: bytes) -> str | None:
        """Return the value of *name* (lower case); None when absent; raises Refusal(MALFORMED) when given twice.

        A second value is refused wherever we read one: servers differ in which of the two they take.
        """
        value = self.values.get(name)
        if value is None:
            return None
        if len(self.values) < len(self.headers) and sum(key == name for key, _ in self.headers) > 1:
            raise Refusal(Reason.MALFORMED, f"the header {name.decode('ascii')} is given more than once")
        return value.decode("latin-1")


def forwarded_headers(headers: Headers, *, in_session: bool = True) -> list[tuple[bytes, bytes]]:
    """Return those of *headers* that the upstream may see, in order and byte for byte.

    A name with an underscore is dropped, as nginx does: CGI-like servers read it as its sister with a dash, which was
    judged or dropped here. What MCP defines is never hop-by-hop: the server must see what was judged. The id of a
    session travels *in_session* only: stateless messages have none, but a server that does not know them would use it.
    """
    found = _sorted_out(headers)
    nominated = {name for name in nominated_in(headers) if not name.startswith(b"mcp-")} if found.nominates else set()
    if not in_session:
        nominated.add(b"mcp-session-id")
    left = compress(headers, found.travels)
    return [pair for pair in left if pair[0] not in nominated] if nominated else list(left)


def forged_headers(headers: Headers) -> tuple[str, ...]:
    """Return the names of those of *headers* that say who the user is, for the record: the server never sees them."""
    return _sorted_out(headers).forged


@dataclass(frozen=True, slots=True)
class _Sorted:
    """Which of some header fields travel on, one by one, and the names of those that claim an identity."""

    travels: tuple[bool, ...]
    forged: tuple[str, ...]
    nominates: bool  # a Connection field is among them, which makes others hop-by-hop


def _sorted_out(headers: Headers) -> _Sorted:
    names = b"\n".join([name for name, _ in headers])  # no name holds the separator
    return _sort(names) if len(names) <= MAX_CACHED_BYTES else _sort.__wrapped__(names)


@lru_cache(maxsize=512)  # a client sends the same names again and again
def _sort(names: bytes) -> _Sorted:
    each = names.split(b"\n")
    return _Sorted(
        tuple(
            name not in _NOT_FORWARDED and b"_" not in name and not name.startswith(IDENTITY_PREFIXES) for name in each
        ),
        tuple(name.decode("latin-1") for name in each if _is_forged(name)),
        b"connection" in each,
    )


def _is_forged(name: bytes) -> bool:
    return (name in IDENTITY or name.startswith(IDENTITY_PREFIXES)) and name not in OURS


def returned_headers(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Return those of the upstream's *headers* that the caller may see."""
    nominated = nominated_in(headers) - HOP_BY_HOP  # mostly keep-alive, which is one of them
    dropped = _NOT_RETURNED | nominated if nominated else _NOT_RETURNED
    return [(name, value) for name, value in headers if name not in dropped]


def nominated_in(headers: Headers) -> set[bytes]:
    """Return the names that a Connection field makes hop-by-hop."""
    return {option.strip().lower() for name, value in headers if name == b"connection" for option in value.split(b",")}

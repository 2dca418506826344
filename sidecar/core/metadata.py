"""Tells callers where to get a token: the protected-resource metadata and the challenges that point to it.

Everything comes from the profile, nothing from the request: a Host that nobody checked must not name the server. The MCP
server's own metadata and challenges may name another URL, and never pass; what it says of a token that it got itself is
said again in a challenge of ours. RFC 9728; RFC 6750, 3; RFC 9449, 7.1; MCP authorization.
"""

import re
from typing import Any, Final
from urllib.parse import urlsplit

import orjson

from sidecar.core.connection import Connection, Headers
from sidecar.core.dpop import ALGORITHMS
from sidecar.core.profile import Identity, Profile
from sidecar.core.replies import Response

WELL_KNOWN: Final = "/.well-known/oauth-protected-resource"
# Public by nature, asked for by browsers without credentials; the SDKs send MCP-Protocol-Version with it.
CORS: Final = (
    (b"access-control-allow-origin", b"*"),
    (b"access-control-allow-methods", b"GET, OPTIONS"),
    (b"access-control-allow-headers", b"authorization, content-type, mcp-protocol-version"),
    (b"access-control-max-age", b"86400"),
)


_SCHEME: Final = re.compile(r"(.*,)?\s*(bearer|dpop)\b", re.IGNORECASE | re.ASCII)
_NAMED: Final = re.compile(r'[\s,](error|scope)="([\x20\x21\x23-\x5b\x5d-\x7e]*)"', re.IGNORECASE | re.ASCII)
_ERRORS: Final = frozenset({"invalid_request", "invalid_token", "insufficient_scope"})


def location(resource: str) -> str:
    """Return the URL of the metadata of *resource* (RFC 9728, 3.1: the path is inserted, not appended)."""
    parts = urlsplit(resource)
    return f"{parts.scheme}://{parts.netloc}{WELL_KNOWN}{parts.path.rstrip('/')}"


def serves(profile: Profile, path: str) -> bool:
    """Say whether the metadata is asked for at *path*.

    At the root too, where some clients look only; and below the path inside the pod, where an ingress rewrites paths.
    """
    resource = profile.identity.resource
    if resource is None or not path.startswith(WELL_KNOWN):
        return False
    rest = path[len(WELL_KNOWN) :].rstrip("/")
    return rest in ("", urlsplit(resource).path.rstrip("/"), *profile.server.paths)


def answer(connection: Connection, profile: Profile) -> Response | None:
    """Return the response to a request for the metadata; None for any other request.

    It needs no identity: it says how to get one. Host is not judged, because nothing here depends on it.
    """
    if not serves(profile, connection.path):
        return None
    if connection.method == "OPTIONS":
        return Response(status=204, headers=CORS, body=b"")
    if connection.method != "GET":
        return None
    return Response(status=200, headers=((b"content-type", b"application/json"), *CORS), body=document(profile))


def document(profile: Profile) -> bytes:
    """Return the metadata as JSON; the profile must name its resource."""
    identity = profile.identity
    members: dict[str, Any] = {
        "resource": identity.resource,
        "authorization_servers": [each.issuer for each in identity.providers],
        "bearer_methods_supported": ["header"],
        "resource_name": profile.server.name,
    }
    scopes = dict.fromkeys((*identity.scopes, *(scope for rule in identity.step_up for scope in rule.scopes)))
    if scopes:
        members["scopes_supported"] = list(scopes)
    if identity.dpop == "required":
        members["dpop_bound_access_tokens_required"] = True
    members["dpop_signing_alg_values_supported"] = ALGORITHMS
    members["tls_client_certificate_bound_access_tokens"] = True
    return orjson.dumps(members)


def challenge(
    identity: Identity, *, error: str | None = None, public: str = "", scopes: tuple[str, ...] = (), dpop: bool = False
) -> tuple[tuple[bytes, bytes], ...]:
    """Return the WWW-Authenticate fields of a refusal.

    Without *error*, no token was shown (RFC 6750, 3.1). *scopes* are all that the call needs; *dpop*: DPoP was tried.
    """
    parameters: dict[str, str] = {}
    if identity.resource is not None:
        parameters["resource_metadata"] = location(identity.resource)
    wanted = scopes or identity.scopes
    if wanted:
        parameters["scope"] = " ".join(wanted)
    if error is not None:
        parameters["error"] = error
        parameters["error_description"] = public
    # Bearer first, because the SDKs look for the metadata there.
    found = [_challenge("Bearer", parameters if not dpop else {**parameters, "error": None, "error_description": None})]
    if dpop or identity.dpop == "required":
        found.append(_challenge("DPoP", {**parameters, "algs": " ".join(ALGORITHMS)}))
    return tuple((b"www-authenticate", each) for each in found)


def relayed(identity: Identity, headers: Headers) -> Headers:
    """Return our challenge for one among *headers* of the server's 401 or 403; nothing where it gets no user's token.

    Of the server's own pass an error of RFC 6750 and the scopes that it wants: a client can ask its provider for those.
    """
    if identity.upstream != "token":
        return ()
    told = ", ".join(value.decode("latin-1") for name, value in headers if name == b"www-authenticate")
    if not _SCHEME.match(told):
        return ()
    named = {name.lower(): value for name, value in _NAMED.findall(told)}
    error = named.get("error")
    scopes = tuple(named.get("scope", "").split())
    return challenge(
        identity, error=error if error in _ERRORS else None, public="the server wants another token", scopes=scopes
    )


def _challenge(scheme: str, parameters: dict[str, Any]) -> bytes:
    told = ", ".join(f'{name}="{_quoted(value)}"' for name, value in parameters.items() if value is not None)
    return f"{scheme} {told}".strip().encode("latin-1", errors="replace")


def _quoted(text: str) -> str:
    """Return *text* as RFC 6750 lets it stand between quotes."""
    return text.replace("\\", "").replace('"', "'")

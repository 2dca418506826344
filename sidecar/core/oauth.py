"""Writes what is asked of a provider's token and introspection endpoints, and reads their answers.

Refuses answers that are no JSON object, tokens that are no Bearer tokens and text that would not fit into a header. Errors say
the provider's error code and nothing else that it wrote: descriptions quote tokens. RFC 6749; RFC 7523 (client assertions);
RFC 7662 (introspection); RFC 8693 (token exchange); Entra ID's on-behalf-of flow.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote

import msgspec
from jwt.utils import base64url_encode

from sidecar.core.profile import JWT_BEARER, Client, Provider, TokenExchange

EXCHANGE_GRANT: Final = "urn:ietf:params:oauth:grant-type:token-exchange"
ASSERTION_GRANT: Final = "urn:ietf:params:oauth:grant-type:jwt-bearer"
ACCESS_TOKEN: Final = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105 - a type's name
JWT: Final = "urn:ietf:params:oauth:token-type:jwt"
ASSERTION_LIFE_S: Final = 60  # of a client assertion that we sign: one request
DEFAULT_LIFE_S: Final = 60.0  # of an issued token that does not say; RFC 6749 only recommends expires_in
MAX_LIFE_S: Final = 24 * 3600.0
RESERVE_S: Final = 30.0  # before its end a token is not used any more: the server may take a while
MAX_TOKEN_CHARS: Final = 16 * 1024
_CODE: Final = re.compile(r"[!-~ ]{1,64}")
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/=-]+")  # RFC 6750, 2.1


class OAuthError(Exception):
    """A provider did not do what was asked; the message quotes no token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """A token for the server behind us, and until when (Unix time) it is used."""

    token: str = field(repr=False)
    until_s: float


def introspection(token: str) -> dict[str, str]:
    """Return the form that asks about an access token (RFC 7662, 2.1)."""
    return {"token": token, "token_type_hint": "access_token"}


def exchange(wanted: TokenExchange, token: str, actor: str | None) -> dict[str, str]:
    """Return the form that exchanges the user's *token*; *actor* is a JWT-SVID of this workload."""
    if wanted.grant == "on_behalf_of":
        form = {"grant_type": ASSERTION_GRANT, "assertion": token, "requested_token_use": "on_behalf_of"}
    else:
        form = {
            "grant_type": EXCHANGE_GRANT,
            "subject_token": token,
            "subject_token_type": ACCESS_TOKEN,
            "requested_token_type": ACCESS_TOKEN,
        }
        if actor is not None:
            form |= {"actor_token": actor, "actor_token_type": JWT}
    asked = {"resource": wanted.resource, "audience": wanted.audience, "scope": " ".join(wanted.scopes)}
    return form | {name: value for name, value in asked.items() if value}


def assertion_claims(client: Client, provider: Provider, now_s: float, jti: str) -> dict[str, Any]:
    """Return the claims of a client assertion that we sign ourselves (RFC 7523, 3)."""
    return {
        "iss": client.id,
        "sub": client.id,
        "aud": client.audience or provider.issuer,
        "jti": jti,
        "iat": int(now_s),
        "exp": int(now_s) + ASSERTION_LIFE_S,
    }


def with_assertion(client: Client, assertion: str) -> dict[str, str]:
    """Return the form fields that prove the client by *assertion*."""
    kind = client.assertion_type if client.method == "jwt_svid" else JWT_BEARER
    form = {"client_assertion_type": kind, "client_assertion": assertion}
    return {**form, "client_id": client.id} if client.id else form


def with_secret(client: Client, secret: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the form fields and the headers that prove the client by *secret* (RFC 6749, 2.3.1)."""
    if client.method == "client_secret_post":
        return {"client_id": client.id, "client_secret": secret}, {}
    pair = f"{quote(client.id, safe='')}:{quote(secret, safe='')}".encode()
    padded = base64url_encode(pair).decode().replace("-", "+").replace("_", "/")
    return {}, {"authorization": "Basic " + padded + "=" * (-len(padded) % 4)}


def read_claims(status: int, body: bytes) -> Mapping[str, Any]:
    """Return what an introspection endpoint says; raises OAuthError."""
    return _document(status, body)


def read_token(status: int, body: bytes, now_s: float) -> Issued:
    """Return the token in a token endpoint's answer; raises OAuthError."""
    document = _document(status, body)
    token, kind = document.get("access_token"), document.get("token_type")
    if not isinstance(token, str) or len(token) > MAX_TOKEN_CHARS or not _TOKEN.fullmatch(token):
        raise OAuthError("the answer holds no access token")
    # N_A (RFC 8693, 2.2.1) is no access token; one bound to a key of ours we have not.
    if not isinstance(kind, str) or kind.lower() != "bearer":
        raise OAuthError("the issued token is no Bearer token")
    life_s = document.get("expires_in", DEFAULT_LIFE_S)
    if isinstance(life_s, str) and life_s.isdecimal():  # Entra ID's older endpoints write text
        life_s = int(life_s)
    if isinstance(life_s, bool) or not isinstance(life_s, int | float) or not life_s > 0:
        raise OAuthError("expires_in is not a duration")
    life_s = min(float(life_s), MAX_LIFE_S)
    return Issued(token=token, until_s=now_s + life_s - min(RESERVE_S, life_s / 2))


def _document(status: int, body: bytes) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise OAuthError(f"HTTP {status}, and no JSON") from error
    if not isinstance(document, dict):
        raise OAuthError(f"HTTP {status}, and no JSON object")
    if status != 200:
        code = document.get("error")
        said = code if isinstance(code, str) and _CODE.fullmatch(code) else "no error code"
        raise OAuthError(f"HTTP {status}: {said}")
    return document

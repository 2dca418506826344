"""sidecar.core.oauth: what is asked of providers, and which of their answers are believed."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.oauth import (
    ASSERTION_GRANT,
    EXCHANGE_GRANT,
    OAuthError,
    assertion_claims,
    exchange,
    introspection,
    read_claims,
    read_token,
    with_assertion,
    with_secret,
)
from sidecar.core.profile import Client, Provider, TokenExchange
from tests.builders import NOW_S

PROVIDER = Provider(name="p", issuer="https://id.test", audiences=("a",))


def test_a_token_is_asked_about() -> None:
    """RFC 7662, 2.1."""
    assert introspection("t") == {"token": "t", "token_type_hint": "access_token"}


def test_a_token_is_exchanged() -> None:
    """RFC 8693, 2.1; what the profile leaves out is not asked for."""
    wanted = TokenExchange(provider="p", audience="api", scopes=("a", "b"), actor=True)
    form = exchange(wanted, "t", "svid")

    assert (form["grant_type"], form["subject_token"], form["actor_token"]) == (EXCHANGE_GRANT, "t", "svid")
    assert (form["audience"], form["scope"]) == ("api", "a b")
    assert "resource" not in form
    assert "actor_token" not in exchange(wanted, "t", None)


def test_entra_has_a_flow_of_its_own() -> None:
    """On behalf of: the token is the assertion."""
    form = exchange(TokenExchange(provider="p", grant="on_behalf_of", scopes=("api://x/.default",)), "t", None)

    assert form == {
        "grant_type": ASSERTION_GRANT,
        "assertion": "t",
        "requested_token_use": "on_behalf_of",
        "scope": "api://x/.default",
    }


def test_a_client_is_proven_by_an_assertion() -> None:
    """Its type is the profile's for an SVID, RFC 7523's for a key of ours; without client id none is sent."""
    spiffe = Client(assertion_type="urn:x:jwt-spiffe")
    own = Client(id="mcp", method="private_key_jwt", assertion_type="urn:x:jwt-spiffe")

    assert with_assertion(spiffe, "svid") == {"client_assertion_type": "urn:x:jwt-spiffe", "client_assertion": "svid"}
    assert with_assertion(own, "jwt")["client_assertion_type"].endswith(":jwt-bearer")
    assert with_assertion(own, "jwt")["client_id"] == "mcp"


def test_an_assertion_of_ours_is_short_lived_and_for_one_issuer() -> None:
    """RFC 7523, 3; the id is used once."""
    claims = assertion_claims(Client(id="mcp"), PROVIDER, NOW_S, "j")

    assert (claims["iss"], claims["sub"], claims["aud"], claims["jti"]) == ("mcp", "mcp", "https://id.test", "j")
    assert claims["exp"] - claims["iat"] == 60


def test_a_secret_travels_as_the_provider_wants_it() -> None:
    """RFC 6749, 2.3.1: both parts are form-encoded before they are joined."""
    form, headers = with_secret(Client(id="a:b", method="client_secret_basic"), "ü/?~")
    posted, none = with_secret(Client(id="a", method="client_secret_post"), "s")

    assert form == {}
    assert base64.b64decode(headers["authorization"].removeprefix("Basic ")) == b"a%3Ab:%C3%BC%2F%3F~"
    assert (posted, none) == ({"client_id": "a", "client_secret": "s"}, {})


GOOD = {"access_token": "abc.def", "token_type": "Bearer", "expires_in": 300}


@pytest.mark.parametrize(
    ("changes", "life_s"),
    [
        ({}, 270.0),
        ({"token_type": "bearer"}, 270.0),
        ({"expires_in": "300"}, 270.0),
        ({"expires_in": 20}, 10.0),
        ({"expires_in": 10**9}, 24 * 3600 - 30.0),
        ({"expires_in": None}, None),
    ],
    ids=str,
)
def test_an_issued_token_is_used_until_shortly_before_its_end(changes: dict[str, Any], life_s: float | None) -> None:
    """Half a short life, all but half a minute of a long one; at most a day."""
    body = json.dumps({**GOOD, **changes}).encode()
    if life_s is None:
        with pytest.raises(OAuthError, match="expires_in"):
            read_token(200, body, NOW_S)
        return
    issued = read_token(200, body, NOW_S)

    assert (issued.token, issued.until_s) == ("abc.def", NOW_S + life_s)
    assert "abc" not in repr(issued)


def test_a_token_without_end_is_used_for_half_a_minute() -> None:
    """RFC 6749 only recommends expires_in."""
    body = json.dumps({name: value for name, value in GOOD.items() if name != "expires_in"}).encode()

    assert read_token(200, body, NOW_S).until_s == NOW_S + 30


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (200, b"<html>", "no JSON"),
        (200, b"[]", "no JSON object"),
        (200, b"{}", "no access token"),
        (200, b'{"access_token":7,"token_type":"Bearer"}', "no access token"),
        (200, b'{"access_token":"a b","token_type":"Bearer"}', "no access token"),
        (200, b'{"access_token":"a\\r\\nx: y","token_type":"Bearer"}', "no access token"),
        (200, b'{"access_token":"abc","token_type":"N_A"}', "no Bearer token"),
        (200, b'{"access_token":"abc","token_type":"DPoP"}', "no Bearer token"),
        (200, b'{"access_token":"abc"}', "no Bearer token"),
        (200, b'{"access_token":"abc","token_type":"Bearer","expires_in":-1}', "expires_in"),
        (200, b'{"access_token":"abc","token_type":"Bearer","expires_in":true}', "expires_in"),
        (400, b'{"error":"invalid_grant","error_description":"token eyJ..."}', "HTTP 400: invalid_grant$"),
        (400, b'{"error":"eyJ\\n"}', "no error code"),
        (400, b'{"error":7}', "no error code"),
        (503, b"busy", "HTTP 503"),
        (302, b"{}", "HTTP 302"),
    ],
)
def test_other_answers_are_refused(status: int, body: bytes, why: str) -> None:
    """Nothing that the provider wrote beyond its error code is told: descriptions quote tokens."""
    with pytest.raises(OAuthError, match=why):
        read_token(status, body, NOW_S)


@given(st.integers(100, 599), st.binary(max_size=80))
def test_any_answer_is_read_or_refused(status: int, body: bytes) -> None:
    """And nothing else happens."""
    for read in (lambda: read_token(status, body, NOW_S), lambda: read_claims(status, body)):
        try:
            read()
        except OAuthError:
            continue

"""sidecar.core.metadata: clients find the provider by what the profile says, and never by what a request says."""

import json

import msgspec
import pytest

from sidecar.core.metadata import WELL_KNOWN, answer, challenge, location, relayed
from sidecar.core.profile import Identity, Profile, Provider, StepUp
from tests.builders import a_connection, a_server

PROVIDERS = (
    Provider(name="a", issuer="https://id.test/realms/a", audiences=("x",)),
    Provider(name="b", issuer="https://other.test", audiences=("x",)),
)
IDENTITY = Identity(
    resource="https://mcp.test/team/mcp",
    providers=PROVIDERS,
    scopes=("mcp:use",),
    step_up=(StepUp(scopes=("mcp:write", "mcp:use"), tools=("execute",)),),
)
PROFILE = Profile(server=a_server(paths=("/mcp",)), identity=IDENTITY)


@pytest.mark.parametrize(
    ("resource", "expected"),
    [
        ("https://mcp.test/mcp", "https://mcp.test/.well-known/oauth-protected-resource/mcp"),
        ("https://mcp.test:8443/a/b", "https://mcp.test:8443/.well-known/oauth-protected-resource/a/b"),
        ("https://mcp.test", "https://mcp.test/.well-known/oauth-protected-resource"),
        ("https://mcp.test/", "https://mcp.test/.well-known/oauth-protected-resource"),
    ],
)
def test_the_path_is_inserted(resource: str, expected: str) -> None:
    """RFC 9728, 3.1: the well-known part comes before the resource's own path."""
    assert expected == location(resource)


PASSING = msgspec.structs.replace(IDENTITY, upstream="token")
OURS = 'Bearer resource_metadata="https://mcp.test/.well-known/oauth-protected-resource/team/mcp"'
SAID = 'error_description="the server wants another token"'


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            'Bearer error="insufficient_scope", scope="files:write files:read", resource_metadata="https://evil.test/x"',
            f'{OURS}, scope="files:write files:read", error="insufficient_scope", {SAID}',
        ),
        ('bearer realm="x",error="invalid_token"', f'{OURS}, scope="mcp:use", error="invalid_token", {SAID}'),
        ('Basic realm="x", Bearer', f'{OURS}, scope="mcp:use"'),
        ('DPoP algs="ES256", error="anything else"', f'{OURS}, scope="mcp:use"'),
        ('Basic realm="x"', None),
        ("", None),
    ],
)
def test_what_the_server_wants_of_a_token_that_it_got_is_said_again(theirs: str, ours: str | None) -> None:
    """By our own challenge, which leads to the providers that are trusted here, whatever the server's says."""
    headers = [(b"x", b"1"), (b"www-authenticate", theirs.encode())]
    made = relayed(PASSING, headers)

    assert made == (() if ours is None else ((b"www-authenticate", ours.encode()),))
    assert relayed(IDENTITY, headers) == ()
    assert relayed(PASSING, headers[:1]) == ()


@pytest.mark.parametrize(
    "path", [WELL_KNOWN, WELL_KNOWN + "/", WELL_KNOWN + "/team/mcp", WELL_KNOWN + "/team/mcp/", WELL_KNOWN + "/mcp"]
)
def test_the_document_is_served_where_clients_look(path: str) -> None:
    """At the path of the URL, at the root (some look only there), and below the pod's own path (an ingress rewrites)."""
    response = answer(a_connection(method="GET", path=path), PROFILE)

    assert response is not None
    assert response.status == 200
    assert (b"access-control-allow-origin", b"*") in response.headers
    assert json.loads(response.body) == {
        "resource": "https://mcp.test/team/mcp",
        "authorization_servers": ["https://id.test/realms/a", "https://other.test"],
        "bearer_methods_supported": ["header"],
        "resource_name": "billing",
        "scopes_supported": ["mcp:use", "mcp:write"],
        "dpop_signing_alg_values_supported": ["ES256", "ES384", "ES512", "PS256", "RS256", "EdDSA"],
        "tls_client_certificate_bound_access_tokens": True,
    }


def test_nothing_of_the_request_gets_into_it() -> None:
    """A forged Host must not name the server."""
    forged = a_connection(method="GET", path=WELL_KNOWN, headers=[(b"x-forwarded-host", b"evil.test")])
    plain = a_connection(method="GET", path=WELL_KNOWN)

    assert answer(forged, PROFILE) == answer(plain, PROFILE)


def test_a_browser_may_ask_first() -> None:
    """The preflight of a page that sends MCP-Protocol-Version."""
    response = answer(a_connection(method="OPTIONS", path=WELL_KNOWN), PROFILE)

    assert response is not None
    assert (response.status, response.body) == (204, b"")
    assert b"mcp-protocol-version" in dict(response.headers)[b"access-control-allow-headers"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", WELL_KNOWN),
        ("GET", "/mcp"),
        ("GET", WELL_KNOWN + "/other"),
        ("GET", WELL_KNOWN + "x"),
        ("GET", "/.well-known/oauth-authorization-server"),
    ],
)
def test_everything_else_takes_the_usual_way(method: str, path: str) -> None:
    """Which refuses it."""
    assert answer(a_connection(method=method, path=path), PROFILE) is None


def test_without_a_resource_there_is_no_metadata() -> None:
    """It could name no URL that clients know."""
    profile = Profile(server=a_server(), identity=Identity(providers=PROVIDERS))

    assert answer(a_connection(method="GET", path=WELL_KNOWN), profile) is None


def test_a_demand_for_bound_tokens_is_announced() -> None:
    """So that a client makes a key before it asks for a token."""
    profile = Profile(server=a_server(), identity=Identity(resource="https://mcp.test/mcp", dpop="required"))
    response = answer(a_connection(method="GET", path=WELL_KNOWN), profile)

    assert response is not None
    assert json.loads(response.body)["dpop_bound_access_tokens_required"] is True


METADATA = 'resource_metadata="https://mcp.test/.well-known/oauth-protected-resource/team/mcp"'


def test_a_call_without_a_token_learns_where_to_get_one() -> None:
    """And no error: RFC 6750, 3.1, wants none where nothing was shown."""
    assert challenge(IDENTITY) == ((b"www-authenticate", f'Bearer {METADATA}, scope="mcp:use"'.encode()),)


def test_a_bad_token_is_said_to_be_one() -> None:
    """In words that may stand between quotes."""
    (field,) = challenge(IDENTITY, error="invalid_token", public='not "good"')

    assert field[1].decode() == (
        f'Bearer {METADATA}, scope="mcp:use", error="invalid_token", error_description="not \'good\'"'
    )


def test_who_tried_dpop_is_answered_so() -> None:
    """Bearer comes first all the same: the SDKs look for the metadata there."""
    bearer, dpop = challenge(IDENTITY, error="invalid_token", public="x", dpop=True)

    assert bearer[1].decode() == f'Bearer {METADATA}, scope="mcp:use"'
    assert dpop[1].startswith(b"DPoP ")
    assert b'error="invalid_token"' in dpop[1]
    assert b'algs="ES256 ' in dpop[1]


def test_without_a_resource_the_challenge_is_bare() -> None:
    """A Bearer token is wanted; where from, the operator tells the client."""
    assert challenge(Identity()) == ((b"www-authenticate", b"Bearer"),)

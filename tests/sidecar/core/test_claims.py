"""sidecar.core.claims: what each provider writes about its users ends in the same fields."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.claims import Delegated, User, check_kind, described
from sidecar.core.profile import ClaimPaths, Provider
from sidecar.errors import Reason, Refusal
from tests.builders import NOW_S


def a_provider(paths: ClaimPaths | None = None, **changes: Any) -> Provider:
    """A provider with these claim paths."""
    return Provider(
        **{"name": "p", "issuer": "https://id.test", "audiences": ("a",), "claims": paths or ClaimPaths(), **changes}
    )


def read(claims: Mapping[str, Any], paths: ClaimPaths | None = None) -> User:
    """The user of *claims*."""
    return described({"sub": "u1", **claims}, a_provider(paths), NOW_S)


def refused(claims: Mapping[str, Any], paths: ClaimPaths | None = None) -> str:
    """Why *claims* are refused."""
    with pytest.raises(Refusal) as caught:
        read(claims, paths)
    assert caught.value.reason is Reason.UNAUTHENTICATED
    return caught.value.detail


# Shapes of the vendors' documentation; values made up.
OKTA = {
    "sub": "alice@corp.example",
    "uid": "00u1",
    "cid": "0oa1",
    "scp": ["mcp", "db:read"],
    "groups": ["Everyone", "data"],
}
ENTRA = {
    "sub": "pairwise",
    "oid": "0000-oid",
    "preferred_username": "alice@corp.example",
    "scp": "mcp db.read",
    "roles": ["Analyst"],
    "groups": ["11111111-1111-1111-1111-111111111111"],
}
KEYCLOAK = {
    "sub": "f:1:alice",
    "typ": "Bearer",
    "email": "alice@corp.example",
    "scope": "openid mcp",
    "realm_access": {"roles": ["offline_access", "analyst"]},
    "resource_access": {"mcp.payments": {"roles": ["writer"]}, "account": {"roles": ["view-profile"]}},
    "groups": ["/data"],
}
GOOGLE = {"sub": "1154", "email": "alice@corp.example", "email_verified": True, "hd": "corp.example"}
AUTH0 = {
    "sub": "auth0|1",
    "https://corp.example/roles": ["analyst"],
    "https://corp.example/app": {"groups": ["g"]},
    "scope": "mcp",
}


@pytest.mark.parametrize(
    ("claims", "paths", "expected"),
    [
        (
            OKTA,
            ClaimPaths(id="uid", email="sub"),
            ("00u1", "alice@corp.example", (), ("Everyone", "data"), {"mcp", "db:read"}),
        ),
        (
            ENTRA,
            ClaimPaths(id="oid", email="email preferred_username upn"),
            (
                "0000-oid",
                "alice@corp.example",
                ("Analyst",),
                ("11111111-1111-1111-1111-111111111111",),
                {"mcp", "db.read"},
            ),
        ),
        (
            KEYCLOAK,
            ClaimPaths(roles="realm_access.roles resource_access.mcp.payments.roles"),
            ("f:1:alice", "alice@corp.example", ("offline_access", "analyst", "writer"), ("/data",), {"openid", "mcp"}),
        ),
        (GOOGLE, ClaimPaths(groups="hd"), ("1154", "alice@corp.example", (), ("corp.example",), set())),
        (
            AUTH0,
            ClaimPaths(roles="https://corp.example/roles", groups="https://corp.example/app.groups"),
            ("auth0|1", None, ("analyst",), ("g",), {"mcp"}),
        ),
    ],
    ids=["okta", "entra", "keycloak", "google", "auth0"],
)
def test_the_claims_of_each_provider_find_their_fields(claims: Any, paths: ClaimPaths, expected: Any) -> None:
    """By names with dots and URLs, nested objects, lists and text."""
    user = read(claims, paths)

    assert expected == (user.id, user.email, user.roles, user.groups, set(user.scopes))


def test_the_longest_name_counts() -> None:
    """A client called `a.b` is not the member b of a client called a."""
    claims = {"x": {"a": {"b": {"roles": ["inner"]}}, "a.b": {"roles": ["outer"]}}}

    assert read(claims, ClaimPaths(roles="x.a.b.roles")).roles == ("outer",)


def test_two_paths_of_an_id_name_nobody() -> None:
    """One user's mail must not be another's subject."""
    assert "names nobody" in refused({}, ClaimPaths(id="sub email"))


@pytest.mark.parametrize("subject", [None, "", 7, ["u1"], {"sub": "u1"}])
def test_a_subject_that_is_no_name_is_refused(subject: Any) -> None:
    """Nobody is called that."""
    assert refused({"sub": subject}) == "the claim sub names nobody"


@pytest.mark.parametrize(
    "claims",
    [{"_claim_names": {"groups": "src1"}, "_claim_sources": {"src1": {"endpoint": "https://x"}}}, {"hasgroups": True}],
)
def test_groups_that_did_not_fit_are_not_taken_for_none(claims: dict[str, Any]) -> None:
    """Entra ID leaves out more than 200; a rule that forbids by group would let the user through."""
    assert "overage" in refused(claims)


@given(st.recursive(st.none() | st.booleans() | st.text() | st.integers(), lambda each: st.lists(each) | st.dictionaries(st.sampled_from(["a", "b", "a.b"]), each)))  # fmt: skip # noqa: E501
def test_any_claims_are_read_or_refused(value: Any) -> None:
    """Of whatever types they are."""
    paths = ClaimPaths(id="sub", email="a.b", role="a", roles="a.b a", groups="b.a.b", scopes="a")
    try:
        user = described({"sub": "u1", "a": value, "act": value}, a_provider(paths), NOW_S)
    except Refusal:
        return
    assert all(isinstance(each, str) for each in (*user.roles, *user.groups, *user.scopes))


# delegation


def test_a_delegation_is_told_from_the_user_outward() -> None:
    """In the token the outermost actor is the latest (RFC 8693, 4.1)."""
    claims = {"act": {"sub": "tool-agent", "act": {"sub": "planner", "iss": "https://id.test"}}}

    assert read(claims).delegation == (
        Delegated(sub="u1", actor="planner"),
        Delegated(sub="planner", actor="tool-agent"),
    )


def test_without_actors_there_is_no_delegation() -> None:
    """The user calls."""
    assert read({}).delegation == ()


def loop(depth: int) -> dict[str, Any]:
    """A chain of that many actors."""
    return {"sub": "a", **({"act": loop(depth - 1)} if depth > 1 else {})}


@pytest.mark.parametrize("act", ["planner", [], 7, {}, {"sub": ""}, {"sub": 7}, {"sub": "a", "act": "b"}, loop(9)])
def test_a_delegation_that_cannot_be_read_is_refused(act: Any) -> None:
    """Somebody acts, and it is not known who."""
    assert "act" in refused({"act": act})


def test_a_long_delegation_passes_up_to_a_bound() -> None:
    """Eight are more than anybody has."""
    assert len(read({"act": loop(8)}).delegation) == 8


# kinds of tokens


@pytest.mark.parametrize(
    ("kind", "claims"),
    [
        ("at+jwt", {"nonce": "n", "at_hash": "x"}),
        ("application/at+jwt", {"typ": "ID"}),
        ("jwt", {}),
        ("jwt", {"typ": "Bearer", "nonce": "n"}),
        ("jwt", {"typ": "DPoP"}),
        ("jwt", {"token_use": "access"}),
        ("", {"auth_time": 1, "azp": "x"}),
    ],
)
def test_an_access_token_is_known(kind: str, claims: dict[str, Any]) -> None:
    """By the header's typ, or because nothing speaks against it."""
    check_kind(kind, claims, a_provider())


@pytest.mark.parametrize(
    "claims",
    [
        {"typ": "ID"},
        {"typ": "Refresh"},
        {"typ": "Offline"},
        {"typ": "Logout"},
        {"typ": 7},
        {"token_use": "id"},
        {"nonce": "n"},
        {"at_hash": "x"},
        {"c_hash": "x"},
        {"s_hash": "x"},
    ],
    ids=str,
)
def test_another_kind_of_token_is_refused(claims: dict[str, Any]) -> None:
    """An ID token tells a client who logged in; whoever got it may not call with it."""
    with pytest.raises(Refusal, match="ID token"):
        check_kind("jwt", claims, a_provider())


def test_id_tokens_pass_where_the_operator_wants_them() -> None:
    """Google issues no other JWTs; a refresh token is none all the same."""
    provider = a_provider(id_tokens=True)
    check_kind("jwt", {"nonce": "n", "at_hash": "x"}, provider)
    check_kind("jwt", {"typ": "ID"}, provider)

    with pytest.raises(Refusal):
        check_kind("jwt", {"typ": "Refresh"}, provider)

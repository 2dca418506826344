"""sidecar.core.identity: nobody is believed before their proof is."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from jwt.utils import base64url_encode

from certs.spiffe import SpiffeId
from sidecar.core import identity as module
from sidecar.core.connection import Connection
from sidecar.core.identity import Keys, Trust, UnknownKey, UnknownToken, authenticate, learn, trust
from sidecar.core.jwk import thumbprint
from sidecar.core.profile import ClaimPaths, Client, Identity, Provider
from sidecar.errors import Reason, Refusal
from tests.builders import AGENT, NOW_S, a_connection, a_peer, a_principal

ISSUER, OTHER = "https://id.test", "https://other.test"
AUDIENCE = "https://mcp.test"
PROVIDER = Provider(name="corporate", issuer=ISSUER, audiences=(AUDIENCE, "api://mcp"))
SECOND = Provider(name="second", issuer=OTHER, audiences=(AUDIENCE,))
CALLERS = ("spiffe://a.test/ns/agents/sa/*",)
RULES = Identity(mtls="permissive", user="required", callers=CALLERS, providers=(PROVIDER, SECOND))


@cache
def rsa_key(name: str) -> rsa.RSAPrivateKey:
    """A key of that name, the same every time; 2048 bits, the least that PyJWT takes without a warning."""
    del name
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@cache
def ec_key(name: str) -> ec.EllipticCurvePrivateKey:
    """A P-256 key of that name."""
    del name
    return ec.generate_private_key(ec.SECP256R1())


def public(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, algorithm: str | None) -> jwt.PyJWK:
    """The key as a provider publishes it."""
    kind = jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
    fields: dict[str, Any] = kind.to_jwk(key.public_key(), as_dict=True)  # type: ignore[attr-defined]
    return jwt.PyJWK(fields | ({"alg": algorithm} if algorithm else {}))


def keys() -> Keys:
    """What both providers publish."""
    return {
        ISSUER: {
            "r": public(rsa_key("r"), "RS256"),
            "e": public(ec_key("e"), "ES256"),
            "n": public(rsa_key("n"), None),
        },
        OTHER: {"o": public(rsa_key("o"), "RS256")},
    }


CLAIMS: Mapping[str, Any] = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": NOW_S + 300, "iat": NOW_S - 5}
ABSENT = object()


def a_token(
    claims: Mapping[str, Any] | None = None,
    *,
    header: Mapping[str, Any] | None = None,
    alg: str = "RS256",
    key: Any = None,
) -> str:
    """A good token but for what is given; ABSENT takes a claim away."""
    merged = {name: value for name, value in {**CLAIMS, **(claims or {})}.items() if value is not ABSENT}
    head = {"alg": alg, "typ": "at+jwt", "kid": "r", **(header or {})}
    head = {name: value for name, value in head.items() if value is not ABSENT}
    return raw_token(json.dumps(head).encode(), json.dumps(merged).encode(), alg=alg, key=key or rsa_key("r"))


def raw_token(head: bytes, payload: bytes, *, alg: str, key: Any) -> str:
    """A token of any header and payload, signed properly."""
    signed = base64url_encode(head) + b"." + base64url_encode(payload)
    signature = jwt.get_algorithm_by_name(alg).sign(signed, key)
    return (signed + b"." + base64url_encode(signature)).decode()


def presented(token: str, scheme: str = "Bearer") -> Connection:
    """A request with *token*."""
    return a_connection(headers=[(b"authorization", f"{scheme} {token}".encode())])


def believed(rules: Identity = RULES) -> Trust:
    """The trust of *rules*."""
    return trust(rules, keys())


def refused(connection: Connection, trusted: Trust, now_s: float = NOW_S) -> Refusal:
    """Return the refusal of *connection*."""
    with pytest.raises(Refusal) as caught:
        authenticate(connection, trusted, now_s)
    return caught.value


def cut(token: str) -> str:
    """The token without its signature."""
    return token.rpartition(".")[0] + "."


def public_pem() -> bytes:
    """The provider's public key as a MAC's secret: the classic confusion."""
    return rsa_key("r").public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def hmac_token() -> str:
    """A token signed with the public key as HMAC secret."""
    head = {"alg": "HS256", "typ": "at+jwt", "kid": "r"}
    signed = base64url_encode(json.dumps(head).encode()) + b"." + base64url_encode(json.dumps(dict(CLAIMS)).encode())
    algorithm = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    return (signed + b"." + base64url_encode(algorithm.sign(signed, public_pem()))).decode()


def retyped(token: str, **fields: Any) -> str:
    """The token with another header and its old signature."""
    head, payload, signature = token.split(".")
    del head
    new = json.dumps({"alg": "RS256", "typ": "at+jwt", "kid": "r"} | fields).encode()
    return f"{base64url_encode(new).decode()}.{payload}.{signature}"


@pytest.mark.parametrize(
    ("token", "user"),
    [
        pytest.param(a_token, "alice", id="RS256"),
        pytest.param(lambda: a_token(header={"kid": "e"}, alg="ES256", key=ec_key("e")), "alice", id="ES256"),
        pytest.param(lambda: a_token(header={"kid": "n"}, key=rsa_key("n")), "alice", id="key without alg"),
        pytest.param(lambda: a_token(header={"typ": "JWT"}), "alice", id="typ JWT"),
        pytest.param(lambda: a_token(header={"typ": "application/at+jwt"}), "alice", id="typ in full"),
        pytest.param(lambda: a_token(header={"typ": ABSENT}), "alice", id="no typ"),
        pytest.param(lambda: a_token({"aud": ["x", "api://mcp"]}), "alice", id="one audience of several"),
        pytest.param(lambda: a_token({"iat": ABSENT}), "alice", id="no iat"),
        pytest.param(lambda: a_token({"exp": NOW_S - 29}), "alice", id="expired within leeway"),
        pytest.param(lambda: a_token({"nbf": NOW_S + 29}), "alice", id="nbf within leeway"),
        pytest.param(lambda: a_token({"exp": int(NOW_S) + 24 * 3600}), "alice", id="a whole day"),
        pytest.param(
            lambda: a_token({"iss": OTHER}, header={"kid": "o"}, key=rsa_key("o")), "alice", id="second provider"
        ),
    ],
)
def test_a_good_token_names_its_user(token: Any, user: str) -> None:
    """Every form of token that providers in the field issue."""
    principal = authenticate(presented(token()), believed(), NOW_S)

    assert principal.user is not None
    assert user == principal.user.id


@pytest.mark.parametrize(
    ("token", "detail"),
    [
        pytest.param(lambda: retyped(a_token(), alg="none"), "algorithm not allowed", id="alg none, signature kept"),
        pytest.param(lambda: cut(retyped(a_token(), alg="none")), "algorithm not allowed", id="alg none, no signature"),
        pytest.param(lambda: cut(retyped(a_token(), alg="nOnE")), "algorithm not allowed", id="alg nOnE"),
        pytest.param(hmac_token, "algorithm not allowed", id="HS256 with the public key"),
        pytest.param(lambda: a_token(alg="RS512"), "algorithm not allowed", id="algorithm not configured"),
        pytest.param(lambda: a_token(header={"kid": "e"}), "another algorithm", id="RS256 with an EC key's id"),
        pytest.param(lambda: a_token(alg="PS256"), "another algorithm", id="PS256 with an RS256 key"),
        pytest.param(lambda: retyped(a_token(), alg=["RS256"]), "", id="alg is a list"),
        pytest.param(lambda: retyped(a_token(), alg=7), "", id="alg is a number"),
        pytest.param(lambda: retyped(a_token(), kid=7), "", id="kid is a number"),
        pytest.param(lambda: a_token(header={"crit": ["x"], "x": 1}), "", id="critical extension"),
        pytest.param(lambda: a_token(header={"typ": "JWE"}), "typ", id="typ JWE"),
        pytest.param(lambda: a_token(header={"typ": "logout+jwt"}), "typ", id="typ of a logout token"),
        pytest.param(lambda: a_token(header={"typ": 7}), "typ", id="typ is a number"),
        pytest.param(lambda: a_token({"iss": "https://evil.test"}), "unknown issuer", id="unknown issuer"),
        pytest.param(lambda: a_token({"iss": ISSUER + "/"}), "unknown issuer", id="issuer with a slash more"),
        pytest.param(lambda: a_token({"iss": ISSUER.upper()}), "unknown issuer", id="issuer in capitals"),
        pytest.param(lambda: a_token({"iss": [ISSUER]}), "unknown issuer", id="issuer is a list"),
        pytest.param(lambda: a_token({"iss": ABSENT}), "unknown issuer", id="no issuer"),
        pytest.param(lambda: a_token({"aud": "https://other.test"}), "udience", id="another audience"),
        pytest.param(lambda: a_token({"aud": ["a", "b"]}), "udience", id="other audiences"),
        pytest.param(lambda: a_token({"aud": AUDIENCE + "/x"}), "udience", id="longer audience"),
        pytest.param(lambda: a_token({"aud": []}), "", id="no audience in the list"),
        pytest.param(lambda: a_token({"aud": {"x": AUDIENCE}}), "", id="audience is an object"),
        pytest.param(lambda: a_token({"aud": [AUDIENCE, 7]}), "", id="audience holds a number"),
        pytest.param(lambda: a_token({"aud": ABSENT}), "aud", id="no audience"),
        pytest.param(lambda: a_token({"exp": ABSENT}), "exp", id="no expiry"),
        pytest.param(lambda: a_token({"exp": str(int(NOW_S) + 300)}), "exp is not a time", id="expiry is text"),
        pytest.param(lambda: a_token({"exp": True}), "exp is not a time", id="expiry is true"),
        pytest.param(lambda: a_token({"exp": float("nan")}), "exp is not a time", id="expiry is NaN"),
        pytest.param(lambda: a_token({"exp": float("inf")}), "exp is not a time", id="expiry is infinite"),
        pytest.param(lambda: a_token({"exp": 10**400}), "exp is not a time", id="expiry has 400 digits"),
        pytest.param(lambda: a_token({"exp": NOW_S - 30}), "expired", id="expired beyond leeway"),
        pytest.param(lambda: a_token({"exp": 0}), "expired", id="expiry 0"),
        pytest.param(lambda: a_token({"exp": NOW_S + 25 * 3600}), "longer than a day", id="valid for too long"),
        pytest.param(lambda: a_token({"nbf": NOW_S + 31}), "not valid yet", id="not valid yet"),
        pytest.param(lambda: a_token({"nbf": "0"}), "nbf is not a time", id="nbf is text"),
        pytest.param(lambda: a_token({"iat": NOW_S + 31}), "not valid yet", id="issued in the future"),
        pytest.param(lambda: a_token({"iat": None}), "iat is not a time", id="iat null"),
        pytest.param(lambda: a_token({"sub": ABSENT}), "names nobody", id="no subject"),
        pytest.param(lambda: a_token({"sub": ""}), "names nobody", id="empty subject"),
        pytest.param(lambda: a_token({"sub": 7}), "", id="subject is a number"),
        pytest.param(lambda: cut(a_token()), "", id="signature cut"),
        pytest.param(lambda: a_token()[:-4], "", id="signature shortened"),
        pytest.param(lambda: a_token(key=rsa_key("x")), "", id="signed by nobody"),
        pytest.param(lambda: a_token(key=rsa_key("o")), "", id="signed by another provider, our key's id"),
        pytest.param(
            lambda: a_token({"sub": "bob"}).rpartition(".")[0] + "." + a_token().rpartition(".")[2], "", id="grafted"
        ),
        pytest.param(lambda: "x", "not a JWT", id="no JWT"),
        pytest.param(lambda: "..", "not a JWT", id="dots"),
        pytest.param(lambda: a_token() + ".x", "not a JWT", id="a fourth part"),
        pytest.param(lambda: " " + a_token(), "not a JWT", id="two spaces"),
        pytest.param(
            lambda: raw_token(b'{"alg":"RS256","kid":"r"}', b"[" * 9000, alg="RS256", key=rsa_key("r")),
            "not a JWT",
            id="deep",
        ),
        pytest.param(
            lambda: raw_token(b'{"alg":"RS256","kid":"r"}', b"[]", alg="RS256", key=rsa_key("r")),
            "not a JWT",
            id="list",
        ),
        pytest.param(
            lambda: raw_token(b"[]", b"{}", alg="RS256", key=rsa_key("r")), "not a JWT", id="header is a list"
        ),
        pytest.param(
            lambda: raw_token(b"\xff", b"{}", alg="RS256", key=rsa_key("r")), "not a JWT", id="header is no text"
        ),
        pytest.param(lambda: "x" * (module.MAX_TOKEN_CHARS + 1), "holds no Bearer token", id="too long"),
        pytest.param(lambda: "", "holds no Bearer token", id="empty"),
    ],
)
def test_a_bad_token_is_refused(token: Any, detail: str) -> None:
    """Each for its own reason, which only the operator learns."""
    refusal = refused(presented(token()), believed())

    assert (refusal.reason, refusal.public) == (Reason.UNAUTHENTICATED, "the access token does not verify")
    assert detail in refusal.detail
    assert not isinstance(refusal, UnknownKey)


@pytest.mark.parametrize(
    "token",
    [
        pytest.param(lambda: a_token(header={"kid": "new"}), id="unknown key id"),
        pytest.param(lambda: a_token(header={"kid": ABSENT}), id="no key id"),
        pytest.param(lambda: a_token(header={"kid": "o"}, key=rsa_key("o")), id="key of another provider"),
    ],
)
def test_an_unknown_key_may_be_looked_for(token: Any) -> None:
    """The provider may have published it since; another provider's keys never count."""
    refusal = refused(presented(token()), believed())

    assert isinstance(refusal, UnknownKey)
    assert (refusal.reason, refusal.provider) == (Reason.UNAUTHENTICATED, PROVIDER)


def test_a_provider_without_keys_is_one_with_an_unknown_key() -> None:
    """Before the first fetch nothing is known."""
    assert isinstance(refused(presented(a_token()), trust(RULES, {})), UnknownKey)


@pytest.mark.parametrize("header", ["Basic YTpi", "Bearer", "Bearer ", "token", ""])
def test_another_scheme_is_no_token(header: str) -> None:
    """Only Bearer is."""
    connection = a_connection(headers=[(b"authorization", header.encode())])

    assert "holds no Bearer token" in refused(connection, believed()).detail


def test_two_tokens_are_refused() -> None:
    """Which of them counts would be a guess."""
    header = (b"authorization", f"Bearer {a_token()}".encode())

    assert refused(a_connection(headers=[header, header]), believed()).reason is Reason.MALFORMED


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=255), max_size=60))
def test_any_header_is_refused_or_believed(value: str) -> None:
    """No header makes a defect."""
    connection = a_connection(headers=[(b"authorization", value.encode("latin-1"))])

    assert refused(connection, trust(RULES, {})).reason is Reason.UNAUTHENTICATED


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_any_token_is_refused_or_believed(head: bytes, payload: bytes) -> None:
    """No header, no payload and no signature makes a defect."""
    token = b".".join(base64url_encode(part) for part in (head, payload, b"x")).decode()

    assert refused(presented(token), trust(RULES, {})).reason is Reason.UNAUTHENTICATED


# workloads


def test_a_workload_that_matches_a_pattern_may_call() -> None:
    """Without a user where none is required; the certificate's end is the principal's."""
    rules = Identity(user="optional", callers=CALLERS)
    principal = authenticate(a_connection(peer=a_peer()), trust(rules, {}), NOW_S)

    assert (principal.workload, principal.user, principal.expires_at_s) == (AGENT, None, NOW_S + 300)


@pytest.mark.parametrize("caller", ["spiffe://a.test/ns/other/sa/x", "spiffe://b.test/ns/agents/sa/planner"])
def test_another_workload_may_not(caller: str) -> None:
    """It is who it says, and that is not enough, even with a good token."""
    connection = replace(presented(a_token()), peer=a_peer(SpiffeId.parse(caller)))
    refusal = refused(connection, believed())

    assert (Reason.FORBIDDEN_CALLER, caller) == (refusal.reason, refusal.detail)


def test_without_patterns_no_workload_may_call() -> None:
    """Empty means nobody."""
    rules = Identity(user="optional")

    assert refused(a_connection(peer=a_peer()), trust(rules, {})).reason is Reason.FORBIDDEN_CALLER


def test_an_expired_certificate_on_an_open_connection_is_refused() -> None:
    """A keep-alive connection outlives the certificate that opened it."""
    rules = Identity(user="optional", callers=CALLERS)
    refusal = refused(a_connection(peer=a_peer(not_after_s=NOW_S)), trust(rules, {}))

    assert (refusal.reason, refusal.public) == (Reason.UNAUTHENTICATED, "the caller's SVID has expired")


def test_strict_mtls_demands_a_certificate() -> None:
    """A good token is not enough there."""
    rules = Identity(user="required", callers=CALLERS, providers=(PROVIDER,))

    assert refused(presented(a_token()), believed(rules)).detail == "no SVID"


def test_a_required_user_must_show_a_token() -> None:
    """A good certificate is not enough there."""
    assert refused(a_connection(peer=a_peer()), believed()).detail == "no Authorization header"


def test_nobody_in_particular_may_call_where_the_profile_says_so() -> None:
    """Their key is not that of any other principal."""
    rules = Identity(mtls="permissive", user="optional")
    principal = authenticate(a_connection(), trust(rules, {}), NOW_S)

    assert principal.key not in {a_principal().key, a_principal(None).key, a_principal(workload=None).key}


def test_the_principal_ends_with_the_first_of_its_proofs() -> None:
    """A token's leeway belongs to its life."""
    long, short = a_peer(not_after_s=NOW_S + 900), a_peer(not_after_s=NOW_S + 9)
    ends = [
        authenticate(replace(presented(a_token()), peer=peer), believed(), NOW_S).expires_at_s for peer in (long, short)
    ]

    assert ends == [NOW_S + 330, NOW_S + 9]


# claims


def test_claims_are_found_by_name_and_by_path() -> None:
    """Keycloak nests, Auth0 writes URLs."""
    paths = ClaimPaths(id="uid", email="https://x.test/mail", role="a.role", roles="realm.roles", groups="group")
    rules = Identity(
        mtls="permissive", providers=(Provider(name="p", issuer=ISSUER, audiences=(AUDIENCE,), claims=paths),)
    )
    claims = {
        "uid": "u1",
        "https://x.test/mail": "a@x.test",
        "a": {"role": "analyst"},
        "realm": {"roles": ["r1", 7, "r2"]},
        "group": "one",
    }
    user = authenticate(presented(a_token(claims)), believed(rules), NOW_S).user

    assert user is not None
    assert (user.id, user.email, user.role) == ("u1", "a@x.test", "analyst")
    assert (user.roles, user.groups) == (("r1", "r2"), ("one",))


def test_claims_of_another_kind_are_as_absent() -> None:
    """A role that is a number is no role; a path into text leads nowhere."""
    rules = Identity(
        mtls="permissive",
        providers=(Provider(name="p", issuer=ISSUER, audiences=(AUDIENCE,), claims=ClaimPaths(groups="sub.x")),),
    )
    user = authenticate(presented(a_token({"role": 7, "email": ["x"], "roles": None})), believed(rules), NOW_S).user

    assert user is not None
    assert (user.email, user.role, user.roles, user.groups) == (None, None, (), ())


# the cache


def test_a_verified_token_is_not_verified_again_for_a_while() -> None:
    """The same user comes back, without the provider's key."""
    trusted = believed()
    first = authenticate(presented(a_token()), trusted, NOW_S).user
    keyless = Trust(identity=trusted.identity, keys={}, callers=(), verified=trusted.verified)

    assert authenticate(presented(a_token()), keyless, NOW_S + module.MAX_CACHE_S - 1).user is first
    assert isinstance(refused(presented(a_token()), keyless, NOW_S + module.MAX_CACHE_S), UnknownKey)


def test_a_cached_token_expires_on_time() -> None:
    """The cache adds no second to its life."""
    trusted, token = believed(), a_token({"exp": NOW_S + 5})
    authenticate(presented(token), trusted, NOW_S)

    assert refused(presented(token), trusted, NOW_S + 35).detail == "expired"


def test_the_cache_holds_no_token() -> None:
    """Only hashes: a memory dump must not be a set of credentials."""
    trusted, token = believed(), a_token()
    authenticate(presented(token), trusted, NOW_S)

    assert token.rpartition(".")[2] not in repr(trusted.verified)


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token verified longest ago goes first."""
    monkeypatch.setattr(module, "MAX_CACHED_TOKENS", 2)
    trusted = believed()
    for user in ("a", "b", "c"):
        authenticate(presented(a_token({"sub": user})), trusted, NOW_S)

    assert [user.id for user, _ in trusted.verified.values()] == ["b", "c"]


# kinds, bindings, challenges

RESOURCE = "https://mcp.test/mcp"
METADATA = b'Bearer resource_metadata="https://mcp.test/.well-known/oauth-protected-resource/mcp"'


@pytest.mark.parametrize("claims", [{"typ": "ID"}, {"nonce": "n"}, {"token_use": "id"}, {"typ": "Refresh"}], ids=str)
def test_an_id_token_does_not_open_the_server(claims: dict[str, Any]) -> None:
    """Though its signature, issuer and audience are right."""
    refusal = refused(presented(a_token(claims, header={"typ": "JWT"})), believed())

    assert "ID token" in refusal.detail


def challenges(connection: Connection, rules: Identity) -> list[bytes]:
    """What the refusal of *connection* tells the client to do."""
    return [value for name, value in refused(connection, believed(rules)).headers if name == b"www-authenticate"]


def test_a_refusal_says_where_to_get_a_token() -> None:
    """Without error when none was shown."""
    rules = replace_identity(RULES, resource=RESOURCE)

    assert challenges(a_connection(), rules) == [METADATA]
    assert challenges(presented("x"), rules)[0].startswith(METADATA + b', error="invalid_token"')


def replace_identity(rules: Identity, **changes: Any) -> Identity:
    """The rules, changed."""
    return msgspec.structs.replace(rules, **changes)


def bound(claims: Mapping[str, Any], *headers: tuple[bytes, bytes], scheme: str = "Bearer") -> Connection:
    """A request with a token that has the confirmation *claims*."""
    token = a_token({"cnf": claims})
    return a_connection(headers=[(b"authorization", f"{scheme} {token}".encode()), *headers])


def a_proof_for(connection: Connection, **claims: Any) -> Connection:
    """The same request with a DPoP proof of the key `holder`."""
    token = connection.header(b"authorization") or ""
    fingerprint = hashlib.sha256(token.partition(" ")[2].encode()).digest()
    made = {"htm": "POST", "htu": RESOURCE, "iat": NOW_S, "jti": "j", "ath": base64url_encode(fingerprint).decode()}
    proof = jwt.encode(
        {**made, **claims}, ec_key("holder"), algorithm="ES256", headers={"typ": "dpop+jwt", "jwk": holder_jwk()}
    )
    return replace(connection, headers=[*connection.headers, (b"dpop", proof.encode())])


def holder_jwk() -> dict[str, Any]:
    """The public key that tokens are bound to."""
    return jwt.algorithms.ECAlgorithm.to_jwk(ec_key("holder").public_key(), as_dict=True)


DPOP = replace_identity(RULES, resource=RESOURCE)


def test_a_bound_token_passes_with_its_proof_and_never_twice() -> None:
    """Each request needs a proof of its own, though the token is in the cache."""
    trusted = believed(DPOP)
    call = bound({"jkt": thumbprint(holder_jwk())}, scheme="DPoP")
    authenticate(a_proof_for(call), trusted, NOW_S)
    authenticate(a_proof_for(call, jti="k"), trusted, NOW_S)

    assert "used before" in refused(a_proof_for(call), trusted).detail
    assert "no DPoP proof" in refused(call, trusted).detail


def test_a_proof_outlives_a_rotation_of_keys() -> None:
    """New keys empty the cache of tokens, not the memory of proofs."""
    trusted = believed(DPOP)
    call = a_proof_for(bound({"jkt": thumbprint(holder_jwk())}, scheme="DPoP"))
    authenticate(call, trusted, NOW_S)

    assert "used before" in refused(call, trust(DPOP, keys(), proofs=trusted.proofs)).detail


@pytest.mark.parametrize(
    ("connection", "rules", "detail"),
    [
        (lambda: bound({"jkt": "x"}), DPOP, "scheme DPoP"),
        (lambda: presented(a_token(), "DPoP"), DPOP, "scheme DPoP"),
        (lambda: bound({"jkt": "x"}, scheme="DPoP"), RULES, "identity.resource"),
        (lambda: bound({"jkt": "x"}, scheme="DPoP"), DPOP, "no DPoP proof"),
        (lambda: a_proof_for(bound({"jkt": "x"}, scheme="DPoP")), DPOP, "another key"),
        (lambda: bound({"x5t#S256": "x"}), DPOP, "client certificate"),
        (lambda: replace(bound({"x5t#S256": "x"}), peer=a_peer()), DPOP, "client certificate"),
        (lambda: bound({"kid": "x"}), DPOP, "not known here"),
        (lambda: presented(a_token()), replace_identity(DPOP, dpop="required"), "not bound"),
    ],
    ids=[
        "as Bearer",
        "unbound as DPoP",
        "no resource",
        "no proof",
        "another key",
        "no mTLS",
        "other mTLS",
        "kid",
        "unbound",
    ],
)
def test_a_token_without_its_key_is_worthless(connection: Any, rules: Identity, detail: str) -> None:
    """To whoever stole it, whatever connection it comes by."""
    assert detail in refused(connection(), believed(rules)).detail


def test_a_nonce_is_handed_out_with_the_refusal() -> None:
    """RFC 9449, 9: the client asks again with it."""
    rules = replace_identity(DPOP, dpop_nonce=True)
    call = bound({"jkt": thumbprint(holder_jwk())}, scheme="DPoP")
    refusal = refused(a_proof_for(call), believed(rules))
    nonce = dict(refusal.headers)[b"dpop-nonce"].decode()

    assert [b'error="use_dpop_nonce"' in value for name, value in refusal.headers if name == b"www-authenticate"] == [
        False,
        True,
    ]
    assert authenticate(a_proof_for(call, nonce=nonce), believed(rules), NOW_S).user is not None


# opaque tokens

ASKED = Provider(
    name="corporate", issuer=ISSUER, audiences=(AUDIENCE,), introspection=True, client=Client(id="mcp", file="/x")
)
OPAQUE = Identity(mtls="permissive", providers=(SECOND, ASKED))
ACTIVE: Mapping[str, Any] = {"active": True, "iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": NOW_S + 300}


def asked(token: str, trusted: Trust) -> UnknownToken:
    """The question that *token* raises."""
    refusal = refused(presented(token), trusted)
    assert isinstance(refusal, UnknownToken)
    return refusal


def test_an_opaque_token_is_its_providers_to_explain() -> None:
    """Asked once, believed for a while."""
    trusted = believed(OPAQUE)
    unknown = asked("s3cret", trusted)
    learn(unknown, ACTIVE, NOW_S)
    principal = authenticate(presented("s3cret"), trusted, NOW_S)

    assert unknown.provider is ASKED
    assert principal.user is not None
    assert (principal.user.id, principal.user.issuer, principal.expires_at_s) == ("alice", ISSUER, NOW_S + 330)
    assert "s3cret" not in repr(trusted.verified)
    asked("other", trusted)


def test_an_opaque_token_is_asked_about_again_after_a_while() -> None:
    """It may have been revoked."""
    trusted = believed(OPAQUE)
    learn(asked("s3cret", trusted), ACTIVE, NOW_S)
    authenticate(presented("s3cret"), trusted, NOW_S + module.MAX_CACHE_S - 1)
    with pytest.raises(UnknownToken):
        authenticate(presented("s3cret"), trusted, NOW_S + module.MAX_CACHE_S)


def test_an_opaque_token_without_expiry_lasts_as_long_as_it_is_remembered() -> None:
    """RFC 7662 makes `exp` optional."""
    trusted = believed(OPAQUE)
    learn(asked("s3cret", trusted), {name: value for name, value in ACTIVE.items() if name != "exp"}, NOW_S)

    assert authenticate(presented("s3cret"), trusted, NOW_S).expires_at_s == NOW_S + module.MAX_CACHE_S


@pytest.mark.parametrize(
    ("claims", "detail"),
    [
        ({"active": False}, "not active"),
        ({"active": "true"}, "not active"),
        ({"active": 1}, "not active"),
        ({"active": ABSENT}, "not active"),
        ({"iss": OTHER}, "unknown issuer"),
        ({"aud": ABSENT}, "Audience"),
        ({"aud": "https://other.test"}, "Audience"),
        ({"aud": [7, None]}, "Audience"),
        ({"exp": NOW_S - 31}, "expired"),
        ({"exp": "x"}, "exp is not a time"),
        ({"nbf": NOW_S + 99}, "not valid yet"),
        ({"sub": ABSENT}, "names nobody"),
        ({"token_type": "refresh_token"}, "no access token"),
        ({"token_type": 7}, "no access token"),
        ({"typ": "Refresh"}, "ID token or another kind"),
        ({"act": "x"}, "act"),
    ],
    ids=str,
)
def test_what_the_provider_does_not_vouch_for_is_refused_for_a_while(claims: Mapping[str, Any], detail: str) -> None:
    """And it is not asked again at each try."""
    trusted = believed(OPAQUE)
    answer = {name: value for name, value in {**ACTIVE, **claims}.items() if value is not ABSENT}
    learn(asked("s3cret", trusted), answer, NOW_S)
    refusal = refused(presented("s3cret"), trusted)

    assert not isinstance(refusal, UnknownToken)
    assert detail in refusal.detail
    assert isinstance(refused(presented("s3cret"), trusted, NOW_S + module.REFUSED_S), UnknownToken)


def test_refused_opaque_tokens_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody can make them up."""
    monkeypatch.setattr(module, "MAX_REFUSED", 2)
    trusted = believed(OPAQUE)
    for token in ("a", "b", "c"):
        learn(asked(token, trusted), {"active": False}, NOW_S)

    assert len(trusted.refused) == 2


def test_a_bound_opaque_token_needs_its_proof_too() -> None:
    """The binding comes with the provider's answer."""
    trusted = believed(replace_identity(OPAQUE, resource=RESOURCE))
    learn(asked("s3cret", trusted), {**ACTIVE, "cnf": {"jkt": thumbprint(holder_jwk())}}, NOW_S)
    call = a_connection(headers=[(b"authorization", b"DPoP s3cret")])

    assert "scheme DPoP" in refused(presented("s3cret"), trusted).detail
    assert authenticate(a_proof_for(call), trusted, NOW_S).user is not None


def test_without_introspection_an_opaque_token_is_no_token() -> None:
    """Nobody is asked."""
    assert "not a JWT" in refused(presented("s3cret"), believed()).detail


def test_a_jwt_is_never_asked_about() -> None:
    """Its signature tells more, and costs nobody a request."""
    assert not isinstance(refused(presented(cut(a_token())), believed(OPAQUE)), UnknownToken)

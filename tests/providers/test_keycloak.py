"""Keycloak as it comes: its users' roles decide, its keys rotate, and it exchanges tokens for an SVID instead of a secret."""

import asyncio
import json
import time
import urllib.error
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from certs.embedded import EmbeddedDomain
from sidecar.core.profile import ClaimPaths, Client, Identity, Provider, TokenExchange
from tests.fakes import eventually
from tests.providers.keycloak import API, REALM, RESOURCE, Keycloak, a_keycloak, realm
from tests.providers.rig import WORKLOAD, Api, Sidecar, a_sidecar, altered, domain, orders, serving

pytestmark = pytest.mark.real_provider

LOAD_S = 15.0
SPIFFE_ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe"


@pytest.fixture(scope="module")
def keycloak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keycloak]:
    """One server for all tests here: it takes longer to start than they take."""
    with a_keycloak(tmp_path_factory.mktemp("keycloak") / "log") as server:
        yield server


def an_identity(keycloak: Keycloak, **changes: Any) -> Identity:
    """The profile's identity: Keycloak's roles and groups, and a client that is proven by the SVID."""
    provider = Provider(
        name="keycloak",
        issuer=keycloak.issuer,
        audiences=(RESOURCE,),
        claims=ClaimPaths(roles="realm_access.roles", groups="groups"),
        client=Client(assertion_type=SPIFFE_ASSERTION),
        leeway_s=0,
    )
    made: dict[str, Any] = {"mtls": "permissive", "providers": (provider,), "resource": RESOURCE, **changes}
    return Identity(**made)


EXCHANGE: dict[str, Any] = {"upstream": "exchange", "exchange": TokenExchange(provider="keycloak", audience=API)}


@asynccontextmanager
async def a_meeting(
    keycloak: Keycloak, folder: Path, *, workload: EmbeddedDomain | None = None, **identity: Any
) -> AsyncIterator[tuple[Sidecar, Api]]:
    """Everything, in a realm of its own; *workload* is the domain of the sidecar's SVID, if not the one Keycloak knows."""
    trust = domain()

    async def bundle(_: web.Request) -> web.Response:
        return web.Response(body=trust.token_bundle, content_type="application/json")

    api = Api(keycloak.issuer, API, f"{keycloak.issuer}/protocol/openid-connect/certs")
    async with serving(bundle) as bundle_url, serving(api.handle) as api_url:
        await asyncio.to_thread(_import, keycloak, bundle_url)
        async with (
            orders(api_url) as upstream,
            a_sidecar(upstream, folder, an_identity(keycloak, **identity), workload or trust) as sidecar,
        ):
            yield sidecar, api


def _import(keycloak: Keycloak, bundle_url: str) -> None:
    try:
        keycloak.admin("DELETE", f"/realms/{REALM}")
    except urllib.error.HTTPError as error:
        assert error.code == 404  # noqa: PT017 - the first test finds none
    keycloak.admin("POST", "/realms", realm(str(WORKLOAD), bundle_url))


async def test_the_server_calls_an_api_as_the_user(keycloak: Keycloak, tmp_path: Path) -> None:
    """Two people, one unmodified server: the API hears each of them, by a token that was exchanged with the SVID as proof."""
    async with a_meeting(keycloak, tmp_path, **EXCHANGE) as (sidecar, api):
        tokens = {name: await asyncio.to_thread(keycloak.login, name) for name in ("alice", "bob")}
        for name, token in tokens.items():
            assert await sidecar.call(token) == f"orders of {name}"

        assert {each["preferred_username"] for each in api.heard} == {"alice", "bob"}
        assert {each["azp"] for each in api.heard} == {"mcp-server"}
        record = await sidecar.last_record("tools/call")
        assert record["who"]["user"]["email"] == "bob@corp.example"
        assert set(record["who"]["user"]["roles"]) >= {"engineer", "analyst"}
        text = sidecar.audit.read_text()
        assert not any(secret in text for token in tokens.values() for secret in token.split("."))


async def test_roles_decide(keycloak: Keycloak, tmp_path: Path) -> None:
    """An analyst may call one tool, an engineer both, who has no role none; without upstream identity no token travels."""
    async with a_meeting(keycloak, tmp_path) as (sidecar, _):
        alice, bob, carol = [await asyncio.to_thread(keycloak.login, name) for name in ("alice", "bob", "carol")]

        assert "error 403" in await sidecar.call(alice, "headers")
        assert "error 403" in await sidecar.call(carol)
        assert await sidecar.call(alice) == "refused by the API: 401"
        seen = json.loads(
            await sidecar.call(bob, "headers", **{"x-forwarded-user": "root", "x-auth-request-user": "root"})
        )
        assert not {"authorization", "x-forwarded-user", "x-auth-request-user"} & set(seen)
        record = await sidecar.last_record("tools/call")
        assert record["http"]["removed"] == ["x-forwarded-user", "x-auth-request-user"]


async def test_a_forged_identity_header_is_refused(keycloak: Keycloak, tmp_path: Path) -> None:
    """Nobody but the sidecar writes Sidegate-Identity; the server can verify the one that it writes."""
    async with a_meeting(keycloak, tmp_path, upstream="header") as (sidecar, _):
        bob = await asyncio.to_thread(keycloak.login, "bob")
        status, _, _ = await sidecar.post(bob, **{"sidegate-identity": "eyJhbGciOiJub25lIn0.e30."})
        assert status == 403
        assert [each["decision"]["reason"] for each in sidecar.records()] == ["forbidden_caller"]

        seen = json.loads(await sidecar.call(bob, "headers"))
        async with aiohttp.ClientSession() as session, session.get(f"{sidecar.health}/identity/jwks.json") as answer:
            keys = jwt.PyJWKSet.from_dict(await answer.json())
        told = jwt.decode(
            seen["sidegate-identity"], keys.keys[0], algorithms=["ES256"], audience=RESOURCE, issuer="sidegate"
        )
        assert told["email"] == "bob@corp.example"
        assert set(told["roles"]) >= {"engineer"}
        assert told["exp"] - told["iat"] <= 60
        assert "authorization" not in seen


async def test_keys_rotate_under_load(keycloak: Keycloak, tmp_path: Path) -> None:
    """New keys while people call, with tokens of before and after: no call fails."""
    async with a_meeting(keycloak, tmp_path, **EXCHANGE) as (sidecar, _):
        tokens = [await asyncio.to_thread(keycloak.login, "alice")]
        kids, failed, done = {jwt.get_unverified_header(tokens[0])["kid"]}, [], 0
        until_s = time.monotonic() + LOAD_S

        async def call() -> None:
            nonlocal done
            while time.monotonic() < until_s:
                token = tokens[done % len(tokens)]
                said = await sidecar.call(token)
                if said != "orders of alice":
                    failed.append(said)
                done += 1

        async def rotate() -> None:
            for _ in range(3):
                await asyncio.sleep(LOAD_S / 5)
                await asyncio.to_thread(keycloak.rotate_keys)
                tokens.append(await asyncio.to_thread(keycloak.login, "alice"))
                kids.add(jwt.get_unverified_header(tokens[-1])["kid"])

        async with asyncio.TaskGroup() as tasks:
            for work in (call(), call(), rotate()):
                tasks.create_task(work)

        assert failed == []
        assert len(kids) == 4
        assert done >= 8


def hmac_signed(token: str, keycloak: Keycloak) -> str:
    """The token's claims, signed with the public key as HMAC secret."""
    jwks = jwt.PyJWKClient(f"{keycloak.issuer}/protocol/openid-connect/certs")
    key = jwks.get_signing_key_from_jwt(token).key
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signed = altered(token, 0, alg="HS256").rpartition(".")[0].encode()
    mac = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(signed, pem)
    return (signed + b"." + jwt.utils.base64url_encode(mac)).decode()


def bad_tokens(keycloak: Keycloak) -> dict[str, str]:
    """What must not open the server; all of it begins with what a real login gives."""
    good = keycloak.tokens("bob")
    token = good["access_token"]
    claims = jwt.decode(token, options={"verify_signature": False})
    kid = jwt.get_unverified_header(token)["kid"]
    own = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    head, payload, signature = token.split(".")
    other = keycloak.login("alice")
    master = keycloak.post(
        f"{keycloak.url}/realms/master/protocol/openid-connect/token",
        {"grant_type": "password", "client_id": "admin-cli", "username": "admin", "password": "admin"},
    )["access_token"]

    def resigned(**changes: Any) -> str:
        return jwt.encode(claims | changes, own, algorithm="RS256", headers={"kid": kid})

    found = {
        "ID token": good["id_token"],
        "refresh token": good["refresh_token"],
        "token of a client that names no audience": keycloak.login("bob", client="other"),
        "token of another realm": master,
        "no signature": f"{head}.{payload}.",
        "signature cut": token[:-8],
        "signature of another token": f"{head}.{payload}.{other.rpartition('.')[2]}",
        "payload of another token": f"{head}.{other.split('.')[1]}.{signature}",
        "header and payload changed places": f"{payload}.{head}.{signature}",
        "public key as HMAC secret": hmac_signed(token, keycloak),
        "signed by nobody, the right kid": resigned(),
        "a fourth part": f"{token}.x",
        "two parts": f"{head}.{payload}",
        "opaque": "0123456789abcdef",
        "dots": "..",
        "empty claims": f"{head}.e30.{signature}",
        "too long": token + "A" * 20_000,
    }
    changes: dict[str, dict[str, Any]] = {
        "alg none": {"alg": "none"},
        "alg nOnE": {"alg": "nOnE"},
        "alg RS512": {"alg": "RS512"},
        "alg ES256": {"alg": "ES256"},
        "another kid": {"kid": "x"},
        "no kid": {"kid": None},
        "crit": {"crit": ["x"], "x": 1},
        "typ of a logout token": {"typ": "logout+jwt"},
        "own key in the header": {"jwk": {"kty": "oct", "k": "eA"}},
    }
    found |= {name: altered(token, 0, **change) for name, change in changes.items()}
    claimed: dict[str, dict[str, Any]] = {
        "another subject": {"sub": "root"},
        "another issuer": {"iss": keycloak.issuer + "/"},
        "issuer of the other realm": {"iss": f"{keycloak.url}/realms/master"},
        "more roles": {"realm_access": {"roles": ["engineer", "admin"]}},
        "longer life": {"exp": int(time.time()) + 3600},
        "exp is text": {"exp": str(int(time.time()) + 3600)},
        "another audience": {"aud": "https://other.example"},
    }
    found |= {name: altered(token, 1, **change) for name, change in claimed.items()}
    found |= {f"resigned: {name}": resigned(**change) for name, change in claimed.items()}
    return found


async def test_no_bad_token_opens_the_server(keycloak: Keycloak, tmp_path: Path) -> None:
    """Each is refused with a challenge, recorded, and reaches neither the server nor the API."""
    async with a_meeting(keycloak, tmp_path, **EXCHANGE) as (sidecar, api):
        bad = await asyncio.to_thread(bad_tokens, keycloak)
        answers = {name: await sidecar.post(token) for name, token in bad.items()}

        assert len(bad) >= 25
        assert {name: status for name, (status, _, _) in answers.items() if status != 401} == {}
        assert all("resource_metadata=" in headers["www-authenticate"] for _, headers, _ in answers.values())
        await eventually(lambda: len(list(sidecar.records())) == len(bad), what="the records")
        assert {each["decision"]["reason"] for each in sidecar.records()} == {"unauthenticated"}
        assert {each["decision"]["outcome"] for each in sidecar.records()} == {"refused"}
        assert api.heard == []


async def test_an_expired_token_is_refused_at_its_end(keycloak: Keycloak, tmp_path: Path) -> None:
    """To the second, with a leeway of none; the cache adds nothing."""
    async with a_meeting(keycloak, tmp_path) as (sidecar, _):
        realm_now = await asyncio.to_thread(keycloak.admin, "GET", f"/realms/{REALM}")
        await asyncio.to_thread(keycloak.admin, "PUT", f"/realms/{REALM}", realm_now | {"accessTokenLifespan": 3})
        token = await asyncio.to_thread(keycloak.login, "bob")
        ends_s = jwt.decode(token, options={"verify_signature": False})["exp"]
        before, _, _ = await sidecar.post(token)
        await asyncio.sleep(max(0.0, ends_s - time.time()))
        after, _, _ = await sidecar.post(token)

        assert (before != 401, after) == (True, 401)


async def test_a_provider_that_refuses_the_exchange_stops_the_call(keycloak: Keycloak, tmp_path: Path) -> None:
    """The call was allowed, and is not sent: the server must not act as somebody else."""
    wanted = TokenExchange(provider="keycloak", audience="unknown-api")
    async with a_meeting(keycloak, tmp_path, upstream="exchange", exchange=wanted) as (sidecar, api):
        status, _, text = await sidecar.post(await asyncio.to_thread(keycloak.login, "bob"))
        record = await sidecar.last_record("tools/call")

        assert (status, json.loads(text)["error"]["code"]) == (200, -32603)
        assert (record["decision"]["outcome"], record["decision"]["reason"]) == ("refused", "provider")
        assert "invalid" in record["decision"]["detail"]
        assert api.heard == []


async def test_an_impostor_gets_no_exchange(keycloak: Keycloak, tmp_path: Path) -> None:
    """An SVID of the same name, signed by somebody else, is no proof to Keycloak."""
    impostor = domain()
    async with a_meeting(keycloak, tmp_path, workload=impostor, **EXCHANGE) as (sidecar, api):
        status, _, text = await sidecar.post(await asyncio.to_thread(keycloak.login, "bob"))

        assert (status, json.loads(text)["error"]["code"]) == (200, -32603)
        assert api.heard == []


async def test_metadata_leads_to_keycloak(keycloak: Keycloak, tmp_path: Path) -> None:
    """Without a token, before any login."""
    async with a_meeting(keycloak, tmp_path, scopes=("openid",)) as (sidecar, _), aiohttp.ClientSession() as session:
        origin = sidecar.url.removesuffix("/mcp")
        for path in ("", "/mcp"):
            async with session.get(f"{origin}/.well-known/oauth-protected-resource{path}") as answer:
                document = await answer.json()
            assert (document["resource"], document["authorization_servers"]) == (RESOURCE, [keycloak.issuer])
        status, headers, _ = await sidecar.post(None)
        assert status == 401
        assert headers["www-authenticate"] == (
            'Bearer resource_metadata="https://mcp.corp.example/.well-known/oauth-protected-resource/mcp", scope="openid"'
        )

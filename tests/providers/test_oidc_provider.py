"""A certified OpenID provider: people log in as by a browser; JWTs are checked here, opaque tokens by asking it."""

import asyncio
import json
import os
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from jwt.algorithms import ECAlgorithm

from sidecar.core import identity as identities
from sidecar.core.profile import Client, Identity, Provider
from tests.e2e.workloads.login import login
from tests.parts import part
from tests.providers.keycloak import free_port
from tests.providers.rig import Sidecar, a_sidecar, domain, orders

pytestmark = pytest.mark.real_provider

JWT, OPAQUE = "https://mcp.corp.example/mcp", "https://mcp.corp.example/opaque"
START_S = 60.0
KEY = ec.generate_private_key(ec.SECP256R1())


@contextmanager
def a_provider(folder: Path) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """Run it; gives the process and the issuer."""
    (folder / "key.pem").write_bytes(KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (folder / "secret").write_text("only for tests")
    jwk: dict[str, Any] = ECAlgorithm.to_jwk(KEY.public_key(), as_dict=True)
    (folder / "jwks.json").write_text(json.dumps({"keys": [{**jwk, "kid": "k", "use": "sig", "alg": "ES256"}]}))
    # Beside its modules, because Node looks for them there.
    program = folder / "provider.mjs"
    program.write_text((Path(__file__).parent / "provider.mjs").read_text())
    (folder / "node_modules").symlink_to(part("oidc-provider") / "node_modules")
    port = free_port()
    command = [str(part("node")), str(program), str(port), str(folder / "jwks.json")]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == b"listening\n"
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()


CLIENTS = {
    "secret": Client(id="mcp-secret", method="client_secret_basic", file="secret"),
    "key": Client(id="mcp-key", method="private_key_jwt", file="key.pem", key_id="k"),
}


def an_identity(issuer: str, folder: Path, client: str = "secret") -> Identity:
    """The profile's identity: both kinds of tokens."""
    chosen = CLIENTS[client]
    known = Client(id=chosen.id, method=chosen.method, file=str(folder / (chosen.file or "")), key_id=chosen.key_id)
    provider = Provider(
        name="corp", issuer=issuer, audiences=(JWT, OPAQUE), introspection=True, client=known, leeway_s=0
    )
    return Identity(mtls="permissive", providers=(provider,), resource=JWT)


async def calls(sidecar: Sidecar, token: str) -> list[str]:
    """What the two tools say to who holds *token*."""
    return [
        "denied" if "error 403" in await sidecar.call(token, tool) else "served" for tool in ("my_orders", "headers")
    ]


@pytest.mark.parametrize("client", ["secret", "key"])
async def test_people_log_in_and_roles_decide(client: str, tmp_path: Path) -> None:
    """By JWTs and by opaque tokens alike; who we are is proven by a secret in a file, or by a key."""
    with a_provider(tmp_path) as (_, issuer):
        tokens = {
            (name, resource): await asyncio.to_thread(login, issuer, resource, name, "")
            for name in ("alice", "bob")
            for resource in (JWT, OPAQUE)
        }
        async with (
            orders("http://127.0.0.1:9/") as upstream,
            a_sidecar(upstream, tmp_path, an_identity(issuer, tmp_path, client), domain()) as sidecar,
        ):
            for resource in (JWT, OPAQUE):
                assert await calls(sidecar, tokens["alice", resource]) == ["served", "denied"]
                assert await calls(sidecar, tokens["bob", resource]) == ["served", "served"]
            record = await sidecar.last_record("tools/call")
            assert record["who"]["user"]["email"] == "bob@corp.example"
            assert not any(token in sidecar.audit.read_text() for token in tokens.values())
        assert tokens["alice", OPAQUE].count(".") == 0


async def test_a_revoked_token_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as the provider is asked again; here at once."""
    monkeypatch.setattr(identities, "MAX_CACHE_S", 1)
    with a_provider(tmp_path) as (_, issuer):
        token = await asyncio.to_thread(login, issuer, OPAQUE, "bob", "")
        async with (
            orders("http://127.0.0.1:9/") as upstream,
            a_sidecar(upstream, tmp_path, an_identity(issuer, tmp_path), domain()) as sidecar,
        ):
            assert await calls(sidecar, token) == ["served", "served"]
            form = urllib.parse.urlencode({"token": token, "client_id": "agent"}).encode()
            with urllib.request.urlopen(f"{issuer}/token/revocation", form) as answer:  # noqa: ASYNC210 - loopback
                assert answer.status == 200
            refused_s = time.monotonic() + 30
            status = 0
            while status != 401 and time.monotonic() < refused_s:
                status, _, _ = await sidecar.post(token)
                await asyncio.sleep(0.2)
            assert status == 401


@pytest.mark.parametrize("token", ["0" * 43, "made-up", "a.b"])
async def test_a_made_up_opaque_token_is_refused(token: str, tmp_path: Path) -> None:
    """By its provider's word."""
    with a_provider(tmp_path) as (_, issuer):
        async with (
            orders("http://127.0.0.1:9/") as upstream,
            a_sidecar(upstream, tmp_path, an_identity(issuer, tmp_path), domain()) as sidecar,
        ):
            status, headers, _ = await sidecar.post(token)
            assert status == 401
            assert 'error="invalid_token"' in headers["www-authenticate"]


async def test_a_provider_that_is_away_stops_opaque_tokens_only(tmp_path: Path) -> None:
    """JWTs go on by the keys that are known; an opaque token that nobody explains is refused, and says when to come back."""
    with a_provider(tmp_path) as (server, issuer):
        tokens = {resource: await asyncio.to_thread(login, issuer, resource, "bob", "") for resource in (JWT, OPAQUE)}
        async with (
            orders("http://127.0.0.1:9/") as upstream,
            a_sidecar(upstream, tmp_path, an_identity(issuer, tmp_path), domain()) as sidecar,
        ):
            assert await calls(sidecar, tokens[JWT]) == ["served", "served"]
            os.kill(server.pid, 9)
            server.wait()
            assert await calls(sidecar, tokens[JWT]) == ["served", "served"]
            status, headers, _ = await sidecar.post(tokens[OPAQUE])
            assert (status, headers["retry-after"]) == (503, "2")
            assert list(sidecar.records())[-1]["decision"]["reason"] == "not_ready"

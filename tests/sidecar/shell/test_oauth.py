"""sidecar.shell.oauth: one question for many callers, kept for as long as it holds, and refusal when there is no answer."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from certs.errors import WorkloadApiError, WorkloadReason
from sidecar.core.identity import UnknownToken, trust
from sidecar.core.profile import Client, Identity, Provider, TokenExchange
from sidecar.errors import Reason, Refusal
from sidecar.shell import oauth as module
from sidecar.shell.oauth import OAuthClient
from tests.fakes import eventually

Answer = Callable[[dict[str, str]], web.Response]


def issued(text: str = "for-the-server", **more: Any) -> web.Response:
    """A token, as a provider issues it."""
    return web.json_response({"access_token": text, "token_type": "Bearer", "expires_in": 300, **more})


@dataclass
class FakeProvider:
    """A provider whose answers a test sets."""

    url: str = ""
    answer: Answer = field(default=lambda _: issued())
    heard: list[tuple[str, dict[str, str], str | None]] = field(default_factory=list)  # path, form, Authorization
    hold: asyncio.Event | None = None

    async def handle(self, request: web.Request) -> web.Response:
        """Answer one request."""
        if request.method == "GET":
            endpoints = {
                name: f"{self.url}/{name}" for name in ("jwks_uri", "token_endpoint", "introspection_endpoint")
            }
            return web.json_response({"issuer": self.url, **endpoints})
        form = {name: str(value) for name, value in (await request.post()).items()}
        self.heard.append((request.path, form, request.headers.get("authorization")))
        if self.hold is not None:
            await self.hold.wait()
        return self.answer(form)

    def identity(self, client: Client | None = None, **changes: Any) -> Identity:
        """A profile's identity with this provider."""
        provider = Provider(
            name="p", issuer=self.url, audiences=("a",), introspection=True, client=client or Client(), **changes
        )
        wanted = TokenExchange(provider="p", audience="api")
        return Identity(mtls="permissive", providers=(provider,), upstream="exchange", exchange=wanted)


async def svid_token(audience: str) -> str:
    """A JWT-SVID of ours."""
    return f"svid-for-{audience}"


@asynccontextmanager
async def asking(provider: FakeProvider, token: Any = svid_token) -> AsyncIterator[OAuthClient]:
    """Run the provider and a client."""
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", provider.handle)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    provider.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            yield OAuthClient(session, token)
    finally:
        if provider.hold is not None:
            provider.hold.set()
        await runner.cleanup()


async def test_a_token_is_exchanged_once_and_kept() -> None:
    """Proven by an SVID for the issuer; the second call asks nobody."""
    provider = FakeProvider()
    async with asking(provider) as client:
        assert client.at_hand("t") is None
        assert await client.exchange("t", provider.identity()) == "for-the-server"
        assert client.at_hand("t") == "for-the-server"
        assert await client.exchange("t", provider.identity()) == "for-the-server"

    ((path, form, authorization),) = provider.heard
    assert (path, authorization) == ("/token_endpoint", None)
    assert (form["subject_token"], form["audience"]) == ("t", "api")
    assert form["client_assertion"] == f"svid-for-{provider.url}"
    assert "client_id" not in form
    assert client.asked == {("p", "exchange", "ok"): 1}


async def test_many_callers_share_one_question() -> None:
    """One flight for each user's token; another token is another user's."""
    provider = FakeProvider(hold=asyncio.Event())
    provider.answer = lambda form: issued(f"for-{form['subject_token']}")
    async with asking(provider) as client, asyncio.TaskGroup() as tasks:
        calls = [tasks.create_task(client.exchange(name, provider.identity())) for name in "aaaab"]
        await eventually(lambda: len(provider.heard) == 2, what="both questions")
        assert provider.hold is not None
        provider.hold.set()
        answers = [await call for call in calls]

    assert answers == ["for-a"] * 4 + ["for-b"]
    assert len(provider.heard) == 2


async def test_a_kept_token_ends_before_it_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is exchanged again."""
    provider = FakeProvider()
    async with asking(provider) as client:
        now_s = module.time.time()
        await client.exchange("t", provider.identity())
        monkeypatch.setattr(module.time, "time", lambda: now_s + 271)
        assert client.at_hand("t") is None


async def test_a_flush_forgets_also_what_is_under_way() -> None:
    """Keys have rotated: a token of before may be a thief's."""
    provider = FakeProvider(hold=asyncio.Event())
    async with asking(provider) as client, asyncio.TaskGroup() as tasks:
        call = tasks.create_task(client.exchange("t", provider.identity()))
        await eventually(lambda: provider.heard, what="the question")
        client.flush()
        assert provider.hold is not None
        provider.hold.set()
        await call
        assert client.at_hand("t") is None


async def test_kept_tokens_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one issued first goes first."""
    monkeypatch.setattr(module, "MAX_KEPT", 2)
    provider = FakeProvider()
    async with asking(provider) as client:
        for token in "abc":
            await client.exchange(token, provider.identity())
        assert [client.at_hand(token) is not None for token in "abc"] == [False, True, True]


async def why_refused(client: OAuthClient, identity: Identity, user: str = "t") -> str:
    """The detail of the refusal to exchange."""
    with pytest.raises(Refusal) as caught:
        await client.exchange(user, identity)
    assert caught.value.reason is Reason.PROVIDER
    return caught.value.detail


async def test_a_provider_that_says_no_is_not_asked_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error code is told to the operator; what it wrote beside that is not."""
    provider = FakeProvider(
        answer=lambda _: web.json_response({"error": "invalid_grant", "error_description": "t"}, status=400)
    )
    async with asking(provider) as client:
        assert await why_refused(client, provider.identity()) == "exchange at p: HTTP 400: invalid_grant"
        assert await why_refused(client, provider.identity()) == "exchange at p: HTTP 400: invalid_grant"
        assert len(provider.heard) == 1
        monkeypatch.setattr(module, "FAILED_S", 0)
        client.flush()
        await why_refused(client, provider.identity())
        assert len(provider.heard) == 2
        assert client.asked == {("p", "exchange", "failed"): 2}


async def test_all_who_wait_learn_of_the_failure() -> None:
    """Nobody hangs."""
    provider = FakeProvider(hold=asyncio.Event(), answer=lambda _: web.Response(status=503))
    async with asking(provider) as client, asyncio.TaskGroup() as tasks:
        calls = [tasks.create_task(why_refused(client, provider.identity())) for _ in range(3)]
        await eventually(lambda: provider.heard, what="the question")
        assert provider.hold is not None
        provider.hold.set()
        assert {await call for call in calls} == {"exchange at p: HTTP 503, and no JSON"}
    assert len(provider.heard) == 1


async def test_questions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody can make up tokens."""
    monkeypatch.setattr(module, "MAX_FLIGHTS", 1)
    provider = FakeProvider(hold=asyncio.Event())
    async with asking(provider) as client, asyncio.TaskGroup() as tasks:
        first = tasks.create_task(client.exchange("a", provider.identity()))
        await eventually(lambda: provider.heard, what="the question")
        assert "too many questions" in await why_refused(client, provider.identity(), "b")
        assert provider.hold is not None
        provider.hold.set()
        assert await first == "for-the-server"


async def no_svid(_: str) -> str:
    """An agent without an identity for us."""
    raise WorkloadApiError(WorkloadReason.NO_IDENTITY, "denied")


@pytest.mark.parametrize(
    ("client", "token", "why"),
    [
        (Client(), no_svid, "no JWT-SVID"),
        (Client(), None, "no workload identity"),
        (Client(id="m", method="private_key_jwt"), svid_token, "needs the field file"),
        (Client(id="m", method="client_secret_post", file="/nowhere/x"), svid_token, "No such file"),
        (Client(id="m", method="private_key_jwt", file=__file__), svid_token, "no private key"),
    ],
    ids=["agent says no", "no agent", "no file", "file is missing", "no key in the file"],
)
async def test_without_proof_nothing_is_asked(client: Client, token: Any, why: str) -> None:
    """A question without assertion would be refused, or answered to anybody."""
    provider = FakeProvider()
    async with asking(provider, token) as asker:
        assert why in await why_refused(asker, provider.identity(client))
    assert provider.heard == []


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (ec.generate_private_key(ec.SECP256R1()), "ES256"),
        (ec.generate_private_key(ec.SECP384R1()), "ES384"),
        (rsa.generate_private_key(public_exponent=65537, key_size=2048), "RS256"),
        (ed25519.Ed25519PrivateKey.generate(), "EdDSA"),
    ],
    ids=["P-256", "P-384", "RSA", "Ed25519"],
)
async def test_a_key_in_a_file_signs_an_assertion(key: Any, algorithm: str, tmp_path: Path) -> None:
    """RFC 7523; a new one each time."""
    file = tmp_path / "key.pem"
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    provider = FakeProvider()
    async with asking(provider, None) as client:
        await client.exchange(
            "t", provider.identity(Client(id="mcp", method="private_key_jwt", file=str(file), key_id="k"))
        )
    assertion = provider.heard[0][1]["client_assertion"]
    claims = jwt.decode(assertion, key.public_key(), algorithms=[algorithm], audience=provider.url)

    assert (claims["iss"], claims["sub"], jwt.get_unverified_header(assertion)["kid"]) == ("mcp", "mcp", "k")


async def test_a_secret_is_read_afresh(tmp_path: Path) -> None:
    """Whoever mounted it may renew it."""
    file = tmp_path / "secret"
    provider = FakeProvider()
    async with asking(provider, None) as client:
        for secret in ("one", "two"):
            file.write_text(f"{secret}\n")
            made = Client(id="mcp", method="client_secret_post", file=str(file))
            await client.exchange(secret, provider.identity(made))

    assert [form["client_secret"] for _, form, _ in provider.heard] == ["one", "two"]


# introspection


async def test_an_opaque_token_is_explained() -> None:
    """The trust learns whose it is."""
    provider = FakeProvider()
    provider.answer = lambda _: web.json_response({"active": True, "sub": "alice", "aud": "a", "iss": provider.url})
    async with asking(provider) as client:
        identity = provider.identity()
        unknown = UnknownToken(identity.providers[0], "opaque", trust(identity, {}))
        assert await client.introspect(unknown) is None

    assert [user.id for user, _ in unknown.trusted.verified.values()] == ["alice"]
    assert provider.heard[0][:2] == ("/introspection_endpoint", provider.heard[0][1])
    assert provider.heard[0][1]["token"] == "opaque"


async def test_a_provider_that_is_away_refuses_the_call() -> None:
    """Not as a bad token: the client would log in again, in vain. Counted."""
    provider = FakeProvider(answer=lambda _: web.Response(status=503))
    async with asking(provider) as client:
        identity = provider.identity()
        unknown = UnknownToken(identity.providers[0], "opaque", trust(identity, {}))
        refusal = await client.introspect(unknown)

    assert refusal is not None
    assert (refusal.reason, refusal.retry_after_s) == (Reason.NOT_READY, 2)
    assert (unknown.trusted.verified, unknown.trusted.refused) == ({}, {})
    assert client.asked == {("p", "introspection", "failed"): 1}

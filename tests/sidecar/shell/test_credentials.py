"""sidecar.shell.credentials: the server gets what the profile says, and never the caller's token by accident."""

from dataclasses import replace
from typing import Any

import jwt
import pytest

from sidecar.core.connection import Headers
from sidecar.core.profile import Client, Identity, Provider, TokenExchange
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange
from sidecar.shell.credentials import Credentials, Signer
from tests.builders import a_call, a_connection, a_permit, a_principal, a_server, a_user, an_exchange

RESOURCE = "https://mcp.test/mcp"
TOKEN = "header.payload.signature"


class FakeOAuth:
    """Knows what one token was exchanged for."""

    def __init__(self, held: str | None) -> None:
        self.held = held
        self.asked: list[str] = []

    def at_hand(self, token: str) -> str | None:
        """What is kept."""
        self.asked.append(token)
        return self.held

    async def exchange(self, token: str, identity: Identity) -> str:
        """What is fetched."""
        return f"for {token} at {identity.exchange and identity.exchange.provider}"


def admitted(*, aud: Any = RESOURCE, user: bool = True, headers: Headers = ()) -> Exchange:
    """An admitted call with a token."""
    principal = a_principal(None)
    if user:
        principal = replace(principal, user=replace(a_user(), claims={"aud": aud}))
    authorization = [(b"authorization", f"Bearer {TOKEN}".encode())] if user else []
    exchange = an_exchange(a_connection(a_call(), headers=[*authorization, *headers]))
    exchange.principal, exchange.permit = principal, a_permit(principal=principal)
    return exchange


def identity(upstream: Any) -> Identity:
    """A profile's identity."""
    wanted = TokenExchange(provider="p") if upstream == "exchange" else None
    provider = Provider(name="p", issuer="https://id.test", audiences=("a",), client=Client())
    return Identity(resource=RESOURCE, providers=(provider,), upstream=upstream, exchange=wanted)


def given(
    exchange: Exchange, upstream: str, *, held: str | None = None, signer: Signer | None = None
) -> Headers | None:
    """What the server gets."""
    credentials = Credentials(FakeOAuth(held), signer or Signer())  # type: ignore[arg-type]
    return credentials.at_hand(exchange, identity(upstream), a_server())


def test_nothing_is_the_default() -> None:
    """No token, no header."""
    assert given(admitted(), "none") == ()


@pytest.mark.parametrize("aud", [RESOURCE, ["other", RESOURCE]])
def test_a_token_that_names_the_server_is_passed_on(aud: Any) -> None:
    """With its DPoP proof, which names the same URL."""
    passed = given(admitted(aud=aud, headers=[(b"dpop", b"proof")]), "token")

    assert passed == ((b"authorization", f"Bearer {TOKEN}".encode()), (b"dpop", b"proof"))


@pytest.mark.parametrize("aud", ["a", ["a"], RESOURCE + "/", None, [RESOURCE + "x"]])
def test_a_token_for_somebody_else_is_never_passed_on(aud: Any) -> None:
    """Though it is good here: the caller is told to get another."""
    with pytest.raises(Refusal) as caught:
        given(admitted(aud=aud), "token")

    assert caught.value.reason is Reason.UNAUTHENTICATED
    assert caught.value.headers


async def test_an_exchanged_token_is_taken_from_memory_or_fetched() -> None:
    """None says that there is something to wait for."""
    exchange = admitted()
    assert given(exchange, "exchange", held="kept") == ((b"authorization", b"Bearer kept"),)
    assert given(exchange, "exchange") is None

    fetched = await Credentials(FakeOAuth(None), Signer()).fetch(exchange, identity("exchange"))  # type: ignore[arg-type]
    assert fetched == ((b"authorization", f"Bearer for {TOKEN} at p".encode()),)


@pytest.mark.parametrize("upstream", ["token", "exchange"])
def test_without_a_user_there_is_no_token(upstream: str) -> None:
    """Where the profile lets workloads call alone; whatever else they send is not looked at."""
    assert given(admitted(user=False), upstream) == ()


def test_the_signed_header_verifies_by_the_published_key() -> None:
    """For this server, for a minute, and by a key that this process made."""
    signer = Signer()
    headers = given(admitted(), "header", signer=signer)
    assert headers is not None
    ((name, value),) = headers
    key = jwt.PyJWKSet.from_dict(signer.jwks).keys[0]
    header = jwt.get_unverified_header(value)
    claims = jwt.decode(
        value, key, algorithms=["ES256"], audience=RESOURCE, issuer="sidegate", options={"verify_exp": False}
    )

    assert name == b"sidegate-identity"
    assert header["kid"] == key.key_id
    assert claims["sub"] == "alice"
    assert "d" not in signer.jwks["keys"][0]
    with pytest.raises(jwt.InvalidSignatureError):
        jwt.decode(value, jwt.PyJWKSet.from_dict(Signer().jwks).keys[0], algorithms=["ES256"], audience=RESOURCE)


def test_each_header_is_used_once() -> None:
    """By its id."""
    signer = Signer()
    ids = set()
    for _ in range(2):
        ((_, value),) = given(admitted(), "header", signer=signer) or ()
        ids.add(jwt.decode(value, options={"verify_signature": False})["jti"])

    assert len(ids) == 2

"""JWT-SVIDs: fetched once per audience, kept for half their life, never printed."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest

from certs import jwt_svid
from certs.embedded import EmbeddedDomain, EmbeddedWorkloadApi, Identity
from certs.errors import WorkloadApiError, WorkloadReason
from certs.jwt_svid import JwtSvid, JwtSvidSource
from certs.messages import messages
from certs.spiffe import SpiffeId
from tests.certs.agents import a_socket, running
from tests.certs.pki import A_TEST, API, NOW

AUDIENCE = "https://idp.test/token"


class CountingAgent(EmbeddedWorkloadApi):
    """An agent that counts tokens, and can be told what to answer."""

    tokens = 0
    answer: Any = None

    async def _fetch_jwt_svid(self, stream: Any) -> None:
        self.tokens += 1
        if self.answer is None:
            await super()._fetch_jwt_svid(stream)
        else:
            await stream.recv_message()
            await stream.send_message(self.answer)


@pytest.fixture
def agent() -> Iterator[CountingAgent]:
    """An agent that is not yet running."""
    with a_socket() as path:
        yield CountingAgent(path, EmbeddedDomain(A_TEST), identities=[Identity(spiffe_id=API)], in_cluster=False)


async def test_a_token_verifies_with_the_domains_keys(agent: CountingAgent) -> None:
    """Whoever has the JWT bundle can check it."""
    async with running(agent):
        await agent.started.wait()
        svid = await JwtSvidSource(agent.address).fetch(API, AUDIENCE)

    keys = jwt.PyJWKSet.from_json(agent._domain.token_bundle.decode())
    claims = jwt.decode(svid.token, keys.keys[0], algorithms=["ES256"], audience=AUDIENCE)
    assert claims["sub"] == str(API)
    assert svid.expires_at == datetime.fromtimestamp(claims["exp"], UTC)
    assert svid.token not in repr(svid)


async def test_concurrent_callers_share_one_fetch(agent: CountingAgent) -> None:
    """And later ones get the kept token."""
    async with running(agent):
        await agent.started.wait()
        source = JwtSvidSource(agent.address)
        async with asyncio.TaskGroup() as tasks:
            fetches = [tasks.create_task(source.fetch(API, AUDIENCE)) for _ in range(5)]
        await source.fetch(API, AUDIENCE)
        await source.fetch(API, "https://other.test")

    assert len({fetch.result().token for fetch in fetches}) == 1
    assert agent.tokens == 2


async def test_a_token_is_renewed_at_half_its_life_and_outlasts_a_lost_agent(agent: CountingAgent) -> None:
    """The embedded agent's tokens live five minutes."""
    shift = timedelta()
    source = JwtSvidSource(agent.address, now=lambda: datetime.now(UTC) + shift)
    async with running(agent):
        await agent.started.wait()
        await source.fetch(API, AUDIENCE)
        shift = timedelta(minutes=3)
        kept = await source.fetch(API, AUDIENCE)
    assert agent.tokens == 2

    assert await source.fetch(API, AUDIENCE) is kept
    shift = timedelta(minutes=4, seconds=55)
    with pytest.raises(WorkloadApiError) as caught:
        await source.fetch(API, AUDIENCE)
    assert caught.value.reason is WorkloadReason.NO_AGENT


async def test_a_withdrawn_identity_has_no_tokens(agent: CountingAgent) -> None:
    """Not even a kept one, once the agent has said so."""
    shift = timedelta()
    source = JwtSvidSource(agent.address, now=lambda: datetime.now(UTC) + shift)
    async with running(agent):
        await agent.started.wait()
        await source.fetch(API, AUDIENCE)
        agent.drop()
        shift = timedelta(minutes=3)
        with pytest.raises(WorkloadApiError) as caught:
            await source.fetch(API, AUDIENCE)

    assert caught.value.reason is WorkloadReason.NO_IDENTITY


@pytest.mark.parametrize("count", [0, 2])
async def test_an_answer_with_another_number_of_tokens_is_refused(agent: CountingAgent, count: int) -> None:
    """We asked for one."""
    agent.answer = messages.JWTSVIDResponse(svids=[messages.JWTSVID(svid="x")] * count)
    async with running(agent):
        await agent.started.wait()
        with pytest.raises(WorkloadApiError, match="where one was asked for"):
            await JwtSvidSource(agent.address).fetch(API, AUDIENCE)


async def test_kept_tokens_are_bounded(agent: CountingAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The audience used longest ago is forgotten."""
    monkeypatch.setattr(jwt_svid, "MAX_KEPT", 1)
    async with running(agent):
        await agent.started.wait()
        source = JwtSvidSource(agent.address)
        for audience in ("x", "y", "x"):
            await source.fetch(API, audience)

    assert agent.tokens == 3


def a_token(**changes: object) -> str:
    """A token for API and AUDIENCE with claims changed; None removes one."""
    claims = {"sub": str(API), "aud": [AUDIENCE], "exp": int(NOW.timestamp()) + 60} | changes
    return jwt.encode({name: value for name, value in claims.items() if value is not None}, "k" * 32)


@pytest.mark.parametrize(
    ("token", "why"),
    [
        ("nonsense", "not a JWT"),
        ("a.b.c", "not a JWT"),
        ("e30.W10.e30", "not a JWT"),
        (a_token(sub="spiffe://a.test/other"), "ID and audience"),
        (a_token(aud=["https://other.test"]), "ID and audience"),
        (a_token(aud=[AUDIENCE, "https://other.test"]), "ID and audience"),
        (a_token(aud=None), "ID and audience"),
        (a_token(exp=None), "exp must be"),
    ],
)
def test_a_token_that_was_not_asked_for_is_refused_and_not_quoted(token: str, why: str) -> None:
    """A token for others is of no use; its text stays out of errors."""
    with pytest.raises(WorkloadApiError, match=why) as caught:
        JwtSvid.parse(token, API, AUDIENCE, now=NOW)
    assert token not in str(caught.value)


def test_a_token_without_issue_time_ages_from_its_arrival() -> None:
    """The claim iat is optional."""
    svid = JwtSvid.parse(a_token(aud=AUDIENCE), API, AUDIENCE, now=NOW)

    assert svid.is_fresh(NOW + timedelta(seconds=29))
    assert not svid.is_fresh(NOW + timedelta(seconds=31))
    assert svid.is_usable(NOW + timedelta(seconds=49))
    assert not svid.is_usable(NOW + timedelta(seconds=51))


async def test_another_identity_has_no_token(agent: CountingAgent) -> None:
    """The agent decides who we are."""
    async with running(agent):
        await agent.started.wait()
        with pytest.raises(WorkloadApiError) as caught:
            await JwtSvidSource(agent.address).fetch(SpiffeId.parse("spiffe://a.test/other"), AUDIENCE)

    assert caught.value.reason is WorkloadReason.NO_IDENTITY

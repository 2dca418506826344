"""The keys for callers' tokens: current, federated, and gone when nobody vouches for them any more."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from certs.embedded import EmbeddedDomain
from certs.errors import BadToken
from certs.jwt_bundles import JwtBundleSource
from certs.jwt_verify import JwtBundles, verify_token
from certs.spiffe import SpiffeId
from tests.certs.agents import FAST, a_socket, an_agent, eventually, running
from tests.certs.pki import A_TEST, API, B_TEST

AUDIENCE = "spiffe://a.test/ns/records/sa/default"
BOT = SpiffeId.parse("spiffe://b.test/bot")


@pytest.fixture
def socket() -> Iterator[Path]:
    """Where the agent listens."""
    with a_socket() as path:
        yield path


def a_source(address: str, *, max_age_s: float = 60.0) -> JwtBundleSource:
    """A source without patience."""
    return JwtBundleSource(address, max_age_s=max_age_s, timing=FAST)


async def test_own_and_federated_keys_come_and_a_new_key_replaces_the_old(socket: Path) -> None:
    """A token of either domain is believed; after a rotation, one of the old key is not."""
    a, b = EmbeddedDomain(A_TEST), EmbeddedDomain(B_TEST)
    agent = an_agent(socket, domain=a, federated=[b])
    source = a_source(agent.address)
    told: list[JwtBundles | None] = []
    source.subscribe(told.append)
    async with running(agent, source):
        await eventually(lambda: source.current is not None)
        assert source.current
        old = a.issue_token(API, [AUDIENCE])
        for token, who in ((old, API), (b.issue_token(BOT, [AUDIENCE]), BOT)):
            assert verify_token(token, source.current, AUDIENCE, now=datetime.now(UTC)).spiffe_id == who
        a.rotate_token_key()
        agent.rotate()
        await eventually(lambda: len(told) == 3)

    assert told[0] is None
    assert source.current
    with pytest.raises(BadToken, match="unknown key"):
        verify_token(old, source.current, AUDIENCE, now=datetime.now(UTC))


async def test_keys_are_confirmed_although_the_stream_is_silent(socket: Path) -> None:
    """Opened anew before they are too old: a healthy agent that says nothing costs no caller anything."""
    agent = an_agent(socket)
    source = a_source(agent.address, max_age_s=0.6)
    told: list[JwtBundles | None] = []
    source.subscribe(told.append)
    async with running(agent, source):
        await eventually(lambda: source.current is not None)
        first = source._confirmed_at
        await eventually(lambda: source._confirmed_at > first + timedelta(seconds=1))

    assert told[1:] == [source._bundles]


async def test_keys_of_a_lost_agent_are_believed_for_a_while_only(socket: Path) -> None:
    """Then every token is refused, and subscribers are told; a returning agent's are believed again."""
    domain = EmbeddedDomain(A_TEST)
    agent = an_agent(socket, domain=domain)
    source = a_source(agent.address, max_age_s=0.5)
    told: list[JwtBundles | None] = []
    source.subscribe(told.append)
    async with running(source):
        async with running(agent):
            await eventually(lambda: source.current is not None)
        assert source.current is not None
        await eventually(lambda: source.current is None)
        await eventually(lambda: told[-1] is None)
        assert source.detail
        async with running(an_agent(socket, domain=domain)):
            await eventually(lambda: source.current is not None)
            assert told[-1] is source.current


async def test_a_withdrawn_identity_has_no_keys_either(socket: Path) -> None:
    """At once: nothing may be judged by whoever is nobody."""
    agent = an_agent(socket)
    source = a_source(agent.address)
    async with running(agent, source):
        await eventually(lambda: source.current is not None)
        agent.drop()
        await eventually(lambda: source.current is None)
        agent.restore()
        await eventually(lambda: source.current is not None)


async def test_an_unreadable_domain_is_named(socket: Path) -> None:
    """And costs no other domain."""
    a, b = EmbeddedDomain(A_TEST), EmbeddedDomain(B_TEST)
    agent = an_agent(socket, domain=a, federated=[b])
    original = agent._token_bundles

    def broken() -> object:
        bundles = original()
        bundles.bundles["spiffe://b.test"] = b"nonsense"
        return bundles

    agent._token_bundles = broken  # type: ignore[method-assign]
    source = a_source(agent.address)
    async with running(agent, source):
        await eventually(lambda: source.current is not None)

    assert source.current
    assert source.current.domains == {A_TEST}
    assert "b.test" in source.detail

"""Our own identity in the sidecar: which SVID is ours, and what other workloads' tokens are checked with."""

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from certs.embedded import EmbeddedDomain, Identity
from certs.errors import PeerReason
from certs.jwt_verify import verify_token
from certs.spiffe import SpiffeId
from certs.workload import WorkloadState
from sidecar.config import Settings
from sidecar.core.workload import WorkloadTokens
from sidecar.errors import ConfigError
from sidecar.shell.svid import WorkloadIdentity
from tests.certs.agents import a_socket, an_agent, running
from tests.certs.pki import A_TEST, API, B_TEST
from tests.fakes import eventually

OTHER = SpiffeId.parse("spiffe://a.test/ns/pay/sa/other")
BOT = SpiffeId.parse("spiffe://b.test/bot")


@pytest.fixture
def socket() -> Iterator[Path]:
    """Where the agent listens."""
    with a_socket() as path:
        yield path


def nobody(_reason: PeerReason, _serial: int | None) -> None:
    """Take note of a refused handshake; there is none here."""


def an_identity(
    socket: Path, use_tokens: Callable[[WorkloadTokens | None], None] = lambda _: None, **settings: str
) -> WorkloadIdentity:
    """Our identity, from the agent at *socket*."""
    made = Settings(spiffe_socket=f"unix:{socket}", **settings)
    return WorkloadIdentity(made, on_refused=nobody, use_tokens=use_tokens)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"spiffe_hint": "second"}, OTHER), ({"spiffe_id": str(API)}, API), ({"spiffe_id": str(OTHER), "spiffe_hint": "second"}, OTHER)],
)  # fmt: skip
async def test_one_of_several_svids_is_ours_by_id_or_hint(
    socket: Path, settings: dict[str, str], expected: SpiffeId
) -> None:
    """As the settings say; the first one offered means nothing."""
    agent = an_agent(
        socket, identities=[Identity(spiffe_id=API, hint="first"), Identity(spiffe_id=OTHER, hint="second")]
    )
    identity = an_identity(socket, **settings)
    async with running(agent, identity):
        await eventually(lambda: identity.own_id is not None, what="our SVID")
        assert identity.own_id == expected


async def test_several_svids_without_a_choice_are_none(socket: Path) -> None:
    """A guess could be somebody else."""
    agent = an_agent(socket, identities=[Identity(spiffe_id=API), Identity(spiffe_id=OTHER)])
    identity = an_identity(socket)
    async with running(agent, identity):
        await eventually(lambda: identity.source.state is WorkloadState.AMBIGUOUS, what="the state")
        assert identity.own_id is None


async def test_a_missing_agent_is_waited_for(socket: Path) -> None:
    """Not ready, and no crash; then it is there."""
    identity = an_identity(socket)
    async with running(identity):
        await eventually(lambda: identity.source.state is WorkloadState.NO_AGENT, what="the state")
        assert not identity.source.is_ready
        async with running(an_agent(socket)):
            await eventually(lambda: identity.source.is_ready, what="our SVID")


async def test_tokens_are_checked_for_our_own_id_and_only_where_wanted(socket: Path) -> None:
    """The audience is who we are; an SVID more forgets no verified token; a withdrawn identity believes nobody."""
    a, b = EmbeddedDomain(A_TEST), EmbeddedDomain(B_TEST)
    agent = an_agent(socket, domain=a, federated=[b])
    told: list[WorkloadTokens | None] = []
    identity = an_identity(socket, told.append)
    async with running(agent, identity):
        await eventually(lambda: identity.own_id is not None, what="our SVID")
        assert told == []
        identity.want_tokens()
        await eventually(lambda: told, what="the keys")
        tokens = told[0]
        assert tokens is not None
        token = b.issue_token(BOT, [str(API)])
        proof = verify_token(token, tokens.bundles, tokens.audience, now=datetime.now(UTC))
        assert proof.spiffe_id == BOT
        before = identity.source.current
        agent.rotate()
        await eventually(lambda: identity.source.current is not before, what="another SVID")
        assert told == [tokens]
        agent.drop()
        await eventually(lambda: told[-1] is None, what="the end")


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"spiffe_socket": "tcp:1.2.3.4:5"}, "SIDEGATE_SPIFFE_SOCKET"), ({"spiffe_id": "alice"}, "SPIFFE_ID")],
)
def test_unusable_settings_are_named(settings: dict[str, str], why: str) -> None:
    """The process does not start."""
    made = Settings(**{"spiffe_socket": "unix:/agent.sock", **settings})
    with pytest.raises(ConfigError, match=why):
        WorkloadIdentity(made, on_refused=nobody, use_tokens=lambda _: None)


def test_without_memory_for_keys_the_process_does_not_start(socket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a key on a disk, and never a silent wait for what cannot come."""

    def fail(_name: str, _flags: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", fail)
    with pytest.raises(ConfigError, match="no private key can be used here"):
        an_identity(socket)

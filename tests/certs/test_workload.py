"""The Workload API client: every way in which an agent can fail, and what the source says then."""

import asyncio
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from certs.embedded import EmbeddedDomain, EmbeddedWorkloadApi, Identity
from certs.errors import BadCertificate, WorkloadApiError, WorkloadReason
from certs.messages import messages
from certs.spiffe import SpiffeId
from certs.svid import X509Snapshot
from certs.workload import Selection, WorkloadState, X509Source, socket_path
from tests.certs.agents import FAST, a_socket, an_agent, eventually, ready, running
from tests.certs.pki import A_TEST, API, B_TEST, NOW

OTHER = SpiffeId.parse("spiffe://a.test/other")


@pytest.fixture
def socket() -> Iterator[Path]:
    """Where the agent listens."""
    with a_socket() as path:
        yield path


class Follower:
    """A subscriber that remembers what it was told."""

    def __init__(self, source: X509Source) -> None:
        self.told: list[X509Snapshot | None] = []
        source.subscribe(self.told.append)

    @property
    def serials(self) -> list[int | None]:
        """The serials told, None for a withdrawal."""
        return [snapshot.svid.serial if snapshot else None for snapshot in self.told]


def a_source(socket: Path, *, selection: Selection | None = None, shift: timedelta = timedelta()) -> X509Source:
    """A source with short waits, whose clock runs *shift* ahead."""
    return X509Source(f"unix:{socket}", selection=selection, timing=FAST, now=lambda: datetime.now(UTC) + shift)


async def test_a_source_has_the_svid_that_the_agent_issued(socket: Path) -> None:
    """Ready, with identity, bundles and a line about them."""
    source = a_source(socket)
    follower = Follower(source)
    assert source.state is WorkloadState.STARTING
    assert not source.is_ready
    async with running(an_agent(socket), source):
        await ready(source)

        assert source.current
        assert source.current.svid.spiffe_id == API
        assert source.current.bundles.domains == {A_TEST}
        assert (source.state, source.is_ready) == (WorkloadState.READY, True)
        assert str(API) in source.detail
        assert follower.told == [None, source.current]


async def test_a_rotation_reaches_subscribers(socket: Path) -> None:
    """Each update is told once."""
    agent, source = an_agent(socket), a_source(socket)
    async with running(agent, source):
        await ready(source)
        follower = Follower(source)
        agent.rotate()
        await eventually(lambda: len(follower.told) == 2)

        assert follower.serials[0] != follower.serials[1]
        assert source.current is follower.told[1]


async def test_a_repeated_update_is_not_told_again(socket: Path) -> None:
    """Agents repeat themselves; contexts are rebuilt for news only."""
    agent, source = an_agent(socket), a_source(socket)
    async with running(agent, source):
        await ready(source)
        follower = Follower(source)
        agent.push(agent._response)
        agent.rotate()
        await eventually(lambda: len(follower.told) > 1)

        assert len(follower.told) == 2


async def test_a_change_of_bundles_alone_is_news(socket: Path) -> None:
    """At CA preparation the SVID stays and the bundle grows; a removed domain is gone at once."""
    other = EmbeddedDomain(B_TEST)
    agent, source = an_agent(socket), a_source(socket)
    async with running(agent, source):
        await ready(source)
        serials = Follower(source)
        grown = messages.X509SVIDResponse(
            svids=agent._response.svids, federated_bundles={"spiffe://b.test": other.bundle_der}
        )
        agent.push(grown)
        await eventually(lambda: bool(source.current and B_TEST in source.current.bundles))
        agent.push(messages.X509SVIDResponse(svids=agent._response.svids))
        await eventually(lambda: bool(source.current and B_TEST not in source.current.bundles))

        assert len(set(serials.serials)) == 1


async def test_a_missing_agent_is_waited_for(socket: Path) -> None:
    """No socket yet: not ready, alive, and ready as soon as the agent is there."""
    source = a_source(socket)
    async with running(source):
        await eventually(lambda: source.state is WorkloadState.NO_AGENT)
        assert str(socket) in source.detail
        async with running(an_agent(socket)):
            await ready(source)


async def test_a_restarted_agent_is_found_again(socket: Path) -> None:
    """While it is away the SVID in use stays; its socket may be a new file."""
    source = a_source(socket)
    domain = EmbeddedDomain(A_TEST)
    async with running(source):
        async with running(an_agent(socket, domain=domain)):
            await ready(source)
            before = source.current
        await eventually(lambda: source.state is WorkloadState.DEGRADED)
        assert source.is_ready
        assert source.current is before
        async with running(an_agent(socket, domain=domain)):
            await eventually(lambda: source.state is WorkloadState.READY)
        assert source.current is not before


async def test_a_workload_without_entry_has_no_identity(socket: Path) -> None:
    """Not ready, alive, and ready once it is registered."""
    agent, source = an_agent(socket), a_source(socket)
    agent.drop()
    async with running(agent, source):
        await eventually(lambda: source.state is WorkloadState.NO_IDENTITY)
        assert source.current is None
        agent.restore()
        await ready(source)


async def test_a_deleted_entry_takes_the_identity_away_at_once(socket: Path) -> None:
    """There is no revocation list: this is how an identity is revoked."""
    agent, source = an_agent(socket), a_source(socket)
    async with running(agent, source):
        await ready(source)
        follower = Follower(source)
        agent.drop()
        await eventually(lambda: source.state is WorkloadState.NO_IDENTITY)

        assert source.current is None
        assert follower.told[-1] is None
        agent.restore()
        await ready(source)
        assert follower.told[-1] is source.current


def damaged(agent: EmbeddedWorkloadApi, **changes: bytes | str) -> Any:
    """The agent's present answer with fields of its SVID replaced."""
    response = messages.X509SVIDResponse()
    response.CopyFrom(agent._response)
    for name, value in changes.items():
        setattr(response.svids[0], name, value)
    return response


@pytest.mark.parametrize(
    "changes",
    [
        {"x509_svid": b"nonsense"},
        {"x509_svid": b""},
        {"x509_svid_key": b"nonsense"},
        {"bundle": b""},
        {"spiffe_id": "spiffe://a.test/somebody-else"},
        {"spiffe_id": "nonsense"},
    ],
    ids=str,
)
async def test_a_malformed_update_leaves_the_last_good_one(socket: Path, changes: dict[str, bytes | str]) -> None:
    """Degraded, with a reason, and well again after the next good update."""
    agent, source = an_agent(socket), a_source(socket)
    async with running(agent, source):
        await ready(source)
        before = source.current
        agent.push(damaged(agent, **changes))
        await eventually(lambda: source.state is WorkloadState.DEGRADED)
        assert source.current is before
        agent.rotate()
        await eventually(lambda: source.state is WorkloadState.READY)


async def test_a_malformed_first_update_is_no_identity_to_use(socket: Path) -> None:
    """The word for readiness is malformed, the detail says what."""
    agent, source = an_agent(socket), a_source(socket)
    agent.push(damaged(agent, bundle=b"nonsense"))
    async with running(agent, source):
        await eventually(lambda: source.state is WorkloadState.MALFORMED)

        assert source.current is None
        assert "certificates" in source.detail


async def test_a_malformed_federated_bundle_costs_its_domain_only(socket: Path) -> None:
    """We stay ready; the domain is named."""
    agent, source = an_agent(socket), a_source(socket)
    agent.push(
        messages.X509SVIDResponse(svids=agent._response.svids, federated_bundles={"spiffe://b.test": b"nonsense"})
    )
    async with running(agent, source):
        await ready(source)

        assert source.current
        assert source.current.rejected_domains == {"spiffe://b.test"}
        assert source.state is WorkloadState.READY


async def test_an_update_that_a_subscriber_cannot_use_is_malformed(socket: Path) -> None:
    """OpenSSL may refuse what our checks let through; the process must go on."""
    agent, source = an_agent(socket), a_source(socket)

    def refuse(snapshot: X509Snapshot | None) -> None:
        if snapshot is not None:
            raise BadCertificate("refused here")

    source.subscribe(refuse)
    async with running(agent, source):
        await eventually(lambda: source.state is WorkloadState.MALFORMED)

        assert "refused here" in source.detail


TWO = (Identity(spiffe_id=API, hint="internal"), Identity(spiffe_id=OTHER, hint="external"))


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        (Selection(spiffe_id=OTHER), OTHER),
        (Selection(hint="internal"), API),
        (Selection(spiffe_id=OTHER, hint="external"), OTHER),
    ],
)
async def test_one_of_several_identities_is_chosen_by_configuration(
    socket: Path, selection: Selection, chosen: SpiffeId
) -> None:
    """By ID, by hint, or by both."""
    source = a_source(socket, selection=selection)
    async with running(an_agent(socket, identities=TWO), source):
        await ready(source)

        assert source.current
        assert source.current.svid.spiffe_id == chosen


async def test_several_identities_without_a_choice_are_refused(socket: Path) -> None:
    """The order in the agent's answer must not decide who we are."""
    source = a_source(socket)
    async with running(an_agent(socket, identities=TWO), source):
        await eventually(lambda: source.state is WorkloadState.AMBIGUOUS)

        assert "hint 'external'" in source.detail


async def test_several_svids_of_one_identity_are_no_ambiguity(socket: Path) -> None:
    """Two entries may grant the same ID."""
    source = a_source(socket)
    async with running(an_agent(socket, API, API), source):
        await ready(source)


@pytest.mark.parametrize("selection", [Selection(spiffe_id=OTHER), Selection(spiffe_id=API, hint="external")])
async def test_a_configured_identity_that_is_not_offered_is_none(socket: Path, selection: Selection) -> None:
    """Another identity is no substitute."""
    source = a_source(socket, selection=selection)
    async with running(an_agent(socket, identities=TWO[:1]), source):
        await eventually(lambda: source.state is WorkloadState.NO_IDENTITY)


async def test_an_empty_answer_takes_the_identity_away(socket: Path) -> None:
    """An agent that offers nothing has withdrawn what it offered."""
    agent, source = an_agent(socket), a_source(socket)
    async with running(agent, source):
        await ready(source)
        agent.push(messages.X509SVIDResponse())
        await eventually(lambda: source.state is WorkloadState.NO_IDENTITY)

        assert source.current is None


async def test_an_expired_svid_is_withdrawn_by_our_own_clock(socket: Path) -> None:
    """The agent's server is down: it stays silent, or repeats the expired SVID; both end the same."""
    agent = an_agent(socket, domain=EmbeddedDomain(A_TEST, svid_lifetime=timedelta(hours=1)))
    source = a_source(socket, shift=timedelta(minutes=59, seconds=58))
    follower = Follower(source)
    async with running(agent, source):
        await ready(source)
        assert source.is_ready
        await eventually(lambda: source.state is WorkloadState.EXPIRED)
        await eventually(lambda: len(follower.told) == 3)

        assert source.current is None
        assert not source.is_ready
        assert follower.told[-1] is None


async def test_a_source_is_not_ready_in_the_last_moments_of_its_svid(socket: Path) -> None:
    """Traffic must have moved away when the SVID ends."""
    agent = an_agent(socket, domain=EmbeddedDomain(A_TEST, svid_lifetime=timedelta(hours=1)))
    source = X509Source(f"unix:{socket}", now=lambda: datetime.now(UTC) + timedelta(minutes=59, seconds=57))
    async with running(agent, source):
        await ready(source)

        assert source.state is WorkloadState.EXPIRING
        assert not source.is_ready
        assert source.current


class CountingAgent(EmbeddedWorkloadApi):
    """An agent that counts how often it is asked."""

    streams = 0

    async def _fetch_x509_svid(self, stream: Any) -> None:
        self.streams += 1
        await super()._fetch_x509_svid(stream)


async def test_a_silent_stream_is_opened_anew_in_the_last_third_of_the_svids_life(socket: Path) -> None:
    """A frozen agent reports nothing, so silence is a reason to ask again."""
    agent = CountingAgent(
        socket,
        EmbeddedDomain(A_TEST, svid_lifetime=timedelta(hours=1)),
        identities=[Identity(spiffe_id=API)],
        in_cluster=False,
    )
    source = a_source(socket, shift=timedelta(minutes=59, seconds=57))
    async with running(agent, source):
        await ready(source)
        await eventually(lambda: agent.streams > 1)

        assert source.is_ready


@pytest.mark.parametrize(("age_s", "patience_s"), [(30, 30), (60, 7.5), (80, 2.5), (100, 0.2)])
def test_a_silent_stream_is_left_alone_until_then(age_s: int, patience_s: float) -> None:
    """Up to two thirds of the life there is nothing to worry about; afterwards it is asked ever sooner."""
    now = NOW
    source = X509Source("unix:/nowhere", timing=FAST, now=lambda: now)

    class Fresh:
        """A snapshot as far as waiting is concerned."""

        class svid:  # noqa: N801 - an attribute
            """Good for 90 s in all."""

            not_before, not_after = now - timedelta(seconds=age_s), now + timedelta(seconds=90 - age_s)

    source._snapshot = Fresh  # type: ignore[assignment]

    assert source._patience_s() == patience_s


async def test_an_agent_that_never_answers_is_given_up(socket: Path) -> None:
    """A frozen process still accepts connections."""
    done = asyncio.Event()

    async def hang(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await done.wait()
        writer.close()

    server = await asyncio.start_unix_server(hang, socket)
    source = a_source(socket)
    async with running(source):
        await eventually(lambda: "silent" in source.detail)
        assert source.state is WorkloadState.NO_AGENT
    done.set()
    server.close()
    await server.wait_closed()


async def test_something_else_on_the_socket_is_no_agent(socket: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever it says."""
    caplog.set_level(logging.CRITICAL)

    async def chatter(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(chatter, socket)
    source = a_source(socket)
    async with running(source):
        await eventually(lambda: source.state is WorkloadState.NO_AGENT)
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("source_first", [True, False])
async def test_a_source_stops_when_told_even_in_the_moment_its_agent_ends(socket: Path, source_first: bool) -> None:
    """The gRPC library once swallowed the cancellation, and the process did not end."""
    agent, source = an_agent(socket), a_source(socket)
    async with asyncio.timeout(10), running(*((source, agent) if source_first else (agent, source))):
        await ready(source)


class EndingAgent(EmbeddedWorkloadApi):
    """An agent that answers once and ends the stream."""

    ending: GRPCError | None = None

    async def _fetch_x509_svid(self, stream: Any) -> None:
        await stream.recv_message()
        await stream.send_message(self._response)
        if self.ending:
            raise self.ending


@pytest.mark.parametrize(
    ("ending", "why"),
    [
        (None, "closed the stream"),
        (GRPCError(Status.UNAVAILABLE, "shutting down"), "UNAVAILABLE: shutting down"),
        (GRPCError(Status.INVALID_ARGUMENT, "no"), "INVALID_ARGUMENT: no"),
    ],
)
async def test_a_stream_that_ends_is_opened_again(socket: Path, ending: GRPCError | None, why: str) -> None:
    """Only PERMISSION_DENIED takes the identity away."""
    agent = EndingAgent(socket, EmbeddedDomain(A_TEST), identities=[Identity(spiffe_id=API)], in_cluster=False)
    agent.ending = ending
    source = a_source(socket)
    async with running(agent, source):
        await eventually(lambda: source.state is WorkloadState.DEGRADED)

        assert why in source.detail
        assert source.current


@pytest.mark.parametrize("address", ["unix:/run/agent.sock", "unix:///run/agent.sock"])
def test_both_spellings_of_an_address_are_read(address: str) -> None:
    """SPIFFE Workload Endpoint, section 4."""
    assert socket_path(address) == "/run/agent.sock"


@pytest.mark.parametrize(
    "address", ["", "/run/agent.sock", "unix:", "unix:agent.sock", "unix://run/x", "tcp://1.2.3.4:1"]
)
def test_another_address_is_refused(address: str) -> None:
    """Over TCP an agent could not attest us."""
    with pytest.raises(WorkloadApiError, match="allowed are") as caught:
        socket_path(address)
    assert caught.value.reason is WorkloadReason.REJECTED

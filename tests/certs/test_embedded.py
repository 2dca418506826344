"""The development agent: what it refuses, and what it hands out."""

import asyncio
import json
import stat
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from grpclib.client import Channel, UnaryStreamMethod, UnaryUnaryMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from certs.embedded import EmbeddedDomain, EmbeddedWorkloadApi, Identity
from certs.errors import CertsError
from certs.messages import METADATA, METHODS, messages
from certs.workload import X509Source
from tests.certs.agents import FAST, a_socket, an_agent, eventually, ready, running
from tests.certs.pki import A_TEST, API, B_TEST


@pytest.fixture
def socket() -> Iterator[Path]:
    """Where the agent listens."""
    with a_socket() as path:
        yield path


def test_a_cluster_is_refused(socket: Path) -> None:
    """It attests nobody, so it has no place where there are other workloads."""
    with pytest.raises(CertsError, match="use SPIRE"):
        EmbeddedWorkloadApi(socket, EmbeddedDomain(A_TEST), identities=[], in_cluster=True)


async def test_the_socket_is_for_its_owner_only(socket: Path) -> None:
    """Whoever opens it gets the identity; it disappears with the agent."""
    agent = an_agent(socket)
    async with running(agent):
        await agent.started.wait()
        mode = stat.S_IMODE(socket.stat().st_mode)

    assert mode == 0o600
    assert not socket.exists()


async def test_svids_are_rotated_without_being_asked(socket: Path) -> None:
    """As a real agent does."""
    agent = EmbeddedWorkloadApi(
        socket,
        EmbeddedDomain(A_TEST, svid_lifetime=timedelta(minutes=5)),
        identities=[Identity(spiffe_id=API)],
        rotation_s=0.05,
        in_cluster=False,
    )
    source = X509Source(agent.address, timing=FAST)
    serials = set()
    source.subscribe(lambda snapshot: serials.add(snapshot.svid.serial if snapshot else None))
    async with running(agent, source):
        await ready(source)
        await eventually(lambda: len(serials) > 3)


async def test_the_authority_before_stays_trusted_for_one_rotation(socket: Path) -> None:
    """Peers with SVIDs of the old CA must not fail in the moment of change."""
    domain = EmbeddedDomain(A_TEST)
    agent = an_agent(socket, domain=domain)
    source = X509Source(agent.address, timing=FAST)
    async with running(agent, source):
        await ready(source)
        counts = []
        for wanted in (2, 2):
            before = source.current
            domain.rotate_authority()
            agent.rotate()
            await eventually(lambda before=before: source.current is not before)  # type: ignore[misc]
            assert source.current
            counts.append((wanted, len(source.current.bundles.anchors(A_TEST))))

    assert all(wanted == had for wanted, had in counts)


async def test_a_request_without_the_security_header_is_refused(socket: Path) -> None:
    """A confused HTTP client cannot send it."""
    agent = an_agent(socket)
    async with running(agent):
        await agent.started.wait()
        channel = Channel(path=str(socket))
        method = UnaryStreamMethod(
            channel, f"{METHODS}FetchX509SVID", messages.X509SVIDRequest, messages.X509SVIDResponse
        )
        with pytest.raises(GRPCError) as caught:
            async with asyncio.timeout(5):
                await method(messages.X509SVIDRequest())
        channel.close()

    assert caught.value.status is Status.INVALID_ARGUMENT


async def call(agent: EmbeddedWorkloadApi, method: type, name: str, request: Any, answer: type) -> Any:
    """The first answer of *name*, asked for as a real client does."""
    async with running(agent):
        await agent.started.wait()
        channel = Channel(path=agent.address.removeprefix("unix:"))
        try:
            async with (
                asyncio.timeout(5),
                method(channel, f"{METHODS}{name}", type(request), answer).open(metadata=METADATA) as stream,
            ):
                await stream.send_message(request, end=True)
                received = await stream.recv_message()
                await stream.cancel()
        finally:
            channel.close()
    return received


async def test_token_keys_of_all_domains_are_handed_out(socket: Path) -> None:
    """Our own and the federated ones, each under its domain."""
    agent = an_agent(socket, federated=[EmbeddedDomain(B_TEST)])

    answer = await call(
        agent, UnaryStreamMethod, "FetchJWTBundles", messages.JWTBundlesRequest(), messages.JWTBundlesResponse
    )

    keys = {domain: json.loads(bundle)["keys"][0] for domain, bundle in answer.bundles.items()}
    assert set(keys) == {"spiffe://a.test", "spiffe://b.test"}
    assert all(key["use"] == "jwt-svid" for key in keys.values())


@pytest.mark.parametrize(
    ("method", "name", "request_", "answer", "status"),
    [
        (
            UnaryUnaryMethod,
            "FetchJWTSVID",
            messages.JWTSVIDRequest(),
            messages.JWTSVIDResponse,
            Status.INVALID_ARGUMENT,
        ),
        (
            UnaryStreamMethod,
            "FetchJWTBundles",
            messages.JWTBundlesRequest(),
            messages.JWTBundlesResponse,
            Status.PERMISSION_DENIED,
        ),
    ],
)
async def test_requests_it_must_not_serve_are_refused(
    socket: Path, method: type, name: str, request_: Any, answer: type, status: Status
) -> None:
    """A token without audience would be good everywhere; a caller without entry gets no keys."""
    agent = an_agent(socket)
    agent.drop()

    with pytest.raises(BaseExceptionGroup) as caught:
        await call(agent, method, name, request_, answer)

    error = caught.value.exceptions[0]
    assert isinstance(error, GRPCError)
    assert error.status is status

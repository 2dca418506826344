"""Builders of the sidecar's values: each names only what a test is about."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import orjson

from certs.spiffe import SpiffeId
from certs.verify import Peer
from sidecar.core.authorise import Agent, Engine, Permit, Question
from sidecar.core.claims import User
from sidecar.core.connection import Connection
from sidecar.core.identity import Keys, Principal, trust
from sidecar.core.limits import Admission
from sidecar.core.message import Message, Shape, parse
from sidecar.core.profile import Identity, Limit, Profile, Server
from sidecar.exchange import Exchange
from sidecar.pipeline import Snapshot

NOW_S = 1_795_000_000.0  # 2026-11-18, as Unix time
AGENT = SpiffeId.parse("spiffe://a.test/ns/agents/sa/planner")
ANYBODY = Identity(mtls="permissive", user="optional", callers=("spiffe://a.test/**",))


def a_peer(spiffe_id: SpiffeId = AGENT, *, not_after_s: float = NOW_S + 300) -> Peer:
    """The verified workload at the other end."""
    return Peer(
        spiffe_id=spiffe_id,
        serial=1,
        not_before=datetime.fromtimestamp(NOW_S - 60, UTC),
        not_after=datetime.fromtimestamp(not_after_s, UTC),
        chain_der=(),
    )


def a_connection(
    body: bytes | Mapping[str, Any] = b"",
    *,
    method: str = "POST",
    path: str = "/mcp",
    query: str = "",
    headers: Sequence[tuple[bytes, bytes]] = (),
    peer: Peer | None = None,
) -> Connection:
    """One request to the MCP endpoint; *headers* come after Host and Content-Type."""
    return Connection(
        peer=peer,
        client="127.0.0.1:40000",
        method=method,
        path=path,
        query=query,
        headers=[(b"host", b"billing.test"), (b"content-type", b"application/json"), *headers],
        body=body if isinstance(body, bytes) else orjson.dumps(body),
    )


def a_request(method: str, params: Mapping[str, Any] | None = None, *, request_id: str | int = 7) -> bytes:
    """A JSON-RPC request, as a client writes it."""
    return orjson.dumps({"jsonrpc": "2.0", "id": request_id, "method": method, "params": params or {}})


def a_call(
    tool: str = "read_schema", arguments: Mapping[str, Any] | None = None, *, request_id: str | int = 7
) -> bytes:
    """A tools/call, as a client writes it."""
    return a_request("tools/call", {"name": tool, "arguments": arguments or {}}, request_id=request_id)


def a_user(user_id: str = "alice", *, issuer: str = "https://id.test") -> User:
    """A human that an OpenID provider vouched for."""
    return User(
        provider="corporate",
        issuer=issuer,
        id=user_id,
        email=None,
        role="analyst",
        roles=("analyst",),
        groups=(),
        claims={"sub": user_id},
        expires_at_s=NOW_S + 300,
    )


def a_principal(user_id: str | None = "alice", *, workload: SpiffeId | None = AGENT) -> Principal:
    """Who is calling."""
    user = None if user_id is None else a_user(user_id)
    return Principal(workload=workload, user=user, expires_at_s=NOW_S + 300)


def a_server(**changes: Any) -> Server:
    """The server behind the sidecar."""
    return Server(**{"namespace": "pay", "workload": "billing", "name": "billing", "port": 8000, **changes})


def a_question(
    message: Message | bytes = b"", *, principal: Principal | None = None, session: str | None = None
) -> Question:
    """May *principal* send *message*?"""
    return Question(
        principal=principal or a_principal(),
        message=message if isinstance(message, Message) else parse(message or a_call()),
        server=a_server(),
        session_id=session,
        agent=Agent(session=session, client_name="planner", client_version="1"),
        time_ns=int(NOW_S * 1e9),
    )


def a_permit(
    message: Message | bytes = b"", *, principal: Principal | None = None, session: str | None = None
) -> Permit:
    """Proof that *message* was authorised."""
    return Permit(question=a_question(message, principal=principal, session=session), policies=(), revision="r1")


def an_admission(message: Message | bytes = b"") -> Admission:
    """Proof that *message* may be sent."""
    return Admission(permit=a_permit(message))


def an_exchange(connection: Connection | None = None, *, message: Message | None = None) -> Exchange:
    """The record of a request that has just come."""
    return Exchange(
        connection=connection or a_connection(a_call()),
        profile=None,
        revision="r1",
        started_ns=int(NOW_S * 1e9),
        clock_s=100.0,
        trace_id="0af7651916cd43dd8448eb211c80319c",
        span_id="b7ad6b7169203331",
        message=message,
    )


def a_snapshot(
    *engines: Engine,
    identity: Identity = ANYBODY,
    keys: Keys | None = None,
    limits: Sequence[Limit] = (),
    hosts: Sequence[str] = (),
    **server: Any,
) -> Snapshot:
    """Everything that judges; *server* are fields of the profile's server."""
    return Snapshot(
        profile=Profile(server=a_server(**server), identity=identity, limits=tuple(limits)),
        revision="r1",
        engines=engines,
        trust=trust(identity, keys or {}),
        hosts=frozenset(hosts),
    )


STREAM = Message(shape=Shape.OPEN_STREAM, method=Shape.OPEN_STREAM.value, params={})

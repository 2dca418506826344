"""Builders: an exchange as the pipeline leaves it, naming only what a test is about."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import orjson

from certs.spiffe import SpiffeId
from certs.verify import Peer
from sidecar.core.authorise import Agent, Permit, Question
from sidecar.core.claims import User
from sidecar.core.connection import Connection
from sidecar.core.identity import Principal
from sidecar.core.limits import Admission, Charge, Rule
from sidecar.core.message import Message, parse
from sidecar.core.profile import Audit, Limit, Profile, Server, Telemetry
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange

STARTED_NS = 1_795_350_000_123_456_789  # 2026-11-22T12:20:00.123456789Z
AGENT = SpiffeId.parse("spiffe://a.test/ns/agents/sa/planner")
SERVER = Server(namespace="pay", workload="billing", name="billing", port=8000)

ALICE = User(
    provider="corporate",
    issuer="https://id.test",
    id="alice",
    email="alice@example.test",
    role="analyst",
    roles=("analyst", "reader"),
    groups=("finance",),
    claims={"sub": "alice", "secret-claim": "not for the record"},
    expires_at_s=STARTED_NS / 1e9 + 300,
)


def a_charge() -> Charge:
    """Return what a call cost under a limit."""
    rule = Rule(Limit(name="per-user", rate_per_s=1.0, burst=10), room=1)
    charge = Charge(rule, "alice", 1, None)
    charge.remaining, charge.is_taken = 9.0, True
    return charge


def a_profile(*, audit: Audit | None = None, telemetry: Telemetry | None = None) -> Profile:
    """Return a profile of the billing server."""
    return Profile(server=SERVER, audit=audit or Audit(), telemetry=telemetry or Telemetry())


def a_call(
    tool: str = "read_schema", arguments: Mapping[str, Any] | None = None, *, request_id: str | int = 7
) -> Message:
    """Return the message that calls *tool*."""
    params = {"name": tool, "arguments": dict(arguments or {})}
    return parse(orjson.dumps({"jsonrpc": "2.0", "id": request_id, "method": "tools/call", "params": params}))


def a_connection(*, headers: Mapping[str, str] | None = None, path: str = "/mcp") -> Connection:
    """Return a POST by the agent's SVID."""
    peer = Peer(
        spiffe_id=AGENT,
        serial=1,
        not_before=datetime(2026, 11, 22, tzinfo=UTC),
        not_after=datetime(2026, 11, 23, tzinfo=UTC),
        chain_der=(),
    )
    return Connection(
        peer=peer,
        client="10.0.0.9:41234",
        method="POST",
        path=path,
        query="",
        headers=tuple((name.encode(), value.encode()) for name, value in (headers or {}).items()),
        body=b"",
    )


def an_exchange(message: Message | None = None, *, profile: Profile | None = None, **changes: Any) -> Exchange:
    """Return the exchange of an admitted and answered call."""
    message = message or a_call()
    profile = profile or a_profile()
    principal = Principal(workload=AGENT, user=ALICE, expires_at_s=ALICE.expires_at_s)
    agent = Agent(session="run-42", client_name="planner", client_version="1.2")
    question = Question(principal=principal, message=message, server=profile.server, agent=agent, time_ns=STARTED_NS)
    permit = Permit(question=question, policies=("analysts-read",), revision="a1b2")
    exchange = Exchange(
        connection=a_connection(),
        profile=profile,
        revision="a1b2",
        started_ns=STARTED_NS,
        clock_s=100.0,
        trace_id="0af7651916cd43dd8448eb211c80319c",
        span_id="b7ad6b7169203331",
        session_id="8a1f-session",
        agent=agent,
        protocol_version="2025-11-25",
        principal=principal,
        message=message,
        permit=permit,
        admission=Admission(permit=permit, charges=(a_charge(),)),
        judged_s=0.000123,
        upstream_s=0.004,
        total_s=0.0045,
        status=200,
        result=b'{"jsonrpc":"2.0","id":7,"result":{"content":[{"type":"text","text":"ok"}]}}',
        result_bytes=75,
        result_sha256="5e" * 32,
    )
    return replace(exchange, **changes)


def a_refused_exchange(reason: Reason = Reason.DENIED, **changes: Any) -> Exchange:
    """Return the exchange of a call that was refused before it reached the server."""
    refusal = Refusal(reason, "policy does not allow it", detail="forbid-deletes")
    return an_exchange(
        **{
            "refusal": refusal,
            "permit": None,
            "admission": None,
            "upstream_s": None,
            "result": None,
            "result_bytes": 0,
            "result_sha256": None,
            **changes,
        }
    )


def an_unreadable_exchange() -> Exchange:
    """Return the exchange of bytes that were no message, before any bundle was there."""
    return replace(
        a_refused_exchange(Reason.MALFORMED),
        message=None,
        profile=None,
        principal=None,
        agent=Agent(),
        session_id=None,
        protocol_version=None,
        revision="",
        status=400,
    )

"""What the server's messages mean for the record and for memory, and whether it may ask something of a client.

The counterpart of sidecar/pipeline.py: a response ends an exchange, may give its principal a task, and says which
headers repeat a tool's arguments; a request to the client is judged like one to the server. Pure.
"""

from hashlib import sha256
from typing import Final

import msgspec

from sidecar.core.authorise import authorise
from sidecar.core.content import merged
from sidecar.core.limits import Reservation, admit, give_back, release, settle
from sidecar.core.message import Message, RequestId, Shape
from sidecar.core.review import Seen
from sidecar.core.trace import of_message
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange
from sidecar.pipeline import Memory, Snapshot, adopt, scope

MAX_KEPT_BYTES: Final = 2**20  # of a result for the audit record; a longer one is known by size and hash


def note(seen: Seen, exchange: Exchange, memory: Memory) -> None:
    """Keep what *seen* says, a message that came on the way back of *exchange* or answers it."""
    exchange.hidden += seen.hidden
    if seen.found:
        exchange.content = merged((*exchange.content, *seen.found))
    if seen.tools:
        memory.param_headers.learn(seen.tools)
    if seen.task_id is not None and exchange.principal is not None:
        memory.tasks.open(seen.task_id, exchange.principal)
    if seen.answers is not None and is_answer(exchange, seen.answers):
        exchange.result = seen.data if len(seen.data) <= MAX_KEPT_BYTES else None
        exchange.result_bytes, exchange.result_sha256 = len(seen.data), sha256(seen.data).hexdigest()
        exchange.error_code, exchange.tool_failed = seen.error_code, seen.tool_failed
        exchange.refusal = seen.refusal


def open_endpoint(endpoint: str, exchange: Exchange, memory: Memory) -> None:
    """Make *endpoint* the session of the stream that *exchange* opened (2024-11-05); raises Refusal(UPSTREAM)."""
    principal = exchange.principal
    assert principal is not None  # noqa: S101 - the stream was admitted
    known = memory.sessions.opened.get(endpoint)
    if known is not None and known.owner != principal.key:
        raise Refusal(Reason.UPSTREAM, "the server's stream cannot be used", detail="its endpoint is another's")
    exchange.session_id = endpoint
    memory.sessions.open(endpoint, principal, exchange.agent)


def is_answer(exchange: Exchange, request_id: RequestId) -> bool:
    """Say whether a response with *request_id* is the one to the exchange's request."""
    message = exchange.message
    return message is not None and message.shape is Shape.REQUEST and message.id == request_id


def judge_ask(
    exchange: Exchange, message: Message, carrier: Exchange, snapshot: Snapshot, memory: Memory, *, clock_s: float
) -> None:
    """Judge *message*, which the server asks on the way back of *carrier*; raises Refusal. *exchange* is filled in."""
    assert carrier.permit is not None  # noqa: S101 - nothing comes back without
    question = msgspec.structs.replace(carrier.permit.question, message=message, time_ns=exchange.started_ns)
    exchange.message = message
    adopt(exchange, of_message(message.params))
    permit = exchange.permit = authorise(question, snapshot.engines, snapshot.revision)
    found = admit(permit, snapshot.profile.limits, memory.ledger, clock_s)
    if isinstance(found, Reservation):
        # The answer to the client cannot wait for the store: what the limit says of its absence holds.
        try:
            found = settle(found, None, clock_s)
        except Refusal:
            give_back(found.charges)
            raise
    exchange.admission = found
    release(found.charges)  # what is under way is the call that it belongs to
    if message.id is not None:
        memory.asked.add(scope(carrier), message.id)

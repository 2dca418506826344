"""Screens by content rules what a client sends, before it is sent; and makes one request of what is left.

A masked message is a new one: its caller judges it again, and headers that repeat an argument repeat the masked one.
Refuses what a rule denies, without a word of what was found. Decides nothing about the way back (sidecar/core/review.py).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from sidecar.core.agreement import repeated
from sidecar.core.connection import Connection
from sidecar.core.content import Content, Found, Rule, Screened
from sidecar.core.detectors import Looks
from sidecar.core.message import Message
from sidecar.core.splicing import REQUEST
from sidecar.errors import Reason, Refusal

# Of the body as it was; RFC 9530, and its forerunners.
DIGESTS: Final = frozenset({b"content-digest", b"repr-digest", b"digest", b"content-md5"})
_elements: Final = msgspec.json.Decoder(list[msgspec.Raw])


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A request that was screened; *connection* is the very object when nothing was masked."""

    connection: Connection
    found: tuple[tuple[Found, ...], ...]  # in each of its messages
    refusals: tuple[Refusal | None, ...]  # of each of its messages


def screen(connection: Connection, messages: Sequence[Message], content: Content) -> Sent:
    """Return what *content* leaves of *connection*, whose body holds *messages*."""
    body = connection.body
    is_batch = body.lstrip(b" \t\r\n")[:1] == b"["
    parts = [bytes(each) for each in _elements.decode(body)] if is_batch else [body]
    looks: Mapping[Rule, Looks] = defaultdict(Looks)  # of all messages: sixty-four bodies' worth would take minutes
    screened = [_screened(part, message, content, looks) for part, message in zip(parts, messages, strict=True)]
    refusals = tuple(denial(each.denied) if each.denied else None for each in screened)
    found = tuple(each.found for each in screened)
    left = [each.data for each in screened]
    changes = [change for each in screened for change in each.changes]
    if all(new is old for new, old in zip(left, parts, strict=True)):
        return Sent(connection=connection, found=found, refusals=refusals)
    headers = [pair for pair in repeated(connection.headers, changes) if pair[0] not in DIGESTS]
    made = replace(connection, headers=headers, body=b"[" + b",".join(left) + b"]" if is_batch else left[0])
    return Sent(connection=made, found=found, refusals=refusals)


def _screened(part: bytes, message: Message, content: Content, looks: Mapping[Rule, Looks]) -> Screened:
    rules = content.requested(message)
    return Screened(data=part) if rules is None else rules.screen(part, REQUEST, looks)


def denial(detail: str) -> Refusal:
    """Return the refusal of content; *detail* is for operators."""
    return Refusal(Reason.DENIED, "what this message holds is not allowed", detail=detail)

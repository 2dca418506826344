"""What can go wrong in the sidecar, split by whose fault it is.

A Refusal is the caller's: expected, answered, counted, audited, never a traceback.
A Fault is ours: answered without detail, logged with a traceback.
A ConfigError is the operator's: it names the setting, what was given and what is allowed.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class Reason(StrEnum):
    """Why a message went no further; the strings appear in logs, metrics, audit records and docs."""

    NOT_READY = "not_ready"  # no valid identity or no policy bundle: nothing may be judged, so nothing passes
    UNAUTHENTICATED = "unauthenticated"  # no identity, or one that does not verify
    INSUFFICIENT_SCOPE = "insufficient_scope"  # policy allows it, the token lacks a scope that its user can ask for
    FORBIDDEN_CALLER = "forbidden_caller"  # a verified workload that may not call this server
    NOT_FOUND = "not_found"  # not the MCP endpoint, or a session that is not the caller's
    METHOD_NOT_ALLOWED = "method_not_allowed"  # an HTTP method that MCP does not use
    UNSUPPORTED_MEDIA = "unsupported_media"  # content type or encoding that MCP does not use
    TOO_LARGE = "too_large"
    MALFORMED = "malformed"  # not one unambiguous JSON-RPC message
    HEADER_MISMATCH = "header_mismatch"  # a header that repeats the body says something else, or is missing
    UNSUPPORTED_VERSION = "unsupported_version"  # a protocol revision that is not known here
    UNKNOWN_METHOD = "unknown_method"  # a JSON-RPC method outside the table of sidecar/core/message.py
    UNDECLARED = "undeclared"  # a method of an extension that the client did not say it has
    UNKNOWN_TASK = "unknown_task"  # a task that is not the caller's
    UNSOLICITED = "unsolicited"  # an answer that nobody asked for, or a cancellation of what is not the caller's
    DENIED = "denied"
    THROTTLED = "throttled"
    NOT_SENT = "not_sent"  # itself in order, but another message of its batch was refused
    UPSTREAM = "upstream"  # the server behind us did not answer as HTTP demands
    PROVIDER = "provider"  # the identity provider gave no token for the server behind us
    EGRESS = "egress"  # a connection that the server opens itself, to what its profile does not name
    FAULT = "fault"  # a defect of ours


class Refusal(Exception):  # noqa: N818 - not an error: the expected answer to a message that may not pass
    """A message may not pass.

    Attributes:
        reason: what kind of refusal; decides status and code (sidecar/core/replies.py).
        public: one sentence for the caller; says nothing of policies, keys or other callers.
        detail: for the operator's audit record and log only.
        retry_after_s: seconds until a retry can succeed, for THROTTLED and NOT_READY.
        id: the JSON-RPC id to answer, once it is known.
        revision: the protocol revision to answer in (sidecar/core/revision.py), once it is known.
        headers: what HTTP must say beside the status, such as WWW-Authenticate.
        data: what the protocol wants said beside the reason, in the error's data.
    """

    id: str | int | None = None
    revision: str | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()
    data: Mapping[str, Any] | None = None

    def __init__(self, reason: Reason, public: str, *, detail: str = "", retry_after_s: int | None = None) -> None:
        super().__init__(reason, public, detail)
        self.reason = reason
        self.public = public
        self.detail = detail
        self.retry_after_s = retry_after_s


class Fault(Exception):  # noqa: N818 - pairs with Refusal
    """A defect or an impossible state of ours."""


class ConfigError(Exception):
    """One or more settings are unusable; the message lists all of them, a line each."""


class BundleError(Exception):
    """A policy bundle was refused; the message names the file or field, and the last good bundle stays."""


class NetError(Exception):
    """The redirect rules could not be loaded, or are not in force; the pod must not start."""

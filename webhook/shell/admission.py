"""AdmissionReview in, AdmissionReview out; the decision is injection.py's.

A review that cannot be read is an HTTP error (400, 413, 415); a pod that may not be created is `allowed: false` in a
proper answer. Nothing is ever let through because of an error. Makes no call and has no side effect, so a dry run is
served alike. Logs who and why, never the pod: its environment may hold secrets.
Source: k8s.io/api/admission/v1; apiserver, plugin/webhook/request (what it verifies in an answer).
"""

import asyncio
import base64
import logging
import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec
from aiohttp import web

from webhook.core.container import Template
from webhook.core.injection import Decision, Deny, Inject, NamespacePolicy, Skip, SkipReason, decide
from webhook.core.pod import JSON
from webhook.core.resources import ServerProfileSpec
from webhook.errors import BadResource, BadReview
from webhook.shell.metrics import Metrics

log = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 8 * 2**20  # etcd takes 1.5 MiB of pod; a review may hold it twice; Linkerd 10 MB, Istio 6 MiB
READ_TIMEOUT_S: Final = 4.0  # four fifths of what the API server gives us (chart: timeoutSeconds 5)
MAX_WARNING: Final = 256  # what the API server passes on of one warning
API_VERSION: Final = "admission.k8s.io/v1"


class NotReady(Exception):  # noqa: N818 - not an error: the state before everything was read once
    """The webhook cannot decide yet."""


class World(Protocol):
    """What a decision needs besides the pod."""

    def template(self) -> Template:
        """Return the operator's template. Raises NotReady."""
        ...

    def profiles(self, namespace: str) -> Mapping[str, ServerProfileSpec]:
        """Return the profiles of *namespace* by name. Raises NotReady, BadResource."""
        ...

    def servers(self, namespace: str) -> Collection[str]:
        """Return the MCP servers that are in *namespace* already, as far as that is known."""
        ...


class Resource(msgspec.Struct, frozen=True):
    """GroupVersionResource."""

    resource: str
    group: str = ""
    version: str = ""


class Request(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The part of AdmissionRequest that counts."""

    uid: str
    operation: str
    resource: Resource
    sub_resource: str = ""
    namespace: str = ""
    object: Any = None


class Review(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """AdmissionReview as it comes in."""

    api_version: str
    kind: str
    request: Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The response, and what is counted and logged of it."""

    response: JSON
    decision: str
    reason: str


def read_review(body: bytes) -> Request:
    """Return the request in *body*; raises BadReview."""
    try:
        review = msgspec.json.decode(body, type=Review)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadReview(400, f"no AdmissionReview: {error}") from error
    if (review.api_version, review.kind) != (API_VERSION, "AdmissionReview"):
        raise BadReview(400, f"{review.api_version} {review.kind}: expected {API_VERSION} AdmissionReview")
    if not review.request.uid:
        raise BadReview(400, "request.uid: missing")
    return review.request


def judge(request: Request, policy: NamespacePolicy, world: World) -> Decision:
    """Return the decision on *request*. Raises NotReady, BadResource."""
    pod_creation = (
        request.operation == "CREATE"
        and (request.resource.group, request.resource.resource) == ("", "pods")
        and not request.sub_resource
    )
    if not pod_creation:
        return Skip(reason=SkipReason.NOT_A_POD_CREATION)
    return decide(
        request.object,
        namespace=request.namespace,
        policy=policy,
        profiles=world.profiles(request.namespace),
        template=world.template(),
        nonce=request.uid,  # a random UUID of the API server's
        servers=world.servers(request.namespace),
    )


def answer(uid: str, decision: Decision) -> Answer:
    """Return the response for *decision*."""
    match decision:
        case Inject():
            response = {
                "uid": uid,
                "allowed": True,
                "auditAnnotations": {
                    "decision": "inject",
                    "capture": str(decision.capture),
                    "hash": decision.hash,
                },
            }
            if decision.warnings:
                response["warnings"] = [text[:MAX_WARNING] for text in decision.warnings]
            if not decision.operations:
                return Answer(response=response, decision="unchanged", reason="")
            patch = base64.b64encode(msgspec.json.encode(decision.operations)).decode()
            response |= {"patchType": "JSONPatch", "patch": patch}
            return Answer(response=response, decision="inject", reason="")
        case Skip():
            audit = {"decision": "skip", "reason": str(decision.reason)}
            return Answer(
                response={"uid": uid, "allowed": True, "auditAnnotations": audit},
                decision="skip",
                reason=decision.reason,
            )
        case Deny():
            audit = {"decision": "deny", "reason": str(decision.code)}
            return Answer(
                response=_refusal(uid, 403, decision.code, f"sidegate: {decision.code}: {decision.message}")
                | {"auditAnnotations": audit},
                decision="deny",
                reason=decision.code,
            )


def _refusal(uid: str, code: int, reason: str, message: str) -> JSON:
    return {"uid": uid, "allowed": False, "status": {"code": code, "reason": reason, "message": message}}


class Admission:
    """The handler of `/mutate/{policy}`, where the path says which of the chart's selectors matched."""

    def __init__(self, world: World, metrics: Metrics) -> None:
        self._world = world
        self._metrics = metrics

    async def mutate(self, request: web.Request) -> web.Response:
        """Return the answer to an AdmissionReview."""
        started = time.monotonic()
        try:
            policy = NamespacePolicy(request.match_info["policy"])
        except ValueError:
            raise web.HTTPNotFound(text=f"one of {', '.join(NamespacePolicy)} is expected behind /mutate/") from None
        try:
            review = read_review(await read_body(request))
        except BadReview as error:
            self._metrics.admissions.labels("error", "bad_review").inc()
            return web.Response(status=error.status, text=str(error))
        answered = self._decide(review, policy)
        self._metrics.admissions.labels(answered.decision, answered.reason).inc()
        self._metrics.admission_seconds.observe(time.monotonic() - started)
        log.info(
            "pod reviewed",
            extra={
                "uid": review.uid,
                "namespace": review.namespace,
                "decision": answered.decision,
                "reason": answered.reason,
            },
        )
        body = {"apiVersion": API_VERSION, "kind": "AdmissionReview", "response": answered.response}
        return web.Response(body=msgspec.json.encode(body), content_type="application/json")

    def _decide(self, review: Request, policy: NamespacePolicy) -> Answer:
        try:
            return answer(review.uid, judge(review, policy, self._world))
        except NotReady as error:
            return Answer(
                response=_refusal(review.uid, 503, "not_ready", f"sidegate: not ready: {error}"),
                decision="error",
                reason="not_ready",
            )
        except BadResource as error:
            return Answer(
                response=_refusal(review.uid, 403, "bad_resource", f"sidegate: {error}"),
                decision="deny",
                reason="bad_resource",
            )
        except Exception:
            # The last resort: a defect of ours must neither let the pod in nor look like an outage.
            correlation = secrets.token_hex(6)
            log.exception("review failed", extra={"uid": review.uid, "correlation": correlation})
            return Answer(
                response=_refusal(review.uid, 500, "internal", f"sidegate: internal error {correlation}; see its log"),
                decision="error",
                reason="internal",
            )


async def read_body(request: web.Request) -> bytes:
    """Return the body of a review; raises BadReview."""
    if request.content_type != "application/json":
        raise BadReview(415, f"content type {request.content_type!r}: expected application/json")
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            return await request.read()
    except TimeoutError as error:
        raise BadReview(408, f"no whole body within {READ_TIMEOUT_S:g} s") from error
    except web.HTTPRequestEntityTooLarge as error:
        raise BadReview(413, f"body above {MAX_BODY_BYTES} bytes") from error

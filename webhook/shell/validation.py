"""Refuses custom resources that cannot be used, when they are written: the author reads file, line, column and cause.

A convenience of authors, not the guard: what arrives unchecked (a busy compiler, an older control plane) is compiled
again before it is distributed, and does not replace the last good bundle. So whatever goes wrong here lets the resource
pass with a warning. Makes no change and has no side effect. Source: k8s.io/api/admission/v1.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import msgspec
from aiohttp import web

from sidecar.core.profile import Profile, Server
from webhook.core import resources
from webhook.core.check import Finding
from webhook.core.compile import Policies
from webhook.core.pod import JSON
from webhook.core.resources import Kind, PolicySpec
from webhook.errors import BadPolicy, BadResource, BadReview
from webhook.shell.admission import API_VERSION, MAX_WARNING, Request, read_body, read_review
from webhook.shell.controllers import Compile
from webhook.shell.metrics import Metrics

log = logging.getLogger(__name__)

DEADLINE_S: Final = 4.0  # four fifths of what the API server gives us
_KINDS: Final[Mapping[str, Kind]] = {kind.plural: kind for kind in resources.KINDS}
ANY: Final = Profile(server=Server(namespace="any", workload="any", name="any", port=1))
MAX_WARNINGS: Final = 8  # of 256 characters; the API server takes 4,096 in all
Check = Callable[[Policies], Awaitable[list[Finding]]]
HINT: Final = "try it before: sidegate policy check DIRECTORY"


class Validation:
    """The handler of `/validate`."""

    def __init__(self, compile_files: Compile, metrics: Metrics, check: Check | None = None) -> None:
        """*check* finds what compiles and yet does not do what it says."""
        self._check = check
        self._compile_files = compile_files
        self._metrics = metrics

    async def validate(self, request: web.Request) -> web.Response:
        """Return the answer to an AdmissionReview of a custom resource."""
        try:
            review = read_review(await read_body(request))
        except BadReview as error:
            return web.Response(status=error.status, text=str(error))
        response = {"uid": review.uid, **await self._judge(review)}
        decision = "valid" if response["allowed"] else "invalid"
        self._metrics.admissions.labels(decision, review.resource.resource).inc()
        body = {"apiVersion": API_VERSION, "kind": "AdmissionReview", "response": response}
        return web.Response(body=msgspec.json.encode(body), content_type="application/json")

    async def _judge(self, review: Request) -> JSON:
        kind = _KINDS.get(review.resource.resource)
        if kind is None or review.resource.group != "sidegate.dev" or not isinstance(review.object, dict):
            return {"allowed": True}
        warnings: list[Finding] = []
        try:
            spec = resources.decode(kind, review.object, kind.spec)
            if isinstance(spec, PolicySpec):
                async with asyncio.timeout(DEADLINE_S):
                    warnings = await self._try(alone(_name(review.object), spec))
        except (BadResource, BadPolicy) as error:
            message = f"sidegate: {error}; {HINT}" if isinstance(error, BadPolicy) else f"sidegate: {error}"
            return {"allowed": False, "status": {"code": 422, "reason": "Invalid", "message": message}}
        except (TimeoutError, OSError) as error:
            log.warning("policy not checked when written", extra={"error": str(error) or "no time"})
            warning = "sidegate: this policy was not compiled in time; whether it can be used is in its status"
            return {"allowed": True, "warnings": [warning[:MAX_WARNING]]}
        said = [f"sidegate: {each}".replace("\n", " ")[:MAX_WARNING] for each in warnings[:MAX_WARNINGS]]
        return {"allowed": True, **({"warnings": said} if said else {})}

    async def _try(self, policies: Policies) -> list[Finding]:
        """Return what the author of *policies* may want to know. Raises BadPolicy."""
        if not (policies.cedar or policies.rego):  # an external bundle is judged when it is fetched
            return []
        if self._check is None or policies.rego:  # Cedar's check compiles first: one process less that starts
            await self._compile_files([policies], ANY)
        found = await self._check(policies) if self._check else []
        for each in found:
            if each.severity == "error":
                message = each.message + (f"; hint: {each.hint}" if each.hint else "")
                raise BadPolicy(each.file, message, line=each.line, column=each.column)
        return found


def alone(name: str, spec: PolicySpec) -> Policies:
    """Return what is compiled to try the policy *name* by itself."""
    return Policies(
        name=name,
        vocabulary=spec.vocabulary,
        cedar={f"{name}.cedar": spec.cedar} if spec.cedar else {},
        rego={f"{name}.rego": spec.rego} if spec.rego else {},
    )


def _name(item: JSON) -> str:
    return str((item.get("metadata") or {}).get("name") or "policy")

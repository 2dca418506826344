"""`sidegate check`: what stands in the way, before an installation (--pre) and after: each finding with what to do.

Reads only, by the kubeconfig; what you may not read is said. Exit status 1 when something fails.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec

from webhook.cli import kubeconfig, status
from webhook.core import preflight, resources
from webhook.core.injection import INJECTION_LABEL
from webhook.core.preflight import Finding, Level
from webhook.core.survey import State
from webhook.errors import KubeError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from webhook.core.pod import JSON
    from webhook.shell.kube import Kube

EXAMPLE: Final = "example: sidegate check --pre && helm install sidegate charts/sidegate …; sidegate check"
ADMISSION: Final = "/apis/admissionregistration.k8s.io/v1"


def add_to(verbs: Any) -> None:
    """Add the verb's arguments."""
    parser = verbs.add_parser("check", help="find what stands in the way of an installation, or of pods", description=__doc__, epilog=EXAMPLE)  # fmt: skip # noqa: E501
    parser.add_argument("--pre", action="store_true", help="only what must hold before the installation")
    parser.add_argument(
        "--release", default="sidegate", metavar="NAME", help="of the chart's objects (default: sidegate)"
    )
    parser.add_argument("-n", "--namespace", default="sidegate-system", metavar="NAME", help="of the control plane (default: sidegate-system)")  # fmt: skip # noqa: E501
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table", help="(default: table)")
    kubeconfig.add_to(parser)
    parser.set_defaults(perform=perform)


def perform(options: argparse.Namespace) -> int:
    """Print the findings; return 1 when one of them fails."""
    findings = asyncio.run(_gather(options))
    if options.output == "json":
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(findings), indent=2).decode() + "\n")
    else:
        sys.stdout.write("\n".join(lines(findings)) + "\n")
    return 1 if preflight.worst(findings) is Level.FAIL else 0


async def _gather(options: argparse.Namespace) -> list[Finding]:
    kube = await kubeconfig.connect(options)
    async with contextlib.aclosing(kube):
        return await gather(kube, release=options.release, namespace=options.namespace, is_before=options.pre)


async def gather(kube: Kube, *, release: str, namespace: str, is_before: bool) -> list[Finding]:
    """Return all findings. Raises KubeError when the API server does not answer at all."""
    version = await kube.get("/version") or {}
    checks = Checks(kube, release, namespace, version)
    findings = [preflight.api_version(version)]
    for name, check in (
        ("platform", checks.platform),
        ("aks", checks.aks),
        ("permissions", checks.permissions),
        ("spire-csi", checks.spire),
        ("network-policy", checks.network_policy),
        ("other-webhooks", checks.other_webhooks),
        *(
            ()
            if is_before
            else (
                ("crds", checks.crds),
                ("control-plane", checks.control_plane),
                ("webhook", checks.webhook),
                ("backstop", checks.backstop),
                ("namespaces", checks.namespaces),
                ("pods", checks.pods),
            )
        ),
    ):
        findings += await _tried(name, check)
    return findings


async def _tried(name: str, check: Callable[[], Awaitable[Iterable[Finding]]]) -> list[Finding]:
    try:
        return list(await check())
    except KubeError as error:
        if not error.status:
            raise
        return [Finding(name, Level.WARN, f"not to be known: {error}", "ask with the rights to read it")]


class Checks:
    """What is read for each finding."""

    def __init__(self, kube: Kube, release: str, namespace: str, version: JSON) -> None:
        self._kube = kube
        self._release = release
        self._namespace = namespace
        self._version = version

    async def platform(self) -> Iterable[Finding]:
        """Find the vendor."""
        return preflight.platform(self._version, await self._groups())

    async def aks(self) -> Iterable[Finding]:
        """Look at the names of nodes."""
        return preflight.aks(await self._kube.list_all("/apis/storage.k8s.io/v1/csinodes"))

    async def permissions(self) -> Iterable[Finding]:
        """Ask the API server what we may do."""
        answers = {}
        for group, resource, verb in preflight.NEEDED:
            attributes = {"group": group, "resource": resource, "verb": verb, "namespace": self._namespace}
            review = {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SelfSubjectAccessReview",
                "spec": {"resourceAttributes": attributes},
            }
            answer = await self._kube.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
            answers[group, resource, verb] = bool(answer["status"].get("allowed"))
        return [preflight.permissions(answers)]

    async def spire(self) -> Iterable[Finding]:
        """Look for the CSI driver, on each node."""
        storage = "/apis/storage.k8s.io/v1"
        driver = await self._kube.get(f"{storage}/csidrivers/{preflight.CSI_DRIVER}")
        nodes = await self._kube.list_all(f"{storage}/csinodes")
        is_openshift = any(each.endswith(".openshift.io") for each in await self._groups())
        found = preflight.csi_driver(driver, nodes, is_openshift=is_openshift)
        return [found, preflight.spire_agent(nodes, await self._deployments())] if driver else [found]

    async def network_policy(self) -> Iterable[Finding]:
        """Look for what enforces NetworkPolicies."""
        return [preflight.network_policy(await self._kube.list_all("/apis/apps/v1/daemonsets"))]

    async def other_webhooks(self) -> Iterable[Finding]:
        """Look at who else changes pods."""
        found = await self._kube.list_all(f"{ADMISSION}/mutatingwebhookconfigurations")
        return list(preflight.other_webhooks(found, self._release)) or [
            Finding("other-webhooks", Level.OK, "no other injector, and none that every pod waits for")
        ]

    async def crds(self) -> Iterable[Finding]:
        """Look at our resource definitions."""
        path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        return preflight.crds(
            {kind.plural: await self._kube.get(f"{path}/{kind.plural}.sidegate.dev") for kind in resources.KINDS}
        )

    async def control_plane(self) -> Iterable[Finding]:
        """Look at the replicas."""
        return [preflight.control_plane(await self._deployments())]

    async def webhook(self) -> Iterable[Finding]:
        """Look at what the API server calls, and compare what it trusts with the Secret, if that can be read."""
        configuration = await self._kube.get(f"{ADMISSION}/mutatingwebhookconfigurations/{self._release}")
        path = f"/api/v1/namespaces/{self._namespace}/secrets/{self._release}-webhook-ca"
        try:
            secret = await self._kube.get(path)
        except KubeError as error:
            if error.status != 403:
                raise
            secret = None
        text = ((secret or {}).get("data") or {}).get("ca.crt")
        ca_pem = base64.b64decode(text) if text else None
        found = preflight.webhook_configuration(configuration, ca_pem, datetime.now(UTC))
        return [found, *preflight.selectors(configuration)]

    async def backstop(self) -> Iterable[Finding]:
        """Look at what holds when nobody answers."""
        policies = await self._kube.list_all(f"{ADMISSION}/validatingadmissionpolicies", status.CONTROL_PLANE)
        bindings = await self._kube.list_all(f"{ADMISSION}/validatingadmissionpolicybindings", status.CONTROL_PLANE)
        return [preflight.backstop(policies, bindings, self._release)]

    async def namespaces(self) -> Iterable[Finding]:
        """Look at the labels."""
        capture = preflight.environment(await self._deployments(), "SIDEGATE_CAPTURE")
        return preflight.namespaces(await self._kube.list_all("/api/v1/namespaces", INJECTION_LABEL), capture)

    async def pods(self) -> Iterable[Finding]:
        """Look for pods that should be governed and are not, and for resources that complain."""
        report = await status.gather(self._kube, namespace=None, asks=False)
        found = [each for each in report.pods if each.state is State.UNGOVERNED]
        findings = [
            Finding(
                "pods",
                Level.FAIL,
                f"{each.namespace}/{each.name} is not governed, although {each.why}",
                f"restart workload {each.workload}: kubectl rollout restart",
            )
            for each in found
        ]
        findings += [
            Finding("resources", Level.WARN, each, "kubectl describe it")
            for each in report.problems
            if not each.startswith("Pod ")
        ]
        findings = findings or [Finding("pods", Level.OK, f"{len(report.pods)} pods should be governed, and are")]
        return findings + [
            Finding("placement", Level.WARN, each, "docs/explanation/placement.md") for each in report.places
        ]

    async def _deployments(self) -> list[JSON]:
        return await self._kube.list_all("/apis/apps/v1/deployments", status.CONTROL_PLANE)

    async def _groups(self) -> list[str]:
        found = await self._kube.get("/apis") or {}
        return [str(each.get("name")) for each in found.get("groups") or ()]


def lines(findings: Iterable[Finding]) -> Iterable[str]:
    """Yield a line for each finding, and one for what to do."""
    known = list(findings)
    width = max(len(each.name) for each in known)
    for each in known:
        yield f"{each.level:<4}  {each.name:<{width}}  {each.text}"
        if each.fix and each.level is not Level.OK:
            yield f"{'':{width + 8}}{each.fix}"
    counted = {level: sum(each.level is level for each in known) for level in Level}
    yield f"\n{counted[Level.OK]} ok, {counted[Level.WARN]} warnings, {counted[Level.FAIL]} failures"

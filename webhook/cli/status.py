"""`sidegate status`: whether everything that should be governed is, by what, and how fresh it is.

Reads the API server by the kubeconfig, and each sidecar's metrics through the API server's proxy. Exit status 1 when a
pod that should be governed is not. What nobody can tell from outside (whether the node really redirects the traffic,
whether NetworkPolicies are enforced) is said as what the pod was injected for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec

from sidecar import __version__
from sidecar.config import HEALTH_PORT
from webhook.cli import kubeconfig
from webhook.core import preflight, resources, survey
from webhook.core.evidence import Origin, repository
from webhook.core.injection import INJECTION_LABEL, policy_of
from webhook.core.pod import JSON
from webhook.core.survey import Counts, Live, State, Surveyed
from webhook.errors import BadResource, KubeError

if TYPE_CHECKING:
    from webhook.shell.kube import Kube

EXAMPLE: Final = "example: sidegate status -n shop"
ASKED_AT_ONCE: Final = 16
SVID_SOON_S: Final = 300.0
CONTROL_PLANE: Final = "app.kubernetes.io/name=sidegate"
UNKNOWN: Final = (
    "guarantee: what each pod was injected for; what nodes and NetworkPolicies really do must be tried (sidegate check)",
    "bundle and SVID age: each sidecar's own word, through the API server's proxy",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that is printed. *unknown* says what could not be found out."""

    control_plane: str
    namespaces: list[Counts] = field(default_factory=list)
    pods: list[Surveyed] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)  # that servers share
    unknown: list[str] = field(default_factory=list)

    @property
    def ungoverned(self) -> int:
        """How many pods should be governed and are not."""
        return sum(each.state is State.UNGOVERNED for each in self.pods)


def add_to(verbs: Any) -> None:
    """Add the verb's arguments."""
    parser = verbs.add_parser("status", help="show whether everything that should be governed is", description=__doc__, epilog=EXAMPLE)  # fmt: skip # noqa: E501
    parser.add_argument("-n", "--namespace", metavar="NAME", help="only this one (default: every labelled one)")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table", help="(default: table)")
    parser.add_argument("--no-ask", action="store_true", help="ask no sidecar: only what the API server holds")
    kubeconfig.add_to(parser)
    parser.set_defaults(perform=perform)


def perform(options: argparse.Namespace) -> int:
    """Print the report; return 1 when something is ungoverned that should not be."""
    report = asyncio.run(_gather(options))
    if options.output == "json":
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(asdict(report)), indent=2).decode() + "\n")
    else:
        sys.stdout.write("\n".join(lines(report)) + "\n")
    return 1 if report.ungoverned else 0


async def _gather(options: argparse.Namespace) -> Report:
    kube = await kubeconfig.connect(options)
    async with contextlib.aclosing(kube):
        return await gather(kube, namespace=options.namespace, asks=not options.no_ask)


async def gather(kube: Kube, *, namespace: str | None, asks: bool) -> Report:
    """Return the state of *namespace*, or of every labelled one. Raises KubeError."""
    deployments = await _deployments(kube)
    version = _version(deployments)
    report = Report(control_plane=version or "not found")
    origin, excluded = _origin(deployments), _excluded(deployments)
    for each in await _namespaces(kube, namespace):
        name, labels = each["metadata"]["name"], each["metadata"].get("labels") or {}
        if namespace is None and name in excluded:
            continue
        prefix = f"/apis/sidegate.dev/{resources.VERSION}/namespaces/{name}"
        profiles = _profiles(await kube.list_all(f"{prefix}/{resources.SERVER_PROFILE.plural}"), report)
        found = await kube.list_all(f"/api/v1/namespaces/{name}/pods")
        policy = None if name in excluded else policy_of(labels)
        surveyed = list(survey.survey(found, policy, profiles, origin))
        if asks:
            surveyed = await _ask(kube, surveyed)
        report.pods.extend(surveyed)
        line = survey.counts(name, labels, surveyed)
        report.namespaces.append(line)
        report.places.extend(survey.shared_places(line, surveyed))
        report.problems.extend(await _missed(kube, name, found, report))
        for kind in (resources.SERVER_PROFILE, resources.POLICY, resources.LIMIT):
            await _look_at(kube, f"{prefix}/{kind.plural}", kind.name, report)
        if policy_of(labels) is None and INJECTION_LABEL in labels:
            report.problems.append(
                f"Namespace {name}: {INJECTION_LABEL}={labels[INJECTION_LABEL]} governs nothing; it must be enabled or enforced"
            )
    for kind in (resources.CLUSTER_POLICY, resources.IDENTITY_PROVIDER):
        await _look_at(kube, f"/apis/sidegate.dev/{resources.VERSION}/{kind.plural}", kind.name, report)
    report.problems.extend(_pod_problems(report.pods, version))
    report.unknown.extend(UNKNOWN if asks else (UNKNOWN[0], "bundle and SVID age: not asked for (--no-ask)"))
    if version is None:
        report.unknown.append("version skew: no control plane was found to compare with")
    return report


async def _namespaces(kube: Kube, namespace: str | None) -> list[JSON]:
    if namespace is None:
        return await kube.list_all("/api/v1/namespaces", INJECTION_LABEL)
    found = await kube.get(f"/api/v1/namespaces/{namespace}")
    if found is None:
        raise KubeError(404, f"namespace {namespace}: not there")
    return [found]


async def _deployments(kube: Kube) -> list[JSON]:
    """Return those of control planes; none when they may not be seen."""
    try:
        return await kube.list_all("/apis/apps/v1/deployments", CONTROL_PLANE)
    except KubeError:
        return []


def _version(deployments: Iterable[JSON]) -> str | None:
    versions = sorted({str(each["metadata"]["labels"].get("app.kubernetes.io/version")) for each in deployments})
    return ", ".join(versions) or None


def _origin(deployments: Sequence[JSON]) -> Origin:
    """Return whose sidecars are ours, by the settings of the control planes; what one does not say is not compared."""
    images = [preflight.environment([each], "SIDEGATE_IMAGE") for each in deployments]
    identities = [preflight.environment([each], "SIDEGATE_CONTROL_PLANE_ID") for each in deployments]
    return Origin(
        repositories=frozenset(repository(each) for each in images if each) if all(images) else frozenset(),
        control_planes=frozenset(each for each in identities if each) if all(identities) else frozenset(),
    )


def _excluded(deployments: Sequence[JSON]) -> frozenset[str]:
    """Return the namespaces that every control plane leaves alone; its own is one."""
    left_alone = [
        {
            *(preflight.environment([each], "SIDEGATE_EXCLUDED_NAMESPACES") or "").split(","),
            each["metadata"]["namespace"],
        }
        for each in deployments
    ]
    return frozenset(set.intersection(*left_alone)) if left_alone else frozenset()


async def _missed(kube: Kube, namespace: str, found: Sequence[JSON], report: Report) -> list[str]:
    """Return the Services that lead past sidecars."""
    try:
        services = await kube.list_all(f"/api/v1/namespaces/{namespace}/services")
    except KubeError as error:
        report.unknown.append(f"Services of namespace {namespace}: {error}")
        return []
    return list(survey.missed_services(services, found))


def _profiles(items: Iterable[JSON], report: Report) -> Mapping[str, resources.ServerProfileSpec]:
    kind, read = resources.SERVER_PROFILE, {}
    for item in items:
        try:
            read[item["metadata"]["name"]] = resources.decode(kind, item, resources.ServerProfileSpec)
        except BadResource as error:
            report.problems.append(str(error))
    return read


async def _look_at(kube: Kube, path: str, kind: str, report: Report) -> None:
    try:
        found = await kube.list_all(path)
    except KubeError as error:
        report.unknown.append(f"{kind}: {error}")
        return
    report.problems.extend(filter(None, (survey.resource_problems(kind, each) for each in found)))


async def _ask(kube: Kube, surveyed: Sequence[Surveyed]) -> list[Surveyed]:
    """Return the pods with what their sidecars say, a few asked at a time."""
    turns = asyncio.Semaphore(ASKED_AT_ONCE)

    async def ask(each: Surveyed) -> Surveyed:
        if each.state is State.UNGOVERNED:
            return each
        async with turns:
            path = f"/api/v1/namespaces/{each.namespace}/pods/{each.name}:{HEALTH_PORT}/proxy/metrics"
            try:
                live = survey.parse_live(await kube.text(path), time.time())
            except KubeError as error:
                live = Live(problem=str(error))
        return msgspec.structs.replace(each, live=live)

    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(ask(each)) for each in surveyed]
    return [each.result() for each in asked]


def _pod_problems(pods: Iterable[Surveyed], version: str | None) -> Iterable[str]:
    for each in pods:
        name = f"Pod {each.namespace}/{each.name}"
        if each.state is State.UNGOVERNED:
            yield f"{name}: not governed, although {each.why}; restart workload {each.workload}"
            continue
        if each.state is State.STARTING:
            yield f"{name}: {each.why}"
        if version and each.version not in version.split(", "):
            yield f"{name}: injected by version {each.version}, the control plane is {version}; restart it"
        if each.live is None:
            continue
        if each.live.problem:
            yield f"{name}: its sidecar does not answer: {each.live.problem}"
        elif not each.live.revision:
            yield f"{name}: its sidecar has no bundle, and refuses all calls"
        if each.live.svid_left_s is not None and each.live.svid_left_s < SVID_SOON_S:
            yield f"{name}: its SVID ends in {_span(each.live.svid_left_s)}; is SPIRE well?"


def lines(report: Report) -> Iterable[str]:
    """Yield the report as tables."""
    yield f"control plane: {report.control_plane}   this program: {__version__}"
    if not report.namespaces:
        yield f"no namespace is labelled; govern one with: kubectl label namespace NAME {INJECTION_LABEL}=enabled"
    else:
        yield ""
        head = ("NAMESPACE", "POLICY", "EXPECTED", "GOVERNED", "STARTING", "SERVERS", "GUARANTEE", "VERSION")
        yield from _table(head, map(_line, report.namespaces))
    if report.pods:
        yield ""
        yield from _table(
            ("POD", "STATE", "GUARANTEE", "VERSION", "BUNDLE", "CONFIRMED", "SVID LEFT"), map(_row, report.pods)
        )
    for title, texts in (
        ("problems", report.problems),
        ("shared places", report.places),
        ("not to be known from here", report.unknown),
    ):
        if texts:
            yield f"\n{title}:"
            yield from (f"  {text}" for text in texts)
    verdict = (
        f"{report.ungoverned} not governed that should be" if report.ungoverned else "all that should be governed is"
    )
    yield f"\n{verdict}"


def _line(each: Counts) -> tuple[str, ...]:
    numbers = map(str, (each.expected, each.governed, each.starting, len(each.servers)))
    return each.namespace, each.policy, *numbers, each.guarantees, each.versions


def _row(each: Surveyed) -> tuple[str, ...]:
    live = each.live or Live()
    age = "-" if live.bundle_age_s is None else f"{_span(live.bundle_age_s)} ago"
    left = "-" if live.svid_left_s is None else _span(live.svid_left_s)
    name = f"{each.namespace}/{each.name}"
    return name, each.state, each.guarantee, each.version or "-", live.revision[:12] or "-", age, left


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    cells = [head, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for row in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _span(seconds: float) -> str:
    """Return *seconds* in its largest unit."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "m")):
        if abs(seconds) >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"

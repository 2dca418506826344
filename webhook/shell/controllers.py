"""Watch pods and custom resources; compile, for each pod, what its sidecar enforces; publish it.

Nothing is compiled before everything was listed once: a bundle without a policy that merely has not arrived would be
wrong. What cannot be used stops the bundles it touches from changing: the last good one stays, and the problem is
logged, counted and told to the sidecar that has none. Also what admission knows of the cluster: the profiles.
"""

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from sidecar.core import bundle, profile
from webhook.core import patch, resources
from webhook.core import pod as pods
from webhook.core.annotations import INJECTED
from webhook.core.compile import Policies
from webhook.core.effective import Defaults, Effective, NamespaceResources, combine
from webhook.core.pod import JSON, Pod
from webhook.core.resources import (
    ClusterPolicySpec,
    IdentityProviderSpec,
    Kind,
    LimitSpec,
    PolicySpec,
    ServerProfileSpec,
)
from webhook.errors import BadPolicy, BadResource, Denial
from webhook.shell.admission import NotReady
from webhook.shell.bundles import Bundles, PodKey, Published
from webhook.shell.kube import Change, Gone, Kube, Listed, Put
from webhook.shell.metrics import Metrics

log = logging.getLogger(__name__)

RETRY_S: Final = 30.0  # for what may succeed without a change: a compiler that ran out of time
MAX_COMPILED: Final = 2048  # workloads whose bundle is remembered; a few KB each, some 100 KB with Rego
PODS: Final = "/api/v1/pods"

Compile = Callable[[Sequence[Policies], profile.Profile], Awaitable[Mapping[str, bytes]]]
Key = tuple[str, str]
"""Namespace ("" for cluster-scoped kinds) and name."""


def path_of(kind: Kind) -> str:
    """Return the collection of *kind* in all namespaces."""
    return f"/apis/sidegate.dev/{resources.VERSION}/{kind.plural}"


class Catalogue:
    """The custom resources as last seen. Mutated by `apply` alone."""

    def __init__(self) -> None:
        self._decoded: dict[str, dict[Key, Any]] = {}

    @property
    def is_complete(self) -> bool:
        """Whether every kind was listed at least once."""
        return len(self._decoded) == len(resources.KINDS)

    @property
    def broken(self) -> int:
        """How many resources cannot be read."""
        return sum(isinstance(each, BadResource) for kind in self._decoded.values() for each in kind.values())

    def apply(self, kind: Kind, change: Change) -> frozenset[str]:
        """Take *change* in; returns the namespaces it touches, "" for all of them."""
        known = self._decoded.setdefault(kind.name, {})
        match change:
            case Listed(items):
                fresh = {_key(item): _decoded(kind, item) for item in items}
                touched = {key for key in known.keys() | fresh.keys() if known.get(key) != fresh.get(key)}
                self._decoded[kind.name] = fresh
            case Put(item):
                touched, known[_key(item)] = {_key(item)}, _decoded(kind, item)
            case Gone(item):
                touched = {_key(item)}
                known.pop(_key(item), None)
        return frozenset(namespace for namespace, _ in touched)

    def namespace(self, name: str) -> NamespaceResources:
        """Return the resources of the namespace. Raises BadResource when one of them cannot be read.

        To leave it out instead would drop a restriction, as likely as not.
        """
        return NamespaceResources(
            profiles=self._in(resources.SERVER_PROFILE, name, ServerProfileSpec),
            policies=self._in(resources.POLICY, name, PolicySpec),
            limits=self._in(resources.LIMIT, name, LimitSpec),
        )

    def guard_rails(self) -> Mapping[str, ClusterPolicySpec]:
        """Return the cluster's policies. Raises BadResource."""
        return self._in(resources.CLUSTER_POLICY, "", ClusterPolicySpec)

    def profiles(self, namespace: str) -> Mapping[str, ServerProfileSpec]:
        """Return the profiles of *namespace*. Raises BadResource."""
        return self._in(resources.SERVER_PROFILE, namespace, ServerProfileSpec)

    def providers(self) -> Mapping[str, IdentityProviderSpec]:
        """Return the identity providers. Raises BadResource."""
        return self._in(resources.IDENTITY_PROVIDER, "", IdentityProviderSpec)

    def _in(self, kind: Kind, namespace: str, spec: type[resources.Spec]) -> dict[str, resources.Spec]:
        found: dict[str, resources.Spec] = {}
        for (where, name), each in self._decoded.get(kind.name, {}).items():
            if where != namespace:
                continue
            if isinstance(each, BadResource):
                raise each
            if isinstance(each, spec):
                found[name] = each
        return found


def _key(item: JSON) -> Key:
    metadata = item["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def _decoded(kind: Kind, item: JSON) -> Any:
    try:
        return resources.decode(kind, item, kind.spec)
    except BadResource as error:
        log.error("resource cannot be used", extra={"error": str(error)})  # noqa: TRY400 - the text says it all
        return error


@dataclass(frozen=True, slots=True)
class Tracked:
    """An injected pod, without our own parts; *problem* when those cannot be told from the rest."""

    service_account: str
    pod: Pod | None
    problem: str = ""


class Controller:
    """Keeps Bundles up to date. Mutated by its own tasks alone, which all run on one loop."""

    def __init__(
        self,
        bundles: Bundles,
        compile_files: Compile,
        signing_key: ec.EllipticCurvePrivateKey,
        defaults: Defaults,
        metrics: Metrics,
    ) -> None:
        self._bundles = bundles
        self._compile_files = compile_files
        self._signing_key = signing_key
        self._defaults = defaults
        self._metrics = metrics
        self._catalogue = Catalogue()
        self._pods: dict[PodKey, Tracked] | None = None
        self._dirty: set[PodKey] = set()
        self._failing: dict[PodKey, str] = {}
        self._compiled: OrderedDict[str, Published] = OrderedDict()
        self._wake = asyncio.Event()

    @property
    def is_synced(self) -> bool:
        """Whether everything was listed once."""
        return self._pods is not None and self._catalogue.is_complete

    def profiles(self, namespace: str) -> Mapping[str, ServerProfileSpec]:
        """Return the profiles of *namespace*. Raises NotReady, BadResource."""
        if not self._catalogue.is_complete:
            raise NotReady("the custom resources were not listed yet")
        return self._catalogue.profiles(namespace)

    async def run(self, kube: Kube) -> None:
        """Follow the cluster and compile, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_pods(kube), name="pods")
            for kind in resources.KINDS:
                tasks.create_task(self._follow(kube, kind), name=kind.plural)
            tasks.create_task(self._compile(), name="compile")

    async def _follow_pods(self, kube: Kube) -> None:
        async for change in kube.follow(PODS, INJECTED):
            self.apply_pods(change)

    async def _follow(self, kube: Kube, kind: Kind) -> None:
        async for change in kube.follow(path_of(kind)):
            self.apply(kind, change)

    def apply(self, kind: Kind, change: Change) -> None:
        """Take in a change of the resources of *kind*."""
        touched = self._catalogue.apply(kind, change)
        self._metrics.broken_resources.set(self._catalogue.broken)
        self._mark(pod for pod in self._pods or () if "" in touched or pod[0] in touched)

    def apply_pods(self, change: Change) -> None:
        """Take in a change of the injected pods."""
        known = self._pods or {}
        seen: dict[PodKey, Tracked] = {}
        gone: set[PodKey] = set()
        match change:
            case Listed(items):
                seen = {_key(item): _tracked(item) for item in items}
                gone = known.keys() - seen.keys()
            case Put(item):
                seen = {_key(item): _tracked(item)}
            case Gone(item):
                gone = {_key(item)}
        changed = [pod for pod, tracked in seen.items() if known.get(pod) != tracked]  # not for every new status
        known.update(seen)
        for pod in gone:
            known.pop(pod, None)
            self._failing.pop(pod, None)
            self._bundles.forget(pod)
        for pod, tracked in seen.items():
            self._bundles.track(pod, tracked.service_account)
        self._pods = known
        self._metrics.bundle_pods.set(len(self._bundles))
        self._mark(changed)

    async def _compile(self) -> None:
        """Compile what has changed, for ever."""
        while True:
            try:
                async with asyncio.timeout(RETRY_S):
                    await self._wake.wait()
            except TimeoutError:
                self._dirty.update(self._failing)
            self._wake.clear()
            if self.is_synced:
                await self.compile_dirty()

    async def compile_dirty(self) -> None:
        """Compile for every pod that something has changed for."""
        dirty, self._dirty = self._dirty, set()
        failed: dict[str, str] = {}  # what was tried for one pod is not tried for the next of the same workload
        for pod in sorted(dirty):
            tracked = (self._pods or {}).get(pod)
            if tracked is not None:
                await self._refresh(pod, tracked, failed)
        self._metrics.failing_pods.set(len(self._failing))

    async def _refresh(self, pod: PodKey, tracked: Tracked, failed: dict[str, str]) -> None:
        try:
            self._bundles.publish(pod, await self._published(self._effective(pod, tracked), failed))
        except (BadResource, BadPolicy, Denial) as error:
            self._bundles.fail(pod, str(error))
            if self._failing.get(pod) != str(error):
                self._failing[pod] = str(error)
                log.error("bundle not renewed", extra={"pod": "/".join(pod), "error": str(error)})  # noqa: TRY400
        else:
            self._failing.pop(pod, None)

    def _effective(self, pod: PodKey, tracked: Tracked) -> Effective:
        """Return what *pod* gets. Raises BadResource, Denial."""
        if tracked.pod is None:
            raise BadResource(f"Pod {'/'.join(pod)}", tracked.problem)
        return combine(
            tracked.pod,
            pod[0],
            self._catalogue.namespace(pod[0]),
            self._catalogue.providers(),
            self._defaults,
            self._catalogue.guard_rails(),
        )

    async def _published(self, effective: Effective, failed: dict[str, str]) -> Published:
        """Return the bundle for *effective*, compiled only if it was not before. Raises BadPolicy."""
        content = msgspec.json.encode([effective.profile, effective.policies], order="sorted")
        digest = hashlib.sha256(content).hexdigest()
        if digest in self._compiled:
            self._compiled.move_to_end(digest)
            return self._compiled[digest]
        if digest in failed:
            raise BadPolicy("bundle", failed[digest])
        try:
            files = await self._compile_files(effective.policies, effective.profile)
        except (BadPolicy, OSError) as error:  # OSError: the opa program cannot be run
            self._metrics.compilations.labels("failed").inc()
            failed[digest] = str(error)
            raise error if isinstance(error, BadPolicy) else BadPolicy("bundle", str(error)) from error
        self._metrics.compilations.labels("ok").inc()
        published = Published(bundle.encode(files, self._signing_key), bundle.revision(files))
        self._compiled[digest] = published
        while len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return published

    def _mark(self, dirty: Iterable[PodKey]) -> None:
        self._dirty.update(dirty)
        self._wake.set()


def _tracked(item: JSON) -> Tracked:
    """Return what is kept of a pod: a few KB of the tens that it has."""
    service_account = str((item.get("spec") or {}).get("serviceAccountName") or "default")
    try:
        pods.read(item)
        return Tracked(service_account, pods.read(patch.restore(item)))
    except (Denial, ValueError) as error:
        return Tracked(service_account, None, str(error))

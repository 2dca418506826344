"""Watch pods and custom resources; compile, for each pod, what its sidecar enforces; publish it.

Nothing is compiled before everything was listed once: a bundle without a policy that merely has not arrived would be
wrong. What cannot be used stops the bundles it touches from changing: the last good one stays, and the problem is
logged, counted and told to the sidecar that has none. Also what admission knows of the cluster: the profiles.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakValueDictionary

import msgspec

from sidecar.core import profile
from sidecar.errors import BundleError
from webhook.core import patch, resources
from webhook.core import pod as pods
from webhook.core.annotations import GROUP, INJECTED
from webhook.core.compile import Policies, key_of
from webhook.core.effective import Defaults, Effective, NamespaceResources, combine
from webhook.core.placement import Occupants
from webhook.core.pod import JSON, Pod, is_over
from webhook.core.resources import (
    BundleSpec,
    ClusterPolicySpec,
    IdentityProviderSpec,
    Kind,
    LimitSpec,
    PolicySpec,
    ServerProfileSpec,
)
from webhook.core.sequence import Seen, number
from webhook.core.status import Held, PodState, Source, selecting
from webhook.errors import BadPolicy, BadResource, Denial
from webhook.shell.admission import NotReady
from webhook.shell.bundles import Bundles, PodKey, Published
from webhook.shell.external import External
from webhook.shell.kube import Bookmark, Change, Gone, Kube, Listed, Put, version_of
from webhook.shell.metrics import Metrics

log = logging.getLogger(__name__)

RETRY_S: Final = 30.0  # for what may succeed without a change: a compiler that ran out of time
TURN: Final = 64  # pods that are looked after at a stretch, some milliseconds
MAX_COMPILED: Final = 2048  # workloads whose bundle is remembered; a few KB each, some 100 KB with Rego
PODS: Final = "/api/v1/pods"
TRACKED: Final = "tracked"  # member of what is left of a pod

Compile = Callable[[Sequence[Policies], profile.Profile], Awaitable[Mapping[str, bytes]]]
Key = tuple[str, str]
"""Namespace ("" for cluster-scoped kinds) and name."""


def path_of(kind: Kind) -> str:
    """Return the collection of *kind* in all namespaces."""
    return f"/apis/sidegate.dev/{resources.VERSION}/{kind.plural}"


class Catalogue:
    """The custom resources as last seen, by kind, namespace and name. Mutated by `apply` alone."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, dict[str, Held]]] = {}

    @property
    def is_complete(self) -> bool:
        """Whether every kind was listed at least once."""
        return len(self._held) == len(resources.KINDS)

    @property
    def broken(self) -> int:
        """How many resources cannot be read."""
        return sum(isinstance(each.spec, BadResource) for _, each in self.all())

    def all(self) -> Iterator[tuple[Source, Held]]:
        """Yield everything."""
        for kind, namespaces in self._held.items():
            for namespace, names in namespaces.items():
                for name, each in names.items():
                    yield (kind, namespace, name), each

    def visible(self, namespace: str) -> Iterator[tuple[Source, Held]]:
        """Yield what pods of *namespace* may be selected by: its own resources and the cluster's."""
        for kind, namespaces in self._held.items():
            for where in (namespace, ""):
                for name, each in namespaces.get(where, {}).items():
                    yield (kind, where, name), each

    def apply(self, kind: Kind, change: Change) -> frozenset[str]:
        """Take *change* in; returns the namespaces it touches, "" for all of them. A new status alone touches none."""
        known = self._held.setdefault(kind.name, {})
        match change:
            case Listed(items):
                fresh = {_key(item): item for item in items}
                gone = [(where, name) for where, names in known.items() for name in names if (where, name) not in fresh]
            case Put(item):
                fresh, gone = {_key(item): item}, []
            case Gone(item):
                fresh, gone = {}, [_key(item)]
            case Bookmark():
                return frozenset()
        touched = {where for where, name in gone if known.get(where, {}).pop(name, None)}
        for (where, name), item in fresh.items():
            names = known.setdefault(where, {})
            before, names[name] = names.get(name), _held(kind, item)
            if before is None or _meaning(before) != _meaning(names[name]):
                touched.add(where)
                if isinstance(names[name].spec, BadResource):
                    log.error("resource cannot be used", extra={"error": str(names[name].spec)})
        return frozenset(touched)

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

    def using(self) -> Iterator[tuple[str, BundleSpec]]:
        """Yield the external bundles that policies name, each with the policy's namespace."""
        for kind in (resources.POLICY, resources.CLUSTER_POLICY):
            for namespace, names in self._held.get(kind.name, {}).items():
                for each in names.values():
                    if isinstance(each.spec, PolicySpec) and each.spec.bundle is not None:
                        yield namespace, each.spec.bundle

    def bundles(self) -> list[BundleSpec]:
        """Return the external bundles that policies name."""
        return [each for _, each in self.using()]

    def _in(self, kind: Kind, namespace: str, spec: type[resources.Spec]) -> dict[str, resources.Spec]:
        found: dict[str, resources.Spec] = {}
        for name, each in self._held.get(kind.name, {}).get(namespace, {}).items():
            if isinstance(each.spec, BadResource):
                raise each.spec
            if isinstance(each.spec, spec):
                found[name] = each.spec
        return found


def _key(item: JSON) -> Key:
    metadata = item["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def _held(kind: Kind, item: JSON) -> Held:
    generation, status = item["metadata"].get("generation", 0), item.get("status") or {}
    try:
        return Held(resources.decode(kind, item, kind.spec), generation, status)
    except BadResource as error:
        return Held(error, generation, status)


def _meaning(held: Held) -> Any:
    """Return what two versions of a resource are compared by: exceptions are equal to themselves only."""
    return str(held.spec) if isinstance(held.spec, BadResource) else held.spec


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Tracked:
    """An injected pod, without our own parts; *problem* when those cannot be told from the rest.

    One object for all pods that get the same: all of a pod counts, but its name where a controller's stands. *likeness*
    is a digest of it.
    """

    service_account: str
    pod: Pod | None
    problem: str
    revision: str  # of the control plane that injected it
    likeness: bytes


class Controller:
    """Keeps Bundles up to date. Mutated by its own tasks alone, which all run on one loop."""

    def __init__(
        self,
        bundles: Bundles,
        compile_files: Compile,
        defaults: Defaults,
        metrics: Metrics,
    ) -> None:
        self._bundles = bundles
        self._compile_files = compile_files
        self._defaults = defaults
        self._metrics = metrics
        self._catalogue = Catalogue()
        self._pods: dict[PodKey, Tracked] | None = None
        self._kinds: WeakValueDictionary[bytes, Tracked] = WeakValueDictionary()  # by likeness
        self._seen = Seen([PODS, *(kind.plural for kind in resources.KINDS)])
        self._occupants = Occupants()
        self._versions: dict[PodKey, int] = {}  # at which a pod was last changed, as far as its bundle goes
        self._is_compiling = False
        self._alike: dict[bytes, tuple[Published, PodState]] = {}  # what pods get that differ by name; until a change
        self._changes = 0
        self.external: External | None = None
        self._dirty: set[PodKey] = set()
        self._failing: dict[PodKey, str] = {}
        self._states: dict[PodKey, PodState] = {}  # of pods that nothing has changed for since
        self._sources: dict[PodKey, tuple[Source, ...]] = {}
        self._compiled: OrderedDict[bytes, Published] = OrderedDict()
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

    def providers(self) -> Mapping[str, IdentityProviderSpec]:
        """Return the identity providers. Raises BadResource."""
        return self._catalogue.providers()

    def servers(self, namespace: str) -> frozenset[str]:
        """Return the MCP servers that *namespace* holds, as far as pods are known."""
        return self._occupants.servers(namespace)

    @property
    def states(self) -> Mapping[PodKey, PodState]:
        """What was made for each pod of the present resources; without those that are still to be compiled for."""
        return self._states

    @property
    def sources(self) -> Mapping[PodKey, tuple[Source, ...]]:
        """Which resources select each pod, as far as it was looked at."""
        return self._sources

    def others(self, revision: str) -> frozenset[PodKey]:
        """Return the pods that were injected by a control plane of another *revision*; it may be the one they ask."""
        return frozenset(pod for pod, tracked in (self._pods or {}).items() if tracked.revision != revision)

    def resources(self) -> dict[Source, Held]:
        """Return all custom resources as last seen."""
        return dict(self._catalogue.all())

    async def run(self, kube: Kube) -> None:
        """Follow the cluster and compile, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_pods(kube), name="pods")
            for kind in resources.KINDS:
                tasks.create_task(self._follow(kube, kind), name=kind.plural)
            tasks.create_task(self._compile(), name="compile")

    async def _follow_pods(self, kube: Kube) -> None:
        async for change in kube.follow(PODS, INJECTED, keep=self.slim):
            self.apply_pods(change)

    async def _follow(self, kube: Kube, kind: Kind) -> None:
        async for change in kube.follow(path_of(kind)):
            self.apply(kind, change)

    def apply(self, kind: Kind, change: Change) -> None:
        """Take in a change of the resources of *kind*."""
        touched = self._catalogue.apply(kind, change)
        self._seen.take(kind.plural, version_of(change), touched)
        self._metrics.broken_resources.set(self._catalogue.broken)
        self._mark(pod for pod in self._pods or () if "" in touched or pod[0] in touched)
        self._raise_floor()
        if touched and kind in (resources.POLICY, resources.CLUSTER_POLICY) and self.external is not None:
            self.external.use(self._catalogue.bundles())

    def renew(self, changed: BundleSpec) -> None:
        """Compile again for whom the external bundle *changed* is of account."""
        using = {where for where, each in self._catalogue.using() if each == changed}
        self._mark(pod for pod in self._pods or () if "" in using or pod[0] in using)

    def slim(self, item: JSON) -> JSON:
        """Return what is kept of a pod, a few hundred bytes of the tens of KB that it has, for `apply_pods`."""
        names = ("name", "namespace", "resourceVersion", "deletionTimestamp")
        metadata = {name: item["metadata"][name] for name in names if name in item["metadata"]}
        phase = (item.get("status") or {}).get("phase")
        return {"metadata": metadata, "status": {"phase": phase}, TRACKED: self._tracked(item)}

    def _tracked(self, item: JSON) -> Tracked:
        held = item.get(TRACKED)
        tracked = held if isinstance(held, Tracked) else _tracked(item)
        return self._kinds.setdefault(tracked.likeness, tracked)

    def apply_pods(self, change: Change) -> None:
        """Take in a change of the injected pods, whole ones or what `slim` left of them."""
        known = self._pods or {}
        seen: dict[PodKey, Tracked] = {}
        gone: set[PodKey] = set()
        over: set[PodKey] = set()
        match change:
            case Listed(items):
                seen = {_key(item): self._tracked(item) for item in items}
                over = {_key(item) for item in items if is_over(item)}
                gone = known.keys() - seen.keys()
            case Put(item):
                seen = {_key(item): self._tracked(item)}
                over = {_key(item)} if is_over(item) else set()
            case Gone(item):
                gone = {_key(item)}
            case Bookmark():
                pass
        self._seen.take(PODS, version_of(change))
        changed = [pod for pod, tracked in seen.items() if known.get(pod) != tracked]  # not for every new status
        known.update(seen)
        if self._pods is not None:  # what a first list shows counts from the floor on
            self._versions |= dict.fromkeys(changed, number(version_of(change)))
        for pod in gone:
            known.pop(pod, None)
            for known_of in (self._failing, self._states, self._sources, self._versions):
                known_of.pop(pod, None)
            self._bundles.forget(pod)
            self._occupants.remove(*pod)
        for pod, tracked in seen.items():
            self._bundles.track(pod, tracked.service_account)
            self._occupants.put(*pod, tracked.pod, is_over=pod in over)
        self._pods = known
        self._metrics.bundle_pods.set(len(self._bundles))
        self._mark(changed)
        self._raise_floor()

    def _raise_floor(self) -> None:
        """Know that bundles reflect all that was seen, once nothing is left to compile."""
        if not self._dirty and not self._is_compiling:
            self._bundles.floor = max(self._bundles.floor, self._seen.floor)

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
        self._is_compiling = True
        failed: dict[bytes, str] = {}  # what was tried for one pod is not tried for the next of the same workload
        for count, pod in enumerate(sorted(dirty)):
            tracked = (self._pods or {}).get(pod)
            if tracked is not None:
                await self._refresh(pod, tracked, failed)
            if count % TURN == 0:
                await asyncio.sleep(0)  # let what is done go out, and admission be served
        self._is_compiling = False
        self._raise_floor()
        self._metrics.failing_pods.set(len(self._failing))

    async def _refresh(self, pod: PodKey, tracked: Tracked, failed: dict[bytes, str]) -> None:
        sequence = max(self._seen.of(pod[0]), self._versions.get(pod, 0))  # of what is compiled now
        key, changes = tracked.likeness, self._changes
        if key in self._alike:
            published, state = self._alike[key]
            self._bundles.publish(pod, published, sequence)
            self._failing.pop(pod, None)
            self._sources[pod], self._states[pod] = state.sources, state
            return
        labels = tracked.pod.labels if tracked.pod else {}
        sources = self._sources[pod] = tuple(selecting(labels, pod[0], self._catalogue.visible(pod[0])))
        try:
            effective = self._effective(pod, tracked)
            published = await self._published(effective, sequence, failed)
        except (BadResource, BadPolicy, Denial) as error:
            self._bundles.fail(pod, str(error))
            state = PodState(sources, "", str(error), is_profiles=_is_profiles(error))
            if self._failing.get(pod) != str(error):
                self._failing[pod] = str(error)
                log.error("bundle not renewed", extra={"pod": "/".join(pod), "error": str(error)})  # noqa: TRY400
        else:
            self._bundles.publish(pod, published, sequence)
            self._failing.pop(pod, None)
            state = PodState(sources, published.revision, notes=effective.notes)
            if changes == self._changes:  # nothing happened while it was compiled
                self._alike[key] = published, state
        if pod in (self._pods or {}) and pod not in self._dirty:  # neither gone nor changed again meanwhile
            self._states[pod] = state

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
            self.external,
        )

    async def _published(self, effective: Effective, sequence: int, failed: dict[bytes, str]) -> Published:
        """Return the bundle for *effective*, compiled only if it was not before. Raises BadPolicy."""
        digest = key_of(effective.profile, effective.policies)
        if digest in self._compiled:
            self._compiled.move_to_end(digest)
            return self._compiled[digest]
        if digest in failed:
            raise BadPolicy("bundle", failed[digest])
        try:
            published = await self._bundles.sign(
                await self._compile_files(effective.policies, effective.profile), sequence
            )
        # OSError: the opa program cannot be run; the others: what no bundle can hold. One tenant's must not end us.
        except (BadPolicy, BundleError, OSError, ValueError) as error:
            self._metrics.compilations.labels("failed").inc()
            failed[digest] = str(error)
            raise error if isinstance(error, BadPolicy) else BadPolicy("bundle", str(error)) from error
        self._metrics.compilations.labels("ok").inc()
        self._compiled[digest] = published
        while len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return published

    def _mark(self, dirty: Iterable[PodKey]) -> None:
        dirty = list(dirty)
        self._dirty.update(dirty)
        self._alike.clear()
        self._changes += 1
        for pod in dirty:
            self._states.pop(pod, None)
        self._wake.set()


def _is_profiles(error: Exception) -> bool:
    """Say whether *error* is about what a pod's profile says, not about a policy or another resource."""
    if isinstance(error, BadResource):
        return error.resource == resources.SERVER_PROFILE.name or error.resource.startswith(
            resources.IDENTITY_PROVIDER.name
        )
    return isinstance(error, Denial)


def _tracked(item: JSON) -> Tracked:
    """Return what is kept of a pod."""
    metadata = item["metadata"]
    service_account = str((item.get("spec") or {}).get("serviceAccountName") or "default")
    revision = str((metadata.get("labels") or {}).get(INJECTED))
    pod, problem = None, ""
    try:
        pods.read(item)
        pod = _pruned(pods.read(patch.restore(item)))
    except (Denial, ValueError) as error:
        problem = str(error)
    likeness = key_of(metadata.get("namespace", ""), pod, problem, service_account, revision)
    return Tracked(service_account, pod, problem, revision, likeness)


def _pruned(pod: Pod) -> Pod:
    """Return *pod* without what differs from replica to replica and decides nothing: names, and a network's annotations."""
    metadata = pod.metadata
    ours = {key: value for key, value in pod.annotations.items() if key.startswith(f"{GROUP}/")}
    metadata = msgspec.structs.replace(metadata, annotations=ours)
    if any(each.controller for each in metadata.owner_references or ()):
        metadata = msgspec.structs.replace(metadata, name=None, uid=None)
    return msgspec.structs.replace(pod, metadata=metadata)

"""Keep the NetworkPolicies of core/surroundings.py as they ought to be, by the one replica that holds the Lease.

What somebody edits or deletes is put right within PERIOD_S; what is no longer wanted is deleted. All of them belong to
the release's ClusterRole, so that the API server's garbage collector takes them away after an uninstall; what others
write into their metadata besides (labels, annotations, finalizers of a network's own controller) is left to them until
one has to be put right. Follows the labels of namespaces and our own policies; the profiles come from the controller.
"""

import asyncio
import logging
from typing import Any, Final

from webhook.core import resources
from webhook.core.injection import policy_of
from webhook.core.pod import JSON
from webhook.core.status import Source
from webhook.core.surroundings import API_VERSION, Surroundings, policies, undeclared
from webhook.errors import BadResource, KubeError
from webhook.shell.controllers import Controller
from webhook.shell.kube import Change, Gone, Kube, Listed, Put
from webhook.shell.lease import Leadership
from webhook.shell.metrics import Metrics

log = logging.getLogger(__name__)

PERIOD_S: Final = 1.0
MAX_WRITES: Final = 50  # a step
NAMESPACES: Final = "/api/v1/namespaces"
POLICIES: Final = f"/apis/{API_VERSION}/networkpolicies"
CLUSTER_ROLES: Final = "/apis/rbac.authorization.k8s.io/v1/clusterroles"


class NetworkPolicies:
    """What is there of one release's policies, and what ought to be. Mutated by its own tasks, which run on one loop."""

    def __init__(
        self,
        kube: Kube,
        controller: Controller,
        leadership: Leadership,
        metrics: Metrics,
        surroundings: Surroundings,
        *,
        governed: str,
        excluded: frozenset[str],
    ) -> None:
        """*governed* selects namespaces by their labels; *excluded* names those that are left alone in any case."""
        self._kube = kube
        self._controller = controller
        self._leadership = leadership
        self._metrics = metrics
        self._surroundings = surroundings
        self._selector = governed
        self._excluded = excluded
        self._governed: set[str] | None = None
        self._actual: dict[str, dict[str, JSON]] | None = None  # by namespace and name
        self._profiles: dict[Source, Any] = {}
        self._providers: dict[Source, Any] = {}
        self._dirty: set[str] = set()
        self._failing: set[str] = set()  # of these
        self._said: set[str] = set()

    async def run(self) -> None:
        """Follow, and step for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_namespaces(), name="namespaces")
            tasks.create_task(self._follow_policies(), name="network-policies")
            while True:
                await self.step()
                await asyncio.sleep(PERIOD_S)

    async def _follow_namespaces(self) -> None:
        async for change in self._kube.follow(NAMESPACES, self._selector):
            self.apply_namespaces(change)

    async def _follow_policies(self) -> None:
        selector = ",".join(f"{key}={value}" for key, value in self._surroundings.labels.items())
        async for change in self._kube.follow(POLICIES, selector):
            self.apply_policies(change)

    def apply_namespaces(self, change: Change) -> None:
        """Take in a change of the namespaces that ask to be governed."""
        before = self._governed or set()
        match change:
            case Listed(items):
                self._governed = {item["metadata"]["name"] for item in items if self._is_governed(item)}
            case Put(item):
                name = {item["metadata"]["name"]}
                self._governed = before | name if self._is_governed(item) else before - name
            case Gone(item):
                self._governed = before - {item["metadata"]["name"]}
        self._dirty |= before ^ (self._governed or set())

    def governs(self, namespace: str) -> bool:
        """Say whether *namespace* is governed; False until that is known."""
        return namespace in (self._governed or ())

    def _is_governed(self, item: JSON) -> bool:
        metadata = item["metadata"]
        return metadata["name"] not in self._excluded and policy_of(metadata.get("labels") or {}) is not None

    def apply_policies(self, change: Change) -> None:
        """Take in a change of our policies, whoever made it."""
        known = self._actual or {}
        match change:
            case Listed(items):
                self._dirty |= known.keys()
                known = {}
                for item in items:
                    self._put(known, item)
            case Put(item):
                self._put(known, item)
            case Gone(item):
                metadata = item["metadata"]
                known.get(metadata["namespace"], {}).pop(metadata["name"], None)
                self._dirty.add(metadata["namespace"])
        self._actual = known

    def _put(self, known: dict[str, dict[str, JSON]], item: JSON) -> None:
        metadata = item["metadata"]
        known.setdefault(metadata["namespace"], {})[metadata["name"]] = item
        self._dirty.add(metadata["namespace"])

    async def step(self) -> None:
        """Put right what is not as it ought to be, if that is this replica's to do; what fails is tried again."""
        if self._governed is None or self._actual is None or not self._controller.is_synced:
            return
        self._look()
        if not self._leadership.leads:
            return
        try:
            owner = await self._owner() if self._dirty else None
        except KubeError as error:
            log.warning("network policies not compared", extra={"error": str(error)})
            return
        writes = 0
        for namespace in sorted(self._dirty, key=lambda each: (each in self._failing, each)):
            if writes >= MAX_WRITES:
                return  # the rest of them in the next step
            self._dirty.discard(namespace)  # before, as what changes meanwhile must be looked at again
            try:
                writes += await self._put_right(namespace, owner)
            except KubeError as error:  # of this namespace: it may be on its way out
                writes += 1
                self._dirty.add(namespace)
                self._failing.add(namespace)  # others first: it may go on failing
                log.warning("network policy not written", extra={"namespace": namespace, "error": str(error)})
            else:
                self._failing.discard(namespace)
        self._metrics.network_policies.set(sum(len(each) for each in self._actual.values()))

    def _look(self) -> None:
        """Find out which profiles have changed, and say what they name in vain."""
        held = self._controller.resources()
        profiles = {source: each.spec for source, each in held.items() if source[0] == resources.SERVER_PROFILE.name}
        providers = {
            source: each.spec for source, each in held.items() if source[0] == resources.IDENTITY_PROVIDER.name
        }
        if providers != self._providers:
            self._dirty |= self._governed or set()
        elif profiles == self._profiles:
            return
        changed = {
            key for key in profiles.keys() | self._profiles.keys() if profiles.get(key) != self._profiles.get(key)
        }
        self._dirty |= {namespace for _, namespace, _ in changed}
        self._profiles, self._providers = profiles, providers

    async def _put_right(self, namespace: str, owner: JSON | None) -> int:
        """Return the number of writes that *namespace* took; its policies are *owner*'s. Raises KubeError."""
        wanted: dict[str, JSON] = {}
        if self.governs(namespace):
            try:
                profiles, providers = self._controller.profiles(namespace), self._controller.providers()
            except BadResource:  # a profile that cannot be read: what there is stays, as with the sidecars' bundles
                return 0
            wanted = policies(namespace, profiles, providers, self._surroundings)
            self._say(namespace, undeclared(profiles, providers, self._surroundings))
        if owner:
            for each in wanted.values():
                each["metadata"]["ownerReferences"] = [owner]
        actual = (self._actual or {}).get(namespace, {})
        differing = [name for name, policy in wanted.items() if not _agrees(actual.get(name), policy)]
        collection = f"/apis/{API_VERSION}/namespaces/{namespace}/networkpolicies"
        for name in differing:
            await self._write(collection, wanted[name], actual.get(name))
        surplus = [name for name in actual if name not in wanted]
        for name in surplus:
            await self._delete(f"{collection}/{name}")
        return len(differing) + len(surplus)

    async def _write(self, collection: str, policy: JSON, held: JSON | None) -> None:
        path = f"{collection}/{policy['metadata']['name']}"
        held = held or await self._kube.get(path)  # one of our name without our labels is not seen by the watch
        if held is None:
            await self._kube.create(collection, policy)
        else:
            kept = {"resourceVersion": held["metadata"]["resourceVersion"]}
            await self._kube.replace(path, policy | {"metadata": policy["metadata"] | kept})
        self._metrics.network_policy_writes.inc()

    async def _delete(self, path: str) -> None:
        try:
            await self._kube.delete(path)
        except KubeError as error:
            if error.status != 404:
                raise
        else:
            self._metrics.network_policy_writes.inc()

    async def _owner(self) -> JSON | None:
        """Return a reference to what an uninstall deletes; asked each time, as a new one has another uid."""
        role = await self._kube.get(f"{CLUSTER_ROLES}/{self._surroundings.name}")
        if role is None:
            return None
        identity = {"name": self._surroundings.name, "uid": role["metadata"]["uid"]}
        return {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole"} | identity

    def _say(self, namespace: str, said: list[str]) -> None:
        """Log what is new."""
        now = {f"{namespace}: {line}" for line in said}
        before = {line for line in self._said if line.startswith(f"{namespace}: ")}
        for line in sorted(now - before):
            log.warning("not let through by network policy", extra={"what": line})
        self._said = (self._said - before) | now
        self._metrics.undeclared.set(len(self._said))


def _agrees(held: JSON | None, wanted: JSON) -> bool:
    """Say whether the API server holds what is wanted; other labels and annotations are nobody's business.

    Our owner alone: a second one that exists would keep the policy after an uninstall.
    """
    if held is None or held.get("spec") != wanted["spec"]:
        return False
    labels, owners = held["metadata"].get("labels") or {}, held["metadata"].get("ownerReferences") or []
    is_ours = all(labels.get(key) == value for key, value in wanted["metadata"]["labels"].items())
    return is_ours and owners == wanted["metadata"].get("ownerReferences", owners)

"""Say how much of the cluster's history a bundle reflects: the number by which sidecars tell the newer of two.

Resource versions are integers that only grow (KEP-5504; etcd's revision, ever since), and the same for all replicas of
the control plane. So a replica that has not heard of a change yet cannot put an older bundle in the place of a newer one,
while an older policy that is applied again is a new change. For one pod it is the highest of: the changes that touched
it, and the version up to which this replica has seen everything; the latter grows with the API server's bookmarks, so
that no two replicas disagree for longer than those take. Refuses nothing: a version that is no integer counts as none.
"""

from collections.abc import Iterable


class Seen:
    """What one replica has seen of some collections. Mutated by `take` alone."""

    def __init__(self, collections: Iterable[str]) -> None:
        self._reached = dict.fromkeys(collections, 0)
        self._touched: dict[str, int] = {}

    @property
    def floor(self) -> int:
        """Return the version up to which every collection has been seen."""
        return min(self._reached.values())

    def take(self, collection: str, version: str, touched: Iterable[str] = ()) -> None:
        """Know that all of *collection* up to *version* was seen, and what that changed.

        *touched* are the namespaces to whose pods it matters, "" for all of them. A first list changes nothing: what is
        in it counts from the floor on.
        """
        is_first, reached = self._reached[collection] == 0, number(version)
        self._reached[collection] = max(self._reached[collection], reached)
        if not is_first:
            self._touched |= {namespace: max(self._touched.get(namespace, 0), reached) for namespace in touched}
        floor = self.floor
        for namespace in [each for each, touched_at in self._touched.items() if touched_at <= floor]:
            del self._touched[namespace]

    def of(self, namespace: str) -> int:
        """Return the number for the pods of *namespace*, as far as custom resources decide it."""
        return max(self.floor, self._touched.get(namespace, 0), self._touched.get("", 0))


def number(version: str) -> int:
    """Return the resource *version* as it is compared."""
    return int(version) if version.isdecimal() else 0

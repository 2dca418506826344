"""What is compiled for which pod, and when."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from certs.authority import make_key
from sidecar.core import profile
from sidecar.errors import BundleError
from tests.sidecar.core.test_bundle import members
from webhook.core import resources
from webhook.core.compile import Policies
from webhook.core.effective import Defaults, combine
from webhook.core.signing import SigningKeys
from webhook.errors import BadPolicy, BadResource
from webhook.shell import controllers
from webhook.shell.admission import NotReady
from webhook.shell.bundles import Bundles, Entry
from webhook.shell.controllers import Catalogue, Controller
from webhook.shell.kube import Bookmark, Gone, Listed, Put
from webhook.shell.metrics import Metrics

KEY = make_key()
PROFILES, POLICIES, RAILS, LIMITS, PROVIDERS = resources.KINDS


def a_resource(name: str, namespace: str = "payments", **spec: Any) -> Any:
    """Return a resource that selects every pod of its namespace."""
    return {"metadata": {"name": name, "namespace": namespace}, "spec": {"selector": {}} | spec}


def a_provider(**spec: Any) -> Any:
    """Return the provider corp."""
    return {"metadata": {"name": "corp"}, "spec": {"issuer": "https://idp.test", "audiences": ["a"]} | spec}


def a_pod(name: str = "ledger-0", namespace: str = "payments", **spec: Any) -> Any:
    """Return an injected pod of the workload ledger."""
    owner = {"kind": "StatefulSet", "name": "ledger", "controller": True}
    container = {"name": "app", "ports": [{"containerPort": 8080}]}
    return {
        "metadata": {"name": name, "namespace": namespace, "ownerReferences": [owner]},
        "spec": {"serviceAccountName": "ledger", "containers": [container]} | spec,
        "status": {"phase": "Pending"},
    }


class FakeCompile:
    """Remembers what it was asked to compile; *error* is raised instead."""

    def __init__(self) -> None:
        self.asked: list[tuple[Sequence[Policies], profile.Profile]] = []
        self.error: Exception | None = None

    async def __call__(self, policies: Sequence[Policies], for_: profile.Profile) -> Mapping[str, bytes]:
        """Return files that say what they were made of."""
        self.asked.append((policies, for_))
        if self.error:
            raise self.error
        return {
            "sidegate.json": profile.encode(for_),
            **{f"{each.path}cedar/{k}": v.encode() for each in policies for k, v in each.cedar.items()},
        }


class Cluster:
    """A controller, and what it makes."""

    def __init__(self) -> None:
        self.compile = FakeCompile()
        self.bundles = Bundles()
        self.bundles.keys = SigningKeys(current=KEY, term=1)
        self.metrics = Metrics()
        self.controller = Controller(self.bundles, self.compile, Defaults(), self.metrics)

    def listed(self, *pods: Any, profiles: Any = (), policies: Any = (), limits: Any = (), providers: Any = ()) -> None:
        """Let everything be listed once."""
        for kind, items in (
            (PROFILES, profiles),
            (POLICIES, policies),
            (RAILS, ()),
            (LIMITS, limits),
            (PROVIDERS, providers),
        ):
            self.controller.apply(kind, Listed(list(items)))
        self.controller.apply_pods(Listed([self.controller.slim(each) for each in pods]))

    async def compiled(self) -> int:
        """Compile what is due; returns how many bundles were compiled."""
        before = len(self.compile.asked)
        await self.controller.compile_dirty()
        return len(self.compile.asked) - before

    def entry(self, name: str = "ledger-0", namespace: str = "payments") -> Entry:
        """Return what a pod may have."""
        entry = self.bundles.find((namespace, name))
        assert entry is not None
        return entry

    def gauge(self, name: str) -> float | None:
        """Return what a metric says."""
        return self.metrics.registry.get_sample_value(name)


def test_nothing_is_known_before_everything_was_listed() -> None:
    """Admission must not decide, nor a bundle be made, on half of the resources."""
    cluster = Cluster()
    for kind in (PROFILES, POLICIES, RAILS, LIMITS):
        cluster.controller.apply(kind, Listed([]))
    cluster.controller.apply_pods(Listed([]))

    assert not cluster.controller.is_synced
    with pytest.raises(NotReady, match="not listed yet"):
        cluster.controller.profiles("payments")

    cluster.controller.apply(PROVIDERS, Listed([]))
    assert cluster.controller.is_synced
    assert cluster.controller.profiles("payments") == {}


def at(version: int, item: Any) -> Any:
    """Return *item* as it is at the resource version *version*."""
    return item | {"metadata": item["metadata"] | {"resourceVersion": str(version)}}


async def test_bundle_says_up_to_which_change_it_reflects_the_cluster() -> None:
    """The change of a policy, applied, removed and applied again; a change of the pod; all that was seen since."""
    cluster = Cluster()
    for kind in resources.KINDS:
        cluster.controller.apply(kind, Listed([], "100"))
    cluster.controller.apply_pods(Listed([at(90, a_pod())], "101"))
    stamps = []

    async def stamp() -> None:
        await cluster.compiled()
        entry = cluster.entry()
        assert entry.published is not None
        await cluster.bundles.signed(entry, entry.published)
        stamps.append((entry.published.revision, entry.published.stamp.sequence))

    await stamp()
    cluster.controller.apply(POLICIES, Put(at(110, a_resource("p", cedar="x"))))
    await stamp()
    cluster.controller.apply(POLICIES, Gone(at(120, a_resource("p", cedar="x"))))
    await stamp()
    cluster.controller.apply(POLICIES, Put(at(130, a_resource("p", cedar="x"))))
    await stamp()
    cluster.controller.apply(POLICIES, Put(at(140, a_resource("q", namespace="other", cedar="x"))))
    await stamp()
    cluster.controller.apply_pods(Put(at(150, a_pod(containers=[{"name": "app", "ports": [{"containerPort": 1}]}]))))
    await stamp()
    for kind in resources.KINDS:
        cluster.controller.apply(kind, Bookmark("200"))
    cluster.controller.apply_pods(Bookmark("190"))
    await stamp()

    revisions, sequences = zip(*stamps, strict=True)
    assert sequences == (100, 110, 120, 130, 130, 150, 190)
    assert revisions[0] == revisions[2] != revisions[1] == revisions[3]  # rolled back: the same content, and newer


async def test_bundle_that_could_not_be_renewed_does_not_grow_newer() -> None:
    """Another replica's, which reflects more, must win."""
    cluster = Cluster()
    cluster.listed(a_pod())
    for kind in resources.KINDS:
        cluster.controller.apply(kind, Listed([], "100"))
    await cluster.compiled()
    cluster.compile.error = BadPolicy("rego", "no")
    cluster.controller.apply(POLICIES, Put(at(110, a_resource("p", rego="x"))))
    await cluster.compiled()
    for kind in resources.KINDS:
        cluster.controller.apply(kind, Bookmark("200"))
    cluster.controller.apply_pods(Bookmark("200"))
    entry = cluster.entry()
    assert entry.published is not None
    await cluster.bundles.signed(entry, entry.published)

    assert (cluster.bundles.floor, entry.published.stamp.sequence) == (200, 0)


async def test_pods_that_differ_by_name_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand of them, changed by one policy, must not take seconds."""
    cluster, looked = Cluster(), []
    monkeypatch.setattr(controllers, "combine", lambda *given: looked.append(given) or combine(*given))
    other = a_pod("other-0", containers=[{"name": "app", "ports": [{"containerPort": 9090}]}])
    cluster.listed(*(a_pod(f"ledger-{number}") for number in range(200)), other)
    await cluster.compiled()

    assert len(looked) == 2
    assert cluster.entry("ledger-0").published is cluster.entry("ledger-199").published
    assert cluster.controller.states["payments", "ledger-0"] == cluster.controller.states["payments", "ledger-199"]
    assert cluster.entry("other-0").published != cluster.entry("ledger-0").published


async def test_change_during_a_compilation_is_not_missed() -> None:
    """What was made of the resources of before does not stand for those of after."""
    cluster = Cluster()
    pods = [a_pod(f"ledger-{number}") for number in range(3)]

    class Slow(FakeCompile):
        async def __call__(self, policies: Sequence[Policies], for_: profile.Profile) -> Mapping[str, bytes]:
            if len(self.asked) == 1:
                cluster.controller.apply(POLICIES, Put(a_resource("p", cedar="new")))
            return await super().__call__(policies, for_)

    cluster.compile = Slow()
    cluster.controller._compile_files = cluster.compile
    cluster.listed(*pods)
    await cluster.compiled()
    cluster.controller.apply(POLICIES, Put(a_resource("p", cedar="old")))
    await cluster.compiled()
    await cluster.compiled()
    files = [entry.published.data for entry in (cluster.entry(f"ledger-{n}") for n in range(3)) if entry.published]

    assert len(files) == 3
    assert {members(each)["/cedar/p.cedar"] for each in files} == {b"new"}


async def test_replicas_of_a_workload_share_one_compilation() -> None:
    """A Deployment of a thousand pods is compiled once."""
    cluster = Cluster()
    cluster.listed(a_pod("ledger-0"), a_pod("ledger-1"), policies=[a_resource("p", cedar="x")])

    assert await cluster.compiled() == 1
    assert cluster.entry("ledger-0").published is cluster.entry("ledger-1").published is not None


async def test_status_of_a_pod_is_no_reason_to_compile() -> None:
    """Pods change all the time; what decides seldom does."""
    cluster = Cluster()
    cluster.listed(a_pod())
    await cluster.compiled()
    cluster.controller.apply_pods(Put(a_pod() | {"status": {"phase": "Running"}}))

    assert await cluster.compiled() == 0


def test_pods_that_get_the_same_are_held_once() -> None:
    """Ten thousand pods are some hundred workloads: what differs by replica and decides nothing is not kept."""
    cluster = Cluster()
    pods = [a_pod(f"ledger-{number}") for number in range(3)]
    for number, each in enumerate(pods):
        each["metadata"] |= {"uid": str(number), "annotations": {"cni.projectcalico.org/podIP": f"10.0.0.{number}"}}
    asked = a_pod("ledger-3")
    asked["metadata"]["annotations"] = {"sidegate.dev/port": "9090"}
    bare = [a_pod(name) for name in ("bare-0", "bare-1")]
    for each in bare:
        each["metadata"]["ownerReferences"] = []
    cluster.listed(*pods, asked, *bare)
    held = cluster.controller._pods
    assert held is not None
    first, second, third, other, *alone = held.values()

    assert first is second is third
    assert first.pod is not None
    assert (first.pod.metadata.name, first.pod.annotations) == (None, {})
    assert other is not first
    assert other.pod is not None
    assert other.pod.annotations == {"sidegate.dev/port": "9090"}
    assert [each.pod.metadata.name for each in alone if each.pod] == ["bare-0", "bare-1"]


def test_little_is_left_of_a_pod_when_it_is_read() -> None:
    """The list of all of them is never there as a whole."""
    item = a_pod() | {"status": {"phase": "Running", "conditions": [{}] * 9}}
    item["metadata"] |= {"managedFields": [{}], "resourceVersion": "7", "deletionTimestamp": "now"}
    slim = Cluster().controller.slim(item)

    assert slim["metadata"] == {
        "name": "ledger-0", "namespace": "payments", "resourceVersion": "7", "deletionTimestamp": "now",
    }  # fmt: skip
    assert slim["status"] == {"phase": "Running"}
    assert slim.keys() == {"metadata", "status", "tracked"}


def test_servers_of_a_namespace_are_known() -> None:
    """Those whose pods are alive, as first listed and as they change."""
    cluster = Cluster()
    cluster.listed(a_pod(), a_pod("done") | {"status": {"phase": "Succeeded"}})
    assert cluster.controller.servers("payments") == {"StatefulSet ledger"}
    assert cluster.controller.servers("elsewhere") == frozenset()

    cluster.controller.apply_pods(Put(a_pod() | {"status": {"phase": "Failed"}}))
    assert cluster.controller.servers("payments") == frozenset()

    cluster.controller.apply_pods(Put(a_pod()))
    cluster.controller.apply_pods(Gone(a_pod()))
    assert cluster.controller.servers("payments") == frozenset()


async def test_policy_touches_its_own_namespace_only() -> None:
    """A change is compiled for the pods that it can concern."""
    cluster = Cluster()
    cluster.listed(a_pod(), a_pod(namespace="other"))
    assert await cluster.compiled() == 2
    cluster.controller.apply(POLICIES, Put(a_resource("p", cedar="x")))

    assert await cluster.compiled() == 1
    assert cluster.compile.asked[-1][0][0].cedar == {"p.cedar": "x"}
    cluster.controller.apply(POLICIES, Gone(a_resource("p", cedar="x")))
    assert await cluster.compiled() == 0  # the bundle without it is remembered
    published = cluster.entry().published
    assert published is not None
    assert b"p.cedar" not in published.data


async def test_provider_touches_every_namespace() -> None:
    """It is of the cluster, so all may use it."""
    cluster = Cluster()
    profiles = [a_resource("p", ns, identity={"providers": [{"name": "corp"}]}) for ns in ("payments", "other")]
    cluster.listed(a_pod(), a_pod(namespace="other"), profiles=profiles, providers=[a_provider()])
    await cluster.compiled()
    cluster.controller.apply(PROVIDERS, Put(a_provider(audiences=["b"])))

    assert await cluster.compiled() == 2
    assert cluster.compile.asked[-1][1].identity.providers[0].audiences == ("b",)


async def test_pods_of_one_workload_may_be_described_apart() -> None:
    """A selector may pick some pods of a namespace and not the others."""
    cluster = Cluster()
    blue, green = a_pod("a"), a_pod("b")
    blue["metadata"]["labels"] = {"colour": "blue"}
    rule = a_resource("p", cedar="x", selector={"matchLabels": {"colour": "blue"}})
    cluster.listed(blue, green, policies=[rule])
    await cluster.compiled()

    assert cluster.entry("a").published != cluster.entry("b").published


async def test_failure_keeps_the_last_good_bundle_and_is_said() -> None:
    """Logged, counted, told to whoever has none; and tried once for all pods of the workload."""
    cluster = Cluster()
    cluster.listed(a_pod("a"))
    await cluster.compiled()
    good = cluster.entry("a").published
    cluster.compile.error = BadPolicy("p.cedar", "unexpected end", line=1, column=9)
    cluster.controller.apply_pods(Put(a_pod("b")))
    cluster.controller.apply(POLICIES, Put(a_resource("p", cedar="permit(")))

    assert await cluster.compiled() == 1
    assert cluster.entry("a").published is good
    assert cluster.entry("b").published is None
    assert "p.cedar:1:9: unexpected end" in cluster.entry("b").problem
    assert cluster.gauge("sidegate_bundle_failing_pods") == 2

    cluster.compile.error = None
    cluster.controller.apply(POLICIES, Put(a_resource("p", cedar="permit(principal, action, resource);")))
    assert await cluster.compiled() == 1
    assert cluster.entry("b").published is not None
    assert cluster.gauge("sidegate_bundle_failing_pods") == 0


async def test_missing_compiler_is_a_failure_like_any_other() -> None:
    """An OSError of the compiler's process does not end ours."""
    cluster = Cluster()
    cluster.compile.error = FileNotFoundError("/opa")
    cluster.listed(a_pod())
    await cluster.compiled()

    assert "/opa" in cluster.entry().problem


@pytest.mark.parametrize("error", [BundleError("odd.txt: no such file in a bundle"), ValueError("name is too long")])
async def test_what_no_bundle_can_hold_is_a_failure_like_any_other(error: Exception) -> None:
    """What one tenant applies ends the bundles that it touches, not the control plane."""
    cluster = Cluster()
    cluster.compile.error = error
    cluster.listed(a_pod())
    await cluster.compiled()

    assert str(error) in cluster.entry().problem


async def test_policy_may_have_the_longest_name_that_kubernetes_gives() -> None:
    """And a second one beside it, so that it lies in a directory of that name."""
    cluster = Cluster()
    name, cedar = "a" * 253, "permit (principal, action, resource);"
    cluster.listed(a_pod(), policies=[a_resource(name, cedar=cedar), a_resource("b", cedar=cedar)])
    await cluster.compiled()

    published = cluster.entry().published
    assert published is not None
    assert f"/sets/namespace/{name}/cedar/{name}.cedar" in members(published.data)


async def test_resource_that_cannot_be_read_stops_its_namespace() -> None:
    """To leave it out could drop a restriction; other namespaces go on, admission there too."""
    cluster = Cluster()
    broken = a_resource("p", server={"prot": 1})
    cluster.listed(a_pod(), a_pod(namespace="other"), profiles=[broken])
    await cluster.compiled()

    assert "MCPServerProfile payments/p: spec" in cluster.entry().problem
    assert cluster.entry(namespace="other").published is not None
    assert cluster.gauge("sidegate_broken_resources") == 1
    with pytest.raises(BadResource, match="prot"):
        cluster.controller.profiles("payments")
    assert cluster.controller.profiles("other") == {}

    cluster.controller.apply(PROFILES, Put(a_resource("p")))
    await cluster.compiled()
    assert cluster.entry().published is not None
    assert cluster.gauge("sidegate_broken_resources") == 0


async def test_pod_that_cannot_be_read_has_no_bundle() -> None:
    """Its record of probes is forged: nothing is concluded from it."""
    cluster = Cluster()
    forged = {"name": "sidegate", "env": [{"name": "SIDEGATE_PROBES", "value": "no JSON"}]}
    cluster.listed(a_pod(initContainers=[forged]))
    await cluster.compiled()

    assert cluster.entry().published is None
    assert "Pod payments/ledger-0" in cluster.entry().problem


async def test_deleted_pod_is_forgotten() -> None:
    """By its event, or by a list that it is missing from."""
    cluster = Cluster()
    cluster.listed(a_pod("a"), a_pod("b"), a_pod("c"))
    cluster.controller.apply_pods(Gone(a_pod("a")))
    assert cluster.bundles.find(("payments", "a")) is None
    cluster.controller.apply_pods(Listed([a_pod("c")]))

    assert cluster.bundles.find(("payments", "b")) is None
    assert cluster.gauge("sidegate_bundle_pods") == 1
    assert await cluster.compiled() == 1


async def test_memory_of_compilations_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least recently used bundle is compiled again when it is needed again."""
    monkeypatch.setattr("webhook.shell.controllers.MAX_COMPILED", 1)
    cluster = Cluster()
    cluster.listed(a_pod(), a_pod(namespace="other"))

    assert await cluster.compiled() == 2
    assert len(cluster.controller._compiled) == 1


def test_list_that_says_nothing_new_touches_nothing() -> None:
    """A watch that had to start over is no reason to compile."""
    catalogue = Catalogue()
    catalogue.apply(POLICIES, Listed([a_resource("p", cedar="x")]))

    assert catalogue.apply(POLICIES, Listed([a_resource("p", cedar="x")])) == frozenset()
    assert catalogue.apply(POLICIES, Listed([])) == {"payments"}

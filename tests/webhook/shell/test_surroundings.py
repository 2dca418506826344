"""NetworkPolicies are kept as they ought to be, against a real API server."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.cluster.apiserver import Answer, ApiServer
from webhook.core import resources
from webhook.core.effective import Defaults
from webhook.core.resources import PeerSpec
from webhook.core.surroundings import Surroundings
from webhook.errors import KubeError
from webhook.shell import surroundings as surroundings_module
from webhook.shell.bundles import Bundles
from webhook.shell.controllers import Controller
from webhook.shell.kube import Kube, Listed
from webhook.shell.lease import Leadership
from webhook.shell.metrics import Metrics
from webhook.shell.surroundings import NetworkPolicies

pytestmark = pytest.mark.real_apiserver

PATIENCE_S = 30.0
ROLE = {"metadata": {"name": "sidegate-fence"}, "rules": []}


async def never(*_: Any) -> Any:
    """Compile nothing: there are no pods."""
    raise AssertionError


class Fence:
    """The control plane's part that is tried, and the API server it works on."""

    def __init__(self, api: ApiServer, kube: Kube, namespace: str) -> None:
        self.api, self.kube, self.namespace = api, kube, namespace
        self.metrics = Metrics()
        self.controller = Controller(Bundles(), never, Defaults(), self.metrics)
        self.controller.apply_pods(Listed([], "1"))
        self.leadership = Leadership(kube, self.metrics, namespace=namespace, name="", identity="x")
        self.lead(leads=True)
        self.policies = NetworkPolicies(
            kube,
            self.controller,
            self.leadership,
            self.metrics,
            Surroundings(
                name="sidegate-fence",
                namespace="sidegate-system",
                trust_domain="example.org",
                metrics_from=(PeerSpec(namespace="*"),),
            ),
            governed="sidegate.dev/injection in (enabled,enforced)",
            excluded=frozenset({"kube-system"}),
        )

    def lead(self, *, leads: bool) -> None:
        """Hold the Lease, or hold it no more."""
        self.leadership._until_s = float("inf") if leads else 0.0

    def path(self, name: str = "") -> str:
        """The path of a policy, or of all."""
        collection = f"/apis/networking.k8s.io/v1/namespaces/{self.namespace}/networkpolicies"
        return f"{collection}/{name}" if name else collection

    def there(self) -> dict[str, Any]:
        """The policies in the namespace, by name."""
        return {each["metadata"]["name"]: each for each in self.api.call("GET", self.path()).body["items"]}

    async def until(self, claim: str, check: Any) -> None:
        """Ask until it holds, or fail with the claim."""
        async with asyncio.timeout(PATIENCE_S):
            while not await asyncio.to_thread(check):  # noqa: ASYNC110 - another process decides
                await asyncio.sleep(0.05)
        assert claim

    def label(self, value: str | None) -> None:
        """Label the namespace, or take the label away."""
        change = {"metadata": {"labels": {"sidegate.dev/injection": value}}}
        path, merge = f"/api/v1/namespaces/{self.namespace}", "application/merge-patch+json"
        assert self.api.call("PATCH", path, change, content_type=merge).status == 200

    def profile(self, **spec: Any) -> None:
        """Write the profile, as the controller sees it too."""
        item = {"metadata": {"name": "ledger", "namespace": self.namespace}, "spec": spec}
        self.controller.apply(resources.SERVER_PROFILE, Listed([item], "1"))


@pytest.fixture
async def fence(api_server: ApiServer, request: pytest.FixtureRequest) -> AsyncIterator[Fence]:
    """Running, in a namespace of this test's own."""
    namespace = "fence-" + request.node.name.removeprefix("test_").replace("_", "-")[:50].strip("-")
    api_server.make_namespace(namespace, **{"sidegate.dev/injection": "enabled"})
    api_server.call("POST", "/apis/rbac.authorization.k8s.io/v1/clusterroles", ROLE)
    async with contextlib.aclosing(await Kube.open(str(api_server.kubeconfig))) as kube:
        made = Fence(api_server, kube, namespace)
        for kind in resources.KINDS:
            made.controller.apply(kind, Listed([], "1"))
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(made.policies.run())
            yield made
            running.cancel()


async def test_a_labelled_namespace_has_them_and_another_has_not(fence: Fence) -> None:
    """They come with the label, belong to the release, and go with the label."""
    fence.profile(selector={"matchLabels": {"app": "ledger"}}, egress=[{"cidr": "192.0.2.0/24"}])
    await fence.until("both are there", lambda: set(fence.there()) == {"sidegate-fence", "sidegate-fence.ledger"})
    owner = fence.api.call("GET", "/apis/rbac.authorization.k8s.io/v1/clusterroles/sidegate-fence").body["metadata"]
    for each in fence.there().values():
        assert [reference["uid"] for reference in each["metadata"]["ownerReferences"]] == [owner["uid"]]

    fence.label(None)

    await fence.until("none is left", lambda: not fence.there())


async def test_a_changed_profile_changes_its_policy(fence: Fence) -> None:
    """And one that is gone has none."""
    fence.profile(selector={}, egress=[{"cidr": "192.0.2.0/24"}])
    await fence.until("it is there", lambda: "sidegate-fence.ledger" in fence.there())

    fence.profile(selector={}, egress=[{"cidr": "198.51.100.0/24"}])

    def destination() -> Any:
        return fence.there()["sidegate-fence.ledger"]["spec"]["egress"][0]["to"][0]["ipBlock"]["cidr"]

    await fence.until("it says so", lambda: destination() == "198.51.100.0/24")
    fence.controller.apply(resources.SERVER_PROFILE, Listed([], "1"))
    await fence.until("it is gone", lambda: set(fence.there()) == {"sidegate-fence"})


async def test_what_somebody_edits_or_deletes_is_put_right(fence: Fence) -> None:
    """The rule that was added is gone again, the policy that was deleted is back; what others add beside stays."""
    await fence.until("it is there", lambda: "sidegate-fence" in fence.there())
    ours = fence.there()["sidegate-fence"]["spec"]
    merge = "application/merge-patch+json"
    opened = {"metadata": {"annotations": {"note": "mine"}}, "spec": {"ingress": [{}], "policyTypes": ["Ingress"]}}
    other = {"metadata": {"name": "other"}, "spec": {"podSelector": {}}}
    assert fence.api.call("POST", fence.path(), other).status == 201

    assert fence.api.call("PATCH", fence.path("sidegate-fence"), opened, content_type=merge).status == 200
    await fence.until("it is repaired", lambda: fence.there()["sidegate-fence"]["spec"] == ours)
    assert fence.api.call("DELETE", fence.path("sidegate-fence")).status == 200
    await fence.until("it is back", lambda: fence.there().get("sidegate-fence", {}).get("spec") == ours)
    assert "other" in fence.there()


async def test_a_policy_that_only_has_our_name_is_made_ours(fence: Fence) -> None:
    """Whoever takes our labels off one, and opens it, has not taken it away from us."""
    await fence.until("it is there", lambda: "sidegate-fence" in fence.there())
    ours = fence.there()["sidegate-fence"]["spec"]
    merge = "application/merge-patch+json"
    labels = {"app.kubernetes.io/managed-by": None, "app.kubernetes.io/instance": None}
    opened = {"metadata": {"labels": labels}, "spec": {"ingress": [{}], "policyTypes": ["Ingress"]}}

    assert fence.api.call("PATCH", fence.path("sidegate-fence"), opened, content_type=merge).status == 200

    await fence.until("it is repaired", lambda: fence.there()["sidegate-fence"]["spec"] == ours)


@pytest.mark.parametrize("owners", [[], "another"], ids=["none", "a-second-one"])
async def test_what_no_longer_belongs_to_the_release_is_put_right(fence: Fence, owners: Any) -> None:
    """An uninstall must find it, and take it away."""
    await fence.until("it is there", lambda: "sidegate-fence" in fence.there())
    ours = fence.there()["sidegate-fence"]["metadata"]["ownerReferences"]
    if owners == "another":
        uid = fence.api.call("GET", f"/api/v1/namespaces/{fence.namespace}").body["metadata"]["uid"]
        owners = [*ours, {"apiVersion": "v1", "kind": "Namespace", "name": fence.namespace, "uid": uid}]
    merge, change = "application/merge-patch+json", {"metadata": {"ownerReferences": owners}}

    assert fence.api.call("PATCH", fence.path("sidegate-fence"), change, content_type=merge).status == 200

    await fence.until(
        "it is put right", lambda: fence.there()["sidegate-fence"]["metadata"].get("ownerReferences") == ours
    )


async def test_whose_they_are_is_asked_again_after_a_failure(fence: Fence, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written without an owner that could be found; nothing is forgotten."""
    await fence.until("it is there", lambda: "sidegate-fence" in fence.there())
    failing, get = [KubeError(500, "made up")], fence.kube.get

    async def sometimes(path: str) -> Any:
        if path.endswith("/clusterroles/sidegate-fence") and failing:
            raise failing.pop()
        return await get(path)

    monkeypatch.setattr(fence.kube, "get", sometimes)
    fence.profile(selector={})

    await fence.until("it is there in the end", lambda: "sidegate-fence.ledger" in fence.there())
    assert failing == []
    assert fence.there()["sidegate-fence.ledger"]["metadata"]["ownerReferences"]


async def test_it_is_known_which_namespaces_are_governed(fence: Fence) -> None:
    """By label, as the policies are; the namespaces that are left alone are not."""
    await fence.until("it is there", lambda: "sidegate-fence" in fence.there())

    assert fence.policies.governs(fence.namespace)
    assert not fence.policies.governs("kube-system")


async def test_only_the_replica_that_leads_writes(fence: Fence) -> None:
    """Another one knows what it would write, and does so once it leads."""
    await fence.until("it is there", lambda: "sidegate-fence" in fence.there())
    fence.lead(leads=False)
    fence.profile(selector={})
    before = fence.metrics.network_policy_writes._value.get()

    await fence.policies.step()

    assert fence.metrics.network_policy_writes._value.get() == before
    fence.lead(leads=True)
    await fence.until("it is there", lambda: "sidegate-fence.ledger" in fence.there())


async def test_a_profile_that_cannot_be_read_changes_nothing(fence: Fence) -> None:
    """As with the sidecars' bundles: the last good one stays."""
    fence.profile(selector={}, egress=[{"cidr": "192.0.2.0/24"}])
    await fence.until("it is there", lambda: "sidegate-fence.ledger" in fence.there())
    before = fence.there()

    fence.profile(selector={}, egress=[{}])
    await fence.policies.step()

    assert fence.there() == before


async def test_undeclared_peers_are_logged_once_and_counted(fence: Fence, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever wonders why a caller does not get in finds the line."""
    await fence.until("it is there", lambda: "sidegate-fence" in fence.there())
    fence.profile(selector={}, identity={"callers": ["spiffe://partner.example/ns/a/sa/b"]})
    await fence.until("it is counted", lambda: fence.metrics.undeclared._value.get() == 1)
    fence.profile(selector={}, denied="conceal", identity={"callers": ["spiffe://partner.example/ns/a/sa/b"]})
    await fence.policies.step()

    said = [each.what for each in caplog.records if hasattr(each, "what")]
    assert len(said) == 1
    assert said[0].startswith(f"{fence.namespace}: MCPServerProfile ledger: caller spiffe://partner.example/ns/a/sa/b")
    fence.profile(selector={})
    await fence.until("it is well again", lambda: fence.metrics.undeclared._value.get() == 0)


async def test_a_failing_api_server_is_tried_again(fence: Fence, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error ends a step, not the task; nothing is forgotten."""
    failing = [KubeError(500, "made up"), KubeError(409, "has changed")]
    create = fence.kube.create

    async def sometimes(*arguments: Any, **options: Any) -> Any:
        if failing:
            raise failing.pop()
        return await create(*arguments, **options)

    await fence.until("it is there", lambda: "sidegate-fence" in fence.there())
    monkeypatch.setattr(fence.kube, "create", sometimes)
    fence.profile(selector={})

    await fence.until("it is there in the end", lambda: "sidegate-fence.ledger" in fence.there())
    assert failing == []


async def test_what_is_deleted_while_another_is_written_is_put_right(
    fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever edits in time with the control plane gets no gap."""
    create = fence.kube.create
    deleted: list[Answer] = []

    async def slowly(path: str, item: Any, **options: Any) -> Any:
        if item["metadata"]["name"] == "sidegate-fence.ledger" and not deleted:
            deleted.append(await asyncio.to_thread(fence.api.call, "DELETE", fence.path("sidegate-fence")))
            held = fence.policies._actual or {}
            await fence.until("it is known", lambda: "sidegate-fence" not in held[fence.namespace])
        return await create(path, item, **options)

    await fence.until("it is there", lambda: "sidegate-fence" in fence.there())
    monkeypatch.setattr(fence.kube, "create", slowly)
    fence.profile(selector={})

    await fence.until("both are there", lambda: set(fence.there()) == {"sidegate-fence", "sidegate-fence.ledger"})
    assert deleted[0].status == 200


async def test_a_namespace_that_goes_on_failing_holds_up_no_other(
    fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quota, or a namespace that does not end: the writes of a step are for the others first."""
    monkeypatch.setattr(surroundings_module, "MAX_WRITES", 1)
    create = fence.kube.create

    async def refused(path: str, item: Any, **options: Any) -> Any:
        if "/a-full-one/" in path:
            raise KubeError(403, "exceeded quota")
        return await create(path, item, **options)

    await fence.until("it is there", lambda: "sidegate-fence" in fence.there())
    monkeypatch.setattr(fence.kube, "create", refused)
    fence.api.make_namespace("a-full-one", **{"sidegate.dev/injection": "enabled"})
    await fence.until("it fails", lambda: "a-full-one" in fence.policies._dirty)
    fence.profile(selector={})

    await fence.until("the other has its own", lambda: "sidegate-fence.ledger" in fence.there())
    assert "a-full-one" in fence.policies._dirty
    fence.namespace = "a-full-one"
    fence.label(None)

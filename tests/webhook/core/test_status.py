"""What is counted and said of custom resources."""

from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from certs.authority import make_key
from webhook.core import resources
from webhook.core.reports import PodKey, Report
from webhook.core.status import Held, PodState, Source, Tally, counted, judge, needs_trial, selecting, tally
from webhook.errors import BadResource

PROFILE: Source = ("MCPServerProfile", "payments", "servers")
POLICY: Source = ("MCPPolicy", "payments", "article")
RAIL: Source = ("ClusterMCPPolicy", "", "rail")
LIMIT: Source = ("MCPLimit", "payments", "calls")
PROVIDER: Source = ("IdentityProvider", "", "corp")
KINDS = {kind.name: kind for kind in resources.KINDS}
SPECS: dict[Source, dict[str, Any]] = {
    PROFILE: {"selector": {"matchLabels": {"app": "ledger"}}, "identity": {"providers": [{"name": "corp"}]}},
    POLICY: {"selector": {"matchLabels": {"app": "ledger"}}, "cedar": "x"},
    RAIL: {"selector": {}, "cedar": "x"},
    LIMIT: {"selector": {}, "ratePerSecond": 1, "burst": 1},
    PROVIDER: {"issuer": "https://idp.test"},
}
ONE: PodKey = ("payments", "ledger-0")
TWO: PodKey = ("payments", "ledger-1")


def held(source: Source, generation: int = 1, **change: Any) -> Held:
    """Return one of SPECS, decoded."""
    kind = KINDS[source[0]]
    item = {"metadata": {"name": source[2]}, "spec": SPECS[source] | change}
    return Held(resources.decode(kind, item, kind.spec), generation)


def select(namespace: str = "payments", *, labels: dict[str, str] | None = None, **rail: Any) -> set[Source]:
    """Return what selects a pod."""
    everything = [(each, held(each, **(rail if each == RAIL else {}))) for each in SPECS]
    return set(selecting({"app": "ledger"} if labels is None else labels, namespace, everything))


def report(revision: str, error: str = "") -> Report:
    """Return what a pod says."""
    return Report(revision=revision, error=error, noted_s=0.0)


def count(reports: dict[PodKey, Report], *states: PodState | None) -> Tally:
    """Return the tally of POLICY over two pods."""
    known = {pod: state for pod, state in zip((ONE, TWO), states, strict=True) if state}
    return tally(((ONE, (POLICY,)), (TWO, (POLICY,))), known, reports)[POLICY]


def said(found: Tally, problem: str | None = None, source: Source = POLICY) -> dict[str, tuple[str, str, str]]:
    """Return status, reason and message by type."""
    conditions = judge(held(source), found, problem) or ()
    return {each.type: (each.status, each.reason, each.message) for each in conditions}


def test_a_pod_is_selected_by_label_namespace_and_role() -> None:
    """The same rules by which its bundle is made."""
    assert select() == set(SPECS)
    assert select(labels={"app": "other"}) == {RAIL, LIMIT}
    assert select("other") == {RAIL}
    assert select(namespaces=["other"]) == set(SPECS) - {RAIL}
    assert select(labels={"app": "ledger", "sidegate.dev/agent": "true"}) == set()


def test_what_cannot_be_read_selects_nothing() -> None:
    """Its selector is not known either."""
    broken = Held(BadResource("MCPPolicy payments/article", "spec: no"), 2)

    assert list(selecting({}, "payments", [(POLICY, broken)])) == []


def test_a_pod_counts_when_its_sidecar_says_the_revision_that_was_made_for_it() -> None:
    """Neither the older one, nor silence, nor a bundle that was not made, is enforcement."""
    good = PodState((POLICY,), "r2")

    assert counted(count({ONE: report("r2"), TWO: report("r2")}, good, good)) == "2/2"
    assert counted(count({ONE: report("r2"), TWO: report("r1")}, good, good)) == "1/2"
    assert counted(count({ONE: report("r2")}, good, good)) == "1/2"
    assert counted(count({ONE: report("r2"), TWO: report("r2")}, good, None)) == "1/2"
    assert counted(count({ONE: report("r2"), TWO: report("r1")}, good, PodState((POLICY,), "", "no"))) == "1/2"


def test_pods_of_another_installation_are_not_counted() -> None:
    """They report to their own, unless they do to us."""
    pods = ((ONE, (POLICY,)), (TWO, (POLICY,)))
    states = dict.fromkeys((ONE, TWO), PodState((POLICY,), "r"))
    others = frozenset((ONE, TWO))

    assert tally(pods, states, {}, others) == {}
    assert counted(tally(pods, states, {ONE: report("r")}, others)[POLICY]) == "1/1"


def test_counting_in_parts_makes_the_same_sum() -> None:
    """The loop serves others in between."""
    pods = ((ONE, (POLICY,)), (TWO, (POLICY,)))
    states = dict.fromkeys((ONE, TWO), PodState((POLICY,), "r"))
    reports = {ONE: report("r"), TWO: report("r")}
    parts: dict[Source, Tally] = {}
    for each in pods:
        tally([each], states, reports, tallies=parts)

    assert parts == tally(pods, states, reports)
    assert counted(parts[POLICY]) == "2/2"


def test_all_pods_enforce_it() -> None:
    """What `kubectl get` shows as True, True and 2/2."""
    good = PodState((POLICY,), "r2")

    assert said(count({ONE: report("r2"), TWO: report("r2")}, good, good)) == {
        "Accepted": ("True", "Selects", "selects injected pods"),
        "Compiled": ("True", "Compiled", "compiles"),
        "Distributed": ("True", "AllPods", "2/2 pods enforce it"),
    }


def test_the_reason_why_some_do_not_is_said() -> None:
    """With the first pod that it concerns."""
    good, bad = PodState((POLICY,), "r2"), PodState((POLICY,), "", "no such provider")
    reports = {ONE: report("r2"), TWO: report("r1", "older than the one in force")}

    assert said(count(reports, good, bad))["Distributed"] == (
        "False",
        "BundleFails",
        "1/2 pods enforce it: last good bundle stays at payments/ledger-1: no such provider",
    )
    assert said(count(reports, good, good))["Distributed"] == (
        "False",
        "Refused",
        "1/2 pods enforce it: refused by payments/ledger-1: older than the one in force",
    )
    assert said(count({ONE: report("r2")}, good, good))["Distributed"][1:] == (
        "InProgress",
        "1/2 pods enforce it: payments/ledger-1 has not reported",
    )
    assert said(count({ONE: report("r2"), TWO: report("r1")}, good, good))["Distributed"][2] == (
        "1/2 pods enforce it: payments/ledger-1 has an older one"
    )


def test_nothing_is_said_while_all_pods_are_compiled_for() -> None:
    """The status does not flicker at every change."""
    assert judge(held(POLICY), count({}, None, None), None) is None
    assert judge(held(POLICY), count({}, None, PodState((POLICY,), "r")), None) is not None


def test_a_policy_that_no_pod_proves_needs_a_trial() -> None:
    """Without it nothing is known of its compilation."""
    everything = {source: held(source) for source in SPECS}
    failing = count({}, PodState((POLICY,), "", "x"), None)

    assert set(needs_trial(everything, {})) == {POLICY, RAIL}
    assert set(needs_trial(everything, {POLICY: failing})) == {POLICY, RAIL}
    assert set(needs_trial(everything, {POLICY: count({}, None, None)})) == {RAIL}
    assert set(needs_trial(everything, {POLICY: count({}, PodState((POLICY,), "r"), None)})) == {RAIL}
    assert judge(held(POLICY), Tally(), None) is None
    assert said(Tally(), "")["Compiled"][0] == "True"
    assert said(Tally(), "")["Distributed"] == ("Unknown", "SelectsNoPod", "selects no injected pod")


def test_a_policy_that_does_not_compile_says_where() -> None:
    """And that nothing has changed for callers."""
    failing = PodState((POLICY,), "", "article.rego:2:20: unexpected eof token")
    found = count({ONE: report("r1"), TWO: report("r1")}, failing, failing)

    assert said(found, "article.rego:2:20: unexpected eof token") == {
        "Accepted": ("True", "Selects", "selects injected pods"),
        "Compiled": ("False", "DoesNotCompile", "article.rego:2:20: unexpected eof token"),
        "Distributed": (
            "False",
            "DoesNotCompile",
            "0/2 pods enforce it: it does not compile; the last good bundles stay",
        ),
    }


def test_an_external_bundle_that_cannot_be_had_is_the_policys_problem() -> None:
    """There is nothing of it to compile but what its server answers, and only for pods."""
    pem = make_key().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    external = held(POLICY, cedar=None, bundle={"url": "https://opa.test/b", "keys": pem})
    failing = PodState((POLICY,), "", "https://opa.test/b: answers 404")

    def compiled(found: Tally) -> tuple[str, str]:
        (condition,) = [each for each in judge(external, found, None) or () if each.type == "Compiled"]
        return condition.status, condition.message

    assert list(needs_trial({POLICY: external}, {})) == []
    assert compiled(count({}, failing, failing)) == ("False", "payments/ledger-0: https://opa.test/b: answers 404")
    assert compiled(Tally())[0] == "True"


def test_a_policy_beside_a_broken_one_is_compiled_and_not_distributed() -> None:
    """The fault is the other's; the pods have neither."""
    failing = PodState((POLICY,), "", "other.rego:1:1: no")
    outcome = said(count({}, failing, failing), "")

    assert outcome["Compiled"][0] == "True"
    assert outcome["Distributed"][:2] == ("False", "BundleFails")


def test_a_resource_that_cannot_be_read_says_so() -> None:
    """Although the API server took it: its schema may be older."""
    broken = Held(BadResource("MCPPolicy payments/article", "spec: one of cedar and rego must be given"), 2)
    conditions = {each.type: each for each in judge(broken, Tally(), None) or ()}

    assert conditions["Accepted"].status == "False"
    assert conditions["Accepted"].message == "MCPPolicy payments/article: spec: one of cedar and rego must be given"
    assert {conditions["Compiled"].status, conditions["Distributed"].status} == {"False"}


def test_a_profile_is_blamed_for_what_it_says_and_not_for_policies() -> None:
    """Its author can mend the one and not the other."""
    blamed = PodState((PROFILE,), "", "IdentityProvider corp: no such provider", is_profiles=True)
    blameless = PodState((PROFILE,), "", "article.rego:1:1: no")

    def outcome(state: PodState) -> dict[str, tuple[str, str, str]]:
        return said(tally([(ONE, (PROFILE,))], {ONE: state}, {})[PROFILE], source=PROFILE)

    assert outcome(blamed)["Compiled"] == ("False", "DoesNotCompile", "IdentityProvider corp: no such provider")
    assert outcome(blameless)["Compiled"][0] == "True"


def test_a_profile_learns_what_was_overruled() -> None:
    """The cluster's stricter value holds, and its author is told."""
    state = PodState((PROFILE,), "r", notes=("spec.identity.mtls: permissive is looser than the cluster's strict",))
    found = tally([(ONE, (PROFILE, PROFILE))], {ONE: state}, {ONE: report("r")})[PROFILE]

    assert counted(found) == "1/1"
    assert said(found, source=PROFILE)["Accepted"][2] == (
        "selects injected pods; spec.identity.mtls: permissive is looser than the cluster's strict"
    )

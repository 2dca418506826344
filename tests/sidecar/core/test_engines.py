"""sidecar/core/engines.py: the article's rules in both languages, and which engines a bundle gets."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sidecar.core.authorise import Engine, differing, judge
from sidecar.core.bundle import Bundle, decode, public_keys
from sidecar.core.engines import engines
from sidecar.core.profile import PolicySet
from sidecar.errors import BundleError
from tests.sidecar.questions import a_question, a_user

ARTICLE = Path(__file__).parents[3] / "examples" / "article"


def article(**announced: Any) -> Bundle:
    """Return the example's bundle, with another announcement of its policies."""
    keys = public_keys((ARTICLE / "bundle.pub.pem").read_text())
    bundle = decode((ARTICLE / "bundle.tar.gz").read_bytes(), keys)
    policies = msgspec.structs.replace(bundle.profile.policies[0], **announced)
    profile = msgspec.structs.replace(bundle.profile, policies=(policies,))
    return Bundle(revision=bundle.revision, files=bundle.files, profile=profile)


SIX_CASES = [
    ("analyst", "read_schema", {}, True),
    ("analyst", "execute_query", {"sql": "SELECT 1"}, False),
    ("engineer", "list_tables", {}, True),
    ("engineer", "execute_query", {"sql": "SELECT 1", "destructive": False}, True),
    ("engineer", "execute_query", {"sql": "DROP TABLE x", "destructive": True}, False),
    ("intern", "list_tables", {}, False),
]


Loaded = Mapping[str, tuple[Engine, ...]]
VARIANTS: dict[str, dict[str, Any]] = {
    "rego": {"cedar": False},
    "cedar": {"rego": False},
    "both": {},
    "both, not projected": {"pure": False, "reads": None},
}


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    """The example's engines, loaded once for many questions as in the sidecar."""
    return {variant: engines(article(**announced)).enforced for variant, announced in VARIANTS.items()}


@pytest.mark.parametrize(("role", "tool", "arguments", "allowed"), SIX_CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_articles_rules(
    loaded: Loaded, variant: str, role: str, tool: str, arguments: dict[str, Any], allowed: bool
) -> None:
    """Rego alone, Cedar alone, both, and both without projection decide the six cases alike."""
    verdict = judge(a_question(tool, arguments, role=role), loaded[variant])

    assert (verdict.allowed, verdict.errors) == (allowed, ())


@pytest.mark.parametrize("destructive", ["yes", 1, [], {}, None])
def test_a_destructive_flag_of_another_type_is_denied_by_both(loaded: Loaded, destructive: Any) -> None:
    """The flag is the caller's to write, so anything but false and absent counts."""
    for variant in ("rego", "cedar"):
        question = a_question("execute_query", {"destructive": destructive}, role="engineer")
        assert not judge(question, loaded[variant]).allowed


def test_both_engines_must_allow() -> None:
    """One that denies is enough, whichever."""
    bundle = article()
    nobody = {**bundle.files, "cedar/article.cedar": b"forbid (principal, action, resource);"}
    narrowed = Bundle(revision="x", files=nobody, profile=bundle.profile)
    verdict = judge(a_question("read_schema", role="analyst"), engines(narrowed).enforced)

    assert (verdict.allowed, verdict.policies) == (False, ("cedar/article.cedar#0",))


def test_without_policies_there_is_no_engine_and_nothing_is_allowed() -> None:
    """A workload without policies is governed, not open."""
    made = engines(article(cedar=False, rego=False)).enforced

    assert made == ()
    assert not judge(a_question(), made).allowed


def test_verdicts_are_remembered_only_of_pure_policies() -> None:
    """A policy that reads the time must be asked each time."""
    assert [(type(each).__name__, each.name) for each in engines(article()).enforced] == [("Remembering", "cedar+rego")]
    assert [each.name for each in engines(article(pure=False)).enforced] == ["cedar", "rego"]


def test_reads_that_are_no_pointers_are_refused() -> None:
    """A projection that cannot be understood is no projection."""
    with pytest.raises(BundleError, match=r"sidegate\.json: policies\.reads: 'user' is no JSON pointer"):
        engines(article(reads=("user",)))


@pytest.mark.parametrize(("used", "unused"), [("cedar", "wasmtime"), ("rego", "cedarpy")])
def test_only_the_engine_that_is_used_is_loaded(used: str, unused: str) -> None:
    """Each costs 10 to 25 MB, of a sidecar's 60."""
    other = {"cedar": "rego", "rego": "cedar"}[used]
    program = (
        "import sys, tests.sidecar.core.test_engines as t\n"
        f"made = t.engines(t.article({other}=False))\n"
        f"print([each.name for each in made.enforced], {unused!r} in sys.modules)\n"
    )
    done = subprocess.run(  # noqa: S603 - this interpreter
        [sys.executable, "-c", program], cwd=ARTICLE.parents[1], capture_output=True, text=True, check=True
    )

    assert done.stdout == f"['{used}'] False\n"


def test_policies_are_announced_as_they_are() -> None:
    """The example carries both languages, pure, and reads what its rules mention."""
    announced = article().profile.policies[0]

    assert announced == PolicySet(cedar=True, rego=True, pure=True, reads=announced.reads)
    assert {"/user/role", "/tool/name", "/tool/args/destructive"} <= set(announced.reads or ())
    assert "/request" not in " ".join(announced.reads or ("/request",))


def several(*sets: PolicySet, **texts: str) -> Bundle:
    """Return a bundle of *sets*, each with the Cedar text under its name's last part."""
    files = {f"{each.path}cedar/p.cedar": texts[each.name.rpartition("/")[2]].encode() for each in sets}
    profile = msgspec.structs.replace(article().profile, policies=sets)
    return Bundle(revision="r1", files=files, profile=profile)


def a_set(name: str, **fields: Any) -> PolicySet:
    """Return one Cedar policy of *name*, such as namespace/a; of the cluster it is a guard rail."""
    grants = name.startswith("namespace/")
    return PolicySet(**{"name": name, "path": f"sets/{name}/", "cedar": True, "grants": grants, **fields})


PERMIT, NONE = "permit (principal, action, resource);", ""
NO_DELETES = PERMIT + '@id("no-deletes") forbid (principal, action, resource) when { resource.name == "delete" };'
READS = '@id("reads") permit (principal, action, resource) when { resource.name == "read" };'


@pytest.mark.parametrize(
    ("texts", "allowed"),
    [
        ({"a": PERMIT, "b": PERMIT, "rail": PERMIT}, {"read", "write", "delete"}),
        ({"a": READS, "b": PERMIT, "rail": PERMIT}, {"read"}),
        ({"a": PERMIT, "b": NO_DELETES, "rail": PERMIT}, {"read", "write"}),
        ({"a": PERMIT, "b": PERMIT, "rail": NO_DELETES}, {"read", "write"}),
        ({"a": PERMIT, "b": PERMIT, "rail": NONE}, set()),
        ({"a": READS, "b": NO_DELETES, "rail": PERMIT}, {"read"}),
    ],
)
def test_every_policy_must_allow(texts: dict[str, str], allowed: set[str]) -> None:
    """What one policy forbids, or merely does not permit, no other opens; nor the cluster's rails."""
    made = engines(several(a_set("namespace/a"), a_set("namespace/b"), a_set("cluster/rail"), **texts))

    assert {tool for tool in ("read", "write", "delete") if judge(a_question(tool), made.enforced).allowed} == allowed


def test_a_guard_rail_alone_opens_nothing() -> None:
    """It narrows what a namespace grants; where that is nothing, it stays nothing."""
    assert engines(several(a_set("cluster/rail"), rail=PERMIT)).enforced == ()


def test_policies_in_shadow_alone_open_nothing() -> None:
    """A shadow grants nothing either."""
    shadow = a_set("namespace/a", mode="shadow")

    made = engines(several(shadow, a_set("cluster/rail"), a=PERMIT, rail=PERMIT))
    assert made.enforced == ()
    assert [each.name for each in made.shadows] == ["namespace/a"]


def test_a_verdict_of_several_policies_says_whose_it_is() -> None:
    """Policy and rule, for the audit record."""
    made = engines(several(a_set("namespace/a"), a_set("cluster/rail"), a=READS, rail=NO_DELETES))

    assert judge(a_question("read"), made.enforced).policies == ("namespace/a: reads", "cluster/rail: cedar/p.cedar#0")
    assert judge(a_question("delete"), made.enforced[1:]).policies == ("cluster/rail: no-deletes",)
    assert judge(a_question("write"), made.enforced).policies == ("namespace/a",)


def test_a_shadow_differs_in_both_directions() -> None:
    """It is told when it would deny what passes, and when it would allow what does not."""
    made = engines(several(a_set("namespace/a"), a_set("namespace/b", mode="shadow"), a=NO_DELETES, b=READS))
    turned = engines(several(a_set("namespace/b"), a_set("namespace/a", mode="shadow"), a=NO_DELETES, b=READS))

    def differences(these: Any, tool: str) -> list[tuple[str, bool]]:
        permitted = judge(a_question(tool), these.enforced).allowed
        return [(each.policy, each.allowed) for each in differing(a_question(tool), these.shadows, permitted=permitted)]

    assert differences(made, "read") == []
    assert differences(made, "write") == [("namespace/b", False)]
    assert differences(made, "delete") == []
    assert differences(turned, "write") == [("namespace/a", True)]


def test_policies_written_for_toolhive_load_unchanged() -> None:
    """Its vocabulary is another way of saying the same question."""
    text = (
        'permit (principal in THVGroup::"ops", action == Action::"call_tool", resource == Tool::"deploy")'
        ' when { context.arg_env != "production" && principal has claim_email && context has arg_tags_present'
        ' && resource.arg_count.lessThan(decimal("10.0")) && resource in MCP::"database" };'
    )
    (engine,) = engines(several(a_set("namespace/a", vocabulary="toolhive"), a=text)).enforced
    user = a_user(groups=("ops",), claims={"email": "x@y.test", "sub": "u-1"})

    def asks(**changes: Any) -> bool:
        arguments = {"env": "staging", "tags": ["a"], "count": 5, **changes}
        return engine.decide(a_question("deploy", arguments, user=user)).allowed

    assert asks()
    assert not asks(env="production")
    assert not asks(count=10.5)
    assert not asks(tags="a")
    assert not engine.decide(a_question("deploy", {"env": "staging", "tags": [], "count": 1}, user=a_user())).allowed

"""sidecar/core/engines.py: the article's rules in both languages, and which engines a bundle gets."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sidecar.core.authorise import Engine, judge
from sidecar.core.bundle import Bundle, decode, public_keys
from sidecar.core.engines import engines
from sidecar.core.profile import Policies
from sidecar.errors import BundleError
from tests.sidecar.questions import a_question

ARTICLE = Path(__file__).parents[3] / "examples" / "article"


def article(**announced: Any) -> Bundle:
    """Return the example's bundle, with another announcement of its policies."""
    keys = public_keys((ARTICLE / "bundle.pub.pem").read_text())
    bundle = decode((ARTICLE / "bundle.tar.gz").read_bytes(), keys)
    policies = msgspec.structs.replace(bundle.profile.policies, **announced)
    profile = msgspec.structs.replace(bundle.profile, policies=policies)
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
    return {variant: engines(article(**announced)) for variant, announced in VARIANTS.items()}


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
    verdict = judge(a_question("read_schema", role="analyst"), engines(narrowed))

    assert (verdict.allowed, verdict.policies) == (False, ("cedar/article.cedar#0",))


def test_without_policies_there_is_no_engine_and_nothing_is_allowed() -> None:
    """A workload without policies is governed, not open."""
    made = engines(article(cedar=False, rego=False))

    assert made == ()
    assert not judge(a_question(), made).allowed


def test_verdicts_are_remembered_only_of_pure_policies() -> None:
    """A policy that reads the time must be asked each time."""
    assert [(type(each).__name__, each.name) for each in engines(article())] == [("Remembering", "cedar+rego")]
    assert [each.name for each in engines(article(pure=False))] == ["cedar", "rego"]


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
        f"print([each.name for each in made], {unused!r} in sys.modules)\n"
    )
    done = subprocess.run(  # noqa: S603 - this interpreter
        [sys.executable, "-c", program], cwd=ARTICLE.parents[1], capture_output=True, text=True, check=True
    )

    assert done.stdout == f"['{used}'] False\n"


def test_policies_are_announced_as_they_are() -> None:
    """The example carries both languages, pure, and reads what its rules mention."""
    announced = article().profile.policies

    assert announced == Policies(cedar=True, rego=True, pure=True, reads=announced.reads)
    assert {"/user/role", "/tool/name", "/tool/args/destructive"} <= set(announced.reads or ())
    assert "/request" not in " ".join(announced.reads or ("/request",))

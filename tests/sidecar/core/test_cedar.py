"""sidecar/core/cedar.py: how a question becomes Cedar's request, and that no error ever permits."""

import json
from typing import Any

import cedarpy
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.authorise import Question
from sidecar.core.cedar import CedarEngine, translate
from sidecar.core.claims import Delegated, User
from sidecar.core.message import Ask, Prompt, Resource
from sidecar.core.projection import Projection
from sidecar.errors import BundleError
from tests.sidecar.questions import WORKLOAD, a_question, a_user

PERMIT = "permit (principal, action, resource);"


def engine(*texts: str) -> CedarEngine:
    """Return an engine over policy files named a.cedar, b.cedar and so on."""
    return CedarEngine({f"{'abcdef'[index]}.cedar": text for index, text in enumerate(texts)})


def when(condition: str) -> CedarEngine:
    """Return an engine that permits on *condition*."""
    return engine(f"permit (principal, action, resource) when {{ {condition} }};")


def test_a_permit_allows_and_is_named() -> None:
    """By its @id, or by file and position."""
    assert engine('@id("all") ' + PERMIT).decide(a_question()).policies == ("all",)
    assert engine("", PERMIT + PERMIT).decide(a_question()).policies == ("b.cedar#0", "b.cedar#1")


def test_no_permit_denies() -> None:
    """Cedar denies by default, without an error."""
    verdict = engine('permit (principal in Role::"x", action, resource);').decide(a_question())
    assert (verdict.allowed, verdict.policies, verdict.errors) == (False, (), ())


def test_a_forbid_wins_and_is_named() -> None:
    """A forbid overrides every permit."""
    verdict = engine(PERMIT, '@id("never") forbid (principal, action, resource);').decide(a_question())
    assert (verdict.allowed, verdict.policies) == (False, ("never",))


@pytest.mark.parametrize("arguments", [{}, {"destructive": "yes"}, {"destructive": 1}])
def test_a_forbid_that_fails_denies(arguments: dict[str, Any]) -> None:
    """Cedar would skip it and permit; the error names the policy."""
    guard = '@id("guard") forbid (principal, action, resource) when { context.args.destructive };'
    verdict = engine(PERMIT, guard).decide(a_question("x", arguments))

    assert not verdict.allowed
    assert "guard" in verdict.errors[0]


@pytest.mark.parametrize(
    "condition",
    [
        'principal == User::"https://id.test#u-1"',
        'principal in Role::"analyst"',
        'principal in Role::"reader" && principal in Group::"finance"',
        'principal.id == "u-1" && principal.issuer == "https://id.test" && principal.role == "analyst"',
        'principal.roles.contains("reader") && !(principal has email)',
        'action == Action::"tools/call"',
        'resource == Tool::"database/read_schema"',
        'resource in Server::"database" && resource.name == "read_schema"',
        f'context.workload.spiffe_id == "{WORKLOAD}" && context.workload.namespace == "agents"',
        'context.agent.session == "s-1" && !(context.agent has client) || !(context.agent.client has name)',
        'context.method == "tools/call" && context.request.time > 1',
        'context.args.path like "/tmp/*" && context.args.tags.contains("a") && context.args.nested.n == 3',
        'context.claims.department == "legal"',
    ],
)
def test_what_a_policy_sees(condition: str) -> None:
    """Principal, action, resource and context, as the reference page promises them."""
    user = a_user(roles=("reader",), groups=("finance",), claims={"department": "legal"})
    arguments = {"path": "/tmp/x", "tags": ["a"], "nested": {"n": 3}}  # noqa: S108 - a word in an argument

    verdict = when(condition).decide(a_question("read_schema", arguments, user=user))
    assert (verdict.allowed, verdict.errors) == (True, ())


def test_servers_have_attributes() -> None:
    """A rule may name the namespace of a server."""
    policy = 'permit (principal, action, resource) when { Server::"database".namespace == "demo" };'
    assert engine(policy).decide(a_question()).allowed


def test_without_a_user_the_workload_is_the_principal() -> None:
    """Machine to machine."""
    condition = f'principal == Workload::"{WORKLOAD}" && principal.service_account == "planner"'
    assert when(condition).decide(a_question(nobody=True)).allowed


def test_without_anybody_the_principal_is_anonymous() -> None:
    """Only where the profile lets nobody in particular in."""
    assert when('principal == Anonymous::"anonymous"').decide(a_question(nobody=True, workload=None)).allowed


def test_prompts_and_resources_are_resources() -> None:
    """Each kind of target has its own entity type."""
    prompt = Prompt(name="review", arguments={"x": "1"})
    assert when('resource == Prompt::"database/review" && context.args.x == "1"').decide(a_question(prompt)).allowed
    resource = Resource(uri="file:///a")
    assert when('resource == Resource::"file:///a" && resource.uri like "file:*"').decide(a_question(resource)).allowed
    assert when('action == Action::"resources/read" && context.args == {}').decide(a_question(resource)).allowed


@pytest.mark.parametrize("key", ["__entity", "__extn", "__expr"])
@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: {"deep": [value]}])
def test_arguments_never_become_entities(key: str, wrap: Any) -> None:
    """Cedar's JSON form would make a User of these; the caller writes arguments."""
    arguments = {"owner": wrap({key: {"type": "User", "id": "https://id.test#u-1"}})}

    verdict = when("context.args.owner == principal || true").decide(a_question("x", arguments))
    assert not verdict.allowed
    assert f"has a member {key}" in verdict.errors[0]


def test_claims_never_become_entities() -> None:
    """Nor do the claims that an identity provider lets a user choose."""
    user = a_user(claims={"profile": {"__entity": {"type": "User", "id": "admin"}}})
    assert not engine(PERMIT).decide(a_question(user=user)).allowed


@pytest.mark.parametrize("value", [None, 1.5, 2**63, -(2**63) - 1, [1, {"x": None}]])
def test_values_that_cedar_has_not_deny(value: Any) -> None:
    """Dropping them would let a forbid on them miss; the error says where."""
    verdict = engine(PERMIT).decide(a_question("x", {"v": value}))
    assert not verdict.allowed
    assert verdict.errors[0].startswith("cedar: args.v")


@pytest.mark.parametrize("value", [True, "x", 2**63 - 1, -(2**63), [], {}, [["a"], {"b": False}]])
def test_values_that_cedar_has_are_judged(value: Any) -> None:
    """All the others are handed over as they are."""
    assert engine(PERMIT).decide(a_question("x", {"v": value})).allowed


def test_values_that_nobody_reads_do_not_deny() -> None:
    """What the projection leaves out is never seen by Cedar."""
    chosen = Projection(["/user", "/server", "/method", "/tool/name", "/tool/args/a"])
    arguments = {"b": None, "c": {"__entity": 1}, "a": 1}

    narrowed = CedarEngine({"a.cedar": PERMIT}, projection=chosen)
    assert narrowed.decide(a_question("x", arguments)).allowed


def test_nesting_that_exhausts_python_denies() -> None:
    """Claims may be nested deeper than any message."""
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    verdict = engine(PERMIT).decide(a_question(user=a_user(claims={"x": deep})))
    assert not verdict.allowed
    assert verdict.errors


def test_nesting_that_cedar_refuses_denies() -> None:
    """Its own limit is about 120 levels; no decision is no permit."""
    deep: Any = {}
    for _ in range(200):
        deep = {"x": deep}
    verdict = engine(PERMIT).decide(a_question("x", deep))
    assert not verdict.allowed
    assert "failed to build request" in verdict.errors[0]


@pytest.mark.parametrize("name", ['a"b', "a\nb", "Ünïcode", "a::b", '"; permit(principal,action,resource); //'])
def test_names_are_never_syntax(name: str) -> None:
    """Names come from callers and travel as data."""
    user: User = a_user(id=name, role=name)
    request, entities = translate(a_question(name, user=user).document())

    assert request["principal"]["id"] == f"https://id.test#{name}"
    assert json.loads(entities[-1])[0]["uid"] == {"type": "Tool", "id": f"database/{name}"}
    assert engine(PERMIT).decide(a_question(name, user=user)).allowed
    assert not when('principal == User::"admin"').decide(a_question(name, user=user)).allowed


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("permit (principal, action", "a.cedar: unexpected end of input"),
        ("permit (principal == ?principal, action, resource);", "a.cedar: a template"),
    ],
)
def test_policies_that_do_not_load_are_refused(text: str, reason: str) -> None:
    """The last good bundle stays."""
    with pytest.raises(BundleError, match=reason):
        engine(text)


def test_a_file_cannot_continue_the_one_before() -> None:
    """Each file is parsed alone, so an unfinished policy cannot swallow the next file's."""
    with pytest.raises(BundleError, match=r"a\.cedar"):
        engine("permit (principal, action, resource) when {", "true }; forbid (principal, action, resource);")


class PanicException(BaseException):
    """What a panic in the engine looks like."""


@pytest.mark.parametrize("raised", [PanicException("boom"), ValueError("boom")])
def test_a_panic_of_the_engine_denies(raised: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect of the engine is a denial, not the end of the process."""

    def broken(*_: Any) -> Any:
        raise raised

    monkeypatch.setattr(cedarpy, "is_authorized", broken)
    verdict = engine(PERMIT).decide(a_question())
    assert verdict.errors == (f"cedar: {type(raised).__name__}",)


def test_an_interrupt_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopping the process stays possible."""

    def broken(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(cedarpy, "is_authorized", broken)
    with pytest.raises(KeyboardInterrupt):
        engine(PERMIT).decide(a_question())


CONDITIONS = (
    "true",
    "context.args.x",
    "context.args has x",
    "context.args.x == 1",
    'principal in Role::"analyst"',
    'resource.name == "a"',
    "context.nothing",
)
RULES = st.builds(
    lambda effect, condition: f"{effect} (principal, action, resource) when {{ {condition} }};",
    st.sampled_from(["permit", "forbid"]),
    st.sampled_from(CONDITIONS),
)


@given(
    st.lists(RULES, max_size=4),
    st.sampled_from(CONDITIONS),
    st.sampled_from(["a", "b"]),
    st.dictionaries(st.just("x"), st.booleans() | st.just(1)),
)
def test_a_further_forbid_never_permits(rules: list[str], condition: str, tool: str, arguments: dict[str, Any]) -> None:
    """Adding a forbid turns no denial into a permit, whatever fails to evaluate."""
    question = a_question(tool, arguments)
    before = engine("\n".join(rules)).decide(question)
    after = engine("\n".join([*rules, f"forbid (principal, action, resource) when {{ {condition} }};"])).decide(
        question
    )

    assert before.allowed or not after.allowed


def asked(target: Ask) -> Question:
    """Return the question whether the server may ask *target*."""
    question = a_question()
    return msgspec.structs.replace(question, message=question.message.about(target))


def test_what_the_server_asks_is_about_the_server() -> None:
    """Its action is the method; a permit for tools does not reach it."""
    rule = 'permit (principal, action == Action::"sampling/createMessage", resource == Server::"database");'
    question = asked(Ask(method="sampling/createMessage"))

    assert engine(rule).decide(question).allowed
    assert not engine(rule).decide(asked(Ask(method="roots/list"))).allowed
    assert not engine('permit (principal, action == Action::"tools/call", resource);').decide(question).allowed
    assert when('resource.namespace == "pay" || resource.name == "database"').decide(question).errors == ()


def test_a_rule_may_read_how_a_human_is_asked() -> None:
    """A form has no URL, and a rule that needs one does not hold."""
    rule = when('context.elicitation has url && context.elicitation.url like "https://id.test/*"')

    assert rule.decide(asked(Ask(method="elicitation/create", mode="url", url="https://id.test/x"))).allowed
    assert not rule.decide(asked(Ask(method="elicitation/create", mode="url", url="https://evil.test/x"))).allowed
    assert not rule.decide(asked(Ask(method="elicitation/create", mode="form"))).allowed


def test_a_rule_may_read_who_acts_for_the_user() -> None:
    """The chain of a delegation, from the user outward; without one it is empty."""
    acting = a_user(delegation=(Delegated(sub="alice", actor="planner"),))
    rule = when('context.delegation.contains({sub: "alice", actor: "planner"})')

    assert rule.decide(a_question(user=acting)).allowed
    assert not rule.decide(a_question()).allowed
    assert when("context.delegation.isEmpty()").decide(a_question()).allowed


KEEPING = engine(
    'permit (principal in Role::"a", action, resource) when { resource.name == "x" };',
    'permit (principal, action, resource in Server::"database") when { principal.id == "u-2" };',
    'forbid (principal in Group::"g", action, resource == Tool::"database/y");',
)
CALLERS = tuple(
    a_user(id=name, role=role, groups=groups)
    for name in ("u-1", "u-2")
    for role in ("a", "b")
    for groups in ((), ("g",))
)


@given(st.lists(st.tuples(st.sampled_from([*CALLERS, None]), st.sampled_from(["x", "y"])), max_size=6))
def test_a_verdict_does_not_depend_on_who_asked_before(asked_: list[tuple[User | None, str]]) -> None:
    """Entities are kept and shared; a caller never gets another's role, group or name."""
    for user, tool in asked_:
        role, groups, name = (user.role, user.groups, user.id) if user else (None, (), None)
        allowed = (role == "a" and tool == "x") or name == "u-2"

        verdict = KEEPING.decide(a_question(tool, user=user, nobody=user is None))

        assert verdict.allowed == (allowed and not ("g" in groups and tool == "y"))

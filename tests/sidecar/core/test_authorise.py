"""sidecar.core.authorise: nothing but a clean allow of every engine makes a permit."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.authorise import Named, Permit, Question, Verdict, authorise, judge, visible
from sidecar.core.message import Ask, Message, Prompt, Resource, Tool, parse
from sidecar.errors import Reason, Refusal
from tests.builders import STREAM, a_call, a_permit, a_principal, a_question, a_request
from tests.fakes import FakeEngine, allowing

VERDICTS = st.builds(
    Verdict,
    allowed=st.booleans(),
    policies=st.lists(st.sampled_from(["p1", "p2"]), max_size=2).map(tuple),
    errors=st.lists(st.just("boom"), max_size=1).map(tuple),
)


@given(st.lists(VERDICTS, max_size=4))
def test_only_a_clean_allow_of_every_engine_allows(verdicts: list[Verdict]) -> None:
    """And of at least one: with no engine nothing is allowed."""
    verdict = judge(a_question(), [FakeEngine(verdict=each) for each in verdicts])

    assert verdict.allowed is (bool(verdicts) and all(each.allowed and not each.errors for each in verdicts))


@given(st.lists(VERDICTS, max_size=3), VERDICTS)
def test_a_further_engine_never_turns_a_denial_into_a_permit(verdicts: list[Verdict], extra: Verdict) -> None:
    """Engines can only narrow; the first may be added to none."""
    before = judge(a_question(), [FakeEngine(verdict=each) for each in verdicts]).allowed
    after = judge(a_question(), [FakeEngine(verdict=each) for each in (*verdicts, extra)]).allowed

    assert after is (extra.allowed and not extra.errors and (before or not verdicts))


def test_a_permit_names_the_policies_that_allowed() -> None:
    """Of all engines, in order, and the revision that they are of."""
    question = a_question()
    engines = [FakeEngine(verdict=Verdict(allowed=True, policies=(name,))) for name in ("p1", "p2")]

    assert authorise(question, engines, "r9") == Permit(question=question, policies=("p1", "p2"), revision="r9")


@pytest.mark.parametrize(
    ("verdict", "detail"),
    [
        (Verdict(allowed=False), "no rule allows it"),
        (Verdict(allowed=False, policies=("forbid-1",)), "forbid-1"),
        (Verdict(allowed=True, errors=("boom",)), "boom"),
        (Verdict(allowed=False, policies=("forbid-1",), errors=("boom",)), "boom; forbid-1"),
    ],
)
def test_a_denial_says_what_was_asked_to_the_caller_and_why_to_the_operator(verdict: Verdict, detail: str) -> None:
    """Policies are nobody else's business."""
    with pytest.raises(Refusal) as caught:
        authorise(a_question(a_call("drop")), [FakeEngine(verdict=verdict)], "r1")

    assert (Reason.DENIED, detail) == (caught.value.reason, caught.value.detail)
    assert caught.value.public == "policy does not allow tools/call on tool 'drop'"


@pytest.mark.parametrize(
    "message",
    [
        *(
            parse(a_request(method))
            for method in ("initialize", "ping", "server/discover", "tools/list", "resources/list")
        ),
        parse(b'{"jsonrpc":"2.0","method":"notifications/initialized"}'),
        parse(b'{"jsonrpc":"2.0","id":1,"result":{}}'),
        STREAM,
    ],
    ids=lambda message: message.method,
)
def test_what_does_nothing_by_itself_needs_no_rule(message: Message) -> None:
    """Refusing it would demote or kill clients; no engine is even asked."""
    engine = FakeEngine(verdict=Verdict(allowed=False))

    assert authorise(a_question(message), [engine], "r1").policies == ()
    assert engine.asked == []


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("tools/call", {"name": "x"}),
        ("prompts/get", {"name": "x"}),
        ("resources/read", {"uri": "x"}),
        ("resources/subscribe", {"uri": "x"}),
        ("completion/complete", {"ref": {"type": "ref/prompt", "name": "x"}}),
    ],
)
def test_what_uses_something_needs_a_rule(method: str, params: dict[str, object]) -> None:
    """Also what only completes arguments or subscribes."""
    with pytest.raises(Refusal) as caught:
        authorise(a_question(a_request(method, params)), [], "r1")

    assert caught.value.reason is Reason.DENIED


def test_items_are_judged_one_by_one_as_if_used_without_arguments() -> None:
    """By the principal of the permit, as what a client would send to use them."""
    engine = allowing("a", "c")
    permit = a_permit(a_request("tools/list"))
    targets = [Tool(name=name, arguments={}) for name in "abc"]

    assert list(visible(permit, targets, [engine])) == [True, False, True]
    assert [("tools/call", target) for target in targets] == [
        (each.message.method, each.message.target) for each in engine.asked
    ]
    assert all(each.principal is permit.question.principal for each in engine.asked)


def test_without_engines_nothing_is_visible() -> None:
    """As nothing may be called."""
    targets = (Tool(name="a", arguments={}), Prompt(name="a", arguments={}), Resource(uri="a"))

    assert list(visible(a_permit(), targets, [])) == [False, False, False]


def test_the_document_says_who_what_and_where() -> None:
    """The contract with policy authors: a change here is a new version of it."""
    question = a_question(a_call("read_schema", {"table": "t"}), session="s1")

    assert question.document() == {
        "user": {
            "id": "alice",
            "issuer": "https://id.test",
            "email": None,
            "role": "analyst",
            "roles": ["analyst"],
            "groups": [],
            "claims": {"sub": "alice"},
        },
        "workload": {
            "spiffe_id": "spiffe://a.test/ns/agents/sa/planner",
            "trust_domain": "a.test",
            "path": "/ns/agents/sa/planner",
            "namespace": "agents",
            "service_account": "planner",
        },
        "agent": {
            "id": "spiffe://a.test/ns/agents/sa/planner",
            "session": "s1",
            "client": {"name": "planner", "version": "1"},
        },
        "server": {"namespace": "pay", "workload": "billing", "name": "billing", "version": ""},
        "method": "tools/call",
        "tool": {"name": "read_schema", "args": {"table": "t"}},
        "prompt": None,
        "resource": None,
        "elicitation": None,
        "request": {"time": question.time_ns, "protocol_version": None, "trace_id": None},
        "delegation": [],
    }


@pytest.mark.parametrize(
    ("body", "part", "value"),
    [
        (a_request("prompts/get", {"name": "p", "arguments": {"a": "b"}}), "prompt", {"name": "p", "args": {"a": "b"}}),
        (a_request("resources/read", {"uri": "db://x"}), "resource", {"uri": "db://x"}),
    ],
)
def test_prompts_and_resources_have_their_own_part(body: bytes, part: str, value: object) -> None:
    """And are no tools."""
    document = a_question(body).document()

    assert (value, None) == (document[part], document["tool"])


def test_who_is_not_known_is_null() -> None:
    """No human and no workload: rules that need one do not hold."""
    document = a_question(principal=a_principal(None, workload=None)).document()

    assert (document["user"], document["workload"], document["agent"]["id"]) == (None, None, None)


# tasks, subscriptions, and what the server asks


class Reads:
    """Allows reading some resources, and nothing else."""

    name = "reads"

    def __init__(self, *uris: str) -> None:
        self.uris = uris

    def decide(self, question: Question) -> Verdict:
        """Return the verdict."""
        target = question.message.target
        is_read = question.message.method == "resources/read" and isinstance(target, Resource)
        return Verdict(allowed=is_read and target.uri in self.uris, policies=("may-read",))  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["tasks/get", "tasks/result", "tasks/cancel", "tasks/update", "tasks/list"])
def test_the_right_to_a_task_is_to_own_it(method: str) -> None:
    """No engine knows whose it is; the pipeline does."""
    question = a_question(a_request(method, {"taskId": "t"}))

    assert authorise(question, [FakeEngine(verdict=Verdict(allowed=False))], "r1").policies == ()


def test_a_subscription_takes_the_right_to_read_each_resource() -> None:
    """As if each were read; who may not read one is told so, and nothing is sent."""
    question = a_question(
        a_request("subscriptions/listen", {"notifications": {"resourceSubscriptions": ["a:1", "a:2"]}})
    )

    assert authorise(question, [Reads("a:1", "a:2")], "r1").policies == ("may-read",)
    with pytest.raises(Refusal, match=r"subscriptions/listen on resource 'a:2'") as caught:
        authorise(question, [Reads("a:1")], "r1")

    assert caught.value.reason is Reason.DENIED


def test_a_subscription_without_resources_needs_no_rule() -> None:
    """That a list has changed says nothing of what is on it."""
    question = a_question(a_request("subscriptions/listen", {"notifications": {"toolsListChanged": True}}))

    assert authorise(question, [Reads()], "r1").policies == ()


@pytest.mark.parametrize("method", ["sampling/createMessage", "elicitation/create", "roots/list"])
def test_what_the_server_asks_needs_a_rule(method: str) -> None:
    """Nothing is allowed by default, and none of the rules for calls is about it."""
    asked = a_question(a_call())
    asked = msgspec.structs.replace(asked, message=asked.message.about(Ask(method=method)))

    assert authorise(asked, [FakeEngine(verdict=Verdict(allowed=True, policies=("p",)))], "r1").policies == ("p",)
    with pytest.raises(Refusal, match="on the client"):
        authorise(asked, [Reads()], "r1")


def test_an_elicitation_is_in_the_document() -> None:
    """How and where the human is asked; other requests of the server's have none."""
    asked = a_question(a_call())
    by_url = msgspec.structs.replace(
        asked, message=asked.message.about(Ask(method="elicitation/create", mode="url", url="https://a.test"))
    )
    document = by_url.document()

    assert (document["method"], document["elicitation"]) == (
        "elicitation/create",
        {"mode": "url", "url": "https://a.test"},
    )
    assert (document["tool"], document["prompt"], document["resource"]) == (None, None, None)
    assert (
        msgspec.structs.replace(asked, message=asked.message.about(Ask(method="roots/list"))).document()["elicitation"]
        is None
    )


@given(VERDICTS, st.sampled_from(["namespace/a", "cluster/b"]))
def test_a_named_engine_says_of_which_policy_its_verdict_is(verdict: Verdict, policy: str) -> None:
    """The same verdict of two policies is told apart, whichever came first."""
    named = Named(FakeEngine(verdict=verdict), policy).decide(a_question())

    assert named.allowed is verdict.allowed
    assert named.policies == (tuple(f"{policy}: {each}" for each in verdict.policies) or (policy,))
    assert named.errors == tuple(f"{policy}: {each}" for each in verdict.errors)


def test_a_named_verdict_is_kept_unless_it_is_long() -> None:
    """What a rule makes of its input may be as long as the caller likes, and must not fill the memory."""
    short, long = (
        Named(FakeEngine(verdict=Verdict(allowed=True, policies=("p" * chars,))), "namespace/a") for chars in (64, 2000)
    )

    assert short.decide(a_question()) is short.decide(a_question())
    assert long.decide(a_question()) is not long.decide(a_question())

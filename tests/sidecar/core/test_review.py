"""sidecar.core.review: each message of the server passes as its reader may get it, or does not."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core import review as module
from sidecar.core.authorise import Engine, Question, Verdict
from sidecar.core.content import Content
from sidecar.core.filters import Reader
from sidecar.core.message import Ask, Message, Resource
from sidecar.core.ownership import tasks
from sidecar.core.replies import Denied
from sidecar.core.review import Seen, review
from sidecar.errors import Reason, Refusal
from tests.builders import a_call, a_permit, a_principal
from tests.fakes import FakeEngine, allowing
from tests.sidecar.core.contents import KEY, a_rule

SAMPLING = '{"jsonrpc":"2.0","id":"s1","method":"sampling/createMessage","params":{"messages":[]}}'
PING = '{"jsonrpc":"2.0","id":0,"method":"ping"}'
TOOLS = '{"jsonrpc":"2.0","id":7,"result":{"tools":[{"name":"a"},{"name":"b"}]}}'


class FakeJudge:
    """Refuses what it is told to; remembers what it was asked."""

    def __init__(self, *refused: str) -> None:
        self.refused = refused
        self.asked: list[Message] = []

    def __call__(self, message: Message) -> Refusal | None:
        """Return the refusal."""
        self.asked.append(message)
        target = message.target
        key = target.url or target.method if isinstance(target, Ask) else message.method
        return Refusal(Reason.DENIED, f"policy does not allow {key}") if key in self.refused else None


class OnlyX:
    """Allows the resource x:."""

    name = "only-x"

    def decide(self, question: Question) -> Verdict:
        """Return the verdict."""
        return Verdict(allowed=question.message.target == Resource(uri="x:"))


def look(
    data: str | bytes, *engines: Engine, judge: FakeJudge | None = None, owned: Sequence[str] = ()
) -> tuple[bytes, Sequence[Seen]]:
    """Review *data* for somebody who called a tool with the id 7 and owns these tasks."""
    memory = tasks()
    for each in owned:
        memory.open(each, a_principal())
    reader = Reader(permit=a_permit(a_call()), engines=engines, tasks=memory)
    return review(data if isinstance(data, bytes) else data.encode(), reader, judge or FakeJudge())


@pytest.mark.parametrize(
    ("data", "answers", "error_code", "tool_failed"),
    [
        (b'{"id":7,"result":{}}', 7, None, False),
        (b'{"id":"7","result":{}}', "7", None, False),
        (b'{"id":7,"result":{"isError":true}}', 7, None, True),
        (b'{"id":7,"result":{"isError":null}}', 7, None, False),
        (b'{"id":7,"result":{"isError":"yes"}}', 7, None, False),
        (b'{"id":7,"error":{"code":-32602,"message":"x"}}', 7, -32602, False),
        (b'{"id":7,"error":{"code":"x"}}', 7, None, False),
        (b'{"id":7,"error":{"code":true}}', 7, None, False),
        (b'{"id":7,"error":"invalid_token"}', 7, None, False),
        (b'{"method":"notifications/progress","params":{"url":7}}', None, None, False),
        (b'{"method":"notifications/x-own"}', None, None, False),
        (b'{"id":7,"result":{"content":[{"text":"[] {}"}]}}', 7, None, False),
        (b'{"id":7,"result":{"task":"x","taskId":7}}', 7, None, False),
        (b' {"id":7,"result":{}}', 7, None, False),
    ],
)
def test_what_concerns_nobody_else_passes(data: bytes, answers: Any, error_code: int | None, tool_failed: bool) -> None:
    """As the very bytes; how it ended is for the record."""
    passed, (seen,) = look(data, FakeEngine())

    assert passed is data
    assert (answers, error_code, tool_failed) == (seen.answers, seen.error_code, seen.tool_failed)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"[]",
        b" [ ]",
        b"[7]",
        b'[{"id":7,"result":{}}',
        b'"text"',
        b'{"id":7,"result":{"tools":[]}}{}',
        b'\xef\xbb\xbf{"id":7,"result":{"tools":[]}}',
        b'{"id":7,"result":{"tools":null}}',
        b'{"id":7,"result":[{"tools":[]}]}',
        b'{"id":true,"result":{}}',
        b'{"id":7,"method":7}',
        b'{"id":7,"method":"ping","result":{}}',
        b'{"method":"notifications/x","error":{}}',
        b'{"id":7,"result":{"tools":[{"name":"\xff"}]}}',
        b'{"id":7,"result":{"inputRequests":[]}}',
        b'{"id":7,"result":{"inputRequests":{"a":{"params":{}}}}}',
        b'{"id":7,"method":"elicitation/create","params":{"mode":7}}',
        b'{"method":"notifications/resources/updated","params":{"uri":7}}',
        b'{"method":"notifications/resources/updated","params":[]}',
    ],
)
def test_what_cannot_be_read_is_refused(data: bytes) -> None:
    """Passing it would show what was not judged."""
    with pytest.raises(Refusal) as caught:
        look(data, allowing())

    assert (caught.value.reason, caught.value.public) == (Reason.UPSTREAM, "the server's answer cannot be read")


@given(st.binary(max_size=60))
def test_any_bytes_are_seen_or_refused(data: bytes) -> None:
    """No answer makes a defect."""
    try:
        look(data, allowing())
    except Refusal as refusal:
        assert refusal.reason is Reason.UPSTREAM  # noqa: PT017 - either way is right


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
MEMBERS = ["tools", "resources", "tasks", "inputRequests", "task", "taskId", "resultType", "cacheScope", "isError"]


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "id": JSON,
            "method": st.sampled_from(["ping", "elicitation/create", "notifications/tasks", "x"]) | JSON,
            "params": st.dictionaries(st.sampled_from(["uri", "mode", "url", "taskId", "inputRequests"]), JSON) | JSON,
            "result": st.dictionaries(st.sampled_from(MEMBERS), JSON) | JSON,
            "error": st.fixed_dictionaries({"code": st.just(-32042) | JSON, "data": JSON}) | JSON,
        },
    )
)
def test_any_message_is_seen_or_refused(message: dict[str, Any]) -> None:
    """Whatever its members hold."""
    try:
        passed, seen = look(json.dumps(message), allowing())
    except Refusal as refusal:
        assert refusal.reason is Reason.UPSTREAM  # noqa: PT017 - either way is right
    else:
        assert passed == seen[0].data


def test_a_list_is_filtered() -> None:
    """And all of its tools are told."""
    passed, (seen,) = look(TOOLS, allowing("a"))

    assert json.loads(passed)["result"]["tools"] == [{"name": "a"}]
    assert (seen.hidden, seen.answers, [name for name, _ in seen.tools]) == (1, 7, ["a", "b"])


# what the server asks


@pytest.mark.parametrize("data", [SAMPLING, PING])
def test_an_allowed_ask_passes(data: str) -> None:
    """As the very bytes."""
    judge = FakeJudge()
    passed, (seen,) = look(data, judge=judge)

    assert (passed, seen.reply, seen.refusal) == (data.encode(), b"", None)
    assert [(each.id, each.method) for each in judge.asked] == [(json.loads(data)["id"], json.loads(data)["method"])]


def test_a_refused_ask_is_answered_in_the_clients_place() -> None:
    """It does not pass, and the server does not wait for ever."""
    passed, (seen,) = look(SAMPLING, judge=FakeJudge("sampling/createMessage"))
    reply = json.loads(seen.reply)

    assert passed == b""
    assert (reply["id"], reply["error"]["code"]) == ("s1", 403)
    assert reply["error"]["message"] == "policy does not allow sampling/createMessage"


@pytest.mark.parametrize(
    ("data", "request_id", "code"),
    [
        ('{"id":1,"method":"tools/call","params":{"name":"a"}}', 1, -32601),
        ('{"id":1.5,"method":"ping"}', 1.5, -32600),
        ('{"id":123456789012345678901234567890,"method":"ping"}', 123456789012345678901234567890, -32600),
    ],
)
def test_what_no_client_could_answer_is_refused(data: str, request_id: Any, code: int) -> None:
    """A method that is not known, or an id that we would refuse in the answer; nobody judges it."""
    judge = FakeJudge()
    passed, (seen,) = look(data, judge=judge)
    reply = json.loads(seen.reply)

    assert (passed, reply["id"], reply["error"]["code"], judge.asked) == (b"", request_id, code, [])


@pytest.mark.parametrize(
    ("asked", "refused"),
    [
        ('{"a":{"method":"sampling/createMessage","params":{}}}', "sampling/createMessage"),
        ('{"a":{"method":"roots/list"},"b":{"method":"sampling/createMessage","params":{}}}', "sampling/createMessage"),
        ('{"a":{"method":"elicitation/create","params":{"mode":"url","url":"https://x.test/"}}}', "https://x.test/"),
    ],
)
def test_a_result_that_asks_what_it_may_not_is_an_error(asked: str, refused: str) -> None:
    """The whole of it: without the one, the server would ask again."""
    data = f'{{"jsonrpc":"2.0","id":7,"result":{{"resultType":"input_required","inputRequests":{asked}}}}}'
    passed, (seen,) = look(data, judge=FakeJudge(refused))
    allowed, _ = look(data)
    answer = json.loads(passed)

    assert allowed == data.encode()
    assert (answer["id"], answer["error"]["code"], "result" in answer) == (7, 403, False)
    assert (seen.answers, seen.error_code, seen.reply) == (7, 403, b"")
    assert seen.refusal is not None
    assert seen.refusal.reason is Reason.DENIED


def test_a_result_that_asks_the_unknown_is_an_error() -> None:
    """Only three methods may stand there."""
    data = '{"id":7,"result":{"inputRequests":{"a":{"method":"tools/call","params":{}}}}}'
    passed, _ = look(data)

    assert json.loads(passed)["error"]["code"] == -32601


def test_an_error_that_asks_to_open_a_url_is_judged() -> None:
    """URL_ELICITATION_REQUIRED of 2025-11-25."""
    asked = '{"mode":"url","url":"https://x.test/","elicitationId":"1","message":""}'
    data = f'{{"id":7,"error":{{"code":-32042,"message":"","data":{{"elicitations":[{asked}]}}}}}}'
    allowed, (seen,) = look(data)
    refused, _ = look(data, judge=FakeJudge("https://x.test/"))

    assert (allowed, seen.error_code) == (data.encode(), -32042)
    assert json.loads(refused)["error"]["code"] == 403


# notifications


@pytest.mark.parametrize(("uri", "passes"), [("x:", True), ("y:", False), ("", False)])
def test_an_update_passes_to_who_may_read_the_resource(uri: str, passes: bool) -> None:
    """Its URI alone tells what there is."""
    data = f'{{"method":"notifications/resources/updated","params":{{"uri":"{uri}"}}}}'
    passed, _ = look(data, OnlyX())

    assert passed == (data.encode() if passes else b"")


@pytest.mark.parametrize("method", ["notifications/tasks", "notifications/tasks/status"])
@pytest.mark.parametrize(("owned", "passes"), [(["t"], True), (["u"], False)])
def test_news_of_a_task_passes_to_its_owner(method: str, owned: list[str], passes: bool) -> None:
    """It may hold the task's result."""
    data = f'{{"method":"{method}","params":{{"taskId":"t","status":"completed","result":{{}}}}}}'
    passed, _ = look(data, owned=owned)

    assert passed == (data.encode() if passes else b"")


def test_news_of_a_task_that_asks_what_it_may_not_does_not_pass() -> None:
    """tasks/get says so, when it is asked."""
    data = '{"method":"notifications/tasks","params":{"taskId":"t","inputRequests":{"a":{"method":"roots/list"}}}}'

    assert look(data, judge=FakeJudge("roots/list"), owned=["t"])[0] == b""
    assert look(data, owned=["t"])[0] == data.encode()


@pytest.mark.parametrize(
    ("data", "passes"),
    [
        ('{"method":"sampling/createMessage"}', False),
        ('{"id":null,"method":"roots/list"}', False),
        ('{"method":"own/news"}', True),
    ],
)
def test_an_ask_without_id_does_not_pass(data: str, passes: bool) -> None:
    """Some client might act on it; what else has no id is news."""
    assert look(data)[0] == (data.encode() if passes else b"")


# tasks


@pytest.mark.parametrize(
    ("result", "task_id"),
    [
        ('{"task":{"taskId":"t","status":"working"}}', "t"),
        ('{"resultType":"task","taskId":"t"}', "t"),
        ('{"resultType":"complete","taskId":"t"}', None),
        ('{"taskId":"t","status":"working"}', None),
        ('{"task":{"taskId":7}}', None),
        ('{"task":[]}', None),
        ('{"resultType":"task"}', None),
    ],
)
def test_a_task_that_was_created_is_told(result: str, task_id: str | None) -> None:
    """In 2025-11-25's form and in the extension's."""
    data = f'{{"id":7,"result":{result}}}'
    passed, (seen,) = look(data)

    assert (passed, seen.task_id) == (data.encode(), task_id)


# batches


def test_each_message_of_a_batch_is_reviewed() -> None:
    """What may not pass is left out, what is filtered is put in its place, all else keeps its bytes."""
    data = f'[ {TOOLS} ,{SAMPLING}, {{"id": 8, "result": {{"x": 1.0}}}},{PING}]'
    passed, seen = look(data, allowing("a"), judge=FakeJudge("sampling/createMessage"))
    expected = TOOLS.replace(',{"name":"b"}', ""), '{"id": 8, "result": {"x": 1.0}}', PING

    assert passed.decode() == f"[{','.join(expected)}]"
    assert [each.answers for each in seen] == [7, None, 8, None]
    assert [bool(each.reply) for each in seen] == [False, True, False, False]


def test_a_batch_that_hides_nothing_keeps_its_bytes() -> None:
    """White space included."""
    data = b' [{"id":1,"result":{}} ,\n{"id":2,"result":{}}]'

    assert look(data)[0] is data


def test_a_batch_of_which_nothing_passes_is_nothing() -> None:
    """An empty array is no message."""
    assert look(f"[{SAMPLING}]", judge=FakeJudge("sampling/createMessage"))[0] == b""


@given(st.lists(st.sampled_from([TOOLS, SAMPLING, PING, '{"id":8,"result":{}}']), min_size=1, max_size=5))
def test_a_batch_passes_what_its_messages_pass_alone(messages: list[str]) -> None:
    """Neither more nor less, in their order."""
    alone = [look(each, allowing("a"), judge=FakeJudge("sampling/createMessage"))[0] for each in messages]
    together, _ = look(f"[{','.join(messages)}]", allowing("a"), judge=FakeJudge("sampling/createMessage"))

    assert together == (b"[" + b",".join(filter(None, alone)) + b"]" if any(alone) else b"")


def a_screened_reader(body: bytes, denied: Denied = "error", **members: Any) -> Reader:
    """A reader of the answer to *body*, under a rule that looks for AWS keys in results."""
    permit = a_permit(body)
    content = Content([a_rule(patterns=("aws-key",), where="results", **members)])
    screen = content.answered(permit.question.message)
    return Reader(permit=permit, engines=[allowing("a")], tasks=tasks(), screen=screen, denied=denied)


SAID = b'{"jsonrpc": "2.0", "id":7,"result":{"content":[{"type":"text","text":"key\\n' + KEY + b'"}]}}'


@pytest.mark.parametrize(
    "said",
    [
        SAID,
        b'{"jsonrpc":"2.0","id":7,"result":{"contents":[{"uri":"x","text":"' + KEY + b'"}]}}',
        b'{"jsonrpc":"2.0","id":7,"error":{"code":1,"message":"' + KEY + b'"}}',
        b'{"jsonrpc":"2.0","method":"notifications/message","params":{"data":"' + KEY + b'"}}',
        b'{"jsonrpc":"2.0","id":1,"method":"sampling/createMessage","params":{"messages":["' + KEY + b'"]}}',
    ],
)
def test_what_the_server_says_is_masked_wherever_it_says_it(said: bytes) -> None:
    """Answers, errors, notifications and questions; every other byte stays."""
    passed, (seen,) = review(said, a_screened_reader(a_call()), lambda _: None)

    assert passed == said.replace(KEY, b"[masked]")
    assert [(each.rule.name, each.where, each.count) for each in seen.found] == [("secrets", "results", 1)]


def test_what_holds_nothing_stays_the_very_same() -> None:
    """Screened or not."""
    said = SAID.replace(KEY, b"nothing")
    passed, (seen,) = review(said, a_screened_reader(a_call()), lambda _: None)

    assert passed is said
    assert seen.found == ()


def test_a_denied_answer_is_an_error() -> None:
    """With the request's id; what was found is not told."""
    passed, (seen,) = review(SAID, a_screened_reader(a_call(), action="deny"), lambda _: None)

    assert json.loads(passed)["id"] == 7
    assert json.loads(passed)["error"]["data"] == {"reason": "denied"}
    assert KEY not in passed
    assert seen.refusal is not None
    assert (seen.refusal.detail, seen.error_code, seen.answers) == ("content rule secrets", 403, 7)


def test_a_denied_answer_can_be_told_to_the_model() -> None:
    """As the profile says of denials; in the shape of the tool's own failures."""
    passed, (seen,) = review(SAID, a_screened_reader(a_call(), "tool_error", action="deny"), lambda _: None)

    assert json.loads(passed)["result"]["isError"] is True
    assert (seen.tool_failed, seen.error_code) == (True, None)
    other = SAID.replace(b'"id":7', b'"id":8')  # not the answer to this call
    assert b'"error"' in review(other, a_screened_reader(a_call(), "tool_error", action="deny"), lambda _: None)[0]


def test_a_denied_question_is_answered_for_the_client() -> None:
    """And a denied notification goes nowhere."""
    asked = b'{"jsonrpc":"2.0","id":1,"method":"sampling/createMessage","params":{"messages":["' + KEY + b'"]}}'
    told = b'{"jsonrpc":"2.0","method":"notifications/message","params":{"data":"' + KEY + b'"}}'
    reader = a_screened_reader(a_call(), action="deny")

    assert [
        (seen.data, bool(seen.reply)) for said in (asked, told) for seen in review(said, reader, lambda _: None)[1]
    ] == [
        (b"", True),
        (b"", False),
    ]


def test_names_that_would_become_the_same_are_withheld() -> None:
    """A reader would take one of the two."""
    said = b'{"id":7,"result":{"structuredContent":{"' + KEY + b'":1,"' + KEY[:-1] + b'Q":2}}}'
    _, (seen,) = review(said, a_screened_reader(a_call()), lambda _: None)
    assert seen.refusal is not None
    assert "same name" in seen.refusal.detail


def test_what_is_too_large_to_be_screened_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searching must end, and what was not searched does not pass."""
    monkeypatch.setattr(module, "MAX_SCREENED_BYTES", 10)
    with pytest.raises(Refusal, match="too large"):
        review(SAID, a_screened_reader(a_call()), lambda _: None)


def test_messages_of_a_batch_share_what_may_be_looked_at() -> None:
    """As those of a client do (sidecar/core/screening.py)."""
    asked = a_permit(a_call())
    screen = Content([a_rule(patterns=("email",), action="deny")]).answered(asked.question.message)
    shadow = Content([a_rule(patterns=("email",), mode="shadow")]).answered(asked.question.message)
    said = '{"id":7,"result":{"content":[{"type":"text","text":"%s"}]}}' % ("a@b.test " * 9_000)
    for each in (screen, shadow):
        reader = Reader(permit=asked, engines=[], tasks=tasks(), screen=each)
        _, seen = review(f"[{said},{said},{said}]".encode(), reader, FakeJudge())
        assert [one.found[0].count for one in seen] == [9_000, 9_000, 20_001]
        assert [one.refusal is None for one in seen] == [each is shadow] * 3

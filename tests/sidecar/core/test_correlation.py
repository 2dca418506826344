"""sidecar.core.correlation: what a process says goes to whom it is for, and to nobody else."""

from collections.abc import Mapping
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core import correlation
from sidecar.core.correlation import Action, Common, Deliver, Drop, Own, Write
from sidecar.core.message import Message, RequestId, Shape
from sidecar.core.revision import Revision
from sidecar.errors import Refusal

LEGACY = Revision.V2025_11_25
MODERN = Revision.V2026_07_28
SUBSCRIPTION = "io.modelcontextprotocol/subscriptionId"


def a_message(
    method: str = "tools/call",
    request_id: RequestId | None = 1,
    params: Mapping[str, Any] | None = None,
    *,
    revision: Revision = LEGACY,
) -> Message:
    """A client's message."""
    document: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "params": params or {}}
    if request_id is not None:
        document["id"] = request_id
    return Message(
        shape=Shape.NOTIFICATION if request_id is None else Shape.REQUEST,
        method=method,
        id=request_id,
        params=params or {},
        revision=revision,
        body=orjson.dumps(document),
    )


def a_result(request_id: RequestId, **result: Any) -> bytes:
    """The server's answer."""
    return orjson.dumps({"jsonrpc": "2.0", "id": request_id, "result": result})


def a_note(method: str, **params: Any) -> bytes:
    """The server's notification."""
    return orjson.dumps({"jsonrpc": "2.0", "method": method, "params": params})


def an_ask(method: str = "sampling/createMessage", request_id: RequestId = 9) -> bytes:
    """The server's request."""
    return orjson.dumps({"jsonrpc": "2.0", "id": request_id, "method": method, "params": {}})


def deliveries(actions: list[Action[str]]) -> list[tuple[str, bool]]:
    """Who gets something, and whether it is the last."""
    return [(each.caller, each.is_last) for each in actions if isinstance(each, Deliver)]


def written(actions: list[Action[str]]) -> list[Any]:
    """What goes to the process, decoded."""
    return [orjson.loads(each.data) for each in actions if isinstance(each, Write)]


def said(actions: list[Action[str]]) -> list[Any]:
    """What callers get, decoded."""
    return [orjson.loads(each.data) for each in actions if isinstance(each, Deliver)]


class TestOwn:
    """A process of one session."""

    def test_the_judged_bytes_go_to_the_process(self) -> None:
        """On one line, and otherwise as they came."""
        own: Own[str] = Own()
        body = b'{"jsonrpc": "2.0",\r\n "id": 1, "method":"tools/call","params":{"name":"a\\nb"}}\n'
        message = Message(shape=Shape.REQUEST, method="tools/call", id=1, params={}, body=body)

        assert own.ask("post", message, "s") == [
            Write(data=b'{"jsonrpc": "2.0",   "id": 1, "method":"tools/call","params":{"name":"a\\nb"}}')
        ]

    def test_an_answer_goes_to_the_request_with_its_id(self) -> None:
        """1 and "1" are two ids; a second answer is nobody's."""
        own: Own[str] = Own()
        own.ask("one", a_message(request_id=1), "s")
        own.ask("text", a_message(request_id="1"), "s")

        assert deliveries(own.hear(a_result("1"))) == [("text", True)]
        assert deliveries(own.hear(a_result(1))) == [("one", True)]
        assert isinstance(own.hear(a_result(1))[0], Drop)

    def test_a_second_request_with_the_same_id_is_refused(self) -> None:
        """Neither answer could be told from the other's."""
        own: Own[str] = Own()
        own.check(a_message())
        own.ask("one", a_message(), "s")
        own.check(a_message(request_id="1"))

        with pytest.raises(Refusal, match="under way"):
            own.check(a_message())

    def test_progress_goes_to_the_request_with_its_token(self) -> None:
        """Whatever else is open."""
        own: Own[str] = Own()
        own.open_stream("get")
        own.ask("one", a_message(request_id=1, params={"_meta": {"progressToken": "t"}}), "s")
        own.ask("two", a_message(request_id=2, params={"_meta": {"progressToken": 5}}), "s")

        assert deliveries(own.hear(a_note("notifications/progress", progressToken="t"))) == [("one", False)]
        assert deliveries(own.hear(a_note("notifications/progress", progressToken=5))) == [("two", False)]

    @pytest.mark.parametrize("line", [an_ask(), a_note("notifications/message", data="x")])
    def test_what_belongs_to_no_request_goes_to_the_stream_else_to_a_request(self, line: bytes) -> None:
        """The GET stream where there is one, the newest request where there is none."""
        own: Own[str] = Own()
        own.ask("one", a_message(request_id=1), "s")
        own.ask("two", a_message(request_id=2), "s")
        assert deliveries(own.hear(line)) == [("two", False)]

        own.open_stream("get")
        assert deliveries(own.hear(line)) == [("get", False)]

        own.leave("get")
        assert deliveries(own.hear(line)) == [("two", False)]

    def test_what_comes_before_any_stream_waits_for_one(self) -> None:
        """A server asks for roots as soon as it is initialized; the client's stream is not open by then."""
        own: Own[str] = Own()

        assert own.hear(an_ask("roots/list")) == []
        assert said(own.open_stream("get")) == [orjson.loads(an_ask("roots/list"))]
        assert own.open_stream("another") == []

    def test_what_waits_is_bounded_and_an_ask_is_answered_then(self) -> None:
        """The server hears that nobody heard it."""
        own: Own[str] = Own()
        for _ in range(correlation.MAX_HELD):
            assert own.hear(a_note("notifications/message", data="x")) == []

        assert written(own.hear(an_ask(request_id=3)))[0]["id"] == 3
        assert isinstance(own.hear(a_note("notifications/message", data="x"))[0], Drop)
        assert len(said(own.open_stream("get"))) == correlation.MAX_HELD

    def test_a_large_message_does_not_wait(self) -> None:
        """The bound is one of bytes, too."""
        own: Own[str] = Own()

        assert isinstance(own.hear(a_note("notifications/message", data="x" * correlation.MAX_HELD_BYTES))[0], Drop)

    def test_leaving_is_no_cancellation_before_2026(self) -> None:
        """The server goes on; its answer is nobody's."""
        own: Own[str] = Own()
        own.ask("one", a_message(), "s")

        assert own.leave("one") == []
        assert isinstance(own.hear(a_result(1))[0], Drop)
        assert own.callers() == []

    def test_abandoned_requests_do_not_pile_up(self) -> None:
        """A server that never answers, and clients that never wait, cost a bounded amount."""
        own: Own[str] = Own()
        for number in range(3 * correlation.MAX_ABANDONED):
            own.ask("one", a_message(request_id=number), "s")
            own.leave("one")

        assert len(own.waiting) <= correlation.MAX_ABANDONED

    @pytest.mark.parametrize("line", [b"hello", b'{"a":1}', b"[]", b'{"jsonrpc":"2.0","id":1}'])
    def test_garbage_goes_nowhere(self, line: bytes) -> None:
        """Not even to a stream that is open."""
        own: Own[str] = Own()
        own.open_stream("get")

        assert own.hear(line) == [Drop(why="not a JSON-RPC message")]


class TestCommon:
    """A process that serves many."""

    def test_equal_ids_of_two_clients_are_two(self) -> None:
        """Each gets its own answer, under its own id."""
        common: Common[str] = Common()
        first = written(common.ask("one", a_message(request_id=1), "a"))[0]["id"]
        second = written(common.ask("two", a_message(request_id=1), "b"))[0]["id"]
        third = written(common.ask("three", a_message(request_id="x"), "b"))[0]["id"]

        assert len({first, second, third}) == 3
        answer = common.hear(a_result(second, who="b"))
        assert deliveries(answer) == [("two", True)]
        assert said(answer) == [{"jsonrpc": "2.0", "id": 1, "result": {"who": "b"}}]
        assert said(common.hear(a_result(third)))[0]["id"] == "x"
        assert isinstance(common.hear(a_result(1000))[0], Drop)

    @given(st.integers(-(2**63), 2**63 - 1) | st.text(max_size=20), st.integers() | st.text(max_size=20))
    def test_ids_and_tokens_come_back_as_they_were(self, request_id: RequestId, token: RequestId) -> None:
        """And nothing else of the message is changed on the way in."""
        common: Common[str] = Common()
        if isinstance(token, int) and abs(token) > 2**63 - 1:
            token = str(token)
        params = {"name": "n", "_meta": {"progressToken": token, "other": 1}}
        (sent,) = written(common.ask("one", a_message(request_id=request_id, params=params), "a"))
        wire_id = sent["id"]

        assert sent["params"] == {"name": "n", "_meta": {"progressToken": wire_id, "other": 1}}
        progress = said(common.hear(a_note("notifications/progress", progressToken=wire_id, progress=1)))
        assert progress[0]["params"] == {"progressToken": token, "progress": 1}
        assert said(common.hear(a_result(wire_id)))[0]["id"] == request_id

    def test_the_first_initialize_is_for_all(self) -> None:
        """Those that come meanwhile wait for it, those that come later get it again; the process sees one."""
        common: Common[str] = Common()
        (sent,) = written(common.ask("one", a_message("initialize", 0), "a"))
        assert common.ask("two", a_message("initialize", "zero"), "b") == []
        answers = common.hear(a_result(sent["id"], protocolVersion="2025-11-25"))
        later = common.ask("three", a_message("initialize", 5), "c")

        assert deliveries(answers) == [("one", True), ("two", True)]
        assert [each["id"] for each in said([*answers, *later])] == [0, "zero", 5]
        assert all(each["result"] == {"protocolVersion": "2025-11-25"} for each in said([*answers, *later]))
        assert len(written(common.tell(a_message("notifications/initialized", None), "a"))) == 1
        assert written(common.tell(a_message("notifications/initialized", None), "b")) == []

    def test_a_failed_initialize_fails_for_those_that_wait_and_is_tried_again(self) -> None:
        """The next one is sent."""
        common: Common[str] = Common()
        (sent,) = written(common.ask("one", a_message("initialize", 0), "a"))
        common.ask("two", a_message("initialize", 1), "b")
        refused = orjson.dumps({"jsonrpc": "2.0", "id": sent["id"], "error": {"code": -32602, "message": "no"}})
        answers = common.hear(refused)

        assert [(each["id"], each["error"]["code"]) for each in said(answers)] == [(0, -32602), (1, -32602)]
        assert all(each.code == -32602 for each in answers if isinstance(each, Deliver))
        assert len(written(common.ask("three", a_message("initialize", 2), "c"))) == 1

    def test_a_cancellation_reaches_the_request_of_its_own_scope_only(self) -> None:
        """Another session's request with the same id goes on."""
        common: Common[str] = Common()
        common.ask("one", a_message(request_id=1), "a")
        (second,) = written(common.ask("two", a_message(request_id=1), "b"))
        cancel = a_message("notifications/cancelled", None, {"requestId": 1})

        assert written(common.tell(cancel, "b"))[0]["params"]["requestId"] == second["id"]
        assert written(common.tell(cancel, "c")) == []

    def test_a_process_that_serves_many_asks_nobody(self) -> None:
        """It could not be told whom; ping is answered here."""
        common: Common[str] = Common()
        common.ask("one", a_message(), "a")
        common.open_stream("get")

        asked = common.hear(an_ask())
        assert deliveries(asked) == []
        assert (written(asked)[0]["id"], written(asked)[0]["error"]["code"]) == (9, -32601)
        assert written(common.hear(an_ask("ping", 4))) == [{"jsonrpc": "2.0", "id": 4, "result": {}}]

    def test_what_names_nobody_goes_to_nobody(self) -> None:
        """A log line may hold another's secrets, even when one request alone is under way."""
        common: Common[str] = Common()
        common.ask("one", a_message(), "a")
        common.open_stream("get")

        for line in (a_note("notifications/message", data="x"), a_note("notifications/progress", progressToken=77)):
            assert isinstance(common.hear(line)[0], Drop)

    def test_what_concerns_all_goes_to_every_stream(self) -> None:
        """It says that something changed, not what."""
        common: Common[str] = Common()
        common.open_stream("one")
        common.open_stream("two")

        assert deliveries(common.hear(a_note("notifications/tools/list_changed"))) == [("one", False), ("two", False)]

    def test_a_subscription_hears_under_its_own_id(self) -> None:
        """MCP 2026-07-28: its id stands in every notification and in the last answer."""
        common: Common[str] = Common()
        listen = a_message("subscriptions/listen", "sub-1", revision=MODERN)
        wire_id = written(common.ask("one", listen, "a"))[0]["id"]
        note = common.hear(a_note("notifications/resources/updated", uri="x", _meta={SUBSCRIPTION: wire_id}))
        torn_down = common.hear(a_note("notifications/cancelled", requestId=wire_id))
        last = common.hear(a_result(wire_id, _meta={SUBSCRIPTION: wire_id}))

        assert deliveries([*note, *torn_down, *last]) == [("one", False), ("one", False), ("one", True)]
        assert said(note)[0]["params"]["_meta"] == {SUBSCRIPTION: "sub-1"}
        assert said(torn_down)[0]["params"]["requestId"] == "sub-1"
        assert said(last)[0]["id"] == said(last)[0]["result"]["_meta"][SUBSCRIPTION] == "sub-1"

    def test_leaving_is_the_cancellation_since_2026(self) -> None:
        """The process is told; what it still says of it is nobody's."""
        common: Common[str] = Common()
        wire_id = written(common.ask("one", a_message(revision=MODERN), "a"))[0]["id"]
        (told,) = written(common.leave("one"))

        assert (told["method"], told["params"]["requestId"]) == ("notifications/cancelled", wire_id)
        assert isinstance(common.hear(a_result(wire_id))[0], Drop)

    @given(
        st.lists(st.binary(max_size=60) | st.sampled_from([a_result(1), an_ask(), a_note("notifications/progress")]))
    )
    def test_whatever_a_process_writes_is_no_exception(self, lines: list[bytes]) -> None:
        """And reaches nobody whom it does not name."""
        common: Common[str] = Common()
        own: Own[str] = Own()
        for whose in (common, own):
            whose.ask("one", a_message(request_id=5), "a")
            for line in lines:
                for action in whose.hear(line):
                    assert isinstance(action, Deliver | Write | Drop)

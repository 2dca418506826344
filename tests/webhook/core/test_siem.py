"""A record in the words of ECS and OCSF: everything that has a word there, in the place and the type it has there."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from sidecar.core.chain import Chain
from sidecar.record import FIELDS, Phase, line
from tests.sidecar.exchanges import STARTED_NS, a_call, a_refused_exchange, an_exchange, an_unreadable_exchange
from webhook.core import siem


def written(text: bytes) -> dict[str, Any]:
    """Return a record as it stands in a trail."""
    document: dict[str, Any] = json.loads(Chain("c1").sealed(text))
    return document


def test_a_call_in_ecs() -> None:
    """Who, what, what was decided, and how long it took."""
    event = siem.said(written(line(an_exchange(a_call("read_schema", {"table": "invoices"})))), "ecs")

    assert event["@timestamp"] == "2026-11-22T12:20:00.123456789Z"
    assert event["event"] == {
        "id": "c1:1",
        "kind": "event",
        "category": ["api"],
        "module": "sidegate",
        "dataset": "sidegate.audit",
        "outcome": "success",
        "type": ["allowed"],
        "sequence": 1,
        "action": "tools/call",
        "duration": 4_500_000,
    }
    assert event["user"] == {
        "id": "alice",
        "domain": "https://id.test",
        "email": "alice@example.test",
        "roles": ["analyst", "reader"],
        "group": {"name": ["finance"]},
    }
    assert event["client"] == {"ip": "10.0.0.9", "port": 41234}
    assert event["gen_ai"]["agent"]["id"] == "spiffe://a.test/ns/agents/sa/planner"
    assert event["gen_ai"]["tool"] == {
        "name": "read_schema",
        "call": {"arguments": {"table": "invoices"}, "result": {"content": [{"type": "text", "text": "ok"}]}},
    }
    assert event["rule"] == {"name": ["analysts-read"], "version": "a1b2"}
    assert event["trace"] == {"id": "0af7651916cd43dd8448eb211c80319c"}


def test_a_call_in_ocsf() -> None:
    """API Activity, whose required members are all there."""
    event = siem.said(written(line(an_exchange())), "ocsf")

    assert (event["class_uid"], event["category_uid"], event["type_uid"], event["activity_id"]) == (6003, 6, 600399, 99)
    assert event["time"] == STARTED_NS // 1_000_000
    assert datetime.fromtimestamp(event["time"] / 1000, UTC).isoformat().startswith("2026-11-22T12:20:00.123")
    assert (event["status_id"], event["action_id"], event["disposition_id"], event["duration"]) == (1, 1, 1, 4)
    assert event["actor"]["user"]["groups"] == [{"name": "finance"}]
    assert event["actor"]["app_uid"] == "spiffe://a.test/ns/agents/sa/planner"
    assert event["api"]["operation"] == "tools/call"
    assert event["api"]["request"]["uid"] == "b7ad6b7169203331"
    assert event["resources"] == [{"name": "read_schema", "type": "tool"}]
    assert (event["src_endpoint"]["ip"], event["src_endpoint"]["port"]) == ("10.0.0.9", 41234)
    assert event["metadata"]["uid"] == "c1:1"


@pytest.mark.parametrize("form", ["ecs", "ocsf"])
def test_a_refused_and_an_unreadable_message_are_events_too(form: siem.Format) -> None:
    """With the reason, and what OCSF requires."""
    refused = siem.said(written(line(a_refused_exchange())), form)
    unread = siem.said(written(line(an_unreadable_exchange())), form)

    if form == "ecs":
        assert (refused["event"]["outcome"], refused["event"]["type"]) == ("failure", ["denied"])
        assert (refused["event"]["reason"], refused["error"]["message"]) == ("denied", "forbid-deletes")
        assert unread["event"]["reason"] == "malformed"
    else:
        assert (refused["status_id"], refused["action_id"], refused["status_code"]) == (2, 2, "denied")
        for member in ("time", "class_uid", "category_uid", "type_uid", "activity_id", "severity_id", "metadata"):
            assert member in unread
        assert unread["api"]["operation"] == "unknown"
        assert unread["actor"]["app_name"] == "unknown"


def test_each_message_is_an_event_once() -> None:
    """Its end; or its beginning, where a kill left no end. What came of that is not known."""
    ended, cut_off = an_exchange(), an_exchange(span_id="0000000000000001")
    records = [
        written(line(ended, Phase.BEGIN)),
        written(line(cut_off, Phase.BEGIN)),
        written(line(ended)),
        written(line(a_refused_exchange(span_id="0000000000000002"))),
    ]

    settled = list(siem.settled(records))

    assert [each["phase"] for each in settled] == ["end", "end", "begin"]
    assert siem.said(settled[-1], "ecs")["event"]["outcome"] == "unknown"
    assert siem.said(settled[-1], "ocsf")["status_id"] == 0


def test_the_table_names_members_that_records_have() -> None:
    """A misspelt one would be left out without a word."""
    known = {path for path, _, _ in FIELDS} | {"chain.id", "chain.seq"}
    assert {row.source for row in siem.TABLE} <= known
    for targets in ([row.ecs for row in siem.TABLE if row.ecs], [row.ocsf for row in siem.TABLE if row.ocsf]):
        assert len(set(targets)) == len(targets)


def test_an_address_is_taken_apart_in_either_family() -> None:
    """And one that is none is left out."""
    for client, address, port in (("10.0.0.9:1", "10.0.0.9", 1), ("[fd00::1]:2", "fd00::1", 2), ("", None, None)):
        record = {"who": {"client": client}}
        assert siem.said(record, "ecs").get("client", {}).get("ip") == address
        assert siem.said(record, "ecs").get("client", {}).get("port") == port

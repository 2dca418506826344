"""webhook/core/cases.py: written questions become the questions that the sidecar asks; the rest is tried through the CLI."""

from webhook.core.cases import Asked, of_record, question, read

TEXT = """
[default]
user = { id = "u-1", groups = ["ops"] }
server = { name = "ledger" }

[[case]]
name = "one"
user.role = "analyst"
tool = "t"
args = { a = [1, { b = true }] }
allow = true

[[case]]
name = "two"
user = { id = "u-2" }
workload = "spiffe://a.test/ns/n/sa/s"
prompt = "p"
allow = false
"""


def test_a_case_adds_to_the_default() -> None:
    """Member by member; what both say is the case's."""
    one, two = (question(each).document() for each in read("x_test.toml", TEXT))

    assert (one["user"]["id"], one["user"]["role"], one["user"]["groups"]) == ("u-1", "analyst", ["ops"])
    assert one["tool"] == {"name": "t", "args": {"a": [1, {"b": True}]}}
    assert (two["user"]["id"], two["user"]["groups"]) == ("u-2", ["ops"])
    assert two["workload"]["service_account"] == "s"
    assert (two["method"], two["server"]["name"]) == ("prompts/get", "ledger")


def test_an_audit_record_is_asked_again() -> None:
    """User, workload, server, target and arguments as they were."""
    asked = of_record(
        {
            "message": {"method": "prompts/get", "prompt": "p", "tool": None},
            "who": {"user": {"id": "u", "issuer": "i", "provider": "x"}, "workload": "spiffe://a.test/w"},
            "server": {"namespace": "n", "workload": "w", "name": "s"},
            "arguments": {"content": {"a": 1}},
        }
    )

    assert isinstance(asked, Asked)
    document = question(asked).document()
    assert (document["prompt"], document["user"]["issuer"]) == ({"name": "p", "args": {"a": 1}}, "i")
    assert (document["workload"]["spiffe_id"], document["server"]["workload"]) == ("spiffe://a.test/w", "w")

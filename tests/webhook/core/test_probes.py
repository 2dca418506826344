"""Probes of the application: moved, recorded, put back."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from webhook.core import probes
from webhook.core.pod import Container, Port
from webhook.errors import Denial, DenyCode

APP = Container(name="app", ports=[Port(container_port=8080, name="http")])
TOKEN = "0123456789abcdef" * 2


def relocated(**fields: Any) -> tuple[Any, Any]:
    """Return a container with *fields* after relocation, and the record."""
    return probes.relocate({"name": "app"} | fields, APP, TOKEN)


def test_record_says_what_to_perform() -> None:
    """Handler as it was, port resolved, the kubelet's timeout."""
    handler = {"path": "/x?y", "port": "http", "httpHeaders": [{"name": "Host", "value": "h"}]}
    raw, originals = relocated(readinessProbe={"httpGet": handler, "timeoutSeconds": 9, "periodSeconds": 3})

    assert originals == {"readiness": {"httpGet": handler, "port": 8080, "timeout_s": 9}}
    assert raw["readinessProbe"] == {
        "httpGet": {"path": "/app-health/app/readiness", "port": 15020, "scheme": "HTTP"},
        "timeoutSeconds": 9,
        "periodSeconds": 3,
    }


def test_record_of_a_grpc_probe_keeps_the_service() -> None:
    """The kubelet would ask for it by name."""
    raw, originals = relocated(livenessProbe={"grpc": {"port": 9090, "service": "ledger"}, "failureThreshold": 2})

    assert originals == {"liveness": {"grpc": {"port": 9090, "service": "ledger"}, "port": 9090, "timeout_s": 1}}
    assert raw["livenessProbe"] == {
        "httpGet": {"path": "/app-health/app/liveness", "port": 15020, "scheme": "HTTP"},
        "failureThreshold": 2,
    }


def test_hook_needs_the_token_of_the_pod() -> None:
    """Its path cannot be guessed, and its time is the pod's own."""
    handler = {"path": "/quit", "port": "http", "scheme": "HTTPS"}
    raw, originals = relocated(lifecycle={"preStop": {"httpGet": handler}, "stopSignal": "SIGQUIT"})

    assert originals == {"pre-stop": {"httpGet": handler, "port": 8080, "timeout_s": 3600, "token": TOKEN}}
    assert raw["lifecycle"] == {
        "preStop": {"httpGet": {"path": f"/app-hook/app/pre-stop/{TOKEN}", "port": 15020, "scheme": "HTTP"}},
        "stopSignal": "SIGQUIT",
    }
    assert probes.token_of({"other": {}, "app": originals}) == TOKEN


@pytest.mark.parametrize("token", [None, "", 1, "short", "g" * 32, f"{TOKEN}/../x"])
def test_token_that_we_would_not_have_made_is_not_taken_over(token: object) -> None:
    """A tenant can write the record, and gets a new token."""
    assert probes.token_of({"app": {"pre-stop": {"token": token}}}) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"livenessProbe": {"exec": {"command": ["true"]}}},
        {"livenessProbe": {"httpGet": {"host": "example.org", "port": 80}}},
        {"lifecycle": {"preStop": {"httpGet": {"host": "example.org", "port": 80}}}},
        {"lifecycle": {"preStop": {"exec": {"command": ["true"]}}, "postStart": {"tcpSocket": {"port": 1}}}},
        {"livenessProbe": {}},
        {"lifecycle": {"stopSignal": "SIGQUIT"}},
        {"lifecycle": {"preStop": {"sleep": {"seconds": 3}}, "postStart": "odd"}},
    ],
)
def test_what_the_kubelet_can_go_on_doing_stays(fields: Any) -> None:
    """Exec needs no network, another host is not behind the sidecar, TCP hooks are never executed."""
    raw, originals = relocated(**fields)

    assert raw == {"name": "app"} | fields
    assert originals == {}


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"startupProbe": {"tcpSocket": {"port": "nope"}}}, DenyCode.PORT_UNRESOLVED, "names http"),
        ({"startupProbe": {"tcpSocket": {"port": 15020}}}, DenyCode.PORT_RESERVED, "15020 belongs to the sidecar"),
        ({"startupProbe": {"tcpSocket": {"port": 0}}}, DenyCode.MALFORMED, "port"),
        ({"startupProbe": {"tcpSocket": {}}}, DenyCode.MALFORMED, "port"),
        ({"startupProbe": {"tcpSocket": 1}}, DenyCode.MALFORMED, "tcpSocket: not an object"),
        ({"startupProbe": 1}, DenyCode.MALFORMED, "startupProbe: not an object"),
        ({"startupProbe": {"grpc": {"port": 15443}}}, DenyCode.PORT_RESERVED, "grpc.port: 15443 belongs"),
        ({"startupProbe": {"grpc": {}}}, DenyCode.MALFORMED, "grpc.port: not a port"),
        (
            {"lifecycle": {"preStop": {"httpGet": {"port": "no"}}}},
            DenyCode.PORT_UNRESOLVED,
            "preStop.httpGet.port: no port",
        ),
        ({"lifecycle": {"postStart": {"httpGet": {"port": 0, "host": ""}}}}, DenyCode.MALFORMED, "postStart"),
        ({"lifecycle": {"postStart": {"httpGet": 1}}}, DenyCode.MALFORMED, "postStart.httpGet: not an object"),
    ],
)
def test_what_cannot_be_performed_is_refused(fields: Any, code: DenyCode, said: str) -> None:
    """A probe is moved or refused with container and field; it is never dropped."""
    with pytest.raises(Denial, match=said) as refused:
        relocated(**fields)

    assert refused.value.code is code
    assert "container app" in str(refused.value)


PROBE = st.fixed_dictionaries(
    {},
    optional={
        "httpGet": st.fixed_dictionaries({"port": st.sampled_from([80, "http"])}, optional={"path": st.text()}),
        "timeoutSeconds": st.integers(1, 9),
        "failureThreshold": st.integers(1, 9),
    },
)


GRPC = st.fixed_dictionaries({"grpc": st.just({"port": 81, "service": "x"})})
HOOKS = st.dictionaries(st.sampled_from(sorted(probes.HOOKS.values())), PROBE, max_size=2)


@given(
    st.fixed_dictionaries(
        {"name": st.just("app")},
        optional=dict.fromkeys(probes.PROBES.values(), PROBE | GRPC) | {"lifecycle": HOOKS},
    ),
)
@settings(deadline=None)
def test_what_is_moved_can_be_put_back(raw: Any) -> None:
    """Through the sidecar's environment and back, the container is as it was."""
    moved, originals = probes.relocate(raw, APP, TOKEN)
    text = probes.encode({"app": originals})

    assert probes.put_back(moved, probes.decode(text).get("app", {})) == raw
    assert "$" not in text


def test_foreign_probe_is_not_replaced_by_the_record() -> None:
    """Only what points where we pointed it is put back."""
    raw = {"name": "app", "livenessProbe": {"httpGet": {"port": 81}}}

    assert probes.put_back(raw, {"liveness": {"tcpSocket": {"port": 80}}}) == raw


@pytest.mark.parametrize("lifecycle", [None, 1, {}, {"preStop": {"httpGet": {"port": 81}}}, {"preStop": 1}])
def test_foreign_hook_is_not_replaced_by_the_record(lifecycle: object) -> None:
    """Nor is a lifecycle that came after us."""
    raw = {"name": "app", "lifecycle": lifecycle}

    assert probes.put_back(raw, {"pre-stop": {"httpGet": {"port": 80}, "token": TOKEN}}) == raw


@pytest.mark.parametrize("text", ["", "[]", "1", '{"a": 1}', '{"a": {"b": 1}}', "[" * 100_000])
def test_record_that_cannot_be_read_is_an_error(text: str) -> None:
    """Garbage is a ValueError, however deep."""
    with pytest.raises(ValueError, match=r"."):
        probes.decode(text)

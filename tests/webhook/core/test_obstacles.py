"""What cannot be enforced is refused; what is weaker than it looks is told. The golden cases have the rest."""

from typing import Any

import pytest

from sidecar.config import Capture, Role
from tests.webhook.core.golden_cases import TEMPLATE
from webhook.core import obstacles, pod
from webhook.errors import Denial, DenyCode


def a_pod(container: Any = None, **spec: Any) -> pod.Pod:
    """Return a pod with one container."""
    app = {"name": "app", "image": "app"} | (container or {})
    return pod.read({"metadata": {}, "spec": {"containers": [app]} | spec})


@pytest.mark.parametrize(
    "capability", ["NET_RAW", "CAP_NET_ADMIN", "cap_sys_ptrace", "ALL", "BPF", "DAC_READ_SEARCH", "CAP_PERFMON"]
)
def test_capability_is_known_by_all_its_spellings(capability: str) -> None:
    """Runtimes take the prefix, and either case."""
    with pytest.raises(Denial, match="can undo the capture") as refused:
        obstacles.refuse(a_pod({"securityContext": {"capabilities": {"add": ["CHOWN", capability]}}}), Capture.REMAP)

    assert refused.value.code is DenyCode.UNENFORCEABLE_CAPABILITY


@pytest.mark.parametrize(
    ("security", "pod_security"),
    [
        ({"capabilities": {"add": ["NET_BIND_SERVICE"], "drop": ["ALL"]}}, {}),
        ({"runAsUser": 1000}, {"runAsUser": 15100}),
        ({"privileged": False}, {"runAsUser": 1000}),
        (None, None),
    ],
)
def test_what_does_no_harm_passes(security: Any, pod_security: Any) -> None:
    """Nothing is refused for its look."""
    bare = a_pod({"securityContext": security, "ports": [{"containerPort": 80}]}, securityContext=pod_security)

    obstacles.refuse(bare, Capture.REDIRECT)


@pytest.mark.parametrize(
    ("security", "pod_security", "is_told"),
    [
        (None, None, True),
        ({}, {"runAsUser": 0}, True),
        ({"runAsUser": 0, "runAsNonRoot": False}, {"runAsNonRoot": True}, True),
        ({"capabilities": {"drop": ["NET_RAW"]}}, None, True),
        ({"capabilities": {"drop": ["CAP_SETUID"]}}, None, True),
        ({"capabilities": {"drop": ["SETUID"]}}, None, False),
        ({"capabilities": {"drop": ["ALL"]}}, None, False),
        ({"runAsUser": 1000}, {"runAsUser": 0}, False),
        ({}, {"runAsNonRoot": True}, False),
    ],
)
def test_agent_that_can_become_the_sidecars_user_is_told(security: Any, pod_security: Any, *, is_told: bool) -> None:
    """Its capture lets that user pass: the container's own settings go before the pod's."""
    bare = a_pod({"securityContext": security}, securityContext=pod_security)
    said = list(obstacles.warnings(bare, Capture.REDIRECT, Role.AGENT, TEMPLATE))

    assert [text.split(":")[0] for text in said] == ["containers app"] * is_told
    assert list(obstacles.warnings(bare, Capture.REMAP, Role.AGENT, TEMPLATE)) == []
    assert list(obstacles.warnings(bare, Capture.REDIRECT, Role.SERVER, TEMPLATE)) == []


def test_every_warning_fits_what_the_api_server_passes_on() -> None:
    """256 characters; long names and many containers must not push the advice out."""
    many = [{"name": f"container-{number:02}-{'x' * 40}", "image": "x"} for number in range(9)]
    bare = a_pod({"name": "istio-proxy"}, initContainers=many, dnsPolicy="None", terminationGracePeriodSeconds=1)
    said = list(obstacles.warnings(bare, Capture.REDIRECT, Role.AGENT, TEMPLATE))

    assert len(said) == 4
    assert max(map(len, said)) <= 256


HELD = {"runAsUser": 1000, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.mark.parametrize(
    "security",
    [HELD, HELD | {"capabilities": {"drop": ["all"], "add": ["CAP_NET_BIND_SERVICE"]}}],
)
def test_a_server_that_stays_who_it_is_may_be_let_out_by_name(security: Any) -> None:
    """The resolver may be the node's, with search domains of its own."""
    obstacles.refuse_by_name(
        a_pod({"securityContext": security}, dnsPolicy="Default", dnsConfig={"searches": ["a.example"]}),
        Capture.REDIRECT,
    )


def test_the_pods_user_counts_where_the_container_names_none() -> None:
    """But it is named: an image's own user is not seen at admission."""
    bare = a_pod(
        {"securityContext": {k: v for k, v in HELD.items() if k != "runAsUser"}}, securityContext={"runAsUser": 7}
    )

    obstacles.refuse_by_name(bare, Capture.REDIRECT)
    with pytest.raises(Denial, match="runAsUser other than 0"):
        obstacles.refuse_by_name(
            a_pod({"securityContext": HELD | {"runAsUser": 0}}, securityContext={"runAsUser": 7}), Capture.REDIRECT
        )


@pytest.mark.parametrize(
    "security",
    [
        None,
        HELD | {"runAsUser": 0},  # which owns the files that say where names lead
        {k: v for k, v in HELD.items() if k != "runAsUser"},
        {k: v for k, v in HELD.items() if k != "allowPrivilegeEscalation"},
        HELD | {"allowPrivilegeEscalation": True},
        HELD | {"capabilities": {"drop": ["NET_RAW", "SETUID"]}},
        HELD | {"capabilities": {"drop": ["CAP_ALL"]}},  # dropped by no runtime
        HELD | {"capabilities": {"drop": ["ALL"], "add": ["SETUID"]}},
        HELD | {"capabilities": None},
    ],
)
def test_a_server_that_may_become_the_sidecars_user_is_not_let_out(security: Any) -> None:
    """By its image, by a setuid program, by root's capabilities."""
    with pytest.raises(Denial, match=r"container app: hosts in spec\.egress") as refused:
        obstacles.refuse_by_name(a_pod({"securityContext": security}), Capture.REDIRECT)

    assert refused.value.code is DenyCode.UNENFORCEABLE_EGRESS


@pytest.mark.parametrize(
    "spec",
    [
        {"hostAliases": [{"ip": "192.0.2.1", "hostnames": ["a.example"]}]},
        {"dnsPolicy": "None"},
        {"dnsConfig": {"nameservers": ["192.0.2.53"]}},
    ],
)
def test_a_pod_that_says_itself_what_names_mean_is_not_let_out(spec: Any) -> None:
    """The sidecar resolves by the same tables."""
    with pytest.raises(Denial, match="would be whatever this pod says"):
        obstacles.refuse_by_name(a_pod({"securityContext": HELD}, **spec), Capture.REDIRECT)

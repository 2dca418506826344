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


@pytest.mark.parametrize("capability", ["NET_RAW", "CAP_NET_ADMIN", "cap_sys_ptrace", "ALL", "BPF"])
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

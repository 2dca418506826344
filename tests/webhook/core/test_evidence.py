"""A sidecar that was planted before the namespace's label is told from ours."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from sidecar.config import Capture
from tests.webhook.core.golden_cases import Case, cases
from tests.webhook.core.test_survey import a_pod
from webhook.core.evidence import Origin, doubt, repository
from webhook.core.injection import Inject

ORIGIN = Origin(
    repositories=frozenset({"registry.example/sidegate/sidecar"}),
    control_planes=frozenset({"spiffe://example.org/ns/sidegate-system/sa/sidegate"}),
)


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("sidecar", "sidecar"),
        ("sidecar:1", "sidecar"),
        ("registry.example:5000/a/b", "registry.example:5000/a/b"),
        ("registry.example:5000/a/b:1", "registry.example:5000/a/b"),
        ("a/b:1@sha256:00", "a/b"),
        ("a/b@sha256:00", "a/b"),
    ],
)
def test_an_images_repository_is_its_name_without_tag_and_digest(image: str, name: str) -> None:
    """A registry's port is no tag."""
    assert repository(image) == name


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.folder.name)
def test_nothing_speaks_against_what_the_webhook_makes(case: Case) -> None:
    """Of every golden pod, whatever its role, capture mode and transport."""
    decision = case.decide(case.pod)
    if isinstance(decision, Inject):
        origin = Origin(repositories=frozenset({repository(case.template.image)}), control_planes=ORIGIN.control_planes)
        assert doubt(decision.pod, origin) == ""
        assert doubt(decision.pod, Origin()) == ""


def _ours(index: int, **fields: Any) -> Callable[[Any], None]:
    return lambda pod: pod["spec"]["initContainers"][index].update(fields)


def _env(*variables: tuple[str, str]) -> Callable[[Any], None]:
    def change(pod: Any) -> None:
        names = {name for name, _ in variables}
        sidecar = pod["spec"]["initContainers"][-1]
        kept = [each for each in sidecar["env"] if each["name"] not in names]
        sidecar["env"] = [*kept, *({"name": name, "value": value} for name, value in variables)]

    return change


def _mount(index: int, **mount: Any) -> Callable[[Any], None]:
    return lambda pod: pod["spec"]["initContainers"][index]["volumeMounts"].append(mount)


def _volume(name: str, **source: Any) -> Callable[[Any], None]:
    def change(pod: Any) -> None:
        others = [each for each in pod["spec"]["volumes"] if each["name"] != name]
        pod["spec"]["volumes"] = [*others, {"name": name, **source}]

    return change


def _labels(**labels: str) -> Callable[[Any], None]:
    return lambda pod: pod["metadata"]["labels"].update({f"sidegate.dev/{key}": value for key, value in labels.items()})


def _put_first(pod: Any) -> None:
    pod["spec"]["initContainers"].insert(0, {"name": "first", "image": "x"})


def _double(pod: Any) -> None:
    sidecar = pod["spec"]["initContainers"][-1]
    sidecar["env"] = [*sidecar["env"], sidecar["env"][-1]]


PLANTED: dict[str, tuple[str, Callable[[Any], object]]] = {
    "image": ("image tenant/sidecar:1 is none of ours", _ours(-1, image="tenant/sidecar:1")),
    "image-of-the-init-container": ("container sidegate-net: image x is none", _ours(0, image="x")),
    "no-image": ("image None is none of ours", _ours(-1, image=None)),
    "command": ("container sidegate: its command", _ours(-1, command=["python", "-c", "x"])),
    "longer-command": ("container sidegate: its command", _ours(-1, command=["python", "-m", "sidecar", "x"])),
    "rules-of-an-agent": ("its rules are not", _ours(0, command=["python", "-m", "sidecar.shell.net", "9999"])),
    "let-out-by-rules": ("its rules are not", _ours(0, command=["python", "-m", "sidecar.shell.net", "hosts"])),
    "let-out-by-label": ("need securityContext", _labels(egress="hosts")),
    "no-command": ("container sidegate-net: its command", _ours(0, command=None)),
    "arguments": ("container sidegate: its command", _ours(-1, args=["x"])),
    "environment-from-elsewhere": ("container sidegate: its command", _ours(-1, envFrom=[])),
    "another-program": ("its environment", _env(("PYTHONPATH", "/evil"))),
    "another-upstream": ("its environment", _env(("SIDEGATE_UPSTREAM_HOST", "192.0.2.1"))),
    "another-control-plane": ("it obeys another control plane", _env(("SIDEGATE_CONTROL_PLANE_ID", "spiffe://a/b"))),
    "a-setting-twice": ("a setting is there twice", _double),
    "nothing-captured": ("is not what captures its traffic", _env(("SIDEGATE_CAPTURE", "listen"))),
    "no-redirection": ("is not what captures its traffic", lambda pod: pod["spec"]["initContainers"].pop(0)),
    "capture-of-another-name": ("is not what captures its traffic", _labels(capture="remap")),
    "capture-unknown": ("are not what the injector writes", _labels(capture="listen")),
    "not-fenced-in": ("are not what the injector writes", lambda pod: pod["metadata"]["labels"].pop("sidegate.dev/injected")),
    "agent-by-label": ("the sidecar's role differ", _labels(agent="true")),
    "agent-by-setting": ("the sidecar's role differ", _env(("SIDEGATE_ROLE", "agent"))),
    "mount": ("mount /evil", _mount(-1, name="evil", mountPath="/evil")),
    "mount-of-another-place": ("mount /evil", _mount(-1, name="sidegate-cache", mountPath="/evil")),
    "part-of-a-volume": ("mount /var/cache/sidegate", _mount(
        -1, name="sidegate-cache", mountPath="/var/cache/sidegate", subPath="a"
    )),
    "workload-api-of-ones-own": ("volume sidegate-spiffe", _volume("sidegate-spiffe", configMap={"name": "x"})),
    "cache-of-ones-own": ("volume sidegate-cache", _volume("sidegate-cache", configMap={"name": "x"})),
    "started-late": ("another container starts before", _put_first),
    "application-beside": ("hostNetwork", lambda pod: pod["spec"].update(hostNetwork=True)),
    "application-in-our-volume": ("is the sidecar's alone", lambda pod: pod["spec"]["containers"][0].update(
        volumeMounts=[{"name": "sidegate-cache", "mountPath": "/x"}]
    )),
    "no-pod-at-all": ("pod: ", lambda pod: pod["spec"].update(containers="none")),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_what_the_webhook_would_not_make_is_no_work_of_ours(planted: str) -> None:
    """Each difference that would let traffic, keys or judgements past the sidecar is found, and named."""
    words, change = PLANTED[planted]
    pod = copy.deepcopy(a_pod())
    assert doubt(pod, ORIGIN) == ""

    change(pod)

    assert words in doubt(pod, ORIGIN)


def test_a_remapped_pod_that_redirects_is_not_ours() -> None:
    """Nor one whose sidecar is not the last of ours to start."""
    remapped, redirected = (a_pod(capture=each) for each in (Capture.REMAP, Capture.REDIRECT))
    remapped["spec"]["initContainers"] = [redirected["spec"]["initContainers"][0], *remapped["spec"]["initContainers"]]
    assert "is not what captures its traffic" in doubt(remapped, ORIGIN)

    redirected["spec"]["initContainers"].reverse()
    assert "it is not the last of ours" in doubt(redirected, ORIGIN)


def test_what_is_not_known_is_not_compared() -> None:
    """Whoever may not see the control plane's settings learns the rest."""
    pod = a_pod()
    pod["spec"]["initContainers"][-1]["image"] = "mirror.example/sidecar:1"

    assert doubt(pod, Origin()) == ""
    assert "none of ours" in doubt(pod, ORIGIN)

"""`sidegate inject`: the webhook's own decision, offline: manifests in, the same manifests with the sidecar in them out.

Pods and whatever has a pod template are rendered; everything else passes, but for MCPServerProfiles, which also take
part in the decision. Nothing is printed when any pod would be refused, by the webhook or, as far as the namespace's
labels tell, by Pod Security behind it.
"""

import argparse
import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from sidecar import __version__
from sidecar.config import PREFIX, Capture
from sidecar.errors import ConfigError
from webhook.config import Settings, template
from webhook.core import resources
from webhook.core.container import NET, Template
from webhook.core.injection import INJECTION_LABEL, Deny, Inject, Skip, decide, policy_of
from webhook.core.pod import JSON
from webhook.core.resources import ServerProfileSpec

# Where each kind keeps its pod; an owner's name becomes the workload's, as it would through its pods' owner references.
TEMPLATES: Final[Mapping[str, tuple[str, ...]]] = {
    "Pod": (),
    "Deployment": ("spec", "template"),
    "ReplicaSet": ("spec", "template"),
    "ReplicationController": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "Job": ("spec", "template"),
    "Rollout": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
}
POD_SECURITY_LABEL: Final = "pod-security.kubernetes.io/enforce"
DEFAULT_SETTINGS: Final = {f"{PREFIX}CONTROL_PLANE_ID": "spiffe://cluster.local/ns/sidegate-system/sa/sidegate"}
EXAMPLE: Final = f"example: sidegate inject -f deployment.yaml --namespace shop --namespace-labels {INJECTION_LABEL}=enabled | kubectl diff -f -"  # fmt: skip # noqa: E501


def add_to(verbs: Any) -> None:
    """Add the verb's arguments."""
    parser = verbs.add_parser("inject", help="show what the webhook makes of manifests", description=__doc__, epilog=EXAMPLE)  # fmt: skip
    parser.add_argument("-f", "--filename", required=True, metavar="FILE", help="YAML or JSON documents; - for standard input")  # fmt: skip
    parser.add_argument("-n", "--namespace", default="default", metavar="NAME", help="of what names none itself (default: default)")  # fmt: skip # noqa: E501
    parser.add_argument("--namespace-labels", default=f"{INJECTION_LABEL}=enabled", metavar="KEY=VALUE,…", help=f"labels of every namespace (default: {INJECTION_LABEL}=enabled)")  # fmt: skip # noqa: E501
    parser.add_argument("--settings", type=Path, metavar="FILE", help=f"the control plane's environment, a {PREFIX}NAME=VALUE a line (default: the defaults)")  # fmt: skip # noqa: E501
    parser.add_argument("--bundle-keys", type=Path, metavar="PEM", help="public keys of the bundles' signatures, as pods would get them")  # fmt: skip # noqa: E501
    parser.set_defaults(perform=perform)


def perform(options: argparse.Namespace) -> int:
    """Print the manifests; return 1, and print none, when a pod would be refused."""
    try:
        text = sys.stdin.read() if options.filename == "-" else Path(options.filename).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{options.filename}: expected YAML in UTF-8: {error}") from error
    documents = list(_documents(text, options.filename))
    labels = _labels(options.namespace_labels)
    keys = "" if options.bundle_keys is None else options.bundle_keys.read_text(encoding="utf-8")
    injector = Injector(_template(options.settings, keys), labels, options.namespace, documents)
    rendered = [injector.render(each) for each in documents]
    for line in injector.said:
        print(f"sidegate: {line}", file=sys.stderr)
    if injector.denied:
        return 1
    yaml.safe_dump_all(rendered, sys.stdout, sort_keys=False, width=120, explicit_start=len(rendered) > 1)
    return 0


class Injector:
    """Renders documents one by one; *said* collects what a person should know, *denied* says that one was refused."""

    def __init__(self, made: Template, labels: Mapping[str, str], namespace: str, documents: list[JSON]) -> None:
        self._template = made
        self._policy = policy_of(labels)
        self._pod_security = labels.get(POD_SECURITY_LABEL, "privileged")
        self._namespace = namespace
        self._nonce = secrets.token_hex(16)  # what is printed may be applied
        self.profiles: dict[str, dict[str, ServerProfileSpec]] = {}
        for each in documents:
            if each["kind"] == resources.SERVER_PROFILE.name:
                spec = resources.decode(resources.SERVER_PROFILE, each, ServerProfileSpec)
                self.profiles.setdefault(self._namespace_of(each), {})[_name(each)] = spec
        self.said: list[str] = []
        self.denied = False

    def render(self, document: JSON) -> JSON:
        """Return *document* as the webhook would make its pods; the same one when it has none or they are left alone."""
        path = TEMPLATES.get(document["kind"])
        if path is None:
            return document
        pod = _at(document, path)
        if not isinstance(pod, dict) or not isinstance(_metadata(pod), dict):
            raise ConfigError(f"{_label(document)}: {'.'.join(path)}: expected a pod template")
        asked = pod if not path else pod | {"metadata": _metadata(pod) | {"generateName": f"{_name(document)}-"}}
        namespace = self._namespace_of(document)
        decision = decide(
            asked,
            namespace=namespace,
            policy=self._policy,
            profiles=self.profiles.get(namespace, {}),
            template=self._template,
            nonce=self._nonce,
        )
        match decision:
            case Deny():
                self.denied = True
                self.said.append(f"error: {_label(document)}: {decision.code}: {decision.message}")
            case Skip():
                self.said.append(f"{_label(document)}: left alone: {decision.reason}")
            case Inject():
                self.said.extend(f"warning: {_label(document)}: {text}" for text in decision.warnings)
                self._judge_pod_security(document, decision.capture)
                made = decision.pod
                if path:
                    kept = {key: value for key, value in made["metadata"].items() if key != "generateName"}
                    made = made | {"metadata": kept}
                return _replaced(document, path, made)
        return document

    def _judge_pod_security(self, document: JSON, capture: Capture) -> None:
        """Say what the API server's own admission would, behind the webhook's."""
        if capture is Capture.REDIRECT and self._pod_security in ("baseline", "restricted"):
            self.denied = True
            self.said.append(
                f"error: {_label(document)}: Pod Security {self._pod_security} of the namespace refuses NET_ADMIN of "
                f"{NET}; use capture mode remap"
            )

    def _namespace_of(self, document: JSON) -> str:
        return str(_metadata(document).get("namespace") or self._namespace)


def _documents(text: str, source: str) -> Iterator[JSON]:
    """Yield every object of *text*, those of lists too. Raises ConfigError."""
    try:
        for document in yaml.safe_load_all(text):
            if document is None:
                continue
            kind, items = _checked(document, source)["kind"], document.get("items")
            if not kind.endswith("List") or not isinstance(items, list):
                yield document
                continue
            said = {
                "apiVersion": document.get("apiVersion"),
                "kind": kind.removesuffix("List"),
            }  # of typed lists' items
            for item in items:
                yield _checked(said | item if isinstance(item, dict) and kind != "List" else item, source)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{source}: {error}") from error


def _checked(document: Any, source: str) -> JSON:
    """Return *document* when it has the least that every object of Kubernetes has. Raises ConfigError."""
    if not isinstance(document, dict):
        raise ConfigError(f"{source}: expected objects of Kubernetes, found {type(document).__name__}")
    if not isinstance(document.get("kind"), str):
        raise ConfigError(f"{source}: expected objects of Kubernetes, found one without kind")
    if not isinstance(_metadata(document), dict):
        raise ConfigError(f"{source}: {document['kind']}: metadata: expected an object")
    return document


def _labels(text: str) -> dict[str, str]:
    labels = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not key or not equals:
            raise ConfigError(f"--namespace-labels {part}: expected KEY=VALUE, such as {INJECTION_LABEL}=enforced")
        labels[key] = value
    return labels


def _template(path: Path | None, bundle_keys: str) -> Template:
    environment = dict(DEFAULT_SETTINGS)
    for number, line in enumerate([] if path is None else path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not name.startswith(PREFIX):
            raise ConfigError(f"{path}:{number}: expected {PREFIX}NAME=VALUE")
        environment[name] = value
    return template(Settings.from_env(environment), __version__, bundle_keys)


def _metadata(document: JSON) -> JSON:
    return document.get("metadata") or {}


def _name(document: JSON) -> str:
    return str(_metadata(document).get("name") or "")


def _label(document: JSON) -> str:
    return f"{document['kind']} {_name(document) or '(unnamed)'}"


def _at(document: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def _replaced(document: JSON, path: tuple[str, ...], value: JSON) -> JSON:
    """Return *document* with *value* at *path*; the given one stays as it is."""
    if not path:
        return value
    return document | {path[0]: _replaced(document[path[0]], path[1:], value)}

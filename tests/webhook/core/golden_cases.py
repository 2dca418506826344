"""The golden pods: each folder below golden/ is one case, and together they are the specification of injection.

pod.yaml, namespace.yaml and optionally settings.toml and profiles.yaml go in; decision.yaml comes out, with patch.json
and mutated.yaml when the pod is injected. `python -m tests.webhook.core.golden_cases` writes the results anew; the
difference is then reviewed, and why.md says what the case is for.
"""

import json
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from sidecar.config import Capture, Settings
from webhook.core import resources
from webhook.core.container import Amounts, Template
from webhook.core.injection import Decision, Inject, Skip, decide, policy_of

ROOT = Path(__file__).parent / "golden"
NONCE = "00000000-0000-4000-8000-000000000000"  # of every review here
TEMPLATE = Template(
    version="0.1.0",
    revision="default",
    image="registry.example/sidegate/sidecar@sha256:" + "0" * 64,
    excluded_namespaces=frozenset({"kube-system", "sidegate-system"}),
    sidecar=Settings(
        spiffe_socket="unix:/spiffe-workload-api/spire-agent.sock",
        control_plane="https://sidegate.sidegate-system.svc:8443",
        control_plane_id="spiffe://example.org/ns/sidegate-system/sa/sidegate",
        bundle_keys="-----BEGIN PUBLIC KEY-----\n...\n-----END PUBLIC KEY-----\n",
    ),
    amounts=Amounts(cpu_m=50, cpu_limit_m=1000, memory_bytes=96 * 2**20, memory_limit_bytes=256 * 2**20),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One folder."""

    folder: Path
    pod: Any
    namespace: Any
    template: Template
    profiles: dict[str, resources.ServerProfileSpec]

    def decide(self, pod: Any) -> Decision:
        """Return the decision on *pod* in this case's surroundings."""
        metadata = self.namespace["metadata"]
        return decide(
            pod,
            namespace=metadata["name"],
            policy=policy_of(metadata.get("labels") or {}),
            profiles=self.profiles,
            template=self.template,
            nonce=NONCE,
        )

    def results(self) -> dict[str, str]:
        """Return the files that come out, by name."""
        decision = self.decide(self.pod)
        if not isinstance(decision, Inject):
            facts = (
                {"decision": "skip", "reason": str(decision.reason)}
                if isinstance(decision, Skip)
                else {"decision": "deny", "code": str(decision.code), "message": decision.message}
            )
            return {"decision.yaml": yaml.safe_dump(facts, sort_keys=False, width=120)}
        facts = {"decision": "inject", "capture": str(decision.capture), "warnings": list(decision.warnings)}
        return {
            "decision.yaml": yaml.safe_dump(facts, sort_keys=False, width=120),
            "patch.json": json.dumps(decision.operations, indent=2) + "\n",
            "mutated.yaml": yaml.safe_dump(decision.pod, sort_keys=True, width=120),
        }


def cases() -> list[Case]:
    """Return every case, in order."""
    return [_read(folder) for folder in sorted(ROOT.iterdir())]


def _read(folder: Path) -> Case:
    changes: dict[str, Any] = {}
    if (settings := folder / "settings.toml").exists():
        changes = tomllib.loads(settings.read_text())
        for name in ("capture", "weakest_capture"):
            if name in changes:
                changes[name] = Capture(changes[name])
        if "image_pull_secrets" in changes:
            changes["image_pull_secrets"] = tuple(changes["image_pull_secrets"])
    profiles = {}
    if (file := folder / "profiles.yaml").exists():
        for resource in yaml.safe_load_all(file.read_text()):
            spec = resources.decode(resources.SERVER_PROFILE, resource, resources.ServerProfileSpec)
            profiles[resource["metadata"]["name"]] = spec
    return Case(
        folder=folder,
        pod=yaml.safe_load((folder / "pod.yaml").read_text()),
        namespace=yaml.safe_load((folder / "namespace.yaml").read_text()),
        template=replace(TEMPLATE, **changes),
        profiles=profiles,
    )


def main() -> None:
    """Write what comes out of every case."""
    for case in cases():
        results = case.results()
        for name in ("decision.yaml", "patch.json", "mutated.yaml"):
            (case.folder / name).unlink(missing_ok=True)
        for name, text in results.items():
            (case.folder / name).write_text(text)


if __name__ == "__main__":
    main()

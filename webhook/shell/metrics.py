"""What the control plane counts: Prometheus metrics with closed label sets, in a registry of their own."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
# The API server waits 5 s for us (chart); the target is 50 ms.
_BUCKETS_S: Final = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class Metrics:
    """All of them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.admissions = Counter(
            "sidegate_admissions",
            "Reviewed pods by decision (inject, unchanged, skip, deny, error) and reason.",
            ["decision", "reason"],
            registry=self.registry,
        )
        self.admission_seconds = Histogram(
            "sidegate_admission_seconds", "Time to answer a review.", buckets=_BUCKETS_S, registry=self.registry
        )
        self.leaf_expiry = Gauge(
            "sidegate_serving_certificate_expiry_timestamp_seconds",
            "When the serving certificate expires, in Unix time.",
            registry=self.registry,
        )
        self.signing_key_since = Gauge(
            "sidegate_signing_key_timestamp_seconds",
            "When the key that signs bundles began to, in Unix time.",
            registry=self.registry,
        )
        self.bundle_requests = Counter(
            "sidegate_bundle_requests", "Requests for bundles by HTTP status.", ["status"], registry=self.registry
        )
        self.bundle_pods = Gauge("sidegate_bundle_pods", "Pods that may ask for a bundle.", registry=self.registry)
        self.compilations = Counter(
            "sidegate_bundle_compilations",
            "Compiled bundles by result (ok, failed).",
            ["result"],
            registry=self.registry,
        )
        self.failing_pods = Gauge(
            "sidegate_bundle_failing_pods",
            "Pods whose newest policies or settings cannot be used; they keep their last good bundle, if any.",
            registry=self.registry,
        )
        self.broken_resources = Gauge(
            "sidegate_broken_resources", "Custom resources that cannot be read.", registry=self.registry
        )

        self.leading = Gauge(
            "sidegate_leading", "Whether this replica holds the Lease, and writes status.", registry=self.registry
        )
        self.reporting_pods = Gauge(
            "sidegate_reporting_pods",
            "Pods whose sidecars reported lately to any replica; known to the one that leads.",
            registry=self.registry,
        )
        self.status_writes = Counter(
            "sidegate_status_writes", "Written statuses of custom resources.", registry=self.registry
        )
        self.trust_repairs = Counter(
            "sidegate_ca_bundle_writes",
            "Webhook configurations whose caBundle was set, as it was another or none.",
            registry=self.registry,
        )

        self.network_policies = Gauge(
            "sidegate_network_policies",
            "NetworkPolicies of governed namespaces; known to the replica that leads.",
            registry=self.registry,
        )
        self.network_policy_writes = Counter(
            "sidegate_network_policy_writes",
            "NetworkPolicies created, put right or deleted.",
            registry=self.registry,
        )
        self.remapped_pods = Gauge(
            "sidegate_remapped_pods",
            "Pods in capture mode remap by what dialling their application found: closed, exposed (NetworkPolicy is not "
            "enforced) or unknown; known to the replica that leads.",
            ["state"],
            registry=self.registry,
        )
        self.undeclared = Gauge(
            "sidegate_undeclared_peers",
            "Callers and destinations of profiles that no NetworkPolicy can let through; the log names them.",
            registry=self.registry,
        )

        self.pods = Gauge(
            "sidegate_pods",
            "Pods of labelled namespaces that should be governed, by what they are (governed, starting, ungoverned); "
            "known to the replica that leads.",
            ["namespace", "state"],
            registry=self.registry,
        )
        self.servers = Gauge(
            "sidegate_servers",
            "MCP servers of labelled namespaces; each should have one of its own. Known to the replica that leads.",
            ["namespace"],
            registry=self.registry,
        )
        self.pods_counted = Gauge(
            "sidegate_pods_counted_timestamp_seconds", "When they were counted, in Unix time.", registry=self.registry
        )

    def render(self) -> bytes:
        """Return the text exposition."""
        return generate_latest(self.registry)

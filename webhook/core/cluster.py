"""Turn the operator's settings into what pods are made of, and into what a workload gets that says nothing itself."""

from sidecar.config import Capture, LogLevel
from sidecar.config import Settings as SidecarSettings
from sidecar.core.profile import Audit, Telemetry
from webhook.config import Settings
from webhook.core.container import SPIFFE_DIR, Amounts, Template
from webhook.core.effective import Defaults


def template(settings: Settings, version: str, bundle_keys: str) -> Template:
    """Return what pods are made of, by the operator's *settings*; *bundle_keys* (PEM) verify their bundles."""
    return Template(
        version=version,
        revision=settings.revision,
        image=settings.image,
        image_pull_policy=settings.image_pull_policy,
        image_pull_secrets=settings.image_pull_secrets,
        capture=Capture(settings.capture),
        weakest_capture=Capture(settings.weakest_capture),
        excluded_namespaces=frozenset({*settings.excluded_namespaces, settings.namespace}),
        sidecar=SidecarSettings(
            spiffe_socket=f"unix:{SPIFFE_DIR}/{settings.spiffe_socket.rpartition('/')[2]}",  # one driver serves both
            control_plane=f"https://{settings.service}.{settings.namespace}.svc:8443",
            control_plane_id=settings.control_plane_id,
            bundle_keys=bundle_keys,
            bundle_max_age_s=settings.bundle_max_age_s,
            otlp_endpoint=settings.otlp_endpoint,
            log_level=LogLevel(settings.sidecar_log_level),
        ),
        amounts=Amounts(
            cpu_m=settings.sidecar_cpu,
            cpu_limit_m=settings.sidecar_cpu_limit,
            memory_bytes=settings.sidecar_memory,
            memory_limit_bytes=settings.sidecar_memory_limit,
        ),
    )


def defaults(settings: Settings) -> Defaults:
    """Return what a workload gets that says nothing else."""
    content = settings.audit_content
    return Defaults(
        mtls=settings.mtls,
        user=settings.user,
        audit=Audit(arguments=content, results=content),
        telemetry=Telemetry(otlp_endpoint=settings.otlp_endpoint or None),
    )

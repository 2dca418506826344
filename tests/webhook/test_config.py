"""The control plane's settings."""

from dataclasses import fields

import pytest

from sidecar.config import ShipFormat
from sidecar.core.profile import Network
from webhook.config import Settings, defaults, surroundings, template
from webhook.core.container import AUDIT_FILE
from webhook.errors import BadSetting

ID = {"SIDEGATE_CONTROL_PLANE_ID": "spiffe://a.test/ns/sidegate-system/sa/sidegate"}


def test_one_variable_is_enough() -> None:
    """Everything else has a default, and each says what it is for."""
    settings = Settings.from_env(ID | {"PATH": "/bin"})

    assert settings == Settings(control_plane_id=ID["SIDEGATE_CONTROL_PLANE_ID"])
    assert all(each.metadata["meaning"].endswith(".") for each in fields(Settings))


def test_values_are_read() -> None:
    """Numbers, lists and quantities become what the code works with."""
    settings = Settings.from_env(
        ID
        | {
            "SIDEGATE_LINGER_S": "2.5",
            "SIDEGATE_METRICS_PORT": "0",
            "SIDEGATE_IMAGE_PULL_SECRETS": "a, b,",
            "SIDEGATE_SIDECAR_CPU": "0.5",
            "SIDEGATE_SIDECAR_MEMORY": "1Gi",
            "SIDEGATE_CAPTURE": "remap",
        }
    )

    assert (settings.linger_s, settings.metrics_port, settings.image_pull_secrets) == (2.5, 0, ("a", "b"))
    assert (settings.sidecar_cpu, settings.sidecar_memory, settings.capture) == (500, 2**30, "remap")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("LINGER_S", "soon", "a number from 0 to 300"),
        ("LINGER_S", "301", "a number from 0 to 300"),
        ("LINGER_S", "nan", "a number from 0 to 300"),
        ("METRICS_PORT", "65536", "a port from 0 to 65535"),
        ("METRICS_PORT", "-1", "a port from 0 to 65535"),
        ("CAPTURE", "listen", "one of redirect, remap"),
        ("MTLS", "off", "one of strict, permissive"),
        ("IMAGE", " ", "must not be empty"),
        ("SIDECAR_CPU", "0", "cores above zero"),
        ("CONTROL_PLANE_ID", "https://a", "a SPIFFE ID such as"),
        ("LIMITS_STORE", "valkey:6379", "redis://HOST"),
        ("LIMITS_STORE", "redis://u:p@valkey", "a password goes into"),
        ("LIMITS_STORE_TIMEOUT_S", "0", "a number from 0.001 to 5"),
        ("IMAGES", "x", "no such setting; known are SIDEGATE_ADMISSION_PORT"),
    ],
)
def test_unusable_setting_is_named_with_what_is_allowed(name: str, value: str, said: str) -> None:
    """Name, value and expectation stand in one line."""
    with pytest.raises(BadSetting, match=said) as refused:
        Settings.from_env(ID | {f"SIDEGATE_{name}": value})

    assert f"SIDEGATE_{name}" in str(refused.value)


def test_all_problems_are_said_at_once() -> None:
    """Nobody wants to fix them one restart at a time."""
    with pytest.raises(BadSetting) as refused:
        Settings.from_env({"SIDEGATE_MTLS": "off", "SIDEGATE_USER": "off"})

    assert len(str(refused.value).splitlines()) == 3
    assert "SIDEGATE_CONTROL_PLANE_ID: missing" in str(refused.value)


def test_shipping_needs_files_to_ship() -> None:
    """Standard output is read by others; what waits for a receiver must be somewhere."""
    with pytest.raises(
        BadSetting, match=r"SIDEGATE_AUDIT_SHIP='https://siem\.test': only with SIDEGATE_AUDIT_SINK=file"
    ):
        template(Settings(audit_ship="https://siem.test"), "1", "")

    sidecar = template(Settings(audit_sink="file", audit_keep=2**30, audit_ship="https://siem.test"), "1", "").sidecar
    assert (sidecar.audit_sink, sidecar.audit_keep_bytes) == (AUDIT_FILE, float(2**30))
    assert (sidecar.audit_ship, sidecar.audit_ship_format) == ("https://siem.test", ShipFormat.OTLP)
    assert template(Settings(), "1", "").sidecar.audit_sink == "stdout"


def test_sidecars_learn_the_limits_store_and_may_reach_it() -> None:
    """Each host of its URL is one that NetworkPolicies let through."""
    url = "rediss+sentinel://a.limits,[fd00::1]:27000/limits"
    settings = Settings.from_env(ID | {"SIDEGATE_LIMITS_STORE": url, "SIDEGATE_LIMITS_STORE_SECRET": "limits-store"})
    made = template(settings, "1", "")

    assert (made.sidecar.limits_store, made.limits_store_secret) == (url, "limits-store")
    assert surroundings(settings).urls == ("redis://a.limits:26379", "redis://[fd00::1]:27000")


@pytest.mark.parametrize("value", ["x", "[]", '{"PATH": "/bin"}', '{"OTEL_SDK_DISABLED": true}'])
def test_variables_of_sidecars_are_a_json_object(value: str) -> None:
    """Nothing but OTEL_* variables can be slipped into every pod."""
    with pytest.raises(BadSetting, match=r"SIDEGATE_SIDECAR_OTEL.*expected OTEL_\* variables as a JSON object"):
        Settings.from_env(ID | {"SIDEGATE_SIDECAR_OTEL": value})


def test_sidecars_get_the_variables_of_the_operator() -> None:
    """As they stand; which ones are honoured is the sidecar's to say."""
    variables = '{"OTEL_TRACES_SAMPLER":"always_off","OTEL_LOGS_EXPORTER":"otlp"}'
    settings = Settings.from_env(ID | {"SIDEGATE_SIDECAR_OTEL": variables, "SIDEGATE_SIDECAR_REQUEST_LOG": "refused"})
    made = template(settings, "0.1.0", "")

    assert made.otel == (("OTEL_LOGS_EXPORTER", "otlp"), ("OTEL_TRACES_SAMPLER", "always_off"))
    assert made.sidecar.request_log == "refused"


def test_what_all_servers_reach_by_address_is_told_to_sidecars_that_know_hosts() -> None:
    """DNS on its own port, and what the operator opened; namespaces are NetworkPolicies' alone."""
    settings = Settings.from_env(
        ID
        | {
            "SIDEGATE_NETWORK_DNS": '[{"namespace":"kube-system"},{"cidr":"192.0.2.53/32"}]',
            "SIDEGATE_NETWORK_EGRESS": '[{"cidr":"198.51.100.0/24","ports":[443]}]',
            "SIDEGATE_NETWORK_PRIVATE": "25.0.0.0/8, 2001:db8::/32",
        }
    )

    assert defaults(settings).networks == (
        Network(cidr="192.0.2.53/32", ports=(53,)),
        Network(cidr="198.51.100.0/24", ports=(443,)),
    )
    assert defaults(settings).private == surroundings(settings).private == ("25.0.0.0/8", "2001:db8::/32")


@pytest.mark.parametrize("value", ["here", "25.0.0.1/8", "fd00::/8", "::/0", "0.0.0.0/0", "2000::/3"])
def test_private_ranges_are_ranges_of_public_addresses(value: str) -> None:
    """Of others there is nothing to take away, and a NetworkPolicy would not be valid."""
    with pytest.raises(BadSetting, match="public address ranges"):
        Settings.from_env(ID | {"SIDEGATE_NETWORK_PRIVATE": value})

"""sidecar.config: every setting survives its way through the environment; every mistake is named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.config import PREFIX, Capture, LogLevel, Settings
from sidecar.errors import ConfigError

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)  # what execve takes
PORT = st.integers(0, 65535)
SETTINGS = st.builds(
    Settings,
    namespace=TEXT,
    workload=TEXT,
    capture=st.sampled_from(Capture),
    listen_host=TEXT,
    listen_port=PORT,
    health_port=PORT,
    hosts=TEXT,
    control_plane=TEXT | st.just("tcp://x:1"),
    bundle_max_age_s=st.floats(0, 2**31),
    drain_s=st.floats(0, 3600),
    max_connections=st.integers(1, 100_000).map(float),
    log_level=st.sampled_from(LogLevel),
)


@given(SETTINGS)
def test_settings_survive_the_environment(settings: Settings) -> None:
    """What the webhook writes is what the sidecar reads."""
    assert settings == Settings.from_env(settings.to_env())


def test_defaults_are_not_written() -> None:
    """An injected pod stays readable."""
    assert Settings().to_env() == {}
    assert Settings() == Settings.from_env({})


def test_the_rest_of_the_environment_is_not_ours() -> None:
    """Only the prefix counts."""
    assert Settings() == Settings.from_env({"PATH": "/bin", "XSIDEGATE_NAMESPACE": "x", "sidegate_namespace": "x"})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("CAPTURE", "iptables", "one of redirect, remap, listen"),
        ("CAPTURE", "", "one of redirect, remap, listen"),
        ("LOG_LEVEL", "INFO", "one of debug, info, warning, error"),
        ("LISTEN_PORT", "-1", "a port from 0 to 65535"),
        ("LISTEN_PORT", "65536", "a port from 0 to 65535"),
        ("LISTEN_PORT", "http", "a port from 0 to 65535"),
        ("LISTEN_PORT", "²", "a port from 0 to 65535"),
        ("DRAIN_S", "30s", "a number from 0 to 3600"),
        ("DRAIN_S", "nan", "a number from 0 to 3600"),
        ("DRAIN_S", "inf", "a number from 0 to 3600"),
        ("DRAIN_S", "-1", "a number from 0 to 3600"),
        ("MAX_CONNECTIONS", "0", "a number from 1 to 100000"),
        ("NAMESPAC", "x", "no such setting; known are SIDEGATE_"),
    ],
)
def test_a_mistake_is_named(name: str, value: str, expected: str) -> None:
    """With the variable and what is allowed there."""
    with pytest.raises(ConfigError) as caught:
        Settings.from_env({PREFIX + name: value})

    assert str(caught.value).startswith(PREFIX + name)
    assert expected in str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    """One start, one list."""
    with pytest.raises(ConfigError) as caught:
        Settings.from_env({"SIDEGATE_CAPTURE": "x", "SIDEGATE_DRAIN_S": "x", "SIDEGATE_X": "x"})

    assert len(str(caught.value).splitlines()) == 3


def test_a_service_called_sidegate_stops_no_pod() -> None:
    """Kubernetes sets these for every Service of the namespace."""
    links = {
        "SIDEGATE_SERVICE_HOST": "10.0.0.1",
        "SIDEGATE_SERVICE_PORT": "443",
        "SIDEGATE_SERVICE_PORT_HTTPS": "443",
        "SIDEGATE_PORT": "tcp://10.0.0.1:443",
        "SIDEGATE_PORT_443_TCP": "tcp://10.0.0.1:443",
        "SIDEGATE_PORT_443_TCP_PROTO": "tcp",
        "SIDEGATE_PORT_443_TCP_PORT": "443",
        "SIDEGATE_PORT_443_TCP_ADDR": "10.0.0.1",
        "SIDEGATE_WEBHOOK_SERVICE_HOST": "10.0.0.2",
        "SIDEGATE_WEBHOOK_PORT_9443_TCP_ADDR": "10.0.0.2",
        "SIDEGATE_LISTEN_PORT": "tcp://10.0.0.3:80",  # a Service called sidegate-listen
    }

    assert Settings() == Settings.from_env(links)


def test_a_link_hides_no_setting() -> None:
    """A text setting may be any address."""
    assert Settings.from_env({"SIDEGATE_CONTROL_PLANE": "tcp://x:1"}).control_plane == "tcp://x:1"

"""sidecar.core.store: the URL of the limits store says what it means, or is refused."""

import pytest

from sidecar.core.store import StoreAddress, read_address
from sidecar.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://valkey", StoreAddress(kind="", is_tls=False, nodes=(("valkey", 6379),))),
        ("rediss://valkey:7000/3", StoreAddress(kind="", is_tls=True, nodes=(("valkey", 7000),), database=3)),
        ("redis://[fd00::1]:6380", StoreAddress(kind="", is_tls=False, nodes=(("fd00::1", 6380),))),
        (
            "redis+sentinel://a,b:27000/limits?db=2",
            StoreAddress(
                kind="sentinel", is_tls=False, nodes=(("a", 26379), ("b", 27000)), master="limits", database=2
            ),
        ),
        ("rediss+cluster://a,b", StoreAddress(kind="cluster", is_tls=True, nodes=(("a", 6379), ("b", 6379)))),
    ],
)
def test_a_url_names_a_store(url: str, address: StoreAddress) -> None:
    """One server, those that Sentinels watch, or a cluster."""
    assert read_address(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "http://valkey",
        "redis+proxy://valkey",
        "redis://",
        "redis://a,b",
        "redis://user:secret@valkey",
        "redis://valkey/x",
        "redis://valkey/-1",
        "redis://valkey:port",
        "redis://valkey?db=1",
        "redis://valkey#1",
        "redis+sentinel://a",
        "redis+sentinel://a/limits?database=1",
        "redis+cluster://a/1",
    ],
)
def test_what_names_no_store_is_refused_with_what_is_expected(url: str) -> None:
    """The setting, what was given, what is allowed; a password in a URL would be seen in the pod's manifest."""
    with pytest.raises(ConfigError, match=r"SIDEGATE_LIMITS_STORE='.*': expected redis://HOST"):
        read_address(url)

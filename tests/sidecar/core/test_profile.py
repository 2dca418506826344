"""sidecar.core.profile: what the control plane writes is what the sidecar reads, and nothing else is read."""

from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core import profile as module
from sidecar.core.profile import (
    Algorithm,
    Audit,
    ClaimPaths,
    Identity,
    Limit,
    PolicySet,
    Profile,
    Provider,
    Telemetry,
    decode,
    encode,
)
from sidecar.errors import BundleError
from tests.builders import a_server

TEXT = st.text(max_size=12)
TEXTS = st.lists(TEXT, max_size=3).map(tuple)
ALGORITHMS = get_args(Algorithm)
PROVIDERS = st.builds(
    Provider,
    name=TEXT,
    issuer=st.text(min_size=8, max_size=20),
    audiences=st.lists(TEXT, min_size=1, max_size=3).map(tuple),
    jwks_uri=st.none() | TEXT,
    ca_pem=st.none() | TEXT,
    algorithms=st.lists(st.sampled_from(ALGORITHMS), min_size=1, max_size=3).map(tuple),
    leeway_s=st.integers(0, 120),
    claims=st.builds(ClaimPaths, id=TEXT, email=TEXT, role=TEXT, roles=TEXT, groups=TEXT),
)
LIMITS = st.builds(
    Limit,
    name=TEXT,
    rate_per_s=st.floats(1e-6, 1e9),
    burst=st.integers(1, 10**6),
    per=st.lists(st.sampled_from(["user", "workload", "session", "tool"]), max_size=4).map(tuple),
    methods=TEXTS,
    tools=TEXTS,
)
PROFILES = st.builds(
    Profile,
    server=st.builds(
        a_server,
        namespace=TEXT,
        port=st.integers(1, 65535),
        paths=st.lists(st.sampled_from(["/", "/mcp", "/sse"]), max_size=2).map(tuple),
        max_body_bytes=st.integers(1024, 64 * 2**20),
    ),
    identity=st.builds(
        Identity,
        mtls=st.sampled_from(["strict", "permissive"]),
        user=st.sampled_from(["required", "optional"]),
        callers=TEXTS,
        providers=st.lists(PROVIDERS, max_size=2).map(tuple),
    ),
    limits=st.lists(LIMITS, max_size=2).map(tuple),
    audit=st.builds(
        Audit,
        arguments=st.sampled_from(["full", "hash"]),
        results=st.sampled_from(["full", "hash"]),
        redact=TEXTS,
        max_bytes=st.integers(0, 2**20),
    ),
    telemetry=st.builds(Telemetry, otlp_endpoint=st.none() | TEXT, content=st.booleans()),
    policies=st.lists(
        st.builds(PolicySet, cedar=st.booleans(), rego=st.booleans(), reads=st.none() | TEXTS, pure=st.booleans()),
        max_size=2,
    ).map(tuple),
)

LEAST = b'{"format":1,"server":{"namespace":"pay","workload":"billing","name":"billing","port":8000}}'


@given(PROFILES)
def test_what_is_written_is_what_is_read(profile: Profile) -> None:
    """And the same profile gives the same bytes."""
    assert profile == decode(encode(profile))
    assert encode(profile) == encode(decode(encode(profile)))


def test_defaults_are_the_tight_ones() -> None:
    """Who says nothing gets mutual TLS, a user and no caller."""
    identity = decode(LEAST).identity

    assert (identity.mtls, identity.user, identity.callers, identity.providers) == ("strict", "required", (), ())


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (b'"format":1', b'"format":2', "format"),
        (b'"port":8000', b'"port":0', "port"),
        (b'"port":8000', b'"port":65536', "port"),
        (b'"port":8000', b'"port":"8000"', "port"),
        (b'"port":8000', b'"port":8000,"path":["/"]', "path"),
        (b'"port":8000', b'"port":8000,"paths":["mcp"]', "paths"),
        (b'"port":8000', b'"port":8000,"paths":["/m cp"]', "paths"),
        (b'"port":8000', b'"port":8000,"paths":["/mcp\\n"]', "paths"),
        (b'"port":8000', b'"port":8000,"max_body_bytes":1', "max_body_bytes"),
        (b'"format":1', b'"format":1,"limit":[]', "limit"),
        (b'"format":1', b'"format":1,"identity":{"mtls":"off"}', "mtls"),
        (b'"format":1', b'"format":1,"limits":[{"name":"x","rate_per_s":0,"burst":1}]', "rate_per_s"),
        (b'"format":1', b'"format":1,"limits":[{"name":"x","rate_per_s":1e-300,"burst":1}]', "rate_per_s"),
        (b'"format":1', b'"format":1,"limits":[{"name":"x","rate_per_s":1e400,"burst":1}]', "range"),
        (b'"format":1', b'"format":1,"limits":[{"name":"x","rate_per_s":1,"burst":0}]', "burst"),
        (
            b'"format":1',
            b'"format":1,"identity":{"providers":[{"name":"x","issuer":"https://x","audiences":[]}]}',
            "audiences",
        ),
        (
            b'"format":1',
            b'"format":1,"identity":{"providers":[{"name":"x","issuer":"https://x","audiences":["a"],"algorithms":["HS256"]}]}',
            "HS256",
        ),
        (LEAST, b"", "truncated"),
        (LEAST, b"[]", "object"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(old: bytes, new: bytes, why: str) -> None:
    """A misspelt restriction that is ignored would be a hole."""
    assert old in LEAST

    with pytest.raises(BundleError, match=why) as caught:
        decode(LEAST.replace(old, new))

    assert str(caught.value).startswith("sidegate.json: ")


def test_every_record_refuses_unknown_fields() -> None:
    """The rule is said at each record, so none may forget it."""
    records = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, msgspec.Struct)]

    assert len(records) > 5
    assert all(each.__struct_config__.forbid_unknown_fields and each.__struct_config__.frozen for each in records)

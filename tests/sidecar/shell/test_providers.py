"""Keys come from the provider that the operator named, unaltered, and stay while it is away."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import aiohttp
import jwt
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from certs.authority import Authority, make_key
from certs.tls import ServingServer, utc_now
from sidecar.core.identity import UnknownKey
from sidecar.core.profile import Provider
from sidecar.shell import providers as module
from sidecar.shell import web as requests
from sidecar.shell.discovery import OAUTH, ProviderError
from sidecar.shell.discovery import OPENID as DISCOVERY
from sidecar.shell.providers import Providers, usable
from tests.fakes import eventually

RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
SHORT_RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505 - to be refused
EC_KEY = ec.generate_private_key(ec.SECP256R1())
EC_384_KEY = ec.generate_private_key(ec.SECP384R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()

Jwk = dict[str, Any]


def _rsa(kid: str = "r1", *, key: rsa.RSAPrivateKey = RSA_KEY, **changes: Any) -> Jwk:
    return {**RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, "key_ops": ["verify"], **changes}


def _ec(kid: str = "e1", *, key: ec.EllipticCurvePrivateKey = EC_KEY, **changes: Any) -> Jwk:
    return {**ECAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, **changes}


def _ed(kid: str = "d1") -> Jwk:
    return {**OKPAlgorithm.to_jwk(ED_KEY.public_key(), as_dict=True), "kid": kid}


def _a_provider(issuer: str = "https://id.test", **changes: Any) -> Provider:
    return Provider(**{"name": "corporate", "issuer": issuer, "audiences": ("api",), **changes})


class FakeIssuer:
    """An OpenID provider on loopback whose answers a test sets."""

    def __init__(self) -> None:
        self.url = ""
        self.keys: list[Jwk] = [_rsa()]
        self.discovery: Jwk | bytes | None = None  # None: the right one
        self.jwks: bytes | None = None  # None: `keys`
        self.status = 200
        self.missing: set[str] = set()  # paths that are not there
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.hold: asyncio.Event | None = None

    async def handle(self, request: web.Request) -> web.Response:
        """Answer one GET."""
        self.asked.append(request.path)
        self.headers.append(dict(request.headers))
        if self.hold is not None:
            await self.hold.wait()
        if self.status != 200:
            return web.Response(status=self.status, headers={"location": "/elsewhere"})
        if request.path in self.missing:
            return web.Response(status=404)
        if request.path in (DISCOVERY, OAUTH):
            right = {"issuer": self.url, "jwks_uri": f"{self.url}/jwks", "token_endpoint": "unused"}
            return self._json(right if self.discovery is None else self.discovery)
        return self._json({"keys": self.keys} if self.jwks is None else self.jwks)

    @staticmethod
    def _json(document: Jwk | bytes) -> web.Response:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        return web.Response(body=body, content_type="application/json")


@asynccontextmanager
async def _serving(issuer: FakeIssuer, tls: ServingServer | None = None) -> AsyncIterator[None]:
    application = web.Application()
    application.router.add_get("/{path:.*}", issuer.handle)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=None if tls is None else tls.context).start()
    port = runner.addresses[0][1]
    issuer.url = f"http://127.0.0.1:{port}" if tls is None else f"https://localhost:{port}"
    try:
        yield
    finally:
        if issuer.hold is not None:
            issuer.hold.set()
        await runner.cleanup()


@asynccontextmanager
async def _asking(issuer: FakeIssuer, tls: ServingServer | None = None, **changes: Any) -> AsyncIterator[Providers]:
    """Run Providers, told of *issuer*."""
    # As the sidecar's own session: it decodes nothing.
    async with _serving(issuer, tls), aiohttp.ClientSession(auto_decompress=False) as session:
        providers = Providers(session, lambda: None)
        providers.use((_a_provider(issuer.url, **changes),))
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(providers.run())
            try:
                yield providers
            finally:
                running.cancel()


def _kids(providers: Providers) -> set[str]:
    return {kid for keys in providers.keys.values() for kid in keys}


def _unknown_key(issuer: FakeIssuer) -> UnknownKey:
    return UnknownKey(_a_provider(issuer.url))


class Clock:
    """Monotonic seconds that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now_s)


async def test_keys_are_found_by_discovery() -> None:
    """OpenID Connect Discovery 1.0: issuer, then jwks_uri, then keys by issuer and id."""
    issuer = FakeIssuer()
    issuer.keys = [_rsa("r1"), _ec("e1"), _ed("d1")]
    async with _asking(issuer) as providers:
        await eventually(lambda: providers.keys[issuer.url], what="keys")

        found = providers.keys[issuer.url]
        assert {kid: key.algorithm_name for kid, key in found.items()} == {"r1": "RS256", "e1": "ES256", "d1": "EdDSA"}
        assert issuer.asked == [DISCOVERY, "/jwks"]
        assert providers.missing == {}


async def test_answers_are_asked_for_unencoded() -> None:
    """An encoded answer could grow without bound, and the session would not decode it."""
    issuer = FakeIssuer()
    async with _asking(issuer) as providers:
        await eventually(lambda: _kids(providers), what="keys")

    assert {each["Accept-Encoding"] for each in issuer.headers} == {"identity"}


async def test_jwks_uri_of_the_operator_needs_no_discovery() -> None:
    """Also over plain HTTP: the operator wrote it."""
    issuer = FakeIssuer()
    async with _serving(issuer), aiohttp.ClientSession() as session:
        providers = Providers(session, lambda: None)
        provider = _a_provider(jwks_uri=f"{issuer.url}/jwks")
        providers.use((provider,))
        await providers.find(UnknownKey(provider))

        assert set(providers.keys["https://id.test"]) == {"r1"}
        assert issuer.asked == ["/jwks"]


@pytest.mark.parametrize(
    ("discovery", "why"),
    [
        ({"issuer": "https://evil.test", "jwks_uri": "https://evil.test/jwks"}, "names the issuer"),
        ({"issuer": "{url}/", "jwks_uri": "{url}/jwks"}, "names the issuer"),
        ({"issuer": "{url}", "jwks_uri": "http://id.test/jwks"}, "must be https"),
        ({"issuer": "{url}", "jwks_uri": "http://127.0.0.1.evil.test/jwks"}, "must be https"),
        ({"issuer": "{url}", "jwks_uri": "file:///etc/passwd"}, "must be https"),
        ({"issuer": "{url}", "jwks_uri": "https:///jwks"}, "must be https"),
        ({"issuer": "{url}", "jwks_uri": "http://[::1"}, "must be https"),
        ({"issuer": "{url}"}, "jwks_uri"),
        (b"<html>", "malformed"),
        (b"[]", "Expected `object`"),
    ],
)
async def test_discovery_that_leads_astray_is_refused(discovery: Jwk | bytes, why: str) -> None:
    """Another issuer's document, a way to the keys that others could change, and what is no document."""
    issuer = FakeIssuer()
    async with _serving(issuer):
        if isinstance(discovery, dict):
            discovery = {name: text.replace("{url}", issuer.url) for name, text in discovery.items()}
        issuer.discovery = discovery
        assert why in await _why_refused(issuer)


async def _why_refused(issuer: FakeIssuer, **changes: Any) -> str:
    async with aiohttp.ClientSession() as session:
        providers = Providers(session, lambda: None)
        provider = _a_provider(issuer.url, **changes)
        providers.use((provider,))
        await providers.find(UnknownKey(provider))
        assert _kids(providers) == set()
        return providers.missing["corporate"]


async def test_issuer_over_plain_http_is_refused_off_this_host() -> None:
    """Its keys could be replaced on their way; nothing is even asked."""
    issuer = FakeIssuer()
    issuer.url = "http://id.test"

    assert "must be https" in await _why_refused(issuer)


@pytest.mark.parametrize(
    ("jwks", "why"),
    [
        (b"{", "truncated"),
        (b'{"keys":{}}', "Expected `array`"),
        (b'{"keys":["x"]}', "Expected `object`"),
        (b'{"keys":[]}', "no key"),
        (b'{"keys":[' + b" " * 300_000 + b"]}", "more than"),
    ],
)
async def test_key_set_that_is_none_is_refused(jwks: bytes, why: str) -> None:
    """Malformed, empty, or larger than any provider's."""
    issuer = FakeIssuer()
    issuer.jwks = jwks
    async with _serving(issuer):
        assert why in await _why_refused(issuer)


@pytest.mark.parametrize("status", [302, 404, 500])
async def test_answer_other_than_200_is_refused(status: int) -> None:
    """A redirect is not followed: it could lead out of HTTPS."""
    issuer = FakeIssuer()
    issuer.status = status
    async with _serving(issuer):
        assert f"HTTP {status}" in await _why_refused(issuer)
    assert issuer.asked == [DISCOVERY, OAUTH] if status == 404 else [DISCOVERY]


async def test_provider_that_speaks_oauth_alone_is_discovered() -> None:
    """RFC 8414 puts the document elsewhere; OpenID's place is tried first."""
    issuer = FakeIssuer()
    issuer.missing = {DISCOVERY}
    async with _asking(issuer) as providers:
        await eventually(lambda: _kids(providers) == {"r1"}, what="the key")
    assert issuer.asked[:2] == [DISCOVERY, OAUTH]


async def test_provider_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls wait for this: the deadline is short."""
    monkeypatch.setattr(requests, "REQUEST_S", 0.05)
    issuer = FakeIssuer()
    issuer.hold = asyncio.Event()
    async with _serving(issuer):
        assert "TimeoutError" in await _why_refused(issuer)


def _a_web_server() -> tuple[ServingServer, str]:
    """Return HTTPS for localhost, and the PEM of its authority."""
    now = utc_now()
    key = make_key()
    authority = Authority.make(
        name="Corporate Web CA", key=make_key(), now=now, lifetime=timedelta(days=1), serial=x509.random_serial_number()
    )
    leaf = authority.sign_serving(
        ["localhost"], key.public_key(), now=now, lifetime=timedelta(hours=1), serial=x509.random_serial_number()
    )
    server = ServingServer()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    server.use(leaf.public_bytes(Encoding.PEM) + authority.certificate_pem, pem)
    return server, authority.certificate_pem.decode()


async def test_provider_behind_a_private_authority_is_verified() -> None:
    """With its `ca_pem` it is believed, without it is not."""
    server, ca_pem = _a_web_server()
    issuer = FakeIssuer()
    async with _asking(issuer, server, ca_pem=ca_pem) as providers:
        await eventually(lambda: _kids(providers), what="keys")

        assert "CERTIFICATE_VERIFY_FAILED" in await _why_refused(issuer)
        assert "unreadable PEM" in await _why_refused(issuer, ca_pem="no PEM")


async def test_new_key_is_found_when_a_token_names_it() -> None:
    """A provider may sign with a new key before the next refresh."""
    issuer = FakeIssuer()
    async with _asking(issuer) as providers:
        await eventually(lambda: _kids(providers), what="keys")
        issuer.keys.append(_rsa("r2"))
        providers._sources[issuer.url].asked_s -= module.COOLDOWN_S

        await providers.find(_unknown_key(issuer))

        assert _kids(providers) == {"r1", "r2"}


async def test_made_up_key_ids_ask_the_provider_once() -> None:
    """Anyone can send a token with any key id: ten thousand cost one question, also when none has a key yet."""
    for status in (200, 500):
        issuer = FakeIssuer()
        issuer.status = status
        async with _serving(issuer), aiohttp.ClientSession() as session:
            providers = Providers(session, lambda: None)
            providers.use((_a_provider(issuer.url),))
            async with asyncio.TaskGroup() as tasks:
                for _ in range(50):
                    tasks.create_task(providers.find(_unknown_key(issuer)))
            await providers.find(_unknown_key(issuer))

            assert issuer.asked.count(DISCOVERY) == 1


async def test_find_for_a_provider_no_longer_in_force_asks_nobody() -> None:
    """The bundle changed while the call waited."""
    async with aiohttp.ClientSession() as session:
        await Providers(session, lambda: None).find(UnknownKey(_a_provider()))


async def test_key_replaced_under_its_id_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing ids alone would go on believing the old key."""
    clock = Clock(monkeypatch)
    changes: list[None] = []
    issuer = FakeIssuer()
    async with _serving(issuer), aiohttp.ClientSession() as session:
        providers = Providers(session, lambda: changes.append(None))
        providers.use((_a_provider(issuer.url),))
        for keys in ([_rsa("k")], [_rsa("k")], [_ec("k")]):
            issuer.keys = keys
            clock.now_s += module.COOLDOWN_S
            await providers.find(_unknown_key(issuer))

        assert providers.keys[issuer.url]["k"].key_type == "EC"
        assert len(changes) == 3  # use, first keys, replaced key: the same keys again are no change


async def test_withdrawn_key_is_no_longer_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider takes a stolen key out of its set."""
    clock = Clock(monkeypatch)
    issuer = FakeIssuer()
    issuer.keys = [_rsa("r1"), _ec("e1")]
    async with _serving(issuer), aiohttp.ClientSession() as session:
        providers = Providers(session, lambda: None)
        providers.use((_a_provider(issuer.url),))
        await providers.find(_unknown_key(issuer))
        issuer.keys = [_ec("e1")]
        clock.now_s += module.COOLDOWN_S
        await providers.find(_unknown_key(issuer))

        assert _kids(providers) == {"e1"}


async def test_last_good_keys_stay_for_a_day_while_the_provider_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its outage is not ours; but whether a key was withdrawn meanwhile cannot be known for ever."""
    clock = Clock(monkeypatch)
    issuer = FakeIssuer()
    async with _serving(issuer), aiohttp.ClientSession() as session:
        providers = Providers(session, lambda: None)
        providers.use((_a_provider(issuer.url),))
        await providers.find(_unknown_key(issuer))
        issuer.status = 503
        clock.now_s += module.KEEP_S - 1
        await providers.find(_unknown_key(issuer))
        assert _kids(providers) == {"r1"}

        clock.now_s += module.COOLDOWN_S
        await providers.find(_unknown_key(issuer))
        assert _kids(providers) == set()
        assert "HTTP 503" in providers.missing["corporate"]

        issuer.status = 200
        clock.now_s += module.COOLDOWN_S
        await providers.find(_unknown_key(issuer))
        assert _kids(providers) == {"r1"}


async def test_failed_provider_is_asked_again_before_the_next_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Soon at first, then less and less often."""
    monkeypatch.setattr(module, "RETRY_S", (0.001, 0.002))
    issuer = FakeIssuer()
    issuer.status = 503
    async with _asking(issuer) as providers:
        await eventually(lambda: issuer.asked.count(DISCOVERY) > 3, what="more questions")
        issuer.status = 200

        await eventually(lambda: _kids(providers), what="keys")


async def test_keys_are_refreshed_without_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Providers publish a new key before they sign with it."""
    monkeypatch.setattr(module, "REFRESH_S", 0.01)
    issuer = FakeIssuer()
    async with _asking(issuer) as providers:
        await eventually(lambda: _kids(providers), what="keys")
        issuer.keys = [_rsa("r2")]

        await eventually(lambda: _kids(providers) == {"r2"}, what="the new key")


async def test_new_bundle_keeps_what_is_known_of_unchanged_providers() -> None:
    """And forgets the others: a provider taken out of the profile vouches for nobody."""
    issuer = FakeIssuer()
    async with _asking(issuer) as providers:
        await eventually(lambda: _kids(providers), what="keys")
        other = _a_provider("https://other.test", name="other", jwks_uri="http://127.0.0.1:1/jwks")
        providers.use((_a_provider(issuer.url), other))
        assert _kids(providers) == {"r1"}

        providers.use((_a_provider(issuer.url, algorithms=("ES256",)),))
        assert _kids(providers) == set()  # other algorithms: its keys are judged anew

        providers.use(())
        assert providers.keys == {}


@pytest.mark.parametrize(
    "described",
    [
        _rsa(use="enc"),
        _rsa(key_ops=["encrypt"]),
        _rsa(key_ops="verify"),
        {key: value for key, value in _rsa().items() if key != "kid"},
        _rsa(kid=""),
        _rsa(kid=7),  # type: ignore[arg-type]
        _rsa(alg="RS512"),  # not among the profile's
        _rsa(alg=["RS256"]),
        _rsa(alg="ES256"),
        _rsa(alg="none"),
        _rsa(key=SHORT_RSA_KEY),
        _rsa(d="AQAB"),
        _rsa(n=7),
        _rsa(e=None),
        _ec(key=EC_384_KEY),
        _ec(key=EC_384_KEY, alg="ES256"),
        _ec(x="AA"),
        {"kty": "oct", "kid": "o", "k": "c2VjcmV0"},
        {"kty": "oct", "kid": "o", "k": "c2VjcmV0", "alg": "HS256"},
        {"kty": "oct", "kid": "o", "k": "c2VjcmV0", "alg": "RS256"},
        {"kty": "new", "kid": "n"},
        {"kid": "x"},
        {},
    ],
)
def test_key_that_cannot_have_signed_a_token_is_left_out(described: Jwk) -> None:
    """For encryption, without id, symmetric, private, too short, of another algorithm or curve, nonsense."""
    assert set(usable([described, _ec("good")], _a_provider())) == {"good"}


def test_key_without_algorithm_gets_the_profile_s_first_that_fits() -> None:
    """Entra ID names none; an operator whose provider signs with PS256 says so in the profile."""
    assert usable([_rsa()], _a_provider())["r1"].algorithm_name == "RS256"
    assert usable([_rsa()], _a_provider(algorithms=("ES256", "PS256")))["r1"].algorithm_name == "PS256"
    assert usable([_ec(key=EC_384_KEY)], _a_provider(algorithms=("ES256", "ES384")))["e1"].algorithm_name == "ES384"


def test_first_of_two_keys_with_one_id_is_taken() -> None:
    """Whatever the order of a later refresh makes of it, it is one of the provider's."""
    assert usable([_rsa("k"), _ec("k")], _a_provider())["k"].key_type == "RSA"


def test_kept_key_verifies_a_token() -> None:
    """What is kept is what identity needs."""
    token = jwt.encode({"sub": "alice"}, EC_KEY, "ES256", headers={"kid": "e1"})

    assert jwt.decode(token, usable([_ec()], _a_provider())["e1"], algorithms=["ES256"]) == {"sub": "alice"}


_members = st.sampled_from(["kty", "kid", "use", "key_ops", "alg", "n", "e", "crv", "x", "y"])
_values: Callable[[], st.SearchStrategy[Any]] = lambda: st.one_of(  # noqa: E731 - one strategy, two uses
    st.sampled_from(["RSA", "EC", "OKP", "oct", "RS256", "ES256", "EdDSA", "P-256", "Ed25519", "sig", "AQAB", "AA"]),
    st.none(),
    st.integers(),
    st.text(max_size=6),
    st.lists(st.text(max_size=3), max_size=2),
    st.dictionaries(st.text(max_size=2), st.none(), max_size=1),
)


@given(base=st.sampled_from([_rsa(), _ec(), _ed(), {}]), changes=st.dictionaries(_members, _values(), max_size=4))
def test_any_key_set_gives_keys_or_a_refusal(base: Jwk, changes: dict[str, Any]) -> None:
    """A provider's nonsense must not end the process."""
    try:
        keys = usable([base | changes], _a_provider())
    except ProviderError:
        return
    assert all(key.algorithm_name in _a_provider().algorithms for key in keys.values())

"""Asks identity providers: whose an opaque token is (RFC 7662), and for a token for the server behind us (RFC 8693).

Proves who we are by a JWT-SVID, so that no secret is stored; a key or a secret in a file serves where a provider takes none.
A provider that is away or says no means refusal, never a call without what was asked for. Tokens are kept in memory alone,
under the hash of the user's, and are never logged.
"""

import asyncio
import hashlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import aiohttp
import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from certs.errors import WorkloadApiError
from sidecar.core import oauth
from sidecar.core.identity import UnknownToken, learn
from sidecar.core.oauth import Issued, OAuthError
from sidecar.core.profile import Client, Identity, Provider
from sidecar.errors import Reason, Refusal
from sidecar.shell.discovery import Discovered, ProviderError, discover, protected
from sidecar.shell.web import WebError, request

log = logging.getLogger(__name__)

MAX_FLIGHTS: Final = 64  # questions to providers at a time; more are refused
MAX_KEPT: Final = 4096  # exchanged tokens, about 8 MB; the one issued first goes first
FAILED_S: Final = 1.0  # for which a question that failed is not asked again
DISCOVERY_S: Final = 300.0  # for which a provider's endpoints are believed
RETRY_AFTER_S: Final = 2
_ALGORITHMS: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}

Answer = TypeVar("Answer")
SvidToken = Callable[[str], Awaitable[str]]  # audience -> JWT-SVID of ours


class OAuthClient:
    """One for all providers. Mutated by its own methods, on the loop."""

    def __init__(self, session: aiohttp.ClientSession, svid_token: SvidToken | None) -> None:
        """*svid_token* is None where there is no workload identity."""
        self._session = session
        self._svid_token = svid_token
        self._flights: dict[bytes, asyncio.Future[Any]] = {}
        self._failed: dict[bytes, tuple[str, float]] = {}  # why, and until when (monotonic) it is not tried again
        self._issued: dict[bytes, Issued] = {}
        self._endpoints: dict[str, tuple[Provider, Discovered, float]] = {}  # by issuer; the last: monotonic seconds
        self._generation = 0
        self.asked: Counter[tuple[str, str, str]] = Counter()  # (provider, introspection | exchange, ok | failed)

    def flush(self) -> None:
        """Forget every token: keys or rules have changed. What is under way is not kept either."""
        self._generation += 1
        self._issued.clear()
        self._failed.clear()

    # introspection

    async def introspect(self, unknown: UnknownToken) -> Refusal | None:
        """Learn whose a token is; return the refusal to give when its provider does not say."""
        provider, token = unknown.provider, unknown.token
        try:
            claims = await self._once(b"introspect", token, lambda: self._introspect(provider, token))
        except OAuthError as error:
            detail = f"introspection by {provider.name}: {error}"
            log.warning("provider not asked", extra={"provider": provider.name, "error": str(error)})
            return Refusal(
                Reason.NOT_READY, "the identity provider cannot be asked", detail=detail, retry_after_s=RETRY_AFTER_S
            )
        learn(unknown, claims, time.time())
        return None

    async def _introspect(self, provider: Provider, token: str) -> Mapping[str, Any]:
        with self._counted(provider, "introspection"):
            url = provider.introspection_endpoint or (await self._discovered(provider)).introspection_endpoint
            return oauth.read_claims(
                *await self._post(provider, url, "introspection_endpoint", oauth.introspection(token))
            )

    # exchange

    def at_hand(self, token: str) -> str | None:
        """Return what *token* was exchanged for, while it is good."""
        issued = self._issued.get(_fingerprint(b"exchange", token))
        return None if issued is None or issued.until_s <= time.time() else issued.token

    async def exchange(self, token: str, identity: Identity) -> str:
        """Return a token for the server behind us, as the profile's `exchange` says; raises Refusal(PROVIDER)."""
        assert identity.exchange is not None  # noqa: S101 - the profile's types see to it
        name = identity.exchange.provider
        provider = next(each for each in identity.providers if each.name == name)
        found = self.at_hand(token)
        if found is not None:
            return found
        try:
            issued: Issued = await self._once(
                b"exchange %d" % self._generation, token, lambda: self._exchange(token, provider, identity)
            )
        except OAuthError as error:
            log.warning("token not exchanged", extra={"provider": name, "error": str(error)})
            detail = f"exchange at {name}: {error}"
            raise Refusal(
                Reason.PROVIDER, "the identity provider gave no token for the server", detail=detail
            ) from error
        return issued.token

    async def _exchange(self, token: str, provider: Provider, identity: Identity) -> Issued:
        wanted, generation = identity.exchange, self._generation
        assert wanted is not None  # noqa: S101 - as above
        with self._counted(provider, "exchange"):
            url = provider.token_endpoint or (await self._discovered(provider)).token_endpoint
            actor = await self._svid(provider.issuer) if wanted.actor else None
            form = oauth.exchange(wanted, token, actor)
            issued = oauth.read_token(*await self._post(provider, url, "token_endpoint", form), time.time())
        if generation == self._generation:
            while len(self._issued) >= MAX_KEPT:
                del self._issued[next(iter(self._issued))]
            self._issued[_fingerprint(b"exchange", token)] = issued
        return issued

    # asking

    async def _once(self, what: bytes, token: str, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """Return the answer of one question at a time for *token*: those who come later share it. Raises OAuthError."""
        key = _fingerprint(what, token)
        flight = self._flights.get(key)
        if flight is not None:
            answer: Answer = await asyncio.shield(flight)
            return answer
        why, until_s = self._failed.get(key, ("", 0.0))
        if time.monotonic() < until_s:
            raise OAuthError(why)
        if len(self._flights) >= MAX_FLIGHTS:
            raise OAuthError("too many questions are under way")
        flight = self._flights[key] = asyncio.get_running_loop().create_future()
        try:
            answer = await ask()
        except BaseException as error:
            told = error if isinstance(error, OAuthError) else OAuthError(type(error).__name__)
            flight.set_exception(told)
            flight.exception()  # nobody may be waiting
            self._fail(key, str(told))
            raise
        finally:
            del self._flights[key]
        flight.set_result(answer)
        return answer

    def _fail(self, key: bytes, why: str) -> None:
        while len(self._failed) >= MAX_KEPT:
            del self._failed[next(iter(self._failed))]
        self._failed[key] = (why, time.monotonic() + FAILED_S)

    def _counted(self, provider: Provider, what: str) -> "_Counted":
        return _Counted(self.asked, provider.name, what)

    async def _discovered(self, provider: Provider) -> Discovered:
        known = self._endpoints.get(provider.issuer)
        if known is not None and known[0] == provider and time.monotonic() - known[2] < DISCOVERY_S:
            return known[1]
        try:
            found = await discover(self._session, provider)
        except ProviderError as error:
            if known is not None and known[0] == provider:
                return known[1]  # endpoints seldom move
            raise OAuthError(str(error)) from error
        self._endpoints[provider.issuer] = (provider, found, time.monotonic())
        return found

    async def _post(self, provider: Provider, url: str | None, what: str, form: dict[str, str]) -> tuple[int, bytes]:
        try:
            endpoint = protected(url, what)
            proof, headers = await self._proof(provider)
            return await request(
                self._session, endpoint, ca_pem=provider.ca_pem, form={**form, **proof}, headers=headers
            )
        except (ProviderError, WebError) as error:
            raise OAuthError(str(error)) from error

    async def _proof(self, provider: Provider) -> tuple[dict[str, str], dict[str, str]]:
        """Return the form fields and the headers that say who we are."""
        client = provider.client
        if client is None:
            raise OAuthError("the provider has no client")
        if client.method == "jwt_svid":
            return oauth.with_assertion(client, await self._svid(client.audience or provider.issuer)), {}
        held = _read(client)
        if client.method == "private_key_jwt":
            claims = oauth.assertion_claims(client, provider, time.time(), secrets.token_urlsafe(16))
            return oauth.with_assertion(client, _signed(held, claims, client)), {}
        return oauth.with_secret(client, held.decode(errors="replace").strip())

    async def _svid(self, audience: str) -> str:
        if self._svid_token is None:
            raise OAuthError("there is no workload identity here")
        try:
            return await self._svid_token(audience)
        except WorkloadApiError as error:
            raise OAuthError(f"no JWT-SVID: {error}") from error


class _Counted:
    """Counts how a question ended."""

    def __init__(self, asked: Counter[tuple[str, str, str]], provider: str, what: str) -> None:
        self._asked, self._provider, self._what = asked, provider, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._asked[self._provider, self._what, "ok" if kind is None else "failed"] += 1


def _fingerprint(what: bytes, token: str) -> bytes:
    return hashlib.sha256(what + b" " + token.encode("latin-1")).digest()


def _read(client: Client) -> bytes:
    """Return the secret or the key; read afresh each time, because whoever mounted the file may renew it."""
    if client.file is None:
        raise OAuthError(f"client method {client.method} needs the field file")
    try:
        return Path(client.file).read_bytes()
    except OSError as error:
        raise OAuthError(f"{client.file}: {error.strerror}") from error


def _signed(pem: bytes, claims: Mapping[str, Any], client: Client) -> str:
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise OAuthError(f"{client.file}: no private key in PEM") from error
    match key:
        case rsa.RSAPrivateKey():
            algorithm = "RS256"
        case ec.EllipticCurvePrivateKey(curve=curve) if curve.name in _ALGORITHMS:
            algorithm = _ALGORITHMS[curve.name]
        case ed25519.Ed25519PrivateKey():
            algorithm = "EdDSA"
        case _:
            raise OAuthError(f"{client.file}: a key of a kind that signs no assertions")
    headers = {"kid": client.key_id} if client.key_id else None
    return jwt.encode(dict(claims), key, algorithm=algorithm, headers=headers)

"""Fetches and keeps the signing keys of the OpenID providers that a bundle names.

Refuses discovery documents of another issuer, keys without id or of an algorithm that the profile does not allow, and
plain HTTP unless the operator wrote it. The last good keys stay when a provider is away. OpenID Connect Discovery 1.0,
section 4; RFC 7517.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import aiohttp
import jwt
import msgspec

from certs.errors import CertsError
from certs.tls import web_client_context
from sidecar.core.identity import Keys, UnknownKey
from sidecar.core.profile import Provider

log = logging.getLogger(__name__)

REFRESH_S: Final = 300.0  # providers publish a new key long before they sign with it
RETRY_S: Final = (1.0, 60.0)  # first and longest wait after a failure
COOLDOWN_S: Final = 10.0  # between looks for an unknown key: anyone can send one
FETCH_S: Final = 5.0
MAX_DOCUMENT_BYTES: Final = 256 * 1024  # Entra ID's key set has 20 KB
MAX_KEYS: Final = 64
DISCOVERY: Final = "/.well-known/openid-configuration"


class ProviderError(Exception):
    """A provider's keys could not be had; the message says why."""


class _Discovery(msgspec.Struct):
    issuer: str
    jwks_uri: str


class _KeySet(msgspec.Struct):
    keys: list[dict[str, Any]]


class _Source:
    """One provider and what is known of it. Mutated by Providers only."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.keys: dict[str, jwt.PyJWK] = {}
        self.error = "not asked yet"
        self.failures = 0
        self.due_s = 0.0  # monotonic
        self.asked_s = float("-inf")
        self.asking = asyncio.Lock()


class Providers:
    """The keys of all providers in force. `run` in the root TaskGroup."""

    def __init__(self, session: aiohttp.ClientSession, changed: Callable[[], None]) -> None:
        """*changed* is called after `keys` has changed."""
        self._session = session
        self._changed = changed
        self._sources: dict[str, _Source] = {}
        self._wake = asyncio.Event()

    @property
    def keys(self) -> Keys:
        """Return the keys by issuer and key id."""
        return {issuer: dict(source.keys) for issuer, source in self._sources.items()}

    @property
    def missing(self) -> dict[str, str]:
        """Return, by provider name, why there are no keys yet."""
        return {source.provider.name: source.error for source in self._sources.values() if not source.keys}

    def use(self, providers: Sequence[Provider]) -> None:
        """Keep the keys of *providers* and no others; what is known of an unchanged one stays."""
        known = self._sources
        self._sources = {
            each.issuer: known[each.issuer]
            if each.issuer in known and known[each.issuer].provider == each
            else _Source(each)
            for each in providers
        }
        self._changed()
        self._wake.set()

    async def run(self) -> None:
        """Refresh each provider's keys when they are due, until cancelled."""
        while True:
            self._wake.clear()
            now_s = time.monotonic()
            due = [source for source in self._sources.values() if source.due_s <= now_s]
            await asyncio.gather(*(self._refresh(source) for source in due))
            next_s = min((source.due_s for source in self._sources.values()), default=now_s + REFRESH_S)
            try:
                async with asyncio.timeout(max(0.0, next_s - time.monotonic())):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def find(self, missing: UnknownKey) -> None:
        """Look for a key that a token names, unless that was done a moment ago."""
        source = self._sources.get(missing.provider.issuer)
        if source is None:
            return
        if source.asking.locked():
            async with source.asking:  # someone is looking already: their answer serves all
                return
        if time.monotonic() - source.asked_s >= COOLDOWN_S or not source.keys:
            await self._refresh(source)

    async def _refresh(self, source: _Source) -> None:
        async with source.asking:
            source.asked_s = time.monotonic()
            try:
                keys = await self._fetch(source.provider)
            except ProviderError as error:
                source.error = str(error)
                source.failures += 1
                wait_s = min(RETRY_S[1], RETRY_S[0] * 2 ** min(source.failures - 1, 10))
                source.due_s = time.monotonic() + random.uniform(wait_s / 2, wait_s)  # noqa: S311 - not a secret
                log.warning("provider's keys not fetched", extra={"provider": source.provider.name, "error": str(error)})
                return
            source.failures, source.error = 0, ""
            source.due_s = time.monotonic() + random.uniform(REFRESH_S * 0.8, REFRESH_S)  # noqa: S311 - not a secret
            if keys.keys() == source.keys.keys():
                return
            source.keys = keys
        log.info("provider's keys changed", extra={"provider": source.provider.name, "keys": sorted(source.keys)})
        self._changed()

    async def _fetch(self, provider: Provider) -> dict[str, jwt.PyJWK]:
        uri = provider.jwks_uri
        if uri is None:
            discovered = await self._get(provider, provider.issuer.rstrip("/") + DISCOVERY, _Discovery)
            if discovered.issuer != provider.issuer:
                raise ProviderError(f"discovery names the issuer {discovered.issuer!r}, not {provider.issuer!r}")
            uri = discovered.jwks_uri
            if not uri.startswith("https://") and provider.issuer.startswith("https://"):
                raise ProviderError(f"discovery leads from HTTPS to {uri!r}")
        found = await self._get(provider, uri, _KeySet)
        keys = [key for each in found.keys[:MAX_KEYS] if (key := _usable(each, provider)) is not None]
        if not keys:
            raise ProviderError(f"{uri} holds no key that may be used")
        return {str(key.key_id): key for key in keys}

    async def _get(self, provider: Provider, url: str, kind: type[Any]) -> Any:
        try:
            anchors = None if provider.ca_pem is None else provider.ca_pem.encode()
            context = web_client_context(anchors_pem=anchors)
            async with (
                asyncio.timeout(FETCH_S),
                self._session.get(url, ssl=context, allow_redirects=False) as response,
            ):
                if response.status != 200:
                    raise ProviderError(f"{url}: HTTP {response.status}")
                document = await response.content.read(MAX_DOCUMENT_BYTES + 1)
                while len(document) <= MAX_DOCUMENT_BYTES and not response.content.at_eof():
                    document += await response.content.read(MAX_DOCUMENT_BYTES + 1 - len(document))
        except (aiohttp.ClientError, OSError, TimeoutError, CertsError, ValueError) as error:
            raise ProviderError(f"{url}: {error or type(error).__name__}") from error
        if len(document) > MAX_DOCUMENT_BYTES:
            raise ProviderError(f"{url}: more than {MAX_DOCUMENT_BYTES} bytes")
        try:
            return msgspec.json.decode(document, type=kind)
        except msgspec.DecodeError as error:
            raise ProviderError(f"{url}: {error}") from error


def _usable(described: dict[str, Any], provider: Provider) -> jwt.PyJWK | None:
    """Return the key, or None for one that cannot have signed an access token."""
    if not described.get("kid") or described.get("use", "sig") != "sig":
        return None
    try:
        key = jwt.PyJWK(described)
    except jwt.PyJWTError:  # of a kind that the library does not know
        return None
    return key if key.algorithm_name in provider.algorithms else None

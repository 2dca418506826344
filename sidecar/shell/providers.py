"""Fetches and keeps the signing keys of the OpenID providers that a bundle names.

Refuses discovery documents of another issuer, keys without id or of an algorithm that the profile does not allow, and
plain HTTP unless it stays on this host or the operator wrote the very `jwks_uri`: whoever can change the keys on their
way can be anybody. The last good keys stay when a provider is away. OpenID Connect Discovery 1.0, section 4; RFC 7517.
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

from sidecar.core.identity import Keys, Unresolved
from sidecar.core.jwk import verifying_key
from sidecar.core.profile import Provider
from sidecar.shell.discovery import ProviderError, discover, fetch, protected

log = logging.getLogger(__name__)

REFRESH_S: Final = 300.0  # providers publish a new key long before they sign with it
RETRY_S: Final = (1.0, 60.0)  # first and longest wait after a failure
KEEP_S: Final = 24 * 3600.0  # a provider away for longer no longer vouches: a key may have been withdrawn meanwhile
# Between looks for an unknown key: anyone can send one; a token of a new key fails for so long at most.
COOLDOWN_S: Final = 2.0
MAX_KEYS: Final = 64


class _KeySet(msgspec.Struct):
    keys: list[dict[str, Any]]


class _Source:
    """One provider and what is known of it; times are monotonic seconds. Mutated by Providers only."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.described: list[dict[str, Any]] = []  # what `keys` was made of
        self.keys: dict[str, jwt.PyJWK] = {}
        self.error = "not asked yet"
        self.failures = 0
        self.due_s = 0.0
        self.asked_s = float("-inf")
        self.answered_s = float("-inf")
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

    @property
    def keys_held(self) -> int:
        """Return how many keys are held, of all providers together."""
        return sum(len(source.keys) for source in self._sources.values())

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
            async with asyncio.TaskGroup() as tasks:
                for source in due:
                    tasks.create_task(self._refresh(source))
            next_s = min((source.due_s for source in self._sources.values()), default=now_s + REFRESH_S)
            try:
                async with asyncio.timeout(max(0.0, next_s - time.monotonic())):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def find(self, missing: Unresolved) -> None:
        """Look for a key that a token names, unless that was done a moment ago."""
        source = self._sources.get(missing.provider.issuer)
        if source is None:
            return
        if source.asking.locked():
            async with source.asking:  # someone is looking already: their answer serves all
                return
        if time.monotonic() - source.asked_s >= COOLDOWN_S:
            await self._refresh(source)

    async def _refresh(self, source: _Source) -> None:
        async with source.asking:
            source.asked_s = time.monotonic()
            try:
                described = await self._fetch(source.provider)
                keys = usable(described, source.provider)
            except ProviderError as error:
                described, keys = self._failed(source, error)
            else:
                source.failures, source.error, source.answered_s = 0, "", time.monotonic()
                source.due_s = time.monotonic() + random.uniform(REFRESH_S * 0.8, REFRESH_S)  # noqa: S311 - not a secret
            if described == source.described:  # not the ids alone: a key may be replaced under its id
                return
            source.described, source.keys = described, keys
        log.info("provider's keys changed", extra={"provider": source.provider.name, "keys": sorted(source.keys)})
        self._changed()

    def _failed(self, source: _Source, error: ProviderError) -> tuple[list[dict[str, Any]], dict[str, jwt.PyJWK]]:
        """Note the failure; return what to go on with: the last good keys, as long as they are not too old."""
        source.error = str(error)
        source.failures += 1
        wait_s = min(RETRY_S[1], RETRY_S[0] * 2 ** min(source.failures - 1, 10))
        source.due_s = time.monotonic() + random.uniform(wait_s / 2, wait_s)  # noqa: S311 - not a secret
        log.warning("provider's keys not fetched", extra={"provider": source.provider.name, "error": str(error)})
        if time.monotonic() - source.answered_s > KEEP_S:
            return [], {}
        return source.described, source.keys

    async def _fetch(self, provider: Provider) -> list[dict[str, Any]]:
        uri = provider.jwks_uri
        if uri is None:
            discovered = await discover(self._session, provider)
            uri = protected(discovered.jwks_uri, "jwks_uri")
        found = await fetch(self._session, provider, uri, _KeySet)
        return found.keys[:MAX_KEYS]


def usable(described: Sequence[dict[str, Any]], provider: Provider) -> dict[str, jwt.PyJWK]:
    """Return those of a key set's keys that may have signed an access token, by id; raises ProviderError if none may."""
    keys: dict[str, jwt.PyJWK] = {}
    for each in described:
        kid = each.get("kid")
        key = verifying_key(each, provider.algorithms)
        if isinstance(kid, str) and kid and key is not None:
            keys.setdefault(kid, key)
    if not keys:
        raise ProviderError(f"no key with an id, for signatures, and with one of {', '.join(provider.algorithms)}")
    return keys

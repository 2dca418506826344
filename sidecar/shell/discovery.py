"""Finds out where a provider's keys and endpoints are, from its own discovery document.

Refuses documents of another issuer and endpoints that others could read or change. OpenID Connect Discovery 1.0, section 4;
RFC 8414, section 3, for providers that speak OAuth alone.
"""

from typing import Final, TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec

from sidecar.core.profile import Provider
from sidecar.shell.web import WebError, request, require_protected

OPENID: Final = "/.well-known/openid-configuration"
OAUTH: Final = "/.well-known/oauth-authorization-server"


class ProviderError(Exception):
    """A provider did not say what it was asked; the message says why."""


class Discovered(msgspec.Struct, frozen=True):
    """What is used of a discovery document."""

    issuer: str
    jwks_uri: str | None = None
    token_endpoint: str | None = None
    introspection_endpoint: str | None = None


Document = TypeVar("Document", bound=msgspec.Struct)


async def discover(session: aiohttp.ClientSession, provider: Provider) -> Discovered:
    """Return what *provider* says of itself; raises ProviderError."""
    url = provider.issuer.rstrip("/") + OPENID
    status, document = await _ask(session, provider, url)
    if status == 404:
        parts = urlsplit(provider.issuer)
        url = f"{parts.scheme}://{parts.netloc}{OAUTH}{parts.path.rstrip('/')}"
        status, document = await _ask(session, provider, url)
    if status != 200:
        raise ProviderError(f"{url}: HTTP {status}")
    found = _decode(url, document, Discovered)
    if found.issuer != provider.issuer:
        raise ProviderError(f"discovery names the issuer {found.issuer!r}, not {provider.issuer!r}")
    return found


async def fetch(session: aiohttp.ClientSession, provider: Provider, url: str, kind: type[Document]) -> Document:
    """Return the document at *url*; raises ProviderError. Whether the URL is protected is the caller's to know."""
    try:
        status, document = await request(session, url, ca_pem=provider.ca_pem)
    except WebError as error:
        raise ProviderError(str(error)) from error
    if status != 200:
        raise ProviderError(f"{url}: HTTP {status}")
    return _decode(url, document, kind)


def protected(url: str | None, what: str) -> str:
    """Return *url*; raises ProviderError when there is none, or when others could change what comes from it."""
    if url is None:
        raise ProviderError(f"discovery names no {what}")
    try:
        require_protected(url)
    except WebError as error:
        raise ProviderError(str(error)) from error
    return url


async def _ask(session: aiohttp.ClientSession, provider: Provider, url: str) -> tuple[int, bytes]:
    protected(url, "URL")
    try:
        return await request(session, url, ca_pem=provider.ca_pem)
    except WebError as error:
        raise ProviderError(str(error)) from error


def _decode(url: str, document: bytes, kind: type[Document]) -> Document:
    try:
        return msgspec.json.decode(document, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProviderError(f"{url}: {error}") from error

"""Makes the sidecar's requests to identity providers: protected, bounded, without redirects.

Refuses plain HTTP beyond this host, answers without end and encoded ones. Whoever can change the answer on its way can be
anybody, so the caller says which certificates it trusts.
"""

import asyncio
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

import aiohttp

from certs.errors import CertsError
from certs.tls import web_client_context

REQUEST_S: Final = 5.0
MAX_DOCUMENT_BYTES: Final = 256 * 1024  # Entra ID's key set has 20 KB


class WebError(Exception):
    """There is no answer, or none that may be read; the message says why."""


async def request(
    session: aiohttp.ClientSession,
    url: str,
    *,
    ca_pem: str | None = None,
    form: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, bytes]:
    """Return status and body of a GET, or of a POST of *form*; raises WebError. *ca_pem* None: the system's roots."""
    # An encoded answer could grow without bound when it is decoded, and the session decodes none.
    told = {"accept": "application/json", "accept-encoding": "identity", **(headers or {})}
    method = "GET" if form is None else "POST"
    try:
        context = web_client_context(anchors_pem=None if ca_pem is None else ca_pem.encode())
        async with (
            asyncio.timeout(REQUEST_S),
            session.request(method, url, ssl=context, headers=told, data=form, allow_redirects=False) as response,
        ):
            document = await response.content.read(MAX_DOCUMENT_BYTES + 1)
            while len(document) <= MAX_DOCUMENT_BYTES and not response.content.at_eof():
                document += await response.content.read(MAX_DOCUMENT_BYTES + 1 - len(document))
    except (aiohttp.ClientError, OSError, TimeoutError, CertsError, ValueError) as error:
        raise WebError(f"{url}: {str(error) or type(error).__name__}") from error
    if len(document) > MAX_DOCUMENT_BYTES:
        raise WebError(f"{url}: more than {MAX_DOCUMENT_BYTES} bytes")
    return response.status, document


def require_protected(url: str) -> None:
    """Raise WebError for a URL whose answer others could change, or whose request they could read, on its way."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        if parts.scheme == "https" and host:
            return
        if parts.scheme == "http" and (host == "localhost" or ip_address(host).is_loopback):
            return
    except ValueError:  # no URL, or no address
        pass
    raise WebError(f"{url}: must be https, or http on a loopback address")

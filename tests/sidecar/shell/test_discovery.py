"""sidecar.shell.discovery: endpoints come from the provider's own document. More is tried in test_providers.py."""

import aiohttp
import pytest

from sidecar.core.profile import Provider
from sidecar.shell.discovery import OAUTH, OPENID, ProviderError, discover, protected
from tests.sidecar.shell.test_providers import FakeIssuer, _serving


async def test_endpoints_are_discovered() -> None:
    """Beside the keys."""
    issuer = FakeIssuer()
    async with _serving(issuer), aiohttp.ClientSession(auto_decompress=False) as session:
        found = await discover(session, Provider(name="p", issuer=issuer.url, audiences=("a",)))

        assert (found.jwks_uri, found.token_endpoint) == (f"{issuer.url}/jwks", "unused")


async def test_an_issuer_with_a_path_is_looked_for_at_both_places() -> None:
    """OpenID appends the well-known part, RFC 8414 inserts it."""
    issuer = FakeIssuer()
    async with _serving(issuer), aiohttp.ClientSession(auto_decompress=False) as session:
        issuer.missing = {f"/realms/a{OPENID}", f"{OAUTH}/realms/a"}
        with pytest.raises(ProviderError, match="HTTP 404"):
            await discover(session, Provider(name="p", issuer=f"{issuer.url}/realms/a", audiences=("a",)))

    assert issuer.asked == [f"/realms/a{OPENID}", f"{OAUTH}/realms/a"]


@pytest.mark.parametrize(("url", "why"), [(None, "names no token_endpoint"), ("http://id.test/token", "must be https")])
def test_an_endpoint_must_be_there_and_protected(url: str | None, why: str) -> None:
    """Our proof goes there."""
    with pytest.raises(ProviderError, match=why):
        protected(url, "token_endpoint")

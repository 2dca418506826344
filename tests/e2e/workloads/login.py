"""Log in at the OpenID provider of provider.mjs as a browser would, and return the access token.

Authorization code flow with PKCE (RFC 7636) and a resource indicator (RFC 8707). Standard library only: it also runs inside the cluster.
"""

import base64
import hashlib
import http.cookiejar
import json
import re
import secrets
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request

REDIRECT = "https://agent.corp.example/callback"


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follow redirects until they leave for the client's own URL."""

    def redirect_request(self, request, file, code, message, headers, url):  # noqa: ANN001, ANN202 - the base class's
        """Return the next request; None ends at the redirect itself."""
        if url.startswith(REDIRECT):
            return None
        return super().redirect_request(request, file, code, message, headers, url)


def a_browser(ca_file: str) -> urllib.request.OpenerDirector:
    """Return a browser without any cookie yet."""
    cookies = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
    tls = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=ca_file or None))
    return urllib.request.build_opener(cookies, tls, _Stay())


def agree(browser: urllib.request.OpenerDirector, url: str, user: str) -> str:
    """Log in as *user* where the client sent the browser, consent, and return the URL that leads back to the client."""
    page = browser.open(url)
    for answers in ({"prompt": "login", "login": user, "password": "any"}, {"prompt": "consent"}):
        action = re.search(r'action="([^"]+)"', page.read().decode())
        assert action is not None
        target = urllib.parse.urljoin(page.url, action.group(1))
        try:
            page = browser.open(target, urllib.parse.urlencode(answers).encode())
        except urllib.error.HTTPError as error:
            return str(error.headers["location"])
    raise AssertionError(f"no way back to the client from {page.url}")


def login(issuer: str, audience: str, user: str, ca_file: str) -> str:
    """Return an access token of *user* for *audience*."""
    verifier = secrets.token_urlsafe(32)
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
    browser = a_browser(ca_file)
    query = {
        "client_id": "agent", "response_type": "code", "redirect_uri": REDIRECT, "scope": "openid mcp", "resource": audience,
        "code_challenge": challenge, "code_challenge_method": "S256", "state": "s",
    }  # fmt: skip
    callback = agree(browser, f"{issuer}/auth?{urllib.parse.urlencode(query)}", user)
    code = urllib.parse.parse_qs(urllib.parse.urlsplit(callback).query)["code"][0]
    form = {
        "grant_type": "authorization_code", "code": code, "redirect_uri": REDIRECT, "client_id": "agent",
        "code_verifier": verifier, "resource": audience,
    }  # fmt: skip
    with browser.open(f"{issuer}/token", urllib.parse.urlencode(form).encode()) as answer:
        return str(json.load(answer)["access_token"])


if __name__ == "__main__":
    print(login(*sys.argv[1:]))

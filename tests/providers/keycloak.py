"""A real Keycloak on loopback: people with roles, an agent that logs them in, the MCP server's workload as a client.

The workload proves itself by a JWT-SVID; Keycloak reads the trust domain's keys at the bundle endpoint that it is told.
"""

import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.parts import ENVIRONMENT, part

START_S = 240.0  # 15 s on an idle machine
REALM = "corp"
RESOURCE = "https://mcp.corp.example/mcp"
API = "orders-api"
PEOPLE: Mapping[str, tuple[str, ...]] = {"alice": ("analyst",), "bob": ("engineer", "analyst"), "carol": ()}
PASSWORD = "only for tests"


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Keycloak:
    """One server; *url* is its origin."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.issuer = f"{url}/realms/{REALM}"

    def post(self, url: str, form: Mapping[str, str]) -> dict[str, Any]:
        """What a form is answered with; raises HTTPError."""
        request = urllib.request.Request(url, urllib.parse.urlencode(form).encode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def admin(self, method: str, path: str, body: Any = None) -> Any:
        """Ask the admin API."""
        form = {"grant_type": "password", "client_id": "admin-cli", "username": "admin", "password": "admin"}
        token = self.post(f"{self.url}/realms/master/protocol/openid-connect/token", form)["access_token"]
        headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/admin{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
            return json.loads(text) if text else None

    def login(self, user: str, *, client: str = "agent", scope: str = "openid") -> str:
        """An access token of *user*."""
        return str(self.tokens(user, client=client, scope=scope)["access_token"])

    def tokens(self, user: str, *, client: str = "agent", scope: str = "openid") -> dict[str, Any]:
        """All that a login gives: access, refresh and ID token."""
        form = {"grant_type": "password", "client_id": client, "username": user, "password": PASSWORD, "scope": scope}
        return self.post(f"{self.issuer}/protocol/openid-connect/token", form)

    def rotate_keys(self) -> None:
        """Sign with a new key from now on; the old one stays published."""
        provider = {
            "name": f"rsa-{time.monotonic_ns()}",
            "providerId": "rsa-generated",
            "providerType": "org.keycloak.keys.KeyProvider",
            "config": {"priority": [str(time.monotonic_ns() // 10**6)], "algorithm": ["RS256"], "keySize": ["2048"]},
        }
        self.admin("POST", f"/realms/{REALM}/components", provider)


def realm(workload: str, bundle_url: str) -> dict[str, Any]:
    """The realm to import: *workload* is the SPIFFE ID of the MCP server, *bundle_url* serves its trust domain's keys."""
    domain = "/".join(workload.split("/")[:3])
    people = [
        {
            "username": name,
            "enabled": True,
            "firstName": name,
            "lastName": "Example",
            "email": f"{name}@corp.example",
            "emailVerified": True,
            "credentials": [{"type": "password", "value": PASSWORD}],
            "realmRoles": list(roles),
            "groups": ["/data"],
        }
        for name, roles in PEOPLE.items()
    ]
    return {
        "realm": REALM,
        "enabled": True,
        "sslRequired": "none",
        "accessTokenLifespan": 300,
        "roles": {"realm": [{"name": "analyst"}, {"name": "engineer"}]},
        "groups": [{"name": "data"}],
        "users": people,
        "identityProviders": [
            {
                "alias": "spire",
                "providerId": "spiffe",
                "enabled": True,
                "config": {"issuer": domain, "bundleEndpoint": bundle_url},
            }
        ],
        "clients": [
            _a_client(
                "agent",
                publicClient=True,
                directAccessGrantsEnabled=True,
                protocolMappers=_names(RESOURCE, "mcp-server"),
            ),
            _a_client("other", publicClient=True, directAccessGrantsEnabled=True),
            _a_client(
                "mcp-server",
                clientAuthenticatorType="federated-jwt",
                attributes={
                    "standard.token.exchange.enabled": "true",
                    "jwt.credential.issuer": "spire",
                    "jwt.credential.sub": workload,
                },
                protocolMappers=_names(None, API),
            ),
            _a_client(API, bearerOnly=True),
        ],
    }


def _a_client(name: str, **changes: Any) -> dict[str, Any]:
    return {"clientId": name, "enabled": True, "protocol": "openid-connect", **changes}


def _names(custom: str | None, client: str) -> list[dict[str, Any]]:
    """Mappers that put audiences and groups into access tokens."""
    audiences = [
        {"included.client.audience": client},
        *([] if custom is None else [{"included.custom.audience": custom}]),
    ]
    mappers = [("oidc-audience-mapper", each) for each in audiences]
    mappers.append(("oidc-group-membership-mapper", {"claim.name": "groups", "full.path": "true"}))
    return [
        {
            "name": f"mapper {number}",
            "protocol": "openid-connect",
            "protocolMapper": kind,
            "config": {**config, "access.token.claim": "true", "id.token.claim": "false"},
        }
        for number, (kind, config) in enumerate(mappers)
    ]


@contextmanager
def a_keycloak(log: Path) -> Iterator[Keycloak]:
    """Run Keycloak, without any realm of ours yet; its output goes to *log*."""
    port, management = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    options = (
        "--optimized", "--cache=local", "--http-enabled=true", "--http-host=127.0.0.1", f"--http-port={port}",
        f"--hostname={url}", "--http-management-host=127.0.0.1", f"--http-management-port={management}",
    )  # fmt: skip
    environment = {
        **ENVIRONMENT,
        "JAVA_HOME": str(part("java")),
        "JAVA_OPTS_KC_HEAP": "-Xms128m -Xmx512m",
        "KC_BOOTSTRAP_ADMIN_USERNAME": "admin",
        "KC_BOOTSTRAP_ADMIN_PASSWORD": "admin",
    }
    with log.open("w") as output:
        server = subprocess.Popen(
            ["sh", str(part("keycloak") / "bin" / "kc.sh"), "start", *options],
            env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            _await(url, server, log)
            yield Keycloak(url)
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _await(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        if server.poll() is not None:
            raise AssertionError(f"Keycloak ended: {log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{url}/realms/master", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError(f"Keycloak is not ready after {START_S} s: {log.read_text()[-2000:]}")

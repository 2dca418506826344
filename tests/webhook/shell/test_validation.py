"""webhook/shell/validation.py: what the API server is told of a resource, against the real compilers."""

import asyncio
import functools
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from tests.parts import part
from webhook.shell import opa, validation
from webhook.shell.controllers import Compile
from webhook.shell.metrics import Metrics
from webhook.shell.validation import Check, Validation

Client = TestClient[web.Request, web.Application]
REGO = "package mcp.authz\n\ndefault allow := false\n\n"


async def serve(compile_files: Compile, check: Check | None = None) -> Client:
    """Return a client of the endpoint."""
    application = web.Application()
    application.router.add_post("/validate", Validation(compile_files, Metrics(), check).validate)
    client = TestClient(TestServer(application))
    await client.start_server()
    return client


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    """The endpoint with the real compilers."""
    program = opa.Opa(part("opa"))
    made = await serve(functools.partial(opa.files, opa=program), functools.partial(opa.check, opa=program))
    yield made
    await made.close()


async def told(client: Client, spec: Any, kind: str = "mcppolicies", group: str = "sidegate.dev") -> Any:
    """Return the response to the writing of a resource with *spec*."""
    request = {
        "uid": "u",
        "operation": "CREATE",
        "namespace": "n",
        "resource": {"group": group, "version": "v1alpha1", "resource": kind},
        "object": {"metadata": {"name": "p", "namespace": "n"}, "spec": spec},
    }
    review = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}
    async with client.post("/validate", json=review) as response:
        return (await response.json())["response"]


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("mcppolicies", {"selector": {}, "cedar": "permit (principal, action, resource);"}),
        ("mcppolicies", {"selector": {}, "rego": REGO + "allow if input.user\n", "mode": "shadow"}),
        ("clustermcppolicies", {"selector": {}, "namespaces": ["a"], "cedar": "permit (principal, action, resource);"}),
        ("mcplimits", {"selector": {}, "ratePerSecond": 1, "burst": 1}),
        ("elsewhere", {"what": "ever"}),
    ],
)
async def test_what_can_be_used_is_let_through(client: Client, kind: str, spec: Any) -> None:
    """Policies that compile, other kinds that can be read, and what is not ours."""
    assert await told(client, spec, kind) == {"uid": "u", "allowed": True}


@pytest.mark.parametrize(
    ("kind", "spec", "said"),
    [
        ("mcppolicies", {"selector": {}, "cedar": "permit (principal, action, resource)"}, "p.cedar:1:37: unexpected end of input"),
        ("mcppolicies", {"selector": {}, "cedar": "permit (principal, action)"}, "p.cedar:1:"),
        ("mcppolicies", {"selector": {}, "cedar": "permit (principal == ?principal, action, resource);"}, "a template"),
        ("mcppolicies", {"selector": {}, "rego": REGO + "allow if foo(1)\n"}, "p.rego:5:10: undefined function foo"),
        ("mcppolicies", {"selector": {}, "rego": REGO + "allow if {\n"}, "p.rego:6:1: unexpected eof token"),
        ("mcppolicies", {"selector": {}, "rego": REGO + "allow if http.send({})\n"}, "p.rego:5:10: undefined function http.send"),
        ("mcppolicies", {"selector": {}, "rego": REGO + "allow if { x := 1 }\n"}, "assigned var x unused"),
        ("mcppolicies", {"selector": {}, "rego": "package other\nallow := true\n"}, "no rule allow in package mcp.authz"),
        ("mcppolicies", {"selector": {}}, "must be given"),
        ("mcppolicies", {"selector": {}, "cedar": "x", "mode": "maybe"}, "maybe"),
        ("clustermcppolicies", {"selector": {}, "namespaces": "a", "cedar": "x"}, "Expected `array`, got `str` - at `$.namespaces`"),
        ("mcplimits", {"selector": {}, "ratePerSecond": 0, "burst": 1}, "ratePerSecond"),
    ],
)  # fmt: skip
async def test_what_cannot_be_used_is_refused(client: Client, kind: str, spec: Any, said: str) -> None:
    """Naming the place or the field, as a validation error of the API server's own would."""
    response = await told(client, spec, kind)

    assert not response["allowed"]
    assert response["status"]["code"] == 422
    assert said in response["status"]["message"]


async def test_a_compiler_without_time_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not checked is compiled later; its author is warned."""

    async def wait(*_: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(validation, "DEADLINE_S", 0.0)
    client = await serve(wait)
    response = await told(client, {"selector": {}, "cedar": "x"})
    await client.close()

    assert response["allowed"]
    assert "not compiled in time" in response["warnings"][0]


async def test_what_is_no_review_is_an_http_error(client: Client) -> None:
    """The API server, not the author, has to know."""
    async with client.post("/validate", data=json.dumps({})) as response:
        assert response.status == 415
    async with client.post("/validate", json={}) as response:
        assert response.status == 400


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            {"cedar": "permit (principal, action, resource)\nwhen { principal.salary > 3 };"},
            "p.cedar:2:18: attribute `salary` on entity type",
        ),
        (
            {"cedar": 'permit (principal, action == Action::"tools/cal", resource);'},
            'p.cedar:1:20: unrecognized action `Action::"tools/cal"`; hint: one of tools/call,',
        ),
        (
            {"rego": REGO + 'allow if input.usr.role == "x"\n'},
            "p.rego:5:10: undefined ref: input.usr.role; hint: one of agent,",
        ),
    ],
)
async def test_a_policy_that_compiles_and_cannot_work_is_refused(client: Client, spec: Any, said: str) -> None:
    """By the contract's schema, as `sidegate policy check` would say."""
    response = await told(client, {"selector": {}, **spec})

    assert not response["allowed"]
    assert said in response["status"]["message"]


async def test_what_only_adds_nothing_is_a_warning(client: Client) -> None:
    """It does no harm; kubectl prints the warning in one line."""
    cedar = 'permit (principal, action, resource);\npermit (principal, action == Action::"tools/call", resource);'
    response = await told(client, {"selector": {}, "cedar": cedar})

    assert response["allowed"]
    (warning,) = response["warnings"]
    assert warning.startswith(
        "sidegate: p.cedar:2:1: warning: p.cedar#1 adds nothing: p.cedar#0 says the same and more"
    )
    assert len(warning) <= 256

"""Requirements on the trials of an installed webhook, against an API server on loopback that admits as it is told."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from tests.webhook.kube_server import connection_to
from webhook.config import Settings, template
from webhook.core.injection import Deny, Inject, NamespacePolicy, decide
from webhook.shell import trial
from webhook.shell.kube import Kube

SETTINGS = Settings.from_env({"SIDEGATE_CONTROL_PLANE_ID": "spiffe://example.org/ns/s/sa/s", "SIDEGATE_NAMESPACE": "s"})
TEMPLATE = template(SETTINGS, "1", "key")


class Api:
    """An API server in front of our own decision, or of a webhook that is away."""

    def __init__(self) -> None:
        self.queries: list[str] = []
        self.is_governed = True
        self.fails_with = 0

    async def create(self, request: web.Request) -> web.Response:
        """Admit a pod as the API server would."""
        self.queries.append(request.query_string)
        pod: dict[str, Any] = await request.json()
        if self.fails_with:
            return web.json_response({"message": "failed calling webhook"}, status=self.fails_with)
        if self.is_governed:
            decision = decide(
                pod, namespace="trial", policy=NamespacePolicy.OPTIONAL, profiles={}, template=TEMPLATE, nonce="n"
            )
            if isinstance(decision, Deny):
                return web.json_response({"message": decision.message}, status=403)
            if isinstance(decision, Inject):
                pod = decision.pod
        return web.json_response(pod, status=201)


@pytest.fixture
def api() -> Api:
    """What the server of `kube` does."""
    return Api()


@pytest.fixture
async def kube(api: Api) -> AsyncIterator[Kube]:
    """A connection to it."""
    application = web.Application()
    application.router.add_post("/api/v1/namespaces/trial/pods", api.create)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    connection = connection_to(runner.addresses[0][1])
    yield connection
    await connection.aclose()
    await runner.cleanup()


async def test_a_working_webhook_passes_every_trial(api: Api, kube: Kube, capsys: pytest.CaptureFixture[str]) -> None:
    """A server is injected, another pod is not, and what cannot be enforced is refused; nothing is made."""
    assert await trial.run(kube, "trial")

    said = capsys.readouterr().out
    assert "ok   server: injected" in said
    assert "ok   other: untouched" in said
    assert "FAIL" not in said
    assert api.queries == ["dryRun=All"] * len(trial.TRIALS)


async def test_a_webhook_that_does_not_act_fails(api: Api, kube: Kube, capsys: pytest.CaptureFixture[str]) -> None:
    """Every trial that needs it says what was expected."""
    api.is_governed = False

    assert not await trial.run(kube, "trial")

    assert "FAIL server: untouched\n     expected: injected" in capsys.readouterr().out


async def test_a_webhook_that_is_away_fails(api: Api, kube: Kube, capsys: pytest.CaptureFixture[str]) -> None:
    """What the API server says is passed on."""
    api.fails_with = 500

    assert not await trial.run(kube, "trial")

    assert "FAIL server: no answer: 500 POST" in capsys.readouterr().out


def test_outside_a_cluster_it_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """There is nothing to try."""
    assert trial.main(["trial"]) == 1
    assert "FAIL no access to the Kubernetes API" in capsys.readouterr().out


def test_misuse_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """One name is needed."""
    assert trial.main([]) == 2
    assert capsys.readouterr().err.startswith("usage: ")

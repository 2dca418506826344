"""Requirements on the removal of what refuses pods before an uninstall, against an API server on loopback."""

from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from tests.webhook.kube_server import connection_to
from webhook.shell import removal
from webhook.shell.kube import Kube

CONFIGURATION = "mutatingwebhookconfigurations/sidegate"


class Api:
    """An API server that knows one configuration."""

    def __init__(self) -> None:
        self.names = {CONFIGURATION, "validatingadmissionpolicybindings/sidegate-pods"}
        self.forbidden = False

    async def delete(self, request: web.Request) -> web.Response:
        """Delete as the API server does."""
        name = f"{request.match_info['kind']}/{request.match_info['name']}"
        if self.forbidden:
            return web.json_response({"message": "sidegate-removal cannot delete"}, status=403)
        if name not in self.names:
            return web.json_response({"message": f"{name} not found"}, status=404)
        self.names.remove(name)
        return web.json_response({"kind": "Status", "status": "Success"})


@pytest.fixture
def api() -> Api:
    """What the server of `kube` knows."""
    return Api()


@pytest.fixture
async def kube(api: Api) -> AsyncIterator[Kube]:
    """A connection to it."""
    application = web.Application()
    application.router.add_delete(removal.PATH + "/{kind}/{name}", api.delete)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    connection = connection_to(runner.addresses[0][1])
    yield connection
    await connection.aclose()
    await runner.cleanup()


async def test_what_refuses_pods_is_deleted(api: Api, kube: Kube) -> None:
    """Pods of governed namespaces can start while the rest is uninstalled."""
    for each in sorted(api.names):
        assert await removal.remove(kube, each) == f"{each}: deleted"

    assert api.names == set()


async def test_a_second_time_finds_nothing_to_do(kube: Kube) -> None:
    """A hook may run again after an interrupted uninstall."""
    await removal.remove(kube, CONFIGURATION)

    assert await removal.remove(kube, CONFIGURATION) == f"{CONFIGURATION}: already gone"


async def test_a_refusal_is_told_with_what_to_do(api: Api, kube: Kube) -> None:
    """Whoever uninstalls learns what is left."""
    api.forbidden = True

    said = await removal.remove(kube, CONFIGURATION)

    assert "not deleted: 403" in said
    assert said.endswith("hint: kubectl delete mutatingwebhookconfigurations/sidegate")


def test_it_never_holds_up_the_uninstall(capsys: pytest.CaptureFixture[str]) -> None:
    """Outside a cluster it cannot work, says so, and ends well."""
    assert removal.main([CONFIGURATION]) == 0
    assert "not deleted: no access to the Kubernetes API" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["sidegate"], ["secrets/sidegate"]])
def test_misuse_is_told(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    """Kinds are named, and no other kind is deleted."""
    assert removal.main(arguments) == 2
    assert "kinds are validatingadmissionpolicybindings, mutatingwebhookconfigurations" in capsys.readouterr().err

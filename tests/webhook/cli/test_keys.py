"""`sidegate rotate-keys`, as typed, against an API server; and what the control plane then does."""

from datetime import UTC, datetime
from typing import Any

import pytest

from sidecar.core.keyring import key_id
from tests.webhook.cli.test_status import a_cluster, typed
from webhook.config import Settings
from webhook.core.signing import SigningKeys
from webhook.shell.rotate import SigningRotation

assert typed  # a fixture
SECRETS = "/api/v1/namespaces/sidegate-system/secrets"


@pytest.mark.parametrize(("options", "believed"), [((), 2), (("--stolen",), 1)])
async def test_new_key_is_asked_for_and_made(
    typed: Any, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], believed: int
) -> None:
    """The key of before counts for the overlap, unless it was stolen."""
    used: list[SigningKeys] = []
    async with a_cluster() as server, server.running() as kube:
        rotation = SigningRotation(kube, Settings(), used.append, lambda: datetime.now(UTC))
        await rotation.step()
        assert await typed(server, "rotate-keys", *options) == 0
        await rotation.step()
        await rotation.step()

    assert "Secret sidegate-system/sidegate-bundle-signing: a new key was asked for" in capsys.readouterr().out
    assert len({key_id(each.current.public_key()) for each in used}) == len(used) == 2
    assert len(used[1].believed) == believed


async def test_missing_secret_is_an_error_with_a_hint(typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The control plane may be installed elsewhere."""
    async with a_cluster() as server:
        server.objects[SECRETS] = {}
        assert await typed(server, "rotate-keys", "--secret", "other") == 1
    said = capsys.readouterr().err

    assert said.startswith("sidegate: error: ")
    assert "hint: --namespace and --secret say where" in said

"""By which kubeconfig the operator's verbs reach the API."""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import pytest

from tests.webhook.kube_server import KubeServer
from tests.webhook.kube_server import kubeconfig as text_of
from webhook.cli import kubeconfig
from webhook.errors import KubeError


def options(*arguments: str) -> argparse.Namespace:
    """Return what was typed."""
    parser = argparse.ArgumentParser()
    kubeconfig.add_to(parser)
    return parser.parse_args(arguments)


async def test_the_named_file_and_context_are_used(tmp_path: Path) -> None:
    """And the file is left as it was."""
    server = KubeServer()
    server.put("/api/v1/namespaces", {"metadata": {"name": "shop"}})
    path = tmp_path / "config"
    async with server.running():
        path.write_text(text_of(server.port))
        before = path.read_bytes()
        async with contextlib.aclosing(
            await kubeconfig.connect(options(f"--kubeconfig={path}", "--context=x"))
        ) as kube:
            assert await kube.get("/api/v1/namespaces/shop") is not None

    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "context", "said"),
    [
        (text_of(1), "other", "other"),
        ("{", "x", "the kubeconfig cannot be read"),
        ("[]", "x", ""),
        ("7", "x", ""),
        (json.dumps({"kind": "Config"}), "x", "Expected object with name x"),
    ],
)
async def test_a_kubeconfig_that_cannot_be_used_is_refused(tmp_path: Path, text: str, context: str, said: str) -> None:
    """With what to do."""
    path = tmp_path / "config"
    path.write_text(text)

    with pytest.raises(KubeError, match=f"no access to the Kubernetes API: .*{said}") as caught:
        await kubeconfig.connect(options(f"--kubeconfig={path}", f"--context={context}"))
    assert str(caught.value).endswith("hint: name a kubeconfig by --kubeconfig FILE or KUBECONFIG")


async def test_without_the_library_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sidecar's extra does not bring it."""
    monkeypatch.setitem(sys.modules, "webhook.shell.kube", None)

    with pytest.raises(KubeError, match=r"pip install 'sidegate\[webhook\]'"):
        await kubeconfig.connect(options())

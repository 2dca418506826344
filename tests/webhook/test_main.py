"""The control plane's entry point."""

import pytest

from webhook.__main__ import main


def test_bad_settings_end_it_with_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2, and every problem on standard error."""
    monkeypatch.setenv("SIDEGATE_MTLS", "off")
    monkeypatch.delenv("SIDEGATE_CONTROL_PLANE_ID", raising=False)

    assert main() == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("sidegate: error: SIDEGATE_MTLS='off': expected one of strict, permissive")
    assert lines[1].startswith("SIDEGATE_CONTROL_PLANE_ID: missing")


def test_missing_credentials_end_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Outside a cluster and without kubeconfig there is nothing to do."""
    monkeypatch.setenv("SIDEGATE_CONTROL_PLANE_ID", "spiffe://a.test/ns/sidegate-system/sa/sidegate")
    monkeypatch.setenv("SIDEGATE_KUBECONFIG", "/nowhere")
    monkeypatch.setattr("sidecar.shell.logs.configure", lambda _level: None)  # the log belongs to pytest here

    assert main() == 2
    assert "no access to the Kubernetes API" in capsys.readouterr().err

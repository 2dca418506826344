"""The protobuf messages are loaded without the package they ship in."""

import subprocess
import sys
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace

import pytest

from certs import messages


def test_neither_grpcio_nor_the_spiffe_package_is_imported() -> None:
    """They would cost the sidecar 16 MiB."""
    code = "import sys, certs.workload, certs.tls; print(sorted({'grpc', 'spiffe'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603 - ours

    assert done.stdout.strip() == "[]"


def test_a_file_that_cannot_be_loaded_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process must not start without its messages."""
    monkeypatch.setattr(metadata, "distribution", lambda _: SimpleNamespace(locate_file=Path))
    monkeypatch.setattr(util, "spec_from_file_location", lambda *_: None)

    with pytest.raises(ImportError, match="no Workload API messages"):
        messages._load()


def test_the_messages_have_the_fields_of_the_standard() -> None:
    """Field numbers are the wire format (workload.proto)."""
    fields = {field.name: field.number for field in messages.messages.X509SVID.DESCRIPTOR.fields}

    assert fields == {"spiffe_id": 1, "x509_svid": 2, "x509_svid_key": 3, "bundle": 4, "hint": 5}

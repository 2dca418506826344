"""The protobuf messages of the SPIFFE Workload API, as generated and shipped by the `spiffe` distribution.

Only that one generated file is loaded, by its location: importing the `spiffe` package itself brings grpcio and 16 MiB.
Refuses to start when the distribution has moved the file; its version is pinned with the other dependencies.
Source: SPIFFE Workload API, section 4 (workload.proto).
"""

from importlib import metadata, util
from typing import Any

__all__ = ["METADATA", "METHODS", "messages"]

METHODS = "/SpiffeWorkloadAPI/"
METADATA = {"workload.spiffe.io": "true"}
"""Every call must carry it (section 3): a request forged through a confused HTTP client cannot."""


def _load() -> Any:
    path = metadata.distribution("spiffe").locate_file("spiffe/_proto/workload_pb2.py")
    spec = util.spec_from_file_location("certs._workload_pb2", str(path))
    if spec is None or spec.loader is None:
        raise ImportError(f"no Workload API messages at {path}")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


messages = _load()

"""What is measured beside us: the server itself, and two proxies that pass everything through unread.

One worker each, no access log, connections kept on both sides. The server is nginx with a fixed answer, so that what a
proxy adds is most of what is seen. Sources: nginx, ngx_http_proxy_module and ngx_http_ssl_module; Envoy, v3 API.
"""

from __future__ import annotations

import contextlib
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import yaml

from bench import requests
from bench.errors import UnavailableError
from bench.processes import free_port, is_listening, running
from tests.parts import DebianTree, PartError, made, part

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bench.loader import Keys

BUFFER_BYTES: Final = 256 * 1024  # nginx's default of 16 KiB would put the large body into a file


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Server-side TLS material in PEM files: whom to believe, what to show."""

    anchors: Path
    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Something that answers on *port*. *keys* are what the loader shows; None: plain HTTP."""

    name: str
    pid: int
    port: int
    version: str
    enforces: bool = False
    keys: Keys | None = None
    audit: Path | None = None  # the file that gets a line for each call


def _nginx_tree() -> Path:
    """Return nginx of the machine's Debian release, with the module that reads a body before answering."""
    recipe = DebianTree(packages=("nginx", "libnginx-mod-http-echo"), programs=(("nginx", "usr/sbin/nginx"),))
    try:
        return made(recipe, "nginx-echo")
    except PartError as error:
        raise UnavailableError(str(error).splitlines()[0]) from error


def _version(program: Path, argument: str) -> str:
    done = subprocess.run([program, argument], capture_output=True, text=True, check=True)
    return (done.stdout + done.stderr).strip()


@contextlib.contextmanager
def direct(directory: Path) -> Iterator[Target]:
    """Run the MCP server: nginx, one fixed answer to every POST, once it has read the body.

    A bare `return` would answer before, and Envoy closes connections on which that happens.
    """
    port = free_port()
    answer = requests.ANSWER.decode()
    server = f"""
      listen 127.0.0.1:{port};
      location / {{
        echo_read_request_body;
        echo_exec @answer;
      }}
      location @answer {{
        default_type application/json;
        add_header Mcp-Session-Id {requests.SESSION};
        return 200 '{answer}';
      }}"""
    with _nginx(directory, "server", server) as (pid, version):
        yield Target(name="direct", pid=pid, port=port, version=version)


@contextlib.contextmanager
def nginx(
    directory: Path, upstream_port: int, files: Files | None = None, keys: Keys | None = None
) -> Iterator[Target]:
    """Run nginx as a proxy; with *files*, under mutual TLS."""
    port = free_port()
    name = "nginx" if files is None else "nginx mTLS"
    server = f"""
      listen 127.0.0.1:{port}{"" if files is None else " ssl"};
      {"" if files is None else _nginx_tls(files)}
      location / {{
        proxy_pass http://upstream;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
      }}"""
    with _nginx(directory, name.replace(" ", "-"), server, upstream_port) as (pid, version):
        yield Target(name=name, pid=pid, port=port, version=version, keys=keys)


@contextlib.contextmanager
def _nginx(directory: Path, name: str, server: str, upstream_port: int = 9) -> Iterator[tuple[int, str]]:
    tree = _nginx_tree()
    program, modules = tree / "bin/nginx", tree / "usr/lib/nginx/modules"
    home = directory / name
    home.mkdir()
    pid_file = home / "pid"
    temporary = "\n".join(
        f"  {kind}_temp_path {home}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration = f"""
load_module {modules}/ngx_http_echo_module.so;
daemon off;
master_process off;
pid {pid_file};
error_log stderr error;
events {{ worker_connections 1024; }}
http {{
{temporary}
  access_log off;
  keepalive_timeout 600s;
  keepalive_requests 1000000000;
  client_body_buffer_size {BUFFER_BYTES};
  upstream upstream {{
    server 127.0.0.1:{upstream_port};
    keepalive 64;
    keepalive_requests 1000000000;
  }}
  server {{{server}
  }}
}}
"""
    written = home / "nginx.conf"
    written.write_text(configuration)
    command: list[str | Path] = [program, "-p", home, "-c", written, "-e", "stderr"]
    with running(command, log=home / "log", is_ready=lambda: pid_file.exists() and bool(pid_file.read_text())) as pid:
        yield pid, _version(program, "-v").rpartition("/")[2]


def _nginx_tls(files: Files) -> str:
    return f"""
      ssl_protocols TLSv1.3;
      ssl_certificate {files.certificate};
      ssl_certificate_key {files.key};
      ssl_client_certificate {files.anchors};
      ssl_verify_client on;"""


@contextlib.contextmanager
def envoy(
    directory: Path, upstream_port: int, files: Files | None = None, keys: Keys | None = None
) -> Iterator[Target]:
    """Run Envoy as a plain router with one worker; with *files*, under mutual TLS."""
    try:
        program = part("envoy")
    except PartError as error:
        raise UnavailableError(str(error).splitlines()[0]) from error
    port = free_port()
    name = "Envoy" if files is None else "Envoy mTLS"
    written = directory / f"{name.replace(' ', '-')}.yaml"
    written.write_text(yaml.safe_dump(_envoy(port, upstream_port, files)))
    command: list[str | Path] = [
        program,
        "-c",
        written,
        "--concurrency",
        "1",
        "--disable-hot-restart",
        "--log-level",
        "error",
    ]
    with running(command, log=written.with_suffix(".log"), is_ready=lambda: is_listening(port)) as pid:
        version = _version(program, "--version").rpartition("version: ")[2].split("/")[1]
        yield Target(name=name, pid=pid, port=port, version=version, keys=keys)


def _envoy(port: int, upstream_port: int, files: Files | None) -> dict[str, Any]:
    types = "type.googleapis.com/envoy.extensions"
    manager = {
        "@type": f"{types}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "http_filters": [{"name": "router", "typed_config": {"@type": f"{types}.filters.http.router.v3.Router"}}],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "server"}}],
                }
            ]
        },
    }
    chain: dict[str, Any] = {"filters": [{"name": "http", "typed_config": manager}]}
    if files is not None:
        context = {
            "@type": f"{types}.transport_sockets.tls.v3.DownstreamTlsContext",
            "require_client_certificate": True,
            "common_tls_context": {
                "alpn_protocols": ["http/1.1"],
                "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
                "tls_certificates": [
                    {
                        "certificate_chain": {"filename": str(files.certificate)},
                        "private_key": {"filename": str(files.key)},
                    }
                ],
                "validation_context": {"trusted_ca": {"filename": str(files.anchors)}},
            },
        }
        chain["transport_socket"] = {"name": "tls", "typed_config": context}
    cluster = {
        "name": "server",
        "type": "STATIC",
        "load_assignment": {
            "cluster_name": "server",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(upstream_port)}}]}],
        },
    }
    listener = {"name": "in", "address": _address(port), "filter_chains": [chain]}
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}

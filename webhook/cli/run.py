"""`sidegate run`: the sidecar outside a pod, in front of a local MCP server; same code, policies from a directory.

The server is one that listens (--upstream), or a stdio server that is started here (-- COMMAND).
"""

import argparse
import asyncio
import ipaddress
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import msgspec

from certs.errors import WorkloadApiError
from certs.spiffe import SpiffePattern
from certs.workload import socket_path
from sidecar.config import STDIO_PORT, Capture, LogLevel, Settings
from sidecar.core import otel
from sidecar.core.bundle import Bundle, decode, public_keys
from sidecar.core.profile import Identity, Limit, Profile, Provider, Server
from sidecar.core.profile import decode as decode_profile
from sidecar.core.profile import encode as encode_profile
from sidecar.errors import ConfigError
from sidecar.shell.app import App
from webhook.cli import directory
from webhook.shell.opa import Opa

DEFAULT_LISTEN: Final = "127.0.0.1:8080"
EXAMPLE: Final = "example: sidegate run --upstream http://127.0.0.1:8000/mcp --policy policies/ --issuer https://id.corp.example --audience http://127.0.0.1:8080/mcp"  # fmt: skip # noqa: E501


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where the server behind us speaks MCP."""

    host: str
    port: int
    path: str


def add_to(verbs: Any) -> None:
    """Add the verb's arguments."""
    parser = verbs.add_parser("run", help="govern a local MCP server", description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--listen", default=DEFAULT_LISTEN, metavar="ADDRESS:PORT", help=f"where callers connect (default {DEFAULT_LISTEN})")  # fmt: skip # noqa: E501
    parser.add_argument("--health", default="127.0.0.1:0", metavar="ADDRESS:PORT", help="health and metrics (default: a free port)")  # fmt: skip # noqa: E501
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="behind --: a stdio server to start and govern, and its arguments")  # fmt: skip # noqa: E501
    parser.add_argument("--upstream", metavar="URL", help="the MCP endpoint to govern, http only; or else a COMMAND")
    parser.add_argument("--processes", choices=("session", "shared"), help="of COMMAND: one for each session (default), or one for all")  # fmt: skip # noqa: E501
    parser.add_argument("--host", action="append", default=[], metavar="NAME[:PORT]", help="a name under which callers know this server, besides the address of --listen and localhost")  # fmt: skip # noqa: E501
    parser.add_argument("--policy", required=True, type=Path, metavar="DIR|BUNDLE", help="a directory of .cedar and .rego files, or a signed bundle (.tar.gz)")  # fmt: skip # noqa: E501
    parser.add_argument("--key", type=Path, metavar="PEM", help="public keys one of which signed BUNDLE")
    parser.add_argument("--opa", default="opa", metavar="PATH", help="the opa binary that compiles .rego (default: opa on the PATH)")  # fmt: skip # noqa: E501
    parser.add_argument("--issuer", metavar="URL", help="the OpenID provider whose access tokens are accepted")
    parser.add_argument("--audience", action="append", default=[], metavar="AUD", help="an audience that names this server; may be given again")  # fmt: skip # noqa: E501
    parser.add_argument("--resource", metavar="URL", help="the URL by which callers know this server: clients find the provider by it (RFC 9728)")  # fmt: skip # noqa: E501
    parser.add_argument("--user", choices=("required", "optional"), help="whether a call needs a user's token (default: required)")  # fmt: skip # noqa: E501
    parser.add_argument("--spiffe-socket", default="", metavar="ADDRESS", help="the Workload API, as unix:/path; without it callers cannot use mTLS")  # fmt: skip # noqa: E501
    parser.add_argument("--caller", action="append", default=[], metavar="PATTERN", help="SPIFFE IDs that may call, such as spiffe://td/ns/*/sa/agent")  # fmt: skip # noqa: E501
    parser.add_argument("--limit", action="append", default=[], metavar="RATE/BURST", help="tool calls per second and burst, per user and workload")  # fmt: skip # noqa: E501
    parser.add_argument("--audit", default="stdout", metavar="FILE", help="where audit records go (default: stdout)")
    parser.add_argument("--otlp", default="", metavar="URL", help="an OTLP/HTTP receiver for spans")
    parser.add_argument("--log-level", choices=list(LogLevel), default=LogLevel.INFO)
    parser.set_defaults(perform=perform)


def perform(options: argparse.Namespace) -> int:
    """Run until a signal; return the exit status."""
    host, port = _address(options.listen, "--listen")
    health_host, health_port = _address(options.health, "--health")
    upstream = _upstream(options)
    _check_socket(options.spiffe_socket)
    bundle = asyncio.run(_bundle(options, upstream))
    settings = Settings(
        namespace=bundle.profile.server.namespace,
        workload=bundle.profile.server.workload,
        capture=Capture.LISTEN,
        listen_host=host,
        listen_port=port,
        health_host=health_host,
        health_port=health_port,
        upstream_host=upstream.host,
        hosts=",".join(_hosts(host, port, options.host)),
        spiffe_socket=options.spiffe_socket,
        audit_sink=options.audit,
        otlp_endpoint=options.otlp,
        log_level=options.log_level,
    )
    App(settings, otel=otel.read(options.environment), bundle=bundle, command=options.command).run()
    return 0


async def _bundle(options: argparse.Namespace, upstream: Endpoint) -> Bundle:
    """Return what is enforced: a signed bundle as it is, or a directory compiled here."""
    path: Path = options.policy
    if path.is_file():
        if options.key is None:
            raise ConfigError("--key is required with a bundle: nothing unsigned is enforced")
        signed = decode(path.read_bytes(), public_keys(_text(options.key)))
        profile = _profile(options, upstream, signed.profile)
        return Bundle(revision=signed.revision, files=signed.files, profile=profile)
    if not path.is_dir():
        raise ConfigError(f"--policy {path}: expected a directory or a bundle file")
    found = directory.read(path)
    return await directory.compiled(found, Opa(options.opa), _profile(options, upstream, found.profile))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from error


def _profile(options: argparse.Namespace, upstream: Endpoint, base: Profile | None) -> Profile:
    """Return *base* (or defaults) with what the command line says; the command line wins, but never on mTLS."""
    if options.issuer and not options.audience:
        raise ConfigError("--audience is required with --issuer: a token for anyone else must not open this server")
    if options.audience and not options.issuer:
        raise ConfigError("--issuer is required with --audience: it says whose tokens name that audience")
    for pattern in options.caller:
        SpiffePattern.parse(pattern)
    old = base.identity if base is not None else Identity()
    providers = old.providers
    if options.issuer:
        providers = (Provider(name="cli", issuer=options.issuer, audiences=tuple(options.audience)),)
    limits = tuple(_limit(text, index) for index, text in enumerate(options.limit)) or (base.limits if base else ())
    old_server = base.server if base else Server(namespace="local", workload="local", name="local", port=upstream.port)
    if options.command:
        processes = options.processes or old_server.processes
        server = msgspec.structs.replace(old_server, transport="stdio", port=upstream.port, processes=processes)
    else:
        transport = "http" if old_server.transport == "stdio" else old_server.transport
        server = msgspec.structs.replace(old_server, transport=transport, port=upstream.port, paths=(upstream.path,))
    try:
        identity = msgspec.structs.replace(
            old,
            mtls=_mtls(options, base),
            user=options.user or old.user,
            callers=tuple(options.caller) or old.callers,
            providers=providers,
            resource=options.resource or old.resource,
        )
        if base is None:
            made = Profile(server=server, identity=identity, limits=limits)
        else:
            made = msgspec.structs.replace(base, server=server, identity=identity, limits=limits)
    except ValueError as error:  # the command line contradicts the profile
        raise ConfigError(f"--policy {options.policy}: {error}") from error
    return decode_profile(encode_profile(made))  # constructors check no bounds


def _mtls(options: argparse.Namespace, base: Profile | None) -> Literal["strict", "permissive"]:
    """Return what the profile demands; raises ConfigError when that cannot be had without a Workload API."""
    if base is None and not options.spiffe_socket:
        print("sidegate: no --spiffe-socket: callers need no SVID and connect without TLS", file=sys.stderr)
        return "permissive"
    wanted = base.identity.mtls if base is not None else "strict"
    if wanted == "strict" and not options.spiffe_socket:
        raise ConfigError(
            f"--policy {options.policy}: its profile demands mTLS (identity.mtls strict), and there is no identity for it"
            "\nhint: --spiffe-socket unix:/path/of/the/agent.sock"
        )
    return wanted


def _limit(text: str, index: int) -> Limit:
    rate, _, burst = text.partition("/")
    try:
        limit = Limit(name=f"cli-{index}", rate_per_s=float(rate), burst=int(burst))
        return msgspec.json.decode(msgspec.json.encode(limit), type=Limit)  # the constructor checks no bounds
    except (ValueError, msgspec.ValidationError) as error:
        raise ConfigError(
            f"--limit {text}: expected RATE/BURST, such as 2/10: a rate per second from 0.000001, a burst from 1"
        ) from error


def _upstream(options: argparse.Namespace) -> Endpoint:
    """Return where the server is; a COMMAND is nowhere. Raises ConfigError."""
    if bool(options.upstream) == bool(options.command):
        raise ConfigError(
            "expected either --upstream URL or -- COMMAND [ARGUMENT...]"
            "\nhint: sidegate run --policy policies/ -- mcp-server-time --local-timezone UTC"
        )
    if options.upstream:
        if options.processes:
            raise ConfigError("--processes is for a COMMAND: a server that listens has its own")
        return _endpoint(options.upstream)
    if shutil.which(options.command[0]) is None:
        raise ConfigError(f"{options.command[0]}: no such program here or on PATH")
    return Endpoint(host="127.0.0.1", port=STDIO_PORT, path="/mcp")


def _hosts(address: str, port: int, names: list[str]) -> list[str]:
    """Return the authorities that Host may name; none, which is any, for an address that is every address."""
    if ipaddress.ip_address(address).is_unspecified:
        return names
    here = [f"[{address}]" if ":" in address else address]
    if ipaddress.ip_address(address).is_loopback:
        here += ["localhost", "127.0.0.1", "[::1]"]
    return [*names, *(f"{each}:{port}" if port else each for each in dict.fromkeys(here))]


def _endpoint(text: str) -> Endpoint:
    expected = f"--upstream {text}: expected http://HOST:PORT/PATH"
    try:
        url = urlsplit(text)
        port = 80 if url.port is None else url.port
    except ValueError as error:
        raise ConfigError(f"{expected} ({error})") from error
    if url.scheme != "http" or not url.hostname or not port or url.username or url.query or url.fragment:
        raise ConfigError(expected)
    return Endpoint(host=url.hostname, port=port, path=url.path or "/")


def _address(text: str, option: str) -> tuple[str, int]:
    expected = f"{option} {text}: expected ADDRESS:PORT, such as 127.0.0.1:8080 or [::1]:8080"
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise ConfigError(expected)
    try:
        return str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))), int(port)
    except ValueError as error:
        raise ConfigError(expected) from error


def _check_socket(address: str) -> None:
    if not address:
        return
    try:
        socket_path(address)
    except WorkloadApiError as error:
        raise ConfigError(f"--spiffe-socket {address}: expected unix:/path") from error

"""Where the store of global limits is: reads the URL of the setting SIDEGATE_LIMITS_STORE.

Refuses unknown schemes and passwords in the URL: it is shown in the pod's manifest, and a secret has a setting of its own.
"""

from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import parse_qsl, urlsplit

from sidecar.errors import ConfigError

SCHEMES: Final = ("redis", "rediss", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
PORTS: Final = {"": 6379, "sentinel": 26379, "cluster": 6379}
SETTING: Final = "SIDEGATE_LIMITS_STORE"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAddress:
    """Valkey or Redis: one server, what Sentinels watch as *master*, or a cluster that the *nodes* belong to."""

    kind: Literal["", "sentinel", "cluster"]
    is_tls: bool
    nodes: tuple[tuple[str, int], ...]
    master: str = ""
    database: int = 0


def read_address(url: str) -> StoreAddress:
    """Return the address that *url* names; raises ConfigError."""
    expected = (
        f"expected redis://HOST[:PORT][/DATABASE], redis+sentinel://HOST[:PORT],…/MASTER[?db=DATABASE] or "
        f"redis+cluster://HOST[:PORT],…, with rediss for TLS; a password goes into {SETTING}_PASSWORD"
    )
    try:
        return _parse(url)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{SETTING}={url!r}: {expected}") from error


def _parse(url: str) -> StoreAddress:
    parts = urlsplit(url)
    scheme, _, kind = parts.scheme.partition("+")
    nodes = tuple([_node(each, PORTS[kind]) for each in parts.netloc.split(",")])
    path, query = parts.path.strip("/"), dict(parse_qsl(parts.query, strict_parsing=True) if parts.query else ())
    is_tls, database = scheme == "rediss", query.pop("db", "0") if kind == "sentinel" else path or "0"
    is_known = parts.scheme in SCHEMES and "@" not in parts.netloc and not parts.fragment and not query
    if not is_known or not database.isdecimal():
        raise ValueError(url)
    match kind:
        case "sentinel" if path:
            return StoreAddress(kind="sentinel", is_tls=is_tls, nodes=nodes, master=path, database=int(database))
        case "cluster" if not path:
            return StoreAddress(kind="cluster", is_tls=is_tls, nodes=nodes)
        case "" if len(nodes) == 1:
            return StoreAddress(kind="", is_tls=is_tls, nodes=nodes, database=int(database))
    raise ValueError(url)


def _node(text: str, default: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname or parts.path:
        raise ValueError(text)
    return parts.hostname, parts.port or default

"""The Kubernetes calls we make, each with a deadline; nothing generic.

Speaks through `kubernetes.aio`: its ApiClient for credentials (in-cluster token, read again every minute; kubeconfig
with its plugins), TLS and requests, 22 MB in all. Objects stay dicts: the typed models drop fields they do not know.
The library's Watch is not used: on 410 Gone it asks again for the version that is gone, where only a new list helps.
Source: Kubernetes API concepts, efficient detection of changes.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final, Self, TypeVar

import aiohttp
import msgspec
import yaml
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.client.exceptions import ApiException

from webhook.core.pod import JSON
from webhook.errors import KubeError

log = logging.getLogger(__name__)
Result = TypeVar("Result")

CALL_TIMEOUT_S: Final = 15.0  # until the head of an answer, and again until its end: generous for one page
PAGE: Final = 500  # kubectl's chunk size
REWATCH_S: Final = 0.2  # a server that ends watches at once must not make us spin
WATCH_S: Final = 240  # the server ends a watch after that; API servers themselves choose 5 to 10 minutes
RETRY_MAX_S: Final = 30.0
MAX_TEXT_BYTES: Final = 2**20  # of metrics
STRATEGIC_MERGE: Final = "application/strategic-merge-patch+json"
JSON_MERGE: Final = "application/merge-patch+json"


@dataclass(frozen=True, slots=True)
class Listed:
    """All objects there are, at the resource version *version*; replaces what was known."""

    items: list[JSON]
    version: str = ""


@dataclass(frozen=True, slots=True)
class Put:
    """An object appeared or changed."""

    item: JSON


@dataclass(frozen=True, slots=True)
class Gone:
    """An object was deleted."""

    item: JSON


@dataclass(frozen=True, slots=True)
class Bookmark:
    """Nothing else happened up to the resource version *version*."""

    version: str


Change = Listed | Put | Gone | Bookmark


def version_of(change: Change) -> str:
    """Return the resource version that a collection has with *change*."""
    if isinstance(change, (Listed, Bookmark)):
        return change.version
    return str(change.item["metadata"].get("resourceVersion", ""))


class Kube:
    """A connection to the Kubernetes API. Close it where it was opened."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client

    @classmethod
    async def open(cls, kubeconfig: str = "") -> Self:
        """Return a connection by the pod's service account, or by the file *kubeconfig*. Raises KubeError."""
        configuration = Configuration()
        try:
            if kubeconfig:
                await config.load_kube_config(  # type: ignore[no-untyped-call]
                    config_file=kubeconfig, client_configuration=configuration
                )
            else:
                config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
            return cls(ApiClient(configuration))
        except (config.ConfigException, OSError) as error:
            raise KubeError(0, f"no access to the Kubernetes API: {error}") from error

    @classmethod
    async def open_as_user(cls, kubeconfig: str | None = None, context: str | None = None) -> Self:
        """Return a connection as kubectl would make it; the kubeconfig is left as it is. Raises KubeError."""
        configuration = Configuration()
        try:
            await config.load_kube_config(  # type: ignore[no-untyped-call]
                config_file=kubeconfig, context=context, client_configuration=configuration, persist_config=False
            )
            return cls(ApiClient(configuration))
        except (config.ConfigException, OSError) as error:
            raise KubeError(0, f"no access to the Kubernetes API: {error}") from error
        except (yaml.YAMLError, TypeError, AttributeError) as error:  # the library takes the file's shape for granted
            raise KubeError(0, f"no access to the Kubernetes API: the kubeconfig cannot be read: {error}") from error

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.close()  # type: ignore[no-untyped-call]

    async def get(self, path: str) -> JSON | None:
        """Return the object at *path*, None when there is none. Raises KubeError."""
        try:
            return await self._call("GET", path)
        except KubeError as error:
            if error.status == 404:
                return None
            raise

    async def text(self, path: str) -> str:
        """Return what *path* answers, up to MAX_TEXT_BYTES, as text. Raises KubeError."""
        async with self._request("GET", path) as response:
            data = await _within(CALL_TIMEOUT_S, response.content.read(MAX_TEXT_BYTES))
            while len(data) < MAX_TEXT_BYTES and (more := await _within(CALL_TIMEOUT_S, response.content.read(4096))):
                data += more
        return data[:MAX_TEXT_BYTES].decode(errors="replace")

    async def create(self, path: str, body: JSON, *, dry_run: bool = False) -> JSON:
        """Return the object as created below *path*, or as it would be. Raises KubeError; status 409 when it exists."""
        return await self._call("POST", path, {"dryRun": "All"} if dry_run else None, body=body)

    async def replace(self, path: str, body: JSON) -> JSON:
        """Return the object as replaced. Raises KubeError; status 409 when it has changed since *body* was read."""
        return await self._call("PUT", path, body=body)

    async def merge(self, path: str, body: JSON) -> JSON:
        """Return the object after a strategic merge, in which lists are merged by their keys. Raises KubeError."""
        return await self._call("PATCH", path, body=body, content_type=STRATEGIC_MERGE)

    async def merge_object(self, path: str, body: JSON) -> JSON:
        """Return the object after a merge (RFC 7396), in which lists are replaced. Raises KubeError."""
        return await self._call("PATCH", path, body=body, content_type=JSON_MERGE)

    async def list_all(self, path: str, selector: str = "") -> list[JSON]:
        """Return the objects of the collection *path* with labels *selector*. Raises KubeError."""
        items, _ = await self._list(path, {"labelSelector": selector}, _whole)
        return items

    async def delete(self, path: str) -> None:
        """Delete the object at *path*. Raises KubeError; status 404 when there is none."""
        await self._call("DELETE", path)

    async def follow(
        self, path: str, selector: str = "", *, name: str = "", keep: Callable[[JSON], JSON] | None = None
    ) -> AsyncIterator[Change]:
        """Yield all objects of the collection *path* with labels *selector*, then every change; never ends or raises.

        *name*: only the object of that name; who may watch no other must ask so. *keep* returns what is kept of an object
        with the name and the version it had: of ten thousand, no more than a page is there as a whole. After a break it
        goes on where it was; when that is too long ago, or after any other error, with a new list.
        """
        keep = keep or _whole
        chosen = {"labelSelector": selector} | ({"fieldSelector": f"metadata.name={name}"} if name else {})
        failures = 0
        version: str | None = None
        while True:
            try:
                if version is None:
                    listed, version = await self._list(path, chosen, keep)
                    yield Listed(listed, version)
                async for kind, item in self._watch(path, chosen, version):
                    version = item["metadata"]["resourceVersion"]
                    failures = 0
                    if kind == "BOOKMARK":
                        yield Bookmark(version)
                    else:
                        yield Gone(keep(item)) if kind == "DELETED" else Put(keep(item))
                await asyncio.sleep(REWATCH_S)
            except (KubeError, KeyError, TypeError) as error:
                version = None
                failures += 1
                delay_s = min(RETRY_MAX_S, 2.0 ** min(failures, 6) / 4) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
                log.warning("watch broken", extra={"path": path, "error": str(error), "retry_s": round(delay_s, 2)})
                await asyncio.sleep(delay_s)

    async def _list(self, path: str, chosen: Mapping[str, str], keep: Callable[[JSON], JSON]) -> tuple[list[JSON], str]:
        items: list[JSON] = []
        query = {**chosen, "limit": str(PAGE)}
        while True:
            page = await self._call("GET", path, query)
            items.extend(map(keep, page.get("items") or ()))
            if not page["metadata"].get("continue"):
                return items, page["metadata"]["resourceVersion"]
            query = query | {"continue": page["metadata"]["continue"]}

    async def _watch(self, path: str, chosen: Mapping[str, str], version: str) -> AsyncIterator[tuple[str, JSON]]:
        query = {
            **chosen,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_S),
        }
        async with self._request("GET", path, query=query) as response:
            # The deadline is around each read, not around the loop: it must never fire in the code that consumes us.
            while line := await _within(WATCH_S + CALL_TIMEOUT_S, response.content.readline()):
                event = _decoded(line)
                if event.get("type") == "ERROR":
                    status = event.get("object") or {}
                    raise KubeError(int(status.get("code") or 0), str(status.get("message")))
                yield event["type"], event["object"]

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        *,
        body: JSON | None = None,
        content_type: str = "application/json",
    ) -> JSON:
        async with self._request(method, path, query=query, body=body, content_type=content_type) as response:
            return _decoded(await _within(CALL_TIMEOUT_S, response.read()))

    @contextlib.asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: JSON | None = None,
        content_type: str = "application/json",
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Give the response to a request that was accepted. Raises KubeError with the API's message otherwise."""
        parameters = await self._client.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params={"Accept": "application/json", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        # The library's own limit would count the whole of a watch.
        sent = self._client.call_api(*parameters, _request_timeout=aiohttp.ClientTimeout(total=None))
        wrapped = await _within(CALL_TIMEOUT_S, sent)
        async with wrapped.response as response:
            if response.status >= 400:
                body_text = await _within(CALL_TIMEOUT_S, response.text())
                raise KubeError(response.status, f"{method} {path}: {_message(body_text)}")
            yield response


def _whole(item: JSON) -> JSON:
    return item


async def _within(timeout_s: float, awaitable: Awaitable[Result]) -> Result:
    """Return the result; raises KubeError when it takes longer or the connection breaks."""
    try:
        async with asyncio.timeout(timeout_s):
            return await awaitable
    except TimeoutError as error:
        raise KubeError(0, f"no answer within {timeout_s:g} s") from error
    except (aiohttp.ClientError, ApiException, OSError, ValueError) as error:  # ValueError: a line above the buffer
        raise KubeError(0, f"{type(error).__name__}: {error}") from error


def _decoded(data: bytes) -> JSON:
    try:
        decoded = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise KubeError(0, f"the API sent no JSON: {error}") from error
    if not isinstance(decoded, dict):
        raise KubeError(0, "the API sent no object")
    return decoded


def _message(text: str) -> str:
    """Return the message of a Status object, or the start of whatever came instead."""
    try:
        status = _decoded(text.encode())
    except KubeError:
        return text[:256]
    return str(status.get("message"))[:256]

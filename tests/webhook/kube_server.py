"""A small Kubernetes API server: objects by path, resource versions, conflicts, pages, watches that can be broken.

What it does is what the API documentation says of the real one; tests/e2e meets the real one.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web
from kubernetes.aio.client import ApiClient, Configuration

from webhook.shell.kube import Kube

PODS = "/api/v1/pods"


class KubeServer:
    """Objects by the path of their collection and their name; every change has a number."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.version = 100
        self.events: list[tuple[str, str, Any]] = []  # collection, type, object
        self.requests: list[str] = []
        self.patches: list[tuple[str, Any]] = []  # path and body
        self.texts: dict[str, str] = {}  # what is no JSON, by path
        self.answers: dict[str, Any] = {}  # to what is asked by POST and kept nowhere, by path
        self.oldest = 0  # versions below are gone
        self.fail_next: list[int] = []  # HTTP statuses to answer with first
        self.port = 0
        self._changed = asyncio.Event()
        self._cut = 0

    def put(self, collection: str, item: Any, key: str = "") -> Any:
        """Create or replace *item* in *collection*, and tell watchers."""
        key = key or "/".join(filter(None, (item["metadata"].get("namespace"), item["metadata"]["name"])))
        known = self.objects.setdefault(collection, {})
        self.version += 1
        item = item | {"metadata": item["metadata"] | {"resourceVersion": str(self.version)}}
        self._tell(collection, "MODIFIED" if key in known else "ADDED", item)
        known[key] = item
        return item

    def delete(self, collection: str, key: str) -> None:
        """Delete what *key* names, and tell watchers."""
        self.version += 1
        item = self.objects[collection].pop(key)
        item = item | {"metadata": item["metadata"] | {"resourceVersion": str(self.version)}}
        self._tell(collection, "DELETED", item)

    def expire(self) -> None:
        """Forget all history: watches from before are 410 Gone."""
        self.oldest = self.version
        self.events.clear()
        self.cut()

    def cut(self) -> None:
        """End all watches, as the server does from time to time."""
        self._cut += 1
        self._wake()

    def error(self, collection: str, code: int) -> None:
        """Send watchers an error event."""
        self._tell(collection, "ERROR", {"kind": "Status", "code": code, "message": "made up"})

    def _tell(self, collection: str, kind: str, item: Any) -> None:
        self.events.append((collection, kind, item))
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Kube]:
        """Serve on a free port; gives a connection."""
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        kube = connection_to(self.port)
        try:
            yield kube
        finally:
            await kube.aclose()
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:  # noqa: PLR0911 - one a verb
        self.requests.append(f"{request.method} {request.path}")
        if self.fail_next:
            return _status(self.fail_next.pop(0), "made up")
        if request.path in self.texts:
            return web.Response(text=self.texts[request.path])
        match request.method:
            case "POST" if request.path in self.answers:
                return web.json_response(self.answers[request.path], status=201)
            case "GET" if "watch" in request.query:
                return await self._watch(request)
            case "GET":
                return self._list(request) if request.path in self.objects else self._get(request)
            case "POST":
                return self._create(request, await request.json())
            case "PUT":
                return self._replace(request, await request.json())
            case "PATCH" if request.content_type == "application/merge-patch+json":
                return self._merge_object(request.path, await request.json())
            case "PATCH":
                return self._merge(request, await request.json())
        return _status(405, "no")

    def _get(self, request: web.Request) -> web.Response:
        collection, _, name = request.path.rpartition("/")
        found = self.objects.get(collection, {}).get(name)
        return web.json_response(found) if found else _status(404, f"{name} not found")

    def _create(self, request: web.Request, item: Any) -> web.Response:
        if item["metadata"]["name"] in self.objects.get(request.path, {}):
            return _status(409, "already exists")
        return web.json_response(self.put(request.path, item), status=201)

    def _list(self, request: web.Request) -> web.Response:
        items = list(self.objects[request.path].values())
        start, limit = int(request.query.get("continue", 0)), int(request.query["limit"])
        more = {"continue": str(start + limit)} if start + limit < len(items) else {}
        page = items[start : start + limit]
        return web.json_response({"items": page, "metadata": {"resourceVersion": str(self.version), **more}})

    def _replace(self, request: web.Request, item: Any) -> web.Response:
        collection, _, name = request.path.rpartition("/")
        held = self.objects.get(collection, {}).get(name)
        if held is None:
            return _status(404, "not found")
        if held["metadata"]["resourceVersion"] != item["metadata"].get("resourceVersion"):
            return _status(409, "the object has been modified")
        return web.json_response(self.put(collection, item, name))

    def _merge_object(self, path: str, change: Any) -> web.Response:
        """Merge into an object, which may be kept in the collection of all namespaces; of `/status`, only the status."""
        path, is_status = path.removesuffix("/status"), path.endswith("/status")
        collection, _, key = path.rpartition("/")
        if collection not in self.objects:
            root, namespace, plural = re.sub(r"/namespaces/([^/]+)/([^/]+)$", r" \1 \2", f"{collection}").split(" ")
            collection, key = f"{root}/{plural}", f"{namespace}/{key}"
        held = self.objects.get(collection, {}).get(key)
        if held is None:
            return _status(404, "not found")
        self.patches.append((f"{collection}/{key}", change))
        change = {"status": change["status"]} if is_status else change
        return web.json_response(self.put(collection, _merged(held, change), key))

    def _merge(self, request: web.Request, change: Any) -> web.Response:
        """Merge `webhooks` by name, as the real server does for this kind; nothing else is needed."""
        if request.content_type != "application/strategic-merge-patch+json":
            return _status(415, request.content_type)
        collection, _, name = request.path.rpartition("/")
        held = json.loads(json.dumps(self.objects[collection][name]))
        for each in change["webhooks"]:
            (mine,) = [webhook for webhook in held["webhooks"] if webhook["name"] == each["name"]]
            mine["clientConfig"].update(each["clientConfig"])
        return web.json_response(self.put(collection, held, name))

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        version, cut = int(request.query["resourceVersion"]), self._cut
        response = web.StreamResponse()
        await response.prepare(request)
        if version < self.oldest:
            await _send(response, "ERROR", {"kind": "Status", "code": 410, "message": "too old resource version"})
            return response
        while self._cut == cut:
            changed = self._changed
            for collection, kind, item in list(self.events):
                if collection != request.path:
                    continue
                if kind == "ERROR":
                    self.events.remove((collection, kind, item))
                    await _send(response, kind, item)
                    return response
                if int(item["metadata"]["resourceVersion"]) > version:
                    version = int(item["metadata"]["resourceVersion"])
                    await _send(response, kind, item)
            await changed.wait()
        await _send(response, "BOOKMARK", {"metadata": {"resourceVersion": str(version)}})
        return response


def _merged(held: Any, change: Any) -> Any:
    """Merge as RFC 7396 says."""
    if not isinstance(change, dict) or not isinstance(held, dict):
        return change
    merged = held | {key: _merged(held.get(key), value) for key, value in change.items()}
    return {key: value for key, value in merged.items() if value is not None}


async def _send(response: web.StreamResponse, kind: str, item: Any) -> None:
    await response.write(json.dumps({"type": kind, "object": item}).encode() + b"\n")


def connection_to(port: int) -> Kube:
    """Return a connection to an API server on *port* of this machine."""
    configuration = Configuration()
    configuration.host = f"http://127.0.0.1:{port}"
    return Kube(ApiClient(configuration))


def kubeconfig(port: int) -> str:
    """Return the text of a kubeconfig for an API server on *port* of this machine."""
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
    )


def _status(code: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "code": code, "message": message}, status=code)

"""The HTTP side: discovery, OpenAPI stubs, and the verbs kubectl uses."""

import json
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import yaml
from tests.k8s.miniapi.errors import ApiError
from tests.k8s.miniapi.kinds import Key, Kind
from tests.k8s.miniapi.store import Store

_VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]
_OBJECTS = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+)(?=/))?/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?"
)
_PARAMETERS = [
    {"name": name, "in": "query", "schema": {"type": "string"}}
    for name in ("fieldValidation", "dryRun", "fieldManager")
]
Answer = tuple[int, Any]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        try:
            with self.store.lock:
                code, content = self._route(url.path.rstrip("/"), dict(parse_qsl(url.query)), body)
                data = json.dumps(content).encode()
        except ApiError as error:
            code, data = error.code, json.dumps(error.status()).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

    def _route(self, path: str, query: dict[str, str], body: bytes) -> Answer:
        found = _discovery(self.store, path)
        if found is not None:
            return 200, found
        match = _OBJECTS.fullmatch(path)
        if not match:
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        key = Key(match["group"] or "", match["version"] or match["core"], match["plural"])
        kind = self.store.kind(key)
        return self._objects(kind, match["namespace"] or "", match["name"], query, _parsed(body))

    def _objects(
        self, kind: Kind, namespace: str, name: str | None, query: dict[str, str], body: Any
    ) -> Answer:
        store, key = self.store, kind.key
        strict, dry = query.get("fieldValidation", "Strict") == "Strict", "dryRun" in query
        if self.command == "POST":
            return 201, store.create(key, namespace, body, strict=strict, dry=dry)
        if self.command == "GET" and name is None:
            items = store.list(key, namespace, _labels(query))
            metadata = {"resourceVersion": store.newest()}
            about = {"kind": f"{kind.name}List", "apiVersion": key.api_version}
            return 200, about | {"metadata": metadata, "items": items}
        assert name
        if self.command == "GET":
            return 200, store.get(key, namespace, name)
        if self.command == "DELETE":
            return 200, store.delete(key, namespace, name)
        if self.command == "PATCH":
            content = self.headers["Content-Type"].partition(";")[0]
            if content == "application/apply-patch+yaml":
                manager = query.get("fieldManager", "")
                return store.apply(key, namespace, name, manager, body, dry=dry)
            body = store.patched(key, namespace, name, content, body)
        return 200, store.update(key, namespace, name, body, strict=strict, dry=dry)


def _labels(query: dict[str, str]) -> dict[str, str]:
    """Of a selector with nothing but equalities."""
    parts = [part.partition("=") for part in query.get("labelSelector", "").split(",") if part]
    return {name: value.removeprefix("=") for name, _, value in parts}


def _parsed(body: bytes) -> Any:
    if body.startswith(b"k8s\0"):
        raise ApiError(415, "UnsupportedMediaType", "JSON and YAML only: use `kubectl apply`")
    return yaml.load(body, yaml.CSafeLoader) if body else None


def _discovery(store: Store, path: str) -> Any:
    """What kubectl asks before it does anything; None if it is not that."""
    apis = {kind.key.api_version: kind.key for kind in store.kinds.values()}
    if path == "/version":
        major, minor, _ = store.version.split(".")
        return {"major": major, "minor": minor, "gitVersion": f"v{store.version}"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = [_group(api, key) for api, key in apis.items() if key.group]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    if path == "/openapi/v3":
        return {
            "paths": {
                root[1:]: {"serverRelativeURL": f"/openapi/v3{root}"} for root in _roots(apis)
            }
        }
    for root, api in _roots(apis).items():
        own = [kind for kind in store.kinds.values() if kind.key.api_version == api]
        if path == root:
            return _resources(api, own)
        if path == f"/openapi/v3{root}":
            return _openapi(root, own)
    return None


def _roots(apis: dict[str, Key]) -> dict[str, str]:
    return {f"/apis/{api}" if key.group else f"/api/{api}": api for api, key in apis.items()}


def _group(api: str, key: Key) -> dict[str, Any]:
    version = {"groupVersion": api, "version": key.version}
    return {"name": key.group, "versions": [version], "preferredVersion": version}


def _resources(api: str, kinds: list[Kind]) -> dict[str, Any]:
    resources = [
        {
            "name": kind.key.plural,
            "singularName": kind.singular,
            "namespaced": kind.namespaced,
            "kind": kind.name,
            "verbs": _VERBS,
        }
        for kind in kinds
    ]
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": api,
        "resources": resources,
    }


def _openapi(root: str, kinds: list[Kind]) -> dict[str, Any]:
    """Just enough for kubectl to leave strict validation to the server."""
    paths = {}
    for kind in kinds:
        own = {"group": kind.key.group, "version": kind.key.version, "kind": kind.name}
        place = "namespaces/{namespace}/" if kind.namespaced else ""
        paths[f"{root}/{place}{kind.key.plural}/{{name}}"] = {
            "patch": {
                "x-kubernetes-group-version-kind": own,
                "parameters": _PARAMETERS,
                "responses": {"200": {"description": "OK"}},
            }
        }
    return {"openapi": "3.0.0", "info": {"title": "tests", "version": "v1"}, "paths": paths}


@contextmanager
def running(version: str, custom: list[Kind]) -> Iterator[str]:
    """A server on loopback; yields its URL."""
    with serving(Store(version, custom)) as port:
        yield f"http://127.0.0.1:{port}"


@contextmanager
def serving(
    store: Store, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> Iterator[int]:
    """A server of these objects; yields its port."""
    handler = type("Handler", (_Handler,), {"store": store})
    server = ThreadingHTTPServer((host, port), handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

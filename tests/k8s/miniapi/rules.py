"""A few of the checks that the API server makes in Go, beyond schemas. Pure."""

import re
from collections.abc import Iterator
from typing import Any

from tests.k8s.miniapi.errors import invalid

Object = dict[str, Any]
MAX_ANNOTATION_BYTES = 262144
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_SERVICE = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
_PORT_NAME = re.compile(r"(?=.{1,15}$)(?=.*[a-z])[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_QUANTITY = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(([KMGTPE]i)|[numkMGTPE]|([eE][+-]?\d+))?")
_HANDLERS = ("exec", "grpc", "httpGet", "tcpSocket")
_FIXED = {
    "Deployment": ("selector",),
    "StatefulSet": ("selector", "serviceName", "volumeClaimTemplates"),
}


def check(obj: Object) -> None:
    """Raise the first fault as the server words it."""
    for fault in _faults(obj):
        raise invalid(obj, fault)


def check_change(old: Object, new: Object) -> None:
    """Raise if a field changed that must not."""
    for field in _FIXED.get(new["kind"], ()):
        if old["spec"].get(field) != new["spec"].get(field):
            raise invalid(new, f"spec.{field}: Invalid value: field is immutable")


def _faults(obj: Object) -> Iterator[str]:
    yield from _metadata(obj)
    yield from _selector(obj)
    yield from _one_kind(obj)
    if obj["kind"] in ("Deployment", "StatefulSet", "Job", "RayService"):
        claims = [own["metadata"]["name"] for own in obj["spec"].get("volumeClaimTemplates", [])]
        for path, spec in _pod_specs(obj["spec"], "spec"):
            yield from _pod(path, spec, claims)


def _metadata(obj: Object) -> Iterator[str]:
    metadata = obj["metadata"]
    annotations = metadata.get("annotations") or {}
    if sum(len(name) + len(value) for name, value in annotations.items()) > MAX_ANNOTATION_BYTES:
        yield f"metadata.annotations: Too long: must have at most {MAX_ANNOTATION_BYTES} bytes"
    pattern = _SERVICE if obj["kind"] == "Service" else _SUBDOMAIN
    if not pattern.fullmatch(metadata["name"]) or len(metadata["name"]) > 253:
        yield f'metadata.name: Invalid value: "{metadata["name"]}"'
    for value in (metadata.get("labels") or {}).values():
        if not _LABEL.fullmatch(value) or len(value) > 63:
            yield f'metadata.labels: Invalid value: "{value}"'


def _selector(obj: Object) -> Iterator[str]:
    if obj["kind"] in _FIXED:
        wanted = obj["spec"]["selector"].get("matchLabels") or {}
        labels = obj["spec"]["template"].get("metadata", {}).get("labels") or {}
        if any(labels.get(name) != value for name, value in wanted.items()):
            yield "spec.template.metadata.labels: `selector` does not match template `labels`"


def _one_kind(obj: Object) -> Iterator[str]:
    kind, spec = obj["kind"], obj.get("spec") or {}
    if kind == "PodDisruptionBudget" and ("minAvailable" in spec) == ("maxUnavailable" in spec):
        yield "spec: exactly one of minAvailable and maxUnavailable"
    if kind == "HorizontalPodAutoscaler" and spec.get("minReplicas", 1) > spec["maxReplicas"]:
        yield "spec.maxReplicas: must be greater than or equal to `minReplicas`"
    if kind == "Service":
        names = [port.get("name") for port in spec.get("ports") or []]
        if len(names) > 1 and None in names:
            yield "spec.ports.name: Required value"
        if len(set(names)) != len(names):
            yield "spec.ports.name: Duplicate value"


def _pod_specs(value: Any, path: str) -> Iterator[tuple[str, Object]]:
    if isinstance(value, dict):
        if isinstance(value.get("containers"), list):
            yield path, value
        for name, inner in value.items():
            yield from _pod_specs(inner, f"{path}.{name}")
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield from _pod_specs(inner, f"{path}[{at}]")


def _pod(path: str, spec: Object, claims: list[str]) -> Iterator[str]:
    volumes = {*claims, *(volume["name"] for volume in spec.get("volumes") or [])}
    seen: set[str] = set()
    for container in [*spec["containers"], *(spec.get("initContainers") or [])]:
        at = f"{path}.containers[{container['name']}]"
        if container["name"] in seen:
            yield f"{at}: Duplicate value"
        seen.add(container["name"])
        if not container.get("image"):
            yield f"{at}.image: Required value"
        for mount in container.get("volumeMounts") or []:
            if mount["name"] not in volumes:
                yield f'{at}.volumeMounts.name: Not found: "{mount["name"]}"'
        yield from _ports(at, container)
        yield from _resources(at, container.get("resources") or {})
        yield from _probes(at, container)


def _ports(at: str, container: Object) -> Iterator[str]:
    for port in container.get("ports") or []:
        if port.get("name") and not _PORT_NAME.fullmatch(port["name"]):
            yield f'{at}.ports.name: Invalid value: "{port["name"]}": at most 15 characters'


def _resources(at: str, resources: Object) -> Iterator[str]:
    for kind in ("requests", "limits"):
        for name, amount in (resources.get(kind) or {}).items():
            if not _QUANTITY.fullmatch(str(amount)):
                yield f'{at}.resources.{kind}[{name}]: Invalid value: "{amount}"'
    for name, amount in (resources.get("limits") or {}).items():
        if "/" in name and (resources.get("requests") or {}).get(name, amount) != amount:
            yield f"{at}.resources: {name} request must equal limit"


def _probes(at: str, container: Object) -> Iterator[str]:
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        probe = container.get(name)
        if probe is not None and sum(handler in probe for handler in _HANDLERS) != 1:
            yield f"{at}.{name}: must specify exactly one handler type"

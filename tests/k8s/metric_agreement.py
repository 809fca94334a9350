"""Whether what is scraped, asked for and alerted on exists in our code and in Ray's."""

import re
from collections.abc import Iterator
from typing import Any

import yaml
from tests.k8s.kuberay import pods
from tests.k8s.mesh_agreement import known_to_ray, settings_of
from tests.k8s.policy import port_names, selects
from tests.k8s.rendering import Manifest, label, named, of_kind

from expertmesh.runtime.errors import ConfigError
from expertmesh.runtime.metrics import Level, Metrics, MetricSpec

STAGES = {"gateway", "router", "expert"}
RESOURCE_LABELS = {"service_name", "service_instance_id", "le"}
_NAME = re.compile(r"\b((?:expertmesh|ray)_\w+)(\{[^}]*\})?")
_MATCHER = re.compile(r'(\w+)\s*=~?\s*"([^"]*)"')


def faults(documents: list[Manifest]) -> list[str]:
    """What does not exist, with where it is asked for."""
    return [
        *(fault for where, text in _queries(documents) for fault in _query(where, text)),
        *_scraped(documents),
        *_collector(documents),
    ]


def prometheus_names() -> dict[str, MetricSpec]:
    """Every series of ours as the collector shows it: dots become underscores, units and _total
    are put behind."""
    metrics, found = Metrics(), {}
    for counter in metrics.counters():
        suffix = "" if isinstance(counter, Level) else "_total"
        found[_with_unit(counter.spec) + suffix] = counter.spec
    for histogram in metrics.histograms():
        for suffix in ("_bucket", "_sum", "_count"):
            found[_with_unit(histogram.spec) + suffix] = histogram.spec
    return found


def _with_unit(spec: MetricSpec) -> str:
    name = spec.name.replace(".", "_")
    unit = {"s": "_seconds", "By": "_bytes"}.get(spec.unit, "")
    return name if not unit or name.endswith(unit) else name + unit


def _queries(documents: list[Manifest]) -> Iterator[tuple[str, str]]:
    for rule in of_kind(documents, "PrometheusRule"):
        for group in rule["spec"]["groups"]:
            for own in group["rules"]:
                yield f"{label(rule)}: {own['alert']}", own["expr"]
    for scaled in of_kind(documents, "ScaledObject"):
        for trigger in scaled["spec"]["triggers"]:
            if trigger["type"] == "prometheus":
                yield f"{label(scaled)}: query", trigger["metadata"]["query"]


def _query(where: str, text: str) -> Iterator[str]:
    names = prometheus_names()
    found = _NAME.findall(text)
    if not found:
        yield f"{where}: asks for no metric"
    for name, matchers in found:
        if name.startswith("ray_"):
            if not known_to_ray(name.removeprefix("ray_").removesuffix("_total")):
                yield f"{where}: Ray has no metric {name}"
            continue
        if name not in names:
            yield f"{where}: there is no metric {name}"
            continue
        for own, value in _MATCHER.findall(matchers):
            if own not in {*names[name].labels, *RESOURCE_LABELS}:
                yield f"{where}: {name} has no label {own}"
            if own == "stage" and value not in STAGES:
                yield f"{where}: {name}: no stage {value!r}"


def _scraped(documents: list[Manifest]) -> Iterator[str]:
    found = pods(documents)
    for monitor in of_kind(documents, "PodMonitor"):
        behind = [pod for pod in found if selects(monitor["spec"]["selector"], pod.labels)]
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            yield from _endpoint(label(monitor), endpoint)
            if not any(endpoint["port"] in port_names(pod) for pod in behind):
                yield f"{label(monitor)}: port: no Pod has {endpoint['port']!r}"
    for monitor in of_kind(documents, "ServiceMonitor"):
        services = [
            own
            for own in of_kind(documents, "Service")
            if selects(monitor["spec"]["selector"], own["metadata"]["labels"])
        ]
        for endpoint in monitor["spec"]["endpoints"]:
            yield from _endpoint(label(monitor), endpoint)
            ports = {port["name"] for own in services for port in own["spec"]["ports"]}
            if services and endpoint["port"] not in ports:
                yield f"{label(monitor)}: port: no Service has {endpoint['port']!r}"


def _endpoint(where: str, endpoint: dict[str, Any]) -> Iterator[str]:
    if endpoint.get("path") != "/metrics":
        yield f"{where}: path: expected /metrics, got {endpoint.get('path')!r}"


def _collector(documents: list[Manifest]) -> Iterator[str]:
    present = [own for own in of_kind(documents, "Deployment") if label(own).endswith("collector")]
    try:
        endpoint = settings_of(documents).otlp_endpoint
    except ConfigError:  # mesh_agreement says what is wrong
        return
    if endpoint and not present:
        yield f"ConfigMap mesh: mesh.yaml: otlp_endpoint: {endpoint}, but no collector is here"
    for document in present:
        [pod] = pods([document])
        text = named(documents, "ConfigMap", "otel-collector")["data"]["config.yaml"]
        config = yaml.safe_load(text)
        ports = {
            "otlp": config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"],
            "prometheus": config["exporters"]["prometheus"]["endpoint"],
            "health": config["extensions"]["health_check"]["endpoint"],
        }
        for name, address in ports.items():
            number = int(address.rpartition(":")[2])
            if port_names(pod)[name] != number:
                yield f"{label(document)}: ports.{name}: the collector listens on {number}"

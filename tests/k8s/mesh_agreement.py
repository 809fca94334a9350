"""Whether manifests and code agree: configuration, commands, ports, probes, groups, memory."""

import contextlib
import functools
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tests.k8s import capacity_agreement, network_agreement
from tests.k8s.capacity_agreement import DEMO, DEMO_IN_IMAGE, serve_config
from tests.k8s.kuberay import Pod, pods, workers
from tests.k8s.policy import port_names
from tests.k8s.rendering import Manifest, named, of_kind

from expertmesh.experts.assignment import parse_ids
from expertmesh.experts.deployment import DRAIN_TIMEOUT_S, ExpertGroupArgs
from expertmesh.router.control import SERVICE as CONTROL_SERVICE
from expertmesh.router.servicer import SERVICE as ROUTER_SERVICE
from expertmesh.runtime.config import validate
from expertmesh.runtime.errors import ConfigError
from expertmesh.runtime.server import LIVENESS
from expertmesh.services.cli import parser
from expertmesh.services.controller.process import SERVICE as CONTROLLER_SERVICE
from expertmesh.services.gateway.servicer import SERVICE as GENERATE_SERVICE
from expertmesh.services.preflight import plan_start
from expertmesh.services.serve_config import group_args, ray_service_config
from expertmesh.services.settings import MeshSettings

CLOSING_S = 10.0
"""At least, between the end of the last call and that of the process."""
READY_SERVICES = {
    "gateway": GENERATE_SERVICE,
    "router": ROUTER_SERVICE,
    "controller": CONTROLLER_SERVICE,
}
PROBED = {LIVENESS, "", CONTROL_SERVICE, *READY_SERVICES.values()}


def faults(documents: list[Manifest]) -> list[str]:
    """What does not agree, with the field."""
    try:
        settings = settings_of(documents)
    except ConfigError as error:
        return [f"ConfigMap mesh: mesh.yaml: {error.message}"]
    serve_faults = list(_serve(documents, settings))
    if any(fault.startswith("ConfigMap mesh") for fault in serve_faults):
        return serve_faults  # what does not fit the model has no sizes
    return [
        *serve_faults,
        *_commands(documents, settings),
        *_addresses(documents, settings),
        *network_agreement.faults(documents, settings),
        *capacity_agreement.faults(documents, settings),
        *_variables(documents),
    ]


def settings_of(documents: list[Manifest]) -> MeshSettings:
    """What gateway and router will have read; ConfigError if they would refuse it."""
    values = yaml.safe_load(named(documents, "ConfigMap", "mesh")["data"]["mesh.yaml"])
    return validate(MeshSettings, values)


@functools.cache
def _ray_schema() -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.serve.schema import ServeDeploySchema
    return ServeDeploySchema


def _serve(documents: list[Manifest], settings: MeshSettings) -> Iterator[str]:
    at = "RayService experts: spec.serveConfigV2"
    config = serve_config(documents)
    _ray_schema().model_validate(config)
    held: set[int] = set()
    for app in config["applications"]:
        where = f"{at}: application {app['name']}"
        module, _, name = app["import_path"].partition(":")
        try:
            getattr(__import__(module, fromlist=[name]), name)
        except (ImportError, AttributeError):
            yield f"{where}: import_path: no {app['import_path']} in the code"
        try:
            held |= _ids(validate(ExpertGroupArgs, app["args"]).experts)
        except ConfigError as error:
            yield f"{where}: args: {error.message}"
        if not app["route_prefix"]:
            yield f"{where}: route_prefix: expected one, or no worker Pod gets ready"
    yield from _generated(at, config, settings, max(held, default=0) + 1)


def _ids(experts: str | dict[int, str]) -> set[int]:
    """Of all layers."""
    shares = [experts] if isinstance(experts, str) else experts.values()
    return {expert for share in shares for expert in parse_ids(share)}


def _generated(
    at: str, config: dict[str, Any], settings: MeshSettings, num_experts: int
) -> Iterator[str]:
    """It is what `k8s serve-config` prints for mesh.yaml."""
    name = settings.model_name or Path(settings.model).name
    try:
        if settings.model == DEMO_IN_IMAGE:
            num_experts = plan_start(settings.model_copy(update={"model": DEMO})).num_experts
        groups = group_args(settings, name, settings.redis.url or "", num_experts)
    except ConfigError as error:
        yield f"ConfigMap mesh: mesh.yaml: {error.message}"
        return
    expected = json.loads(json.dumps(ray_service_config(settings, groups)))
    if len(config["applications"]) != len(groups):
        got = len(config["applications"])
        yield f"{at}: applications: experts.groups of mesh.yaml makes {len(groups)}, got {got}"
    elif config != expected:
        for app, own in zip(config["applications"], expected["applications"], strict=True):
            for field in sorted(app.keys() | own.keys()):
                if app.get(field) != own.get(field):
                    yield (
                        f"{at}: application {app['name']}: {field}: expected {own.get(field)}, "
                        f"got {app.get(field)}; run `expertmesh k8s serve-config` again"
                    )


def own_containers(documents: list[Manifest]) -> Iterator[tuple[Pod, dict[str, Any]]]:
    """Containers that run an `expertmesh` command."""
    for pod in pods(documents):
        for container in pod.containers():
            if container["name"] in READY_SERVICES:
                yield pod, container


def _commands(documents: list[Manifest], settings: MeshSettings) -> Iterator[str]:
    seen = set()
    for pod, container in own_containers(documents):
        at, name = f"{pod.owner}: container {container['name']}", container["name"]
        seen.add(name)
        yield from _arguments(at, container["args"])
        mounts = [own["mountPath"] for own in container["volumeMounts"]]
        for file in (container["args"][-1], settings.redis.password_file):
            if not file or str(Path(file).parent) not in mounts:
                yield f"{at}: volumeMounts: nothing is mounted where {file} should be"
        own: Any = getattr(settings, name)
        if port_names(pod).get("grpc") != own.port:
            yield f"{at}: ports: {name}.port is {own.port}, got {port_names(pod).get('grpc')}"
        if own.host not in ("0.0.0.0", "[::]"):
            yield f"ConfigMap mesh: mesh.yaml: {name}.host: {own.host} is not reached from outside"
        yield from _probes(at, container, own.port)
        pre_stop_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        drain_s = getattr(own, "drain_s", 0.0)  # a controller leaves its move to the next one
        needed_s = pre_stop_s + drain_s + CLOSING_S
        if pod.spec["terminationGracePeriodSeconds"] < needed_s:
            yield (
                f"{pod.owner}: {pod.path}.terminationGracePeriodSeconds: expected at least "
                f"{needed_s:g}: preStop {pre_stop_s}, {name}.drain_s {drain_s:g}, closing"
            )
    for name in READY_SERVICES.keys() - seen:
        yield f"no container runs `expertmesh {name}`"
    yield from _worker_files(documents, settings)


def _arguments(at: str, args: list[str]) -> Iterator[str]:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser().parse_args(args)
    except SystemExit:
        yield f"{at}: args: {said.getvalue().splitlines()[-1]}"


def _probes(at: str, container: dict[str, Any], port: int) -> Iterator[str]:
    expected = {"livenessProbe": LIVENESS, "startupProbe": LIVENESS}
    expected["readinessProbe"] = READY_SERVICES[container["name"]]
    for probe, service in expected.items():
        if probe not in container:
            if probe != "startupProbe":
                yield f"{at}: {probe}: not set"
            continue
        own = container[probe].get("grpc")
        if own is None:
            continue  # with TLS, components/tls asks in another way
        if own.get("service") != service:
            yield f"{at}: {probe}.grpc.service: expected {service!r}, got {own.get('service')!r}"
        if own["port"] != port:
            yield f"{at}: {probe}.grpc.port: expected {port}, got {own['port']}"


def _worker_files(documents: list[Manifest], settings: MeshSettings) -> Iterator[str]:
    for pod in workers(documents):
        [worker] = [own for own in pod.spec["containers"] if own["name"] == "ray-worker"]
        mounts = [own["mountPath"] for own in worker["volumeMounts"]]
        file = settings.redis.password_file
        if not file or str(Path(file).parent) not in mounts:
            yield f"{pod.owner}: volumeMounts: redis.password_file is {file}, mounted is {mounts}"
        command = worker["lifecycle"]["preStop"]["exec"]["command"]
        yield from _arguments(f"{pod.owner}: lifecycle.preStop", command[1:])
        args = parser().parse_args(command[1:])
        if args.ports != settings.experts.ports:
            yield f"{pod.owner}: lifecycle.preStop: experts.ports is {settings.experts.ports}"
        grace_s = pod.spec["terminationGracePeriodSeconds"]
        if grace_s < args.timeout or args.timeout < DRAIN_TIMEOUT_S:
            yield (
                f"{pod.owner}: {pod.path}.terminationGracePeriodSeconds: expected more than the "
                f"preStop's {args.timeout:g} s, and that more than {DRAIN_TIMEOUT_S:g} s"
            )


def _addresses(documents: list[Manifest], settings: MeshSettings) -> Iterator[str]:
    addresses = {"redis.url": settings.redis.url or ""}
    if settings.otlp_endpoint:
        addresses["otlp_endpoint"] = settings.otlp_endpoint
    for field, url in addresses.items():
        match = re.fullmatch(r"\w+://([\w.-]+):(\d+)(/\d+)?", url)
        services = {own["metadata"]["name"]: own for own in of_kind(documents, "Service")}
        if not match or match[1] not in services:
            yield f"ConfigMap mesh: mesh.yaml: {field}: {url!r} names no Service here"
            continue
        if int(match[2]) not in [port["port"] for port in services[match[1]]["spec"]["ports"]]:
            yield f"ConfigMap mesh: mesh.yaml: {field}: {url!r}: no such port of the Service"
    ray = named(documents, "RayService", "experts")["spec"]["rayClusterConfig"]
    host = ray["gcsFaultToleranceOptions"]["redisAddress"].partition(":")[0]
    if host == (settings.redis.url or "").partition("//")[2].partition(":")[0]:
        yield "RayService experts: redisAddress: heartbeats must have a Redis of their own"
    named(documents, "Service", host)


def _variables(documents: list[Manifest]) -> Iterator[str]:
    """Variables of ours are fields of the settings; Ray's are known to Ray."""
    for pod in pods(documents):
        for container in pod.containers():
            for env in container.get("env", []):
                name = env["name"]
                field = name.removeprefix("EXPERTMESH_").lower().replace("__", ".")
                if name.startswith("EXPERTMESH_") and not _is_field(field):
                    yield f"{pod.owner}: env {name}: no such setting"
                if name.startswith("RAY_") and not known_to_ray(name):
                    yield f"{pod.owner}: env {name}: Ray knows no such variable"


def _is_field(dotted: str) -> bool:
    model: Any = MeshSettings
    for part in dotted.split("."):
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            return False
        model = fields[part].annotation
    return True


@functools.cache
def known_to_ray(text: str) -> bool:
    """Whether the installed Ray's Python code has this word."""
    import ray

    root = Path(str(ray.__file__)).parent
    folders = ("serve/_private", "_common", "_private")
    files = (file for folder in folders for file in sorted((root / folder).rglob("*.py")))
    return any(f'"{text}"'.encode() in file.read_bytes() for file in files)

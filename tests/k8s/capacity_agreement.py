"""Whether Pods have the CPUs, GPUs and memory that what runs in them needs."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tests.k8s.policy import selects
from tests.k8s.rendering import Manifest, label, named, of_kind

from expertmesh.services.k8s.render import model_sizes
from expertmesh.services.k8s.sizing import (
    GIB,
    gateway_need,
    router_need,
    volume_need,
    worker_need,
)
from expertmesh.services.preflight import plan_start
from expertmesh.services.settings import MeshSettings

DEMO = str(Path(__file__).parents[2] / "examples" / "demo-moe")
DEMO_IN_IMAGE = "/opt/expertmesh/demo-moe"
_SUFFIXES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 10**3, "M": 10**6, "G": 10**9}


def serve_config(documents: list[Manifest]) -> dict[str, Any]:
    """serveConfigV2 as Ray's dashboard gets it."""
    parsed: dict[str, Any] = yaml.safe_load(
        named(documents, "RayService", "experts")["spec"]["serveConfigV2"]
    )
    return parsed


def quantity(text: str) -> float:
    """Kubernetes' notation of numbers: "500m", "4Gi"."""
    match = re.fullmatch(r"([\d.]+)([A-Za-z]*)", text)
    assert match, text
    return float(match[1]) * {"": 1, "m": 1e-3, **_SUFFIXES}[match[2]]


def faults(documents: list[Manifest], settings: MeshSettings) -> Iterator[str]:
    """The Pods of each pool have the CPUs, GPUs and memory that its replicas reserve."""
    ray = named(documents, "RayService", "experts")["spec"]["rayClusterConfig"]
    apps = serve_config(documents)["applications"]
    if settings.model == DEMO_IN_IMAGE:
        yield from of_checkpoint(documents, settings, DEMO)
    for at, group in enumerate(ray["workerGroupSpecs"]):
        own = [
            app
            for app in apps
            if selects(app["args"].get("label_selector", {}), group.get("labels", {}))
        ]
        where = f"RayService experts: spec.rayClusterConfig.workerGroupSpecs[{at}]"
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        replicas = sum(app["deployments"][0]["num_replicas"] for app in own)
        for name, field in (("cpu", "num_cpus"), ("nvidia.com/gpu", "num_gpus")):
            needed = sum(
                app["args"].get(field, 0) * app["deployments"][0]["num_replicas"] for app in own
            )
            has = group["minReplicas"] * quantity(limits.get(name, "0"))
            if needed > has:
                yield f"{where}: {name}: its replicas reserve {needed:g}, its Pods have {has:g}"
        needed_bytes = _pod_bytes(settings, replicas, group["minReplicas"])
        if quantity(limits["memory"]) < needed_bytes:
            yield (
                f"{where}.template.spec.containers[0].resources.limits.memory: expected at least "
                f"{needed_bytes / GIB:g}Gi for {replicas} replicas in {group['minReplicas']} Pods, "
                f"got {limits['memory']}"
            )


def of_checkpoint(
    documents: list[Manifest], settings: MeshSettings, checkpoint: str
) -> Iterator[str]:
    """Gateway, router and volume have the room that the planner says this model needs.

    Args:
        checkpoint: where the model lies here.
    """
    sizes = model_sizes(checkpoint, settings.dtype)
    needs = {
        "gateway": gateway_need(sizes, settings.gateway.kv_cache_tokens),
        "router": router_need(sizes),
    }
    for document in of_kind(documents, "Deployment"):
        containers = document["spec"]["template"]["spec"]["containers"]
        for own in containers:
            need, limit = needs.get(own["name"]), own["resources"]["limits"]["memory"]
            if need and quantity(limit) < need.num_bytes:
                yield (
                    f"{label(document)}: container {own['name']}: resources.limits.memory: "
                    f"expected at least {need}; got {limit}"
                )
    for claim in of_kind(documents, "PersistentVolumeClaim"):
        need, storage = volume_need(sizes), claim["spec"]["resources"]["requests"]["storage"]
        if quantity(storage) < need.num_bytes:
            yield (
                f"{label(claim)}: spec.resources.requests.storage: expected at least {need}; "
                f"got {storage}"
            )


def _pod_bytes(settings: MeshSettings, replicas: int, num_pods: int) -> int:
    each = -(-replicas // num_pods)
    cpu_bytes = 0
    if settings.model == DEMO_IN_IMAGE:
        plan = plan_start(settings.model_copy(update={"model": DEMO}))
        cpu_bytes = each * max(plan.group_bytes)
    return worker_need(settings.experts.host_memory_bytes, cpu_bytes, each).num_bytes

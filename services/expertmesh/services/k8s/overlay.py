"""The files of an overlay, from the base's own manifests and the sizes of a model. Pure."""

import copy
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from expertmesh.services.k8s.pools import GpuPool
from expertmesh.services.k8s.products import PRODUCT_LABEL, PRODUCTS
from expertmesh.services.k8s.sizing import (
    GIB,
    ModelSizes,
    Need,
    gateway_need,
    router_need,
    volume_need,
    worker_need,
)
from expertmesh.services.settings import MeshSettings

Manifest = dict[str, Any]
WEIGHTS = "/models"
_SPARE_PODS = 1  # an update starts new replicas beside the old ones
_WORKER_CPUS = 4
_CLAIM = "weights"


@dataclass(frozen=True)
class Overlay:
    """What `render` has decided."""

    name: str
    """Of the model's directory."""
    sizes: ModelSizes
    pools: Mapping[str, GpuPool]
    settings: MeshSettings
    base: str
    """Path from the overlay to the base."""

    def needs(self) -> dict[str, Need]:
        """Memory of each kind of Pod, and the volume."""
        settings = self.settings
        return {
            "gateway": gateway_need(self.sizes, settings.gateway.kv_cache_tokens),
            "router": router_need(self.sizes),
            "worker": worker_need(settings.experts.host_memory_bytes),
            "volume": volume_need(self.sizes),
        }


def mesh_values(
    base_values: Mapping[str, Any], name: str, pools: Mapping[str, GpuPool]
) -> Manifest:
    """mesh.yaml: the base's, with the model and its pools."""
    values: Manifest = copy.deepcopy(dict(base_values))
    experts = values["experts"]
    for field in ("groups", "replicas"):
        experts.pop(field, None)
    experts |= {
        "device": "cuda",
        "pools": {
            name: pool.settings.model_dump(exclude_defaults=True) for name, pool in pools.items()
        },
    }
    return values | {"model": f"{WEIGHTS}/{name}"}


def files(overlay: Overlay, template: Manifest) -> dict[str, Any]:
    """File name -> its YAML documents, for all but mesh.yaml and serve.yaml.

    Args:
        template: the base's RayService.
    """
    return {
        "kustomization.yaml": kustomization(overlay),
        "worker-groups.yaml": worker_groups(overlay, template),
        "sizes.yaml": [*_deployments(overlay), _disruption_budget(overlay)],
        "weights.yaml": _claim(overlay),
    }


def kustomization(overlay: Overlay) -> Manifest:
    """What ties the files together."""
    local = {"config.kubernetes.io/local-config": "true"}
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "expertmesh",
        "resources": [overlay.base],
        "components": [posixpath.normpath(f"{overlay.base}/../components/weights-pvc")],
        "patches": [
            {"path": "worker-groups.yaml"},
            {"path": "sizes.yaml"},
            {"path": "weights.yaml"},
        ],
        # the patch brings images that the base's tags no longer reach
        "images": [{"name": "expertmesh-experts", "newTag": version("expertmesh")}],
        "configMapGenerator": [
            {"name": "mesh", "behavior": "replace", "files": ["mesh.yaml"]},
            {
                "name": "serve-overlay",
                "files": ["serve=serve.yaml"],
                "options": {"disableNameSuffixHash": True, "annotations": local},
            },
        ],
        "replacements": [_into_ray_service("serve-overlay")],
    }


def _into_ray_service(config_map: str) -> Manifest:
    """What puts the text of serve.yaml where KubeRay looks for it."""
    target = {
        "select": {"kind": "RayService", "name": "experts"},
        "fieldPaths": ["spec.serveConfigV2"],
    }
    source = {"kind": "ConfigMap", "name": config_map, "fieldPath": "data.serve"}
    return {"source": source, "targets": [target]}


def worker_groups(overlay: Overlay, template: Manifest) -> Manifest:
    """A patch that puts a group of Pods for each pool in place of the base's."""
    [group] = template["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    memory_bytes = overlay.needs()["worker"].num_bytes
    groups = [_worker_group(group, pool, memory_bytes) for pool in overlay.pools.values()]
    return {
        "apiVersion": template["apiVersion"],
        "kind": template["kind"],
        "metadata": {"name": template["metadata"]["name"]},
        "spec": {"rayClusterConfig": {"workerGroupSpecs": groups}},
    }


def _worker_group(template: Manifest, pool: GpuPool, memory_bytes: int) -> Manifest:
    group: Manifest = copy.deepcopy(template)
    name = pool.gpu
    group |= {
        "groupName": name,
        "replicas": pool.num_gpus,
        "minReplicas": pool.num_gpus,
        "maxReplicas": pool.num_gpus + _SPARE_PODS,
        "labels": dict(pool.settings.label_selector),
    }
    spec = group["template"]["spec"]
    spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if name in PRODUCTS:
        spec["affinity"] = _on_nodes_with(PRODUCTS[name])
    for constraint in spec["topologySpreadConstraints"]:
        constraint["labelSelector"] = {"matchLabels": {"ray.io/group": name}}
    claim = {"name": _CLAIM, "persistentVolumeClaim": {"claimName": _CLAIM, "readOnly": True}}
    spec["volumes"] = [claim if own["name"] == _CLAIM else own for own in spec["volumes"]]
    [container] = spec["containers"]
    own = {"cpu": str(_WORKER_CPUS), "memory": quantity(memory_bytes), "nvidia.com/gpu": "1"}
    container["resources"] = {"requests": dict(own), "limits": dict(own)}
    return group


def _on_nodes_with(products: tuple[str, ...]) -> Manifest:
    term = {"key": PRODUCT_LABEL, "operator": "In", "values": list(products)}
    terms = {"nodeSelectorTerms": [{"matchExpressions": [term]}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}


def _deployments(overlay: Overlay) -> list[Manifest]:
    needs = overlay.needs()
    return [_memory_of(name, needs[name].num_bytes) for name in ("gateway", "router")]


def _memory_of(name: str, memory_bytes: int) -> Manifest:
    memory = quantity(memory_bytes)
    resources = {"requests": {"memory": memory}, "limits": {"memory": memory}}
    containers = [{"name": name, "resources": resources}]
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {"template": {"spec": {"containers": containers}}},
    }


def _disruption_budget(overlay: Overlay) -> Manifest:
    num_pods = sum(pool.num_gpus for pool in overlay.pools.values())
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": "experts"},
        "spec": {"minAvailable": max(1, num_pods - 1)},
    }


def _claim(overlay: Overlay) -> Manifest:
    storage = quantity(overlay.needs()["volume"].num_bytes)
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": _CLAIM},
        "spec": {"resources": {"requests": {"storage": storage}}},
    }


def quantity(num_bytes: int) -> str:
    """Whole GiB as Kubernetes writes them."""
    return f"{-(-num_bytes // GIB)}Gi"

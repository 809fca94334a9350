"""The Pods that KubeRay 1.7 makes of a RayService, as far as policies and ports are concerned.

After ray-operator/controllers/ray/common/pod.go: labels, the autoscaler next to the head, the init
container that waits for the head, restart policies, and the job that cleans Redis up.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.k8s.rendering import Manifest, of_kind

SERVE_HTTP_PORT = 8000
AGENT_PORT = 52365
METRICS_PORT = 8080
DASHBOARD_PORT = 8265
PROGRAMS = ("bash", "wget", "grep")
"""What its readiness command runs in the image."""


@dataclass(frozen=True)
class Pod:
    """A Pod, or the template of one, and where it is from."""

    owner: str
    """Like "Deployment gateway" or "RayService experts, head"."""
    path: str
    """Of its spec inside the owner, for messages."""
    labels: dict[str, str]
    spec: dict[str, Any]

    def containers(self) -> list[dict[str, Any]]:
        """Those that run, and those that run before."""
        return [*self.spec["containers"], *self.spec.get("initContainers", [])]


def pods(documents: list[Manifest]) -> list[Pod]:
    """All Pods that come of the manifests."""
    found = [_of_template(document) for document in of_kind(documents, *_TEMPLATED)]
    for service in of_kind(documents, "RayService"):
        found += _of_ray(service)
    return found


def workers(documents: list[Manifest]) -> list[Pod]:
    """The Pods of replicas."""
    return [pod for pod in pods(documents) if pod.labels.get("ray.io/node-type") == "worker"]


_TEMPLATED = ("Deployment", "StatefulSet", "Job")


def _of_template(document: Manifest) -> Pod:
    template = document["spec"]["template"]
    owner = f"{document['kind']} {document['metadata']['name']}"
    return Pod(owner, "spec.template.spec", template["metadata"]["labels"], template["spec"])


def _of_ray(service: Manifest) -> Iterator[Pod]:
    name, cluster = service["metadata"]["name"], service["spec"]["rayClusterConfig"]
    path = "spec.rayClusterConfig"
    head = cluster["headGroupSpec"]
    yield Pod(
        f"RayService {name}, head",
        f"{path}.headGroupSpec.template.spec",
        _labels(name, "head", "headgroup", head),
        _head_spec(cluster),
    )
    for at, group in enumerate(cluster["workerGroupSpecs"]):
        yield Pod(
            f"RayService {name}, {group['groupName']}",
            f"{path}.workerGroupSpecs[{at}].template.spec",
            _labels(name, "worker", group["groupName"], group),
            _worker_spec(group),
        )
    if "gcsFaultToleranceOptions" in cluster:
        spec = copy.deepcopy(head["template"]["spec"]) | {"restartPolicy": "Never"}
        labels = _labels(name, "redis-cleanup", "headgroup", head)
        where = f"{path}.headGroupSpec.template.spec"
        yield Pod(f"RayService {name}, clean-up", where, labels, spec)


def _labels(name: str, kind: str, group: str, spec: dict[str, Any]) -> dict[str, str]:
    own: dict[str, str] = spec["template"].get("metadata", {}).get("labels", {})
    return own | {
        "ray.io/is-ray-node": "yes",
        "ray.io/node-type": kind,
        "ray.io/group": group,
        "ray.io/cluster": f"{name}-abcde",
        "ray.io/originated-from-cr-name": name,
        "ray.io/originated-from-crd": "RayService",
    }


def _head_spec(cluster: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = copy.deepcopy(cluster["headGroupSpec"]["template"]["spec"])
    if cluster.get("enableInTreeAutoscaling"):
        options = cluster.get("autoscalerOptions", {})
        sidecar = {
            "name": "autoscaler",
            "image": options.get("image", spec["containers"][0]["image"]),
            "command": ["/bin/bash", "-c", "--"],
            "resources": options.get("resources", {}),
        }
        if "securityContext" in options:  # the head's own is not taken
            sidecar["securityContext"] = options["securityContext"]
        spec["containers"].append(sidecar)
        spec["restartPolicy"] = "Never"
    return spec


def _worker_spec(group: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = copy.deepcopy(group["template"]["spec"])
    first = spec["containers"][0]
    waits = {name: first[name] for name in ("image", "securityContext", "env") if name in first}
    waits |= {"name": "wait-gcs-ready", "command": ["/bin/bash", "-c", "--"]}
    spec.setdefault("initContainers", []).append(waits)
    return spec

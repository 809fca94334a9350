"""Whether network policies let through what the processes need, and little else."""

from collections.abc import Iterator

from tests.k8s.kuberay import Pod, pods, workers
from tests.k8s.policy import port_names, selects
from tests.k8s.rendering import Manifest, of_kind

from expertmesh.runtime.connection_age import ConnectionAge
from expertmesh.runtime.ports import parse_ports
from expertmesh.services.serve_config import SERVE_HTTP_PORT
from expertmesh.services.settings import MeshSettings

CALLERS = ("gateway", "router", "controller")
"""Who calls replicas."""


def allowed(documents: list[Manifest], to: Pod, come_from: dict[str, str]) -> set[int]:
    """Ports of a Pod that Pods (or namespaces) with these labels reach by the policies."""
    ports: set[int] = set()
    for policy in of_kind(documents, "NetworkPolicy"):
        if not selects(policy["spec"]["podSelector"], to.labels):
            continue
        for rule in policy["spec"].get("ingress", []):
            peers = [own.get("podSelector") or own["namespaceSelector"] for own in rule["from"]]
            if any(selects(peer, come_from) for peer in peers):
                for port in rule.get("ports", [{"port": 1, "endPort": 65535}]):
                    first = port_names(to).get(port["port"], port["port"])
                    if isinstance(first, int):
                        ports |= set(range(first, port.get("endPort", first) + 1))
    return ports


def faults(documents: list[Manifest], settings: MeshSettings) -> Iterator[str]:
    yield from _headless(documents, settings)
    rows = set(parse_ports(settings.experts.ports))
    if rows == {0}:
        yield "ConfigMap mesh: mesh.yaml: experts.ports: expected a range, as policies need one"
    operator = {"kubernetes.io/metadata.name": "kuberay-system"}
    for pod in workers(documents):
        for name in CALLERS:
            reached = allowed(documents, pod, {"app.kubernetes.io/name": name})
            if missing := rows - reached:
                yield (
                    f"NetworkPolicy ray: the {name} does not reach ports {min(missing)} to "
                    f"{max(missing)} of {pod.owner}; experts.ports is {settings.experts.ports}"
                )
            if name not in pod.labels.values() and (more := reached - rows - {SERVE_HTTP_PORT}):
                yield f"NetworkPolicy ray: the {name} reaches {sorted(more)[:3]}, too"
        if SERVE_HTTP_PORT not in allowed(documents, pod, operator):
            yield f"NetworkPolicy ray: KubeRay does not reach port 8000 of {pod.owner}"
    for pod in pods(documents):
        missing = {8265, 8000, 52365} - allowed(documents, pod, operator)
        if missing and pod.labels.get("ray.io/node-type") == "head":
            yield f"NetworkPolicy ray: KubeRay does not reach ports {missing} of the head"
        if pod.labels.get("app.kubernetes.io/name") == "redis-state":
            for caller in ({"app.kubernetes.io/name": "gateway"}, {"ray.io/is-ray-node": "yes"}):
                if 6379 not in allowed(documents, pod, caller):
                    yield f"NetworkPolicy redis-state: port 6379 is closed for {caller}"


def _headless(documents: list[Manifest], settings: MeshSettings) -> Iterator[str]:
    """Who balances by DNS asks it when a connection ends."""
    for service in of_kind(documents, "Service"):
        name = service["metadata"]["name"].removesuffix("-headless")
        own = getattr(settings, name, None)
        if service["spec"].get("clusterIP") != "None" or not isinstance(own, ConnectionAge):
            continue
        if own.max_connection_age_s is None:
            yield (
                f"ConfigMap mesh: mesh.yaml: {name}.max_connection_age_s: expected seconds, as "
                f"clients of Service {name}-headless find new Pods only when they connect anew"
            )

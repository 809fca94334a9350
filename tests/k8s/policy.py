"""What an expert would refuse in review, although Kubernetes takes it."""

import re
from collections.abc import Iterator
from typing import Any

from tests.k8s import references
from tests.k8s.kuberay import Pod, pods
from tests.k8s.rendering import Manifest, label, of_kind

_VERSIONED = re.compile(r".+[:@][A-Za-z0-9][\w.:-]+")
_SECRET_NAME = re.compile(r"PASSWORD|TOKEN|SECRET|KEY", re.IGNORECASE)


def faults(documents: list[Manifest]) -> list[str]:
    """What is wrong, each with its owner and field."""
    found = pods(documents)
    return [
        *(fault for pod in found for fault in _pod(pod)),
        *references.faults(documents, found),
        *_services(documents, found),
        *_budgets(documents, found),
        *_scalers(documents),
        *(f"{label(d)}: a Secret in git" for d in of_kind(documents, "Secret")),
    ]


def _pod(pod: Pod) -> Iterator[str]:
    at = f"{pod.owner}: {pod.path}"
    context = pod.spec.get("securityContext", {})
    if context.get("runAsNonRoot") is not True:
        yield f"{at}.securityContext.runAsNonRoot: expected true, as the namespace is restricted"
    if not isinstance(context.get("runAsUser"), int) or context["runAsUser"] == 0:
        yield f"{at}.securityContext.runAsUser: expected a number above 0"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield f"{at}.securityContext.seccompProfile.type: expected RuntimeDefault"
    if pod.spec.get("enableServiceLinks") is not False:
        yield (
            f"{at}.enableServiceLinks: expected false: Services named expertmesh-* would set "
            "EXPERTMESH_* variables, and our processes refuse unknown ones"
        )
    needs_token = pod.labels.get("ray.io/node-type") in ("head", "redis-cleanup")  # autoscaler
    if not needs_token and pod.spec.get("automountServiceAccountToken") is not False:
        yield f"{at}.automountServiceAccountToken: expected false"
    if "terminationGracePeriodSeconds" not in pod.spec and "Job" not in pod.owner:
        yield f"{at}.terminationGracePeriodSeconds: not set"
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(field):
            yield f"{at}.{field}: refused by restricted Pod Security"
    for container in pod.containers():
        yield from _container(pod, container)
    yield from _volumes(pod)


def _container(pod: Pod, container: dict[str, Any]) -> Iterator[str]:
    at = f"{pod.owner}: {pod.path}, container {container['name']}"
    context = container.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False:
        yield f"{at}: securityContext.allowPrivilegeEscalation: expected false"
    if context.get("capabilities", {}).get("drop") != ["ALL"]:
        yield f"{at}: securityContext.capabilities.drop: expected [ALL]"
    if context.get("privileged"):
        yield f"{at}: securityContext.privileged: refused"
    if "RayService" not in pod.owner and not context.get("readOnlyRootFilesystem"):
        yield f"{at}: securityContext.readOnlyRootFilesystem: expected true"
    image = container.get("image", "")
    if not _VERSIONED.fullmatch(image.rpartition("/")[2]) or image.endswith(":latest"):
        yield f"{at}: image: expected a version or digest, got {image!r}"
    yield from _resources(at, container)
    for env in container.get("env", []):
        if _SECRET_NAME.search(env["name"]) and env.get("value"):
            yield f"{at}: env {env['name']}: a secret in plain text"


def _resources(at: str, container: dict[str, Any]) -> Iterator[str]:
    if container["name"] == "wait-gcs-ready":  # KubeRay's
        return
    resources = container.get("resources", {})
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for name in ("cpu", "memory"):
        if name not in requests:
            yield f"{at}: resources.requests.{name}: not set"
    if requests.get("memory") != limits.get("memory"):
        yield f"{at}: resources.limits.memory: expected the request, {requests.get('memory')}"


def _volumes(pod: Pod) -> Iterator[str]:
    volumes = {own["name"]: own for own in pod.spec.get("volumes", [])}
    claims = {"data"} if "StatefulSet" in pod.owner else set()
    for container in pod.containers():
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes.keys() | claims:
                yield (
                    f"{pod.owner}: container {container['name']}: volumeMounts: "
                    f"no volume {mount['name']!r}"
                )
    for name, volume in volumes.items():
        if "hostPath" in volume:
            yield f"{pod.owner}: volumes.{name}.hostPath: refused by restricted Pod Security"


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a selector by labels takes them; `matchLabels` or the labels themselves."""
    wanted = selector.get("matchLabels", selector)
    return all(labels.get(name) == value for name, value in wanted.items())


def _services(documents: list[Manifest], found: list[Pod]) -> Iterator[str]:
    for service in of_kind(documents, "Service"):
        spec = service["spec"]
        if spec.get("type") == "ExternalName":
            continue
        behind = [pod for pod in found if selects(spec["selector"], pod.labels)]
        if not behind:
            yield f"{label(service)}: spec.selector: selects no Pod"
        for pod in behind:
            for port in spec["ports"]:
                if port["targetPort"] not in port_names(pod).keys() | port_names(pod).values():
                    yield (
                        f"{label(service)}: spec.ports.{port['name']}.targetPort: {pod.owner} has "
                        f"no port {port['targetPort']!r}"
                    )
                if spec.get("clusterIP") == "None":
                    number = port_names(pod).get(port["targetPort"], port["targetPort"])
                    if number != port["port"]:
                        yield f"{label(service)}: spec.ports.port: headless, so expected {number}"


def port_names(pod: Pod) -> dict[str, int]:
    """Name -> number of all ports of a Pod."""
    return {
        port["name"]: port["containerPort"]
        for container in pod.containers()
        for port in container.get("ports", [])
    }


def _budgets(documents: list[Manifest], found: list[Pod]) -> Iterator[str]:
    budgets = of_kind(documents, "PodDisruptionBudget")
    for budget in budgets:
        spec = budget["spec"]
        behind = [pod for pod in found if selects(spec["selector"], pod.labels)]
        if not behind:
            yield f"{label(budget)}: spec.selector: selects no Pod"
        if any("RayService" in pod.owner for pod in behind) and not isinstance(
            spec.get("minAvailable"), int
        ):
            yield (
                f"{label(budget)}: spec.minAvailable: expected a number: a RayCluster has no scale "
                "subresource, and with maxUnavailable nothing could be evicted"
            )
    for document in of_kind(documents, "Deployment"):
        labels = document["spec"]["template"]["metadata"]["labels"]
        many = "replicas" not in document["spec"]
        if many and not any(selects(own["spec"]["selector"], labels) for own in budgets):
            yield f"{label(document)}: no PodDisruptionBudget"


def _scalers(documents: list[Manifest]) -> Iterator[str]:
    scaled = [
        own["spec"]["scaleTargetRef"]["name"]
        for own in of_kind(documents, "HorizontalPodAutoscaler", "ScaledObject")
    ]
    for document in of_kind(documents, "Deployment"):
        name, owns = document["metadata"]["name"], "replicas" in document["spec"]
        if scaled.count(name) + owns != 1:
            yield (
                f"{label(document)}: spec.replicas: expected one owner of it, got "
                f"{scaled.count(name)} autoscalers and {'a' if owns else 'no'} number"
            )

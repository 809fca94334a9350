"""Whether everything that Pods name exists, or is among what k8s/README.md asks people for."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.k8s.kuberay import Pod
from tests.k8s.rendering import Manifest, label, of_kind

EXTERNAL_SECRETS = {"redis-state": ("password",), "redis-gcs": ("password",), "weights-source": ()}
"""Secrets that people bring, and the keys they must have."""


@dataclass(frozen=True)
class _Known:
    """Names of what is there."""

    config_maps: set[str]
    accounts: set[str]
    claims: set[str]
    priorities: set[str]
    secrets: set[str]


def faults(documents: list[Manifest], pods: Iterable[Pod]) -> Iterator[str]:
    """What is named and is not there."""
    known = _Known(
        _names(documents, "ConfigMap"),
        _names(documents, "ServiceAccount"),
        _names(documents, "PersistentVolumeClaim"),
        _names(documents, "PriorityClass"),
        {own["spec"]["secretName"] for own in of_kind(documents, "Certificate")}
        | EXTERNAL_SECRETS.keys(),
    )
    for pod in pods:
        yield from _of_pod(pod, known)
    yield from _ray_secret(documents)


def _names(documents: list[Manifest], kind: str) -> set[str]:
    return {document["metadata"]["name"] for document in of_kind(documents, kind)}


def _of_pod(pod: Pod, known: _Known) -> Iterator[str]:
    at = f"{pod.owner}: {pod.path}"
    priority = pod.spec.get("priorityClassName")
    if priority and priority not in known.priorities:
        yield f"{at}.priorityClassName: no PriorityClass {priority!r}"
    account = pod.spec.get("serviceAccountName")
    if account and account not in known.accounts:
        yield f"{at}.serviceAccountName: no ServiceAccount {account!r}"
    for volume in pod.spec.get("volumes", []):
        yield from _volume(f"{at}.volumes.{volume['name']}", volume, known)
    for container in pod.containers():
        yield from _variables(at, container)


def _volume(at: str, volume: dict[str, Any], known: _Known) -> Iterator[str]:
    claim = volume.get("persistentVolumeClaim", {}).get("claimName")
    if claim and claim not in known.claims:
        yield f"{at}.persistentVolumeClaim.claimName: no claim {claim!r}"
    config_map = volume.get("configMap", {}).get("name")
    if config_map and config_map not in known.config_maps:
        yield f"{at}.configMap.name: no ConfigMap {config_map!r}"
    secret = volume.get("secret", {})
    if secret and not secret.get("optional") and secret["secretName"] not in known.secrets:
        yield f"{at}.secret.secretName: no Secret {secret['secretName']!r} is made or asked for"


def _variables(at: str, container: dict[str, Any]) -> Iterator[str]:
    for env in container.get("env", []):
        reference = env.get("valueFrom", {}).get("secretKeyRef")
        if reference and reference["key"] not in EXTERNAL_SECRETS.get(reference["name"], ()):
            yield f"{at}: env {env['name']}: no key {reference['key']!r} in {reference['name']!r}"


def _ray_secret(documents: list[Manifest]) -> Iterator[str]:
    for service in of_kind(documents, "RayService"):
        options = service["spec"]["rayClusterConfig"].get("gcsFaultToleranceOptions", {})
        reference = options.get("redisPassword", {}).get("valueFrom", {}).get("secretKeyRef")
        if reference and reference["key"] not in EXTERNAL_SECRETS.get(reference["name"], ()):
            yield (
                f"{label(service)}: spec.rayClusterConfig.gcsFaultToleranceOptions.redisPassword: "
                f"no Secret {reference['name']!r} with a key {reference['key']!r}"
            )

"""The kinds the server knows from the start."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple


class Key(NamedTuple):
    """What a URL says of a kind."""

    group: str
    version: str
    plural: str

    @property
    def api_version(self) -> str:
        """As manifests write it."""
        return f"{self.group}/{self.version}" if self.group else self.version


@dataclass(frozen=True)
class Kind:
    """One kind of object."""

    key: Key
    name: str
    namespaced: bool
    schema: dict[str, Any] | None = None
    """Structural, of a CRD; built-in kinds have theirs elsewhere."""

    @property
    def singular(self) -> str:
        """In messages of kubectl."""
        return self.name.lower()


_BUILT_IN = """
v1 Namespace namespaces -
v1 ConfigMap configmaps +
v1 Pod pods +
v1 Secret secrets +
v1 Service services +
v1 ServiceAccount serviceaccounts +
v1 PersistentVolumeClaim persistentvolumeclaims +
apps/v1 Deployment deployments +
apps/v1 StatefulSet statefulsets +
batch/v1 Job jobs +
policy/v1 PodDisruptionBudget poddisruptionbudgets +
autoscaling/v2 HorizontalPodAutoscaler horizontalpodautoscalers +
networking.k8s.io/v1 NetworkPolicy networkpolicies +
scheduling.k8s.io/v1 PriorityClass priorityclasses -
"""


def built_in() -> Iterator[Kind]:
    """All of them."""
    for line in _BUILT_IN.split("\n"):
        if line:
            api, name, plural, scope = line.split()
            group, _, version = api.rpartition("/")
            yield Kind(Key(group, version, plural), name, scope == "+")


def custom(api: str, name: str, plural: str, schema: dict[str, Any]) -> Kind:
    """A kind of a CRD, namespaced."""
    group, _, version = api.rpartition("/")
    return Kind(Key(group, version, plural), name, True, schema)

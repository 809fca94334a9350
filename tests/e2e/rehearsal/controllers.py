"""Stand-ins for Kubernetes' controllers of Deployments and StatefulSets."""

import copy
import hashlib
import json
import threading
from itertools import count
from typing import Any

from tests.e2e.rehearsal.cluster import Cluster, Manifest
from tests.e2e.rehearsal.pods import Pod

_HASH = "pod-template-hash"
_numbers = count()


def template_hash(template: Manifest) -> str:
    """Another one for each change of the template."""
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:10]


class Deployments:
    """Keeps as many Pods of each Deployment and StatefulSet as it asks for; rolls changes out with
    one more Pod than that, or, with `Recreate`, after the old ones are gone."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.deleted_s: dict[str, float] = {}
        """Seconds that Pods took to go, by name."""

    def reconcile(self) -> None:
        """One look at everything; call it again and again."""
        for deployment in self._cluster.all("Deployment"):
            self._deployment(deployment)
        for stateful in self._cluster.all("StatefulSet"):
            name = f"{stateful['metadata']['name']}-0"
            if name not in self._cluster.pods:
                self._cluster.start(_pod(stateful, name, {}))

    def _deployment(self, deployment: Manifest) -> None:
        name, spec = deployment["metadata"]["name"], deployment["spec"]
        current = template_hash(spec["template"])
        pods = self._cluster.of(app=name)
        new = [pod for pod in pods if pod.labels[_HASH] == current]
        old = [pod for pod in pods if pod not in new]
        recreate = spec.get("strategy", {}).get("type") == "Recreate"
        if recreate and old:
            self._delete(old[0])
            return
        wanted = self._wanted(name, spec)
        ready = sum(pod.ready for pod in new)
        if len(new) < wanted and len(pods) <= wanted:
            labels = {_HASH: current}
            own = f"{name}-{current}-{next(_numbers)}"
            self._cluster.start(_pod(deployment, own, labels))
        elif old and ready + len(old) > wanted:
            self._delete(old[0])

    def _wanted(self, name: str, spec: Manifest) -> int:
        scaler = self._cluster.get("HorizontalPodAutoscaler", name)
        return int(scaler["spec"]["minReplicas"] if scaler else spec.get("replicas", 1))

    def _delete(self, pod: Pod) -> None:
        """It goes while others do."""
        self._cluster.forget(pod)

        def delete() -> None:
            self.deleted_s[pod.name] = pod.delete()

        threading.Thread(target=delete, name=f"delete-{pod.name}", daemon=True).start()


def _pod(owner: Manifest, name: str, labels: dict[str, str]) -> Manifest:
    template = owner["spec"]["template"]
    spec: dict[str, Any] = copy.deepcopy(template["spec"])
    for claim in owner["spec"].get("volumeClaimTemplates", []):
        own = claim["metadata"]["name"]
        source = {"persistentVolumeClaim": {"claimName": f"{own}-{name}"}}
        spec.setdefault("volumes", []).append({"name": own} | source)
    metadata = {
        "name": name,
        "namespace": owner["metadata"]["namespace"],
        "labels": template["metadata"]["labels"] | labels,
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}

"""A stand-in for KubeRay's operator: RayService -> RayCluster -> Pods, and Serve's config."""

import copy
import json
import secrets
import threading
import urllib.error
import urllib.request
from itertools import count
from typing import Any

import yaml
from tests.e2e.rehearsal import network, raypods
from tests.e2e.rehearsal.cluster import NAMESPACE, Cluster, Manifest
from tests.e2e.rehearsal.pods import Pod
from tests.k8s.kuberay import DASHBOARD_PORT

_numbers = count()


class Operator:
    """Of one RayService, called "experts"."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._name = ""
        self._token = secrets.token_hex(32)
        self._deployed = ""
        self.num_puts = 0
        self.deleted_s: dict[str, float] = {}
        self.refused = ""

    def reconcile(self) -> None:
        """One look at everything; call it again and again."""
        service = self._cluster.get("RayService", "experts")
        if service is None:
            return
        if not self._name:
            self.begin(service)
        cluster = self._cluster.get("RayCluster", self._name)
        assert cluster
        self._pods(cluster)
        self._deploy(service["spec"]["serveConfigV2"])

    def cluster(self) -> Manifest:
        """The RayCluster as it is."""
        found = self._cluster.get("RayCluster", self._name)
        assert found
        return found

    def applications(self) -> dict[str, Any]:
        """What Serve says of them; nothing if it does not answer."""
        try:
            answer = json.loads(self._ask("GET", None))
        except OSError:
            return {}
        found: dict[str, Any] = answer.get("applications", {})
        return found

    def replicas(self) -> dict[str, int]:
        """That run, by group."""
        return {
            name: sum(own["state"] == "RUNNING" for own in app["deployments"][name]["replicas"])
            for name, app in self.applications().items()
            if name in app.get("deployments", {})
        }

    def lives(self) -> set[str]:
        """The replicas that run, each with a name of its own."""
        return {
            own["replica_id"]
            for app in self.applications().values()
            for deployment in app.get("deployments", {}).values()
            for own in deployment["replicas"]
            if own["state"] == "RUNNING"
        }

    def running(self) -> bool:
        """Whether Serve says so of every application."""
        states = [app["status"] for app in self.applications().values()]
        return bool(states) and set(states) == {"RUNNING"}

    def replace(self, pod: Pod) -> None:
        """It was killed, or failed: the next look makes another one."""
        self._cluster.forget(pod)

    def delete(self, pod: Pod) -> None:
        """As `kubectl delete pod`: it goes in its own time, and another one comes."""
        self._delete([pod])

    def begin(self, service: Manifest) -> None:
        """Its RayCluster, the token, and the head's Service."""
        name = f"{service['metadata']['name']}-rehearse"
        self._cluster.add_secret(name, auth_token=self._token)
        spec = copy.deepcopy(service["spec"]["rayClusterConfig"])
        for group in spec["workerGroupSpecs"]:
            group.setdefault("scaleStrategy", {})  # Go writes it always
        metadata = {"name": name, "namespace": NAMESPACE}
        self._cluster.put(
            {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": spec}
        )
        selector = {"ray.io/cluster": name, "ray.io/node-type": "head"}
        ports = [{"name": "gcs-server", "port": raypods.GCS_PORT}]
        self._cluster.put(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": f"{name}-head-svc", "namespace": NAMESPACE},
                "spec": {"clusterIP": "None", "selector": selector, "ports": ports},
            }
        )
        self._name = name

    def _pods(self, cluster: Manifest) -> None:
        for pod in [*self._cluster.of(ray="head"), *self._cluster.of(ray="worker")]:
            if pod.failed:
                self.replace(pod)
                pod.kill()
        if not self._cluster.of(ray="head"):
            self._cluster.start(raypods.head(cluster, _suffix(), network.NODE))
        for group in cluster["spec"]["workerGroupSpecs"]:
            self._group(cluster, group)

    def _group(self, cluster: Manifest, group: Manifest) -> None:
        pods = self._group_pods(group["groupName"])
        for name in group["scaleStrategy"].get("workersToDelete", []):
            self._delete([pod for pod in pods if pod.name == name])
        pods = self._group_pods(group["groupName"])
        wanted = max(group["minReplicas"], min(group["replicas"], group["maxReplicas"]))
        for _ in range(wanted - len(pods)):
            self._cluster.start(raypods.worker(cluster, group, _suffix()))
        self._delete(pods[wanted:])

    def _group_pods(self, name: str) -> list[Pod]:
        return [pod for pod in self._cluster.of(ray="worker") if pod.labels["ray.io/group"] == name]

    def _delete(self, pods: list[Pod]) -> None:
        for pod in pods:
            self._cluster.forget(pod)
            threading.Thread(target=self._gone, args=(pod,), daemon=True).start()

    def _gone(self, pod: Pod) -> None:
        self.deleted_s[pod.name] = pod.delete()

    def _deploy(self, config: str) -> None:
        """KubeRay hands a configuration over when it is another one than before."""
        if config == self._deployed or not any(pod.ready for pod in self._cluster.of(ray="head")):
            return
        try:
            self._ask("PUT", json.dumps(yaml.safe_load(config)).encode())
        except urllib.error.HTTPError as error:
            self.refused = error.read().decode()[:3000]
        except OSError as error:
            self.refused = str(error)
        else:
            self._deployed, self.refused = config, ""
            self.num_puts += 1

    def _ask(self, method: str, body: bytes | None) -> bytes:
        addresses = [pod.address for pod in self._cluster.of(ray="head") if pod.ready]
        if not addresses:
            raise OSError("no head is ready")
        url = f"http://{addresses[0]}:{DASHBOARD_PORT}/api/serve/applications/"
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"}
        request = urllib.request.Request(url, body, headers, method=method)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return bytes(answer.read())


def _suffix() -> str:
    return f"{next(_numbers):05}"

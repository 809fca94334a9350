"""The rehearsed cluster: an API server that kubectl talks to, Pods that run, and names for them."""

import base64
import contextlib
import copy
import os
import secrets
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.e2e.rehearsal import network
from tests.e2e.rehearsal.dns import Dns
from tests.e2e.rehearsal.outside import ROOT, STATE
from tests.e2e.rehearsal.pods import Pod
from tests.k8s import schemas
from tests.k8s.miniapi.errors import ApiError
from tests.k8s.miniapi.kinds import Key, custom
from tests.k8s.miniapi.server import serving
from tests.k8s.miniapi.store import Store
from tests.k8s.rendering import KUBECTL

Manifest = dict[str, Any]
NAMESPACE = "expertmesh"
API_PORT = 6443
KEYS = {
    kind: Key(group, version, plural)
    for kind, group, version, plural in (
        ("Pod", "", "v1", "pods"),
        ("Service", "", "v1", "services"),
        ("Secret", "", "v1", "secrets"),
        ("ConfigMap", "", "v1", "configmaps"),
        ("Deployment", "apps", "v1", "deployments"),
        ("StatefulSet", "apps", "v1", "statefulsets"),
        ("HorizontalPodAutoscaler", "autoscaling", "v2", "horizontalpodautoscalers"),
        ("RayService", "ray.io", "v1", "rayservices"),
        ("RayCluster", "ray.io", "v1", "rayclusters"),
    )
}


def _ray_cluster_schema() -> Manifest:
    service = schemas.ray_service_schema()
    config = service["properties"]["spec"]["properties"]["rayClusterConfig"]
    return {"type": "object", "properties": {"spec": config}}


class Cluster:
    """Everything that exists, and everything that runs."""

    def __init__(self) -> None:
        self.store = Store(
            schemas.NEWEST,
            [
                custom("ray.io/v1", "RayService", "rayservices", schemas.ray_service_schema()),
                custom("ray.io/v1", "RayCluster", "rayclusters", _ray_cluster_schema()),
            ],
        )
        self.pods: dict[str, Pod] = {}
        self.lock = threading.RLock()

    def get(self, kind: str, name: str) -> Manifest | None:
        """A copy."""
        with self.store.lock, contextlib.suppress(ApiError):
            return copy.deepcopy(self.store.get(KEYS[kind], NAMESPACE, name))
        return None

    def all(self, kind: str) -> list[Manifest]:
        """Copies."""
        with self.store.lock:
            return copy.deepcopy(self.store.list(KEYS[kind], NAMESPACE))

    def put(self, manifest: Manifest) -> Manifest:
        """Create or replace; a copy of what there is then."""
        key, name = KEYS[manifest["kind"]], manifest["metadata"]["name"]
        with self.store.lock:
            try:
                self.store.get(key, NAMESPACE, name)
            except ApiError:
                made = self.store.create(key, NAMESPACE, manifest, strict=True, dry=False)
            else:
                made = self.store.update(key, NAMESPACE, name, manifest, strict=True, dry=False)
            return copy.deepcopy(made)

    def start(self, manifest: Manifest) -> Pod:
        """A Pod: in the API, and running."""
        self.put(copy.deepcopy(manifest))
        pod = Pod(manifest, self.get)
        with self.lock:
            self.pods[pod.name] = pod
        running = {"phase": "Running", "podIP": pod.address}
        states = [
            {"name": own["name"], "image": own["image"], "imageID": "", "ready": True,
             "restartCount": 0, "state": {"running": {}}}
            for own in manifest["spec"]["containers"]
        ]  # fmt: skip
        self.put(manifest | {"status": running | {"containerStatuses": states}})
        pod.start()
        return pod

    def forget(self, pod: Pod) -> None:
        """It is no longer there for the API and for DNS."""
        with self.lock:
            self.pods.pop(pod.name, None)
        with self.store.lock, contextlib.suppress(ApiError):
            self.store.delete(KEYS["Pod"], NAMESPACE, pod.name)

    def of(self, **labels: str) -> list[Pod]:
        """Pods by `app`, or by "ray" as node type."""
        names = {"app": "app.kubernetes.io/name", "ray": "ray.io/node-type"}
        wanted = {names[name]: value for name, value in labels.items()}
        with self.lock:
            return [pod for pod in self.pods.values() if wanted.items() <= pod.labels.items()]

    def resolve(self, name: str) -> list[str] | None:
        """Addresses of the ready Pods behind a Service. A ClusterIP would forward to the same."""
        service, _, domain = name.partition(".")
        if domain != f"{NAMESPACE}.svc.cluster.local":
            return None
        found = self.get("Service", service)
        if found is None:
            return None
        selector = found["spec"]["selector"].items()
        with self.lock:
            return [
                pod.address
                for pod in self.pods.values()
                if pod.ready and not pod.going and selector <= pod.labels.items()
            ]

    def kubectl(self, *args: str, text: str | None = None) -> str:
        """What it prints; it must work."""
        flags = ["--server", f"https://{network.NODE}:{API_PORT}"]
        flags += ["--certificate-authority", str(STATE / "pki/ca.crt"), "--token", "rehearsal"]
        done = subprocess.run(
            [str(KUBECTL), *flags, *args], input=text, capture_output=True, text=True, cwd=ROOT,
            env=os.environ | {"HOME": str(STATE), "KUBECACHEDIR": str(STATE / "kube")},
        )  # fmt: skip
        assert not done.returncode, done.stderr
        return done.stdout

    def add_secret(self, name: str, **content: str) -> None:
        """As the README says, before anything is applied."""
        data = {key: base64.b64encode(own.encode()).decode() for key, own in content.items()}
        metadata = {"name": name, "namespace": NAMESPACE}
        self.put({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data})


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """An empty one; on leaving, its Pods are killed."""
    network.open_bridge()
    repository = STATE / "repository"
    repository.mkdir(parents=True)
    subprocess.run(["mount", "--bind", str(ROOT), str(repository)], check=True)
    cluster = Cluster()
    dns = Dns(network.NODE, cluster.resolve)
    with serving(cluster.store, network.NODE, API_PORT, _certificate(STATE / "pki")):
        cluster.kubectl("apply", "-f", "k8s/base/namespace.yaml")
        for name in ("redis-state", "redis-gcs"):
            cluster.add_secret(name, password=secrets.token_hex(16))
        ca = (STATE / "pki/ca.crt").read_text()
        cluster.add_secret("serviceaccount-token", token="rehearsal", **{"ca.crt": ca})
        yield cluster
    dns.close()


def _certificate(folder: Path) -> ssl.SSLContext:
    """The API server's own."""
    folder.mkdir()
    names = f"subjectAltName=IP:{network.NODE}"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=kubernetes", "-addext", names]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "ca.crt")]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.crt", folder / "key.pem")
    return context

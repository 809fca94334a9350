"""What Ray's own KubeRay autoscaler asks of the API server, it can do to our RayCluster."""

import copy
import importlib
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from tests.e2e.rehearsal import raypods
from tests.e2e.rehearsal.cluster import KEYS, NAMESPACE, Cluster, Manifest
from tests.e2e.rehearsal.operator import Operator
from tests.k8s.miniapi.kinds import Key
from tests.k8s.miniapi.server import serving
from tests.k8s.rendering import named, rendered

WORKER = "experts-rehearse-experts-worker"


class Api:
    """Ray's client of the API server, in plaintext."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> Any:
        return self._ask("GET", path)

    def patch(
        self, path: str, payload: Any, content_type: str = "application/json-patch+json"
    ) -> Any:
        return self._ask("PATCH", path, payload, content_type)

    def _ask(self, method: str, path: str, body: Any = None, content_type: str = "") -> Any:
        root = "/api/v1" if path.startswith("pods") else "/apis/ray.io/v1"
        url = f"{self._url}{root}/namespaces/{NAMESPACE}/{path}"
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": content_type}
        request = urllib.request.Request(url, data, headers, method=method)
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())


class NoDrain:
    """Stands for Ray's head: nothing here asks it anything that matters."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def add_pod(cluster: Cluster, pod: Manifest) -> None:
    """One that runs."""
    cluster.put(copy.deepcopy(pod))
    names = [own["name"] for own in pod["spec"]["containers"]]
    about = {"image": "x", "imageID": "", "ready": True, "restartCount": 0}
    states = [about | {"name": name, "state": {"running": {}}} for name in names]
    cluster.put(pod | {"status": {"phase": "Running", "containerStatuses": states}})


@pytest.fixture
def cluster() -> Cluster:
    """overlays/kind with a head and two workers."""
    made = Cluster()
    space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    made.store.create(Key("", "v1", "namespaces"), "", space, strict=True, dry=False)
    service = named(rendered("kind"), "RayService", "experts")
    [group] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    group |= {"replicas": 2, "maxReplicas": 3}
    Operator(made).begin(made.put(service))
    ray_cluster = made.get("RayCluster", "experts-rehearse")
    assert ray_cluster
    add_pod(made, raypods.head(ray_cluster, "0", "10.0.0.1"))
    for suffix in ("1", "2"):
        add_pod(made, raypods.worker(ray_cluster, group, suffix))
    return made


@pytest.fixture
def provider(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Ray's."""
    package = "ray.autoscaler.v2.instance_manager.cloud_providers.kuberay.cloud_provider"
    module: Any = importlib.import_module(package)
    monkeypatch.setattr(module, "RAY_HEAD_POD_NAME", "experts-rehearse-head-0")
    config = {"namespace": NAMESPACE, "head_node_type": "headgroup"}
    with serving(cluster.store) as port:
        yield module.KubeRayProvider(
            "experts-rehearse", config, gcs_client=NoDrain(), k8s_api_client=Api(port)
        )


def test_it_asks_for_a_worker_and_takes_one_back(cluster: Cluster, provider: Any) -> None:
    def group() -> Any:
        with cluster.store.lock:
            found = cluster.store.get(KEYS["RayCluster"], NAMESPACE, "experts-rehearse")
        return found["spec"]["workerGroupSpecs"][0]

    names = {"experts-rehearse-head-0", f"{WORKER}-1", f"{WORKER}-2"}
    assert provider.get_non_terminated().keys() == names
    provider.launch(shape={"experts": 1}, request_id="a")
    assert (provider.poll_errors(), group()["replicas"]) == ([], 3)
    provider.terminate(ids=[f"{WORKER}-2"], request_id="b")
    assert (provider.poll_errors(), group()["replicas"]) == ([], 2)
    assert group()["scaleStrategy"] == {"workersToDelete": [f"{WORKER}-2"]}

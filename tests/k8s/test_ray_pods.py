"""The Pods that the rehearsal runs are those that the policies judge."""

import struct

from tests.e2e.rehearsal import dns, raypods
from tests.k8s import kuberay, schemas
from tests.k8s.rendering import Manifest, named, rendered


def cluster() -> Manifest:
    """As the operator makes it of overlays/kind."""
    spec = named(rendered("kind"), "RayService", "experts")["spec"]["rayClusterConfig"]
    metadata = {"name": "experts-abcde", "namespace": "expertmesh", "uid": "1-2-3"}
    return {"metadata": metadata, "spec": spec}


def test_they_are_valid_and_have_the_containers_that_policies_see() -> None:
    own = cluster()
    [group] = own["spec"]["workerGroupSpecs"]
    made = [raypods.head(own, "0", "10.0.0.1"), raypods.worker(own, group, "1")]
    assert schemas.faults(made) == []
    judged = [pod for pod in kuberay.pods(rendered("kind")) if "RayService" in pod.owner][:2]
    for pod, other in zip(made, judged, strict=True):
        names = [container["name"] for container in other.containers()]
        spec = pod["spec"]
        assert [c["name"] for c in [*spec["containers"], *spec.get("initContainers", [])]] == names
        assert spec.get("restartPolicy", "") in ("Never", "")
        assert pod["metadata"]["labels"].items() <= other.labels.items()


def test_the_commands_are_made_of_parameters_and_limits() -> None:
    own = cluster()
    [group] = own["spec"]["workerGroupSpecs"]
    head = raypods.head(own, "0", "10.0.0.1")["spec"]["containers"][0]["args"][0]
    assert "ray start --head " in head
    assert "--no-monitor" in head
    assert "--num-cpus=0" in head
    worker = raypods.worker(own, group, "1")["spec"]["containers"][0]["args"][0]
    assert "--num-cpus=4" in worker
    assert f"--memory={3 << 30}" in worker
    assert "--address=experts-abcde-head-svc.expertmesh.svc.cluster.local:6379" in worker


def test_the_head_can_read_what_its_scaling_policy_reads() -> None:
    """Serve's controller runs there; the policy connects to Redis with the replicas' secrets."""
    own = cluster()
    [group] = own["spec"]["workerGroupSpecs"]
    pods = (raypods.head(own, "0", "10.0.0.1"), raypods.worker(own, group, "1"))
    head, worker = (
        {mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
        for pod in pods
    )
    wanted = {"/etc/expertmesh/redis", "/etc/expertmesh/tls"}
    assert wanted <= worker
    assert wanted <= head


def query(name: str, kind: int) -> bytes:
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    return struct.pack("!6H", 7, 0x100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", kind, 1)


def test_names_have_all_addresses_of_their_pods() -> None:
    known = {"router.expertmesh.svc.cluster.local": ["10.0.0.1", "10.0.0.2"]}
    said = dns.answer(query("Router.expertmesh.svc.cluster.local", 1), known.get)
    assert said.endswith(bytes([10, 0, 0, 2]))
    assert struct.unpack("!6H", said[:12])[3] == 2
    six = dns.answer(query("router.expertmesh.svc.cluster.local", 28), known.get)
    assert struct.unpack("!6H", six[:12])[1:4] == (0x8580, 1, 0)
    none = dns.answer(query("router", 1), known.get)
    assert struct.unpack("!6H", none[:12])[1] == 0x8583

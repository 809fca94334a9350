"""Every overlay and component: strict schemas, policies, and agreement with the code."""

import re
from importlib.metadata import version

import pytest
import yaml
from tests.k8s import mesh_agreement, metric_agreement, policy, schemas
from tests.k8s.kuberay import PROGRAMS, pods
from tests.k8s.references import EXTERNAL_SECRETS
from tests.k8s.rendering import ALL, COMPONENTS, K8S, OVERLAYS, ROOT, named, of_kind, rendered

from expertmesh.runtime.config import load
from expertmesh.services.ray_service import serve_config_of
from expertmesh.services.settings import MeshSettings

DOCKERFILE = ROOT / "Dockerfile"


def test_nothing_under_k8s_is_left_out() -> None:
    folders = {path.parent.name for path in (K8S / "overlays").glob("*/kustomization.yaml")}
    assert folders == set(OVERLAYS)
    folders = {path.parent.name for path in (K8S / "components").glob("*/kustomization.yaml")}
    assert folders == set(COMPONENTS)
    named_files = {
        match
        for path in K8S.rglob("kustomization.yaml")
        for match in re.findall(r"[\w-]+\.yaml", path.read_text("utf-8"))
    }
    files = {path.name for path in K8S.rglob("*.yaml")} - {"kustomization.yaml"}
    assert files - named_files == set()


@pytest.mark.parametrize("release", [schemas.OLDEST, schemas.NEWEST])
@pytest.mark.parametrize("name", ALL)
def test_every_field_is_known(name: str, release: str) -> None:
    assert schemas.faults(rendered(name), release) == []


@pytest.mark.parametrize("name", ALL)
def test_policies(name: str) -> None:
    documents = rendered(name)
    assert len(pods(documents)) > 4
    assert policy.faults(documents) == []


@pytest.mark.parametrize("name", ALL)
def test_manifests_and_code_agree(name: str) -> None:
    assert mesh_agreement.faults(rendered(name)) == []


@pytest.mark.parametrize("name", ALL)
def test_what_is_scraped_and_asked_for_exists(name: str) -> None:
    assert metric_agreement.faults(rendered(name)) == []


def test_names_of_metrics_are_as_the_collector_makes_them() -> None:
    names = metric_agreement.prometheus_names()
    assert "expertmesh_calls_total" in names
    assert "expertmesh_queue_wait_seconds_bucket" in names
    assert "expertmesh_in_flight_rows" in names
    assert "expertmesh_resident_bytes" in names
    assert "expertmesh_batch_rows_count" in names


def test_versions_agree() -> None:
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    for name in ("base", *OVERLAYS):
        documents = rendered(name)
        ray = named(documents, "RayService", "experts")["spec"]["rayClusterConfig"]
        assert ray["rayVersion"] == pins["ray"]
        images = {container["image"] for pod in pods(documents) for container in pod.containers()}
        ours = {image.rpartition("/")[2] for image in images if "expertmesh" in image}
        tag = version("expertmesh")
        assert ours == {f"expertmesh:{tag}", f"expertmesh-experts:{tag}"}


@pytest.mark.parametrize("overlay", ["gpu", "mixed-gpu", "prod"])
def test_gpu_pods_ask_for_what_they_get(overlay: str) -> None:
    ray = named(rendered(overlay), "RayService", "experts")["spec"]["rayClusterConfig"]
    for group in ray["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        limits = spec["containers"][0]["resources"]["limits"]
        assert limits["nvidia.com/gpu"] == "1"
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec[
            "tolerations"
        ]
        assert any("persistentVolumeClaim" in volume for volume in spec["volumes"])


def test_a_model_is_spread_over_two_kinds_of_gpus() -> None:
    documents = rendered("mixed-gpu")
    ray = named(documents, "RayService", "experts")["spec"]["rayClusterConfig"]
    labels = [group["labels"] for group in ray["workerGroupSpecs"]]
    pools = mesh_agreement.settings_of(documents).experts.pools
    assert len(pools) == 2
    assert [pool.label_selector for pool in pools.values()] == labels


def test_secrets_people_bring_are_in_the_readme() -> None:
    text = (K8S / "README.md").read_text("utf-8")
    for name in EXTERNAL_SECRETS:
        assert f"`{name}`" in text


def test_serve_configs_are_generated() -> None:
    """Byte for byte what k8s/generate writes, for all folders that have one."""
    script = (K8S / "generate").read_text("utf-8")
    listed = dict(re.findall(r"^([\w/-]+) (\d+)$", script.partition("<<'END'")[2], re.M))
    assert {K8S / folder for folder in listed} == {file.parent for file in K8S.rglob("serve.yaml")}
    for folder, num_experts in listed.items():
        settings = load(MeshSettings, K8S / folder / "mesh.yaml", env={})
        text = f"# Made by k8s/generate.\n{serve_config_of(settings, int(num_experts))}"
        assert (K8S / folder / "serve.yaml").read_text("utf-8") == text, folder


def test_no_secret_is_in_git() -> None:
    for path in K8S.rglob("*.yaml"):
        for document in yaml.safe_load_all(path.read_text("utf-8")):
            for part in document if isinstance(document, list) else [document]:
                assert part.get("kind") != "Secret", path
                assert "secretGenerator" not in part, path


def test_kuberays_probes_find_their_programs_in_the_image() -> None:
    text = DOCKERFILE.read_text("utf-8")
    for program in PROGRAMS:
        assert re.search(rf"\b{program}\b", text), program


def test_the_users_of_images_and_pods_are_the_same() -> None:
    [user] = set(re.findall(r"^USER (\d+):\1$", DOCKERFILE.read_text("utf-8"), re.M))
    for pod in pods(rendered("base")):
        if "redis" not in pod.owner:
            assert pod.spec["securityContext"]["runAsUser"] == int(user)


def test_state_and_memory_of_the_head_are_apart() -> None:
    documents = rendered("base")
    [gcs] = of_kind(documents, "StatefulSet")
    assert gcs["metadata"]["name"] == "redis-gcs"
    assert "appendonly yes" in gcs["spec"]["template"]["spec"]["containers"][0]["command"][-1]
    state = named(documents, "Deployment", "redis-state")["spec"]["template"]["spec"]
    assert "appendonly no" in state["containers"][0]["command"][-1]


def test_alerts_are_explained() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text("utf-8")
    for rule in of_kind(rendered("monitoring"), "PrometheusRule"):
        for group in rule["spec"]["groups"]:
            for own in group["rules"]:
                assert f"`{own['alert']}`" in text

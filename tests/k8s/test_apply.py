"""Real kubectl applies the manifests to a small API server that refuses what a real one would."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.k8s import schemas
from tests.k8s.miniapi.kinds import custom
from tests.k8s.miniapi.server import running
from tests.k8s.rendering import KUBECTL, ROOT, Manifest, named, rendered

_OPEN: dict[str, Any] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
CUSTOM = [
    custom("ray.io/v1", "RayService", "rayservices", schemas.ray_service_schema()),
    custom("keda.sh/v1alpha1", "ScaledObject", "scaledobjects", _OPEN),
    custom("monitoring.coreos.com/v1", "ServiceMonitor", "servicemonitors", _OPEN),
    custom("monitoring.coreos.com/v1", "PodMonitor", "podmonitors", _OPEN),
    custom("monitoring.coreos.com/v1", "PrometheusRule", "prometheusrules", _OPEN),
]
Kubectl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def kubectl(tmp_path: Path) -> Iterator[Kubectl]:
    """kubectl against an empty server."""
    home = {"HOME": str(tmp_path), "KUBECACHEDIR": str(tmp_path / "cache")}
    with running(schemas.NEWEST, CUSTOM) as url:

        def run(*args: str, text: str | None = None) -> "subprocess.CompletedProcess[str]":
            command = [str(KUBECTL), "--server", url, *args]
            return subprocess.run(
                command, input=text, capture_output=True, text=True, cwd=ROOT, env=os.environ | home
            )

        yield run


def apply(kubectl: Kubectl, documents: list[Manifest], *flags: str) -> list[str]:
    """Lines of `kubectl apply`; it must have worked."""
    done = kubectl("apply", "-f", "-", *flags, text=yaml.safe_dump_all(documents))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def some(documents: list[Manifest], *wanted: tuple[str, str]) -> list[Manifest]:
    """The namespace and these: kubectl takes its time for each."""
    return [named(documents, *place) for place in (("Namespace", "expertmesh"), *wanted)]


@pytest.mark.parametrize("overlay", ["kind", "prod"])
def test_an_overlay_is_applied_and_then_nothing_is_left_to_do(
    kubectl: Kubectl, overlay: str
) -> None:
    folder = ("-k", f"k8s/overlays/{overlay}")
    first = kubectl("apply", *folder)
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert len(lines) == len(rendered(overlay))
    assert {line.rpartition(" ")[2] for line in lines} == {"created"}
    again = kubectl("apply", *folder)
    changed = [line for line in again.stdout.splitlines() if not line.endswith(" unchanged")]
    # kubectl always sends what has defaults inside lists, and selectors that are replaced whole;
    # the server finds nothing changed
    kinds = {line.partition("/")[0] for line in changed}
    assert kinds <= {"rayservice.ray.io", "poddisruptionbudget.policy"}
    assert kubectl("diff", "--server-side", *folder).stdout == ""


def test_server_side_apply_takes_back_what_is_no_longer_there(kubectl: Kubectl) -> None:
    documents = some(rendered("base"), ("Deployment", "gateway"))
    lines = apply(kubectl, documents, "--server-side")
    assert [line.rpartition(" ")[2] for line in lines] == ["serverside-applied"] * 2
    gateway = documents[1]
    [container] = gateway["spec"]["template"]["spec"]["containers"]
    del container["startupProbe"]
    apply(kubectl, documents, "--server-side")
    got = kubectl("get", "deployment", "gateway", "-n", "expertmesh", "-o", "json")
    [stored] = json.loads(got.stdout)["spec"]["template"]["spec"]["containers"]
    assert "startupProbe" not in stored
    assert "livenessProbe" in stored


def test_a_change_is_shown_before_it_is_made(kubectl: Kubectl) -> None:
    documents = some(rendered("base"), ("Deployment", "router"), ("Deployment", "gateway"))
    apply(kubectl, documents)
    router = documents[1]
    router["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = 46
    text = yaml.safe_dump_all(documents)
    shown = kubectl("diff", "-f", "-", text=text)
    assert shown.returncode == 1, shown.stderr
    assert "+      terminationGracePeriodSeconds: 46" in shown.stdout
    tried = kubectl("apply", "--dry-run=server", "-f", "-", text=text)
    assert "deployment.apps/router configured (server dry run)" in tried.stdout
    applied = apply(kubectl, documents)
    assert "deployment.apps/router configured" in applied
    assert "deployment.apps/gateway unchanged" in applied


_WORKER = ("spec", "rayClusterConfig", "workerGroupSpecs", 0)


@pytest.mark.parametrize(
    ("kind", "name", "path", "field"),
    [
        (
            "RayService",
            "experts",
            (*_WORKER, "minReplicas"),
            "spec.rayClusterConfig.workerGroupSpecs[0].minReplicasx",
        ),
        (
            "Deployment",
            "gateway",
            ("spec", "template", "spec", "enableServiceLinks"),
            "spec.template.spec.enableServiceLinksx",
        ),
        ("Service", "router", ("spec", "ports"), "spec.portsx"),
    ],
)
def test_a_misspelt_field_is_refused_by_name(
    kubectl: Kubectl, kind: str, name: str, path: tuple[str | int, ...], field: str
) -> None:
    documents = some(rendered("base"), (kind, name))
    inner: Any = documents[1]
    for part in path[:-1]:
        inner = inner[part]
    inner[f"{path[-1]}x"] = inner.pop(path[-1])
    done = kubectl("apply", "-f", "-", text=yaml.safe_dump_all(documents))
    assert done.returncode == 1
    assert f'unknown field "{field}"' in done.stderr


def test_what_cannot_change_cannot(kubectl: Kubectl) -> None:
    documents = some(rendered("base"), ("StatefulSet", "redis-gcs"))
    apply(kubectl, documents)
    documents[1]["spec"]["serviceName"] = "other"
    done = kubectl("apply", "-f", "-", text=yaml.safe_dump_all(documents))
    assert done.returncode == 1
    assert "spec.serviceName: Invalid value: field is immutable" in done.stderr


def test_deleting_leaves_nothing(kubectl: Kubectl) -> None:
    assert kubectl("apply", "-k", "k8s/overlays/kind").returncode == 0
    done = kubectl("delete", "-k", "k8s/overlays/kind", "--wait=false", "--ignore-not-found")
    assert done.returncode == 0, done.stderr
    kinds = "namespaces,deployments.apps,rayservices.ray.io,priorityclasses.scheduling.k8s.io"
    left = kubectl("get", kinds, "-A", "-o", "name")
    assert (left.stdout, left.returncode) == ("", 0)


def test_json_patches_and_selectors_work_as_ray_autoscaler_uses_them(kubectl: Kubectl) -> None:
    documents = some(rendered("kind"), ("RayService", "experts"), ("Service", "router"))
    apply(kubectl, documents)
    place = "/spec/rayClusterConfig/workerGroupSpecs/0"
    change = [
        {"op": "test", "path": f"{place}/groupName", "value": "experts"},
        {"op": "replace", "path": f"{place}/replicas", "value": 2},
    ]
    own = ("rayservices.ray.io", "experts", "-n", "expertmesh")
    patch = ("patch", *own, "--type=json", "-p")
    assert kubectl(*patch, json.dumps(change)).returncode == 0
    stored = json.loads(kubectl("get", *own, "-o", "json").stdout)
    assert stored["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replicas"] == 2
    absent = {"op": "replace", "path": f"{place}/absent", "value": 2}
    refused = kubectl(*patch, json.dumps([absent]))
    assert "the JSON patch cannot be applied" in refused.stderr
    names = ("get", "services", "-n", "expertmesh", "-o", "name", "-l")
    assert kubectl(*names, "app.kubernetes.io/name=router").stdout == "service/router\n"
    assert kubectl(*names, "app.kubernetes.io/name=gateway").stdout == ""

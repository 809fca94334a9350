"""overlays/kind for a machine of two cores, made of the manifests that users apply.

Two groups of two replicas on two worker Pods, and room for a third Pod when a group grows.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from tests.e2e.rehearsal.outside import ROOT

_MESH = Path(__file__).parent / "mesh.yaml"
_NUM_EXPERTS = "8"
_IDLE_S = 15
_WORKERS = "/spec/rayClusterConfig/workerGroupSpecs/0"
_CHANGES = {
    f"{_WORKERS}/replicas": 2,
    f"{_WORKERS}/minReplicas": 2,
    f"{_WORKERS}/maxReplicas": 3,
    f"{_WORKERS}/template/spec/containers/0/resources/limits/cpu": "2",
    "/spec/rayClusterConfig/autoscalerOptions/idleTimeoutSeconds": _IDLE_S,
}


def write(folder: Path, **scaling: Any) -> Path:
    """A folder for `kubectl apply -k`.

    Args:
        scaling: other fields of `experts.scaling` than those in mesh.yaml.
    """
    folder.mkdir(exist_ok=True)
    mesh = yaml.safe_load(_MESH.read_text("utf-8"))
    mesh["experts"]["scaling"] |= scaling
    (folder / "mesh.yaml").write_text(yaml.safe_dump(mesh))
    experts = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "experts"},
        "spec": {"serveConfigV2": _serve_config(folder / "mesh.yaml")},
    }
    (folder / "serve.yaml").write_text(yaml.safe_dump(experts))
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(_kustomization(folder)))
    return folder


def _serve_config(mesh: Path) -> str:
    command = [str(Path(sys.executable).parent / "expertmesh"), "k8s", "serve-config"]
    command += ["--config", str(mesh), "--num-experts", _NUM_EXPERTS]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _kustomization(folder: Path) -> dict[str, Any]:
    changes = [{"op": "replace", "path": path, "value": to} for path, to in _CHANGES.items()]
    service = {"kind": "RayService", "name": "experts"}
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "expertmesh",
        "resources": [os.path.relpath(ROOT / "k8s/overlays/kind", folder)],
        "configMapGenerator": [{"name": "mesh", "behavior": "replace", "files": ["mesh.yaml"]}],
        "patches": [
            {"path": "serve.yaml"},
            {"target": service, "patch": yaml.safe_dump(changes)},
        ],
    }

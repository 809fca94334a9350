"""components/tls with the settings of docs/kubernetes.md: real processes, mounts, renewed files."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks.harness.certificates import Authority, Pair
from cryptography import x509
from tests.k8s import mesh_agreement, policy, schemas
from tests.k8s.capacity_agreement import DEMO, serve_config
from tests.k8s.kuberay import pods, workers
from tests.k8s.rendering import K8S, ROOT, Manifest, kustomize, named
from tests.k8s.tls_world import ADDRESS, MODEL

from expertmesh.runtime.config import validate
from expertmesh.services.ray_service import serve_config_of
from expertmesh.services.settings import MeshSettings

PAGE = (ROOT / "docs/kubernetes.md").read_text("utf-8")
ISOLATED = ("unshare", "--mount", "--net")
pytestmark = pytest.mark.timeout(180)


@functools.cache
def documents() -> list[Manifest]:
    """The base with the component, and mesh.yaml as the page says."""
    [text] = re.findall(r"^```yaml\n(security:\n  tls:.*?)^```", PAGE, re.M | re.S)
    values = yaml.safe_load((K8S / "base/mesh.yaml").read_text("utf-8")) | yaml.safe_load(text)
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder)
        (own / "mesh.yaml").write_text(yaml.safe_dump(values))
        settings = validate(MeshSettings, values)
        (own / "serve.yaml").write_text(serve_config_of(settings, 8))
        prod = yaml.safe_load((K8S / "overlays/prod/kustomization.yaml").read_text("utf-8"))
        k8s = os.path.relpath(K8S, os.path.realpath(folder))
        kustomization = {
            "apiVersion": prod["apiVersion"],
            "kind": prod["kind"],
            "namespace": "expertmesh",
            "resources": [f"{k8s}/base"],
            "components": [f"{k8s}/components/tls"],
            "configMapGenerator": prod["configMapGenerator"],
            "replacements": prod["replacements"],
        }
        (own / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return kustomize(own)


def test_the_overlay_passes_every_check() -> None:
    for check in (schemas.faults, policy.faults, mesh_agreement.faults):
        assert check(documents()) == []


def as_cert_manager(pair: Pair, folder: Path) -> str:
    """tls.crt, tls.key and ca.crt; the serial number."""
    folder.mkdir()
    for name, source in zip(
        ("tls.crt", "tls.key", "ca.crt"), (pair.cert_file, pair.key_file, pair.ca_file), strict=True
    ):
        (folder / name).write_bytes(Path(source).read_bytes())
    found = x509.load_pem_x509_certificate((folder / "tls.crt").read_bytes())
    return str(found.serial_number)


def issued(authority: Authority) -> Pair:
    """What the component's Certificate asks for."""
    spec = named(documents(), "Certificate", "mesh")["spec"]
    return authority.pair("mesh", uris=spec["uris"], dns=spec["dnsNames"])


def tls_mount(folder: Path) -> tuple[str, str]:
    """A Secret as the kubelet mounts it, and its successor of another CA beside it."""
    folder.mkdir(parents=True)
    first = as_cert_manager(issued(Authority(folder.parent / "pki", "first")), folder / "..first")
    second = issued(Authority(folder.parent / "pki", "second"))
    renewed = as_cert_manager(second, folder / "..renewed")
    (folder / "..data").symlink_to("..first")
    for name in ("tls.crt", "tls.key", "ca.crt"):
        (folder / name).symlink_to(f"..data/{name}")
    return first, renewed


def prepared(folder: Path) -> dict[str, Any]:
    """Everything the world reads; what the test knows of it."""
    mounts = folder / "mounts"
    first, renewed = tls_mount(mounts / "tls")
    files = {"mesh": named(documents(), "ConfigMap", "mesh")["data"], "redis": {"password": "s3"}}
    for name, contents in files.items():
        (mounts / name).mkdir()
        for file, text in contents.items():
            (mounts / name / file).write_text(text)
    targets = {"mesh": "/etc/expertmesh/mesh", "redis": "/etc/expertmesh/redis"}
    targets["tls"] = "/etc/expertmesh/tls"
    names = [own["metadata"]["name"] for own in documents() if own["kind"] == "Service"]
    hosts = [f"{ADDRESS} {name} {name}.expertmesh" for name in names]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
    config = serve_config(documents())
    (folder / "serve.json").write_text(json.dumps(config))
    processes = [named(documents(), "Deployment", name) for name in ("router", "gateway")]
    containers = [own["spec"]["template"]["spec"]["containers"][0] for own in processes]
    plan = {
        "mounts": {str(mounts / name): target for name, target in targets.items()} | {DEMO: MODEL},
        "args": [own["args"] for own in containers],
        "renewed": renewed,
        "num_groups": len(config["applications"]),
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    return {"first": first, "renewed": renewed}


def test_every_process_mounts_the_secret_where_the_settings_look() -> None:
    tls = mesh_agreement.settings_of(documents()).security.tls
    users = [pod for pod in pods(documents()) if pod.owner.startswith("Deployment ")]
    for pod in [*workers(documents()), *(own for own in users if "redis" not in own.owner)]:
        volumes = {own["name"]: own for own in pod.spec["volumes"]}
        [container] = [own for own in pod.spec["containers"] if own["name"] != "autoscaler"]
        mounts = {own["mountPath"]: volumes[own["name"]] for own in container["volumeMounts"]}
        for file in (tls.cert_file, tls.key_file, tls.ca_file):
            assert mounts[str(Path(str(file)).parent)]["secret"]["secretName"] == "mesh-tls"


def is_possible() -> bool:
    """Whether this user may make namespaces and mounts."""
    probe = [*ISOLATED, "sh", "-c", "mount -t tmpfs none /mnt && ip link set lo up"]
    try:
        return subprocess.run(probe, capture_output=True).returncode == 0
    except OSError:
        return False


def outcome(folder: Path) -> list[dict[str, Any]]:
    """What the world saw; it is ended with everything in it."""
    command = [*ISOLATED, sys.executable, "-m", "tests.k8s.tls_world", str(folder)]
    world = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        out, err = world.communicate(timeout=170)
    finally:
        if world.poll() is None:
            os.killpg(world.pid, signal.SIGKILL)
    logs = "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in folder.glob("*.log"))
    assert world.returncode == 0, f"{out}\n{err[-3000:]}\n{logs}"
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.skipif(not is_possible() and not os.environ.get("CI"), reason="needs root, iproute2")
def test_calls_go_on_while_certificates_and_their_ca_are_renewed(tmp_path: Path) -> None:
    known = prepared(tmp_path)
    served, shown, probes, strangers, member, rotated, again, calls = outcome(tmp_path)
    assert len(served["tokens"]) == 8
    assert shown["serials"] == [known["first"]] * 3
    assert probes["open"] == [True, True]
    assert strangers == {"what": "replica", "plaintext": "Unavailable", "user": "Unavailable"}
    assert member["member"] == "answers"
    assert rotated["num_answers"] > 0
    assert again["tokens"] == served["tokens"]
    assert calls["errors"] == []
    assert calls["same"]
    assert calls["num"] > rotated["num_answers"]

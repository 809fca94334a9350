"""README's kubectl lines, as a newcomer would type them, against the small API server."""

import json
import subprocess
from pathlib import Path

import yaml
from tests.e2e.readme import ROOT, commands
from tests.e2e.served import environment
from tests.k8s import schemas
from tests.k8s.miniapi.kinds import custom
from tests.k8s.miniapi.server import running
from tests.k8s.references import EXTERNAL_SECRETS

RAY_SERVICE = custom("ray.io/v1", "RayService", "rayservices", schemas.ray_service_schema())


def config(folder: Path, url: str) -> Path:
    """A kubeconfig for the server."""
    file = folder / "config"
    place = {"name": "tests", "context": {"cluster": "tests", "user": ""}}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "tests", "cluster": {"server": url}}],
        "contexts": [place],
        "current-context": "tests",
    }
    file.write_text(yaml.safe_dump(content))
    return file


def test_readmes_commands_apply_the_kind_overlay(tmp_path: Path) -> None:
    lines = [line for line in commands() if line.startswith("kubectl ")]
    assert len(lines) == 4
    with running(schemas.NEWEST, [RAY_SERVICE]) as url:
        env = environment() | {"KUBECONFIG": str(config(tmp_path, url)), "HOME": str(tmp_path)}

        def shell(line: str) -> str:
            command = ["bash", "-o", "pipefail", "-ec", line]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
            assert done.returncode == 0, f"{line}: {done.stderr}"
            return done.stdout

        for line in lines:
            shell(line)
        kinds = "deployments.apps,rayservices.ray.io,secrets,networkpolicies.networking.k8s.io"
        got = json.loads(shell(f"kubectl get {kinds} -n expertmesh -o json"))["items"]
        names = {(own["kind"], own["metadata"]["name"]) for own in got}
        secrets = {own["metadata"]["name"]: own["data"].keys() for own in got if "data" in own}
        assert {("Deployment", "gateway"), ("RayService", "experts")} <= names
        for name, keys in secrets.items():
            assert set(keys) == set(EXTERNAL_SECRETS[name])

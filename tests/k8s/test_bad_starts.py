"""What no check of manifests can know: processes say it when they start, naming field or path."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.k8s.capacity_agreement import DEMO
from tests.k8s.rendering import K8S

from expertmesh.services.cli import USER_ERROR

MISSING = {"cert_file": "/none/tls.crt", "key_file": "/none/tls.key", "ca_file": "/none/ca.crt"}


def start(command: list[str], folder: Path, **changes: Any) -> str:
    """The error of a process that has the base's mesh.yaml with changes."""
    values = yaml.safe_load((K8S / "base/mesh.yaml").read_text("utf-8")) | {"model": DEMO}
    password = folder / "password"
    password.write_text("secret")
    values["redis"] = {"url": "redis://127.0.0.1:1/0", "password_file": str(password)}
    file = folder / "mesh.yaml"
    file.write_text(yaml.safe_dump(values | changes))
    done = subprocess.run(
        [sys.executable, "-m", "expertmesh.services.cli", *command, "--config", str(file)],
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert done.returncode == USER_ERROR, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/models/none"}, "/models/none: no such directory"),
        (
            {"redis": {"url": "redis://127.0.0.1:1/0", "password_file": "/none/password"}},
            "redis.password_file: /none/password cannot be read: No such file",
        ),
        (
            {"security": {"tls": MISSING}},
            "security.tls: /none/tls.crt cannot be read: No such file",
        ),
        ({"security": {}}, "there is no TLS; set security.tls.cert_file"),
    ],
    ids=["claim that is empty", "secret", "secret of TLS", "neither TLS nor insecure"],
)
def test_a_router_says_what_its_pod_lacks(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert message in start(["router"], tmp_path, **changes)


def test_groups_that_the_model_has_not_are_refused_when_the_manifest_is_made(
    tmp_path: Path,
) -> None:
    said = start(["k8s", "serve-config"], tmp_path, experts={"groups": 9})
    assert "experts.groups: expected 1 to 8 (the model's experts), got 9" in said

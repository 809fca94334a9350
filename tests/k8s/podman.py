"""Images built and run by podman, as root and without a registry.

The Dockerfile's base comes from a registry; unless BASE_IMAGE names one, a Debian of the same
release with Debian's Python stands for it. What pip is told on this machine (index, certificates,
wheels on disk) it is told in the builds, too.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.k8s.kuberay import Pod
from tests.k8s.rendering import ROOT

DEBIAN = "bookworm"
BASE = f"localhost/expertmesh-base:{DEBIAN}"
_PACKAGES = "ca-certificates,python-is-python3,python3,python3-pip,python3-venv"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
# root in a container may have fewer files than podman would ask for
LIMITS = ("--ulimit", "nofile=16384:16384", "--ulimit", "nproc=4096:4096")


def run(*command: str) -> str:
    """Its output; fails with what it said."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (
        f"{shlex.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    )
    return done.stdout


def base_image() -> str:
    """What stands for the Dockerfile's BASE, made once."""
    if named := os.environ.get("BASE_IMAGE"):
        return named
    if subprocess.run(["podman", "image", "exists", BASE]).returncode:
        with tempfile.TemporaryDirectory() as folder:
            run("debootstrap", "--variant=minbase", f"--include={_PACKAGES}", DEBIAN, folder)
            for marker in Path(folder).glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
                marker.unlink()  # python:3.11 lets pip install as well
            archive = f"{folder}.tar"
            run("tar", "-C", folder, "-cf", archive, ".")
            run("podman", "import", archive, BASE)
            Path(archive).unlink()
    return BASE


def build(target: str, folder: Path) -> str:
    """One of the Dockerfile's images; its name."""
    image = f"localhost/expertmesh-{target}:built"
    run(
        "podman",
        "build",
        *("--network", "host", *LIMITS, *_pip_of_this_machine(folder)),
        *("--build-arg", f"BASE={base_image()}", "--target", target, "--tag", image),
        str(ROOT),
    )
    return image


def _pip_of_this_machine(folder: Path) -> Iterator[str]:
    values = {}
    for line in run(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        values[name.rpartition(".")[2]] = " ".join(shlex.split(value))
    config = folder / "pip.conf"
    lines = [f"{name} = {value}" for name, value in values.items()]
    config.write_text("\n".join(["[global]", *lines, ""]))
    words = {word for value in values.values() for word in value.split()}
    local = {Path(word.removeprefix("file://")) for word in words if "/" in word}
    # the pages of an index on disk lead to files beside them
    indexes = {path.parent for path in local if f"file://{path}" in words}
    mounts = {path: path for path in {*local, *indexes, _CERTIFICATES} if path.exists()}
    for path, target in (mounts | {config: Path("/etc/pip.conf")}).items():
        yield from ("--volume", f"{path}:{target}:ro")


def inspect(image: str) -> dict[str, Any]:
    """What podman knows of it."""
    [found] = json.loads(run("podman", "image", "inspect", image))
    own: dict[str, Any] = found
    return own


def as_in(pod: Pod, container: str, files: dict[str, Path]) -> Sequence[str]:
    """Options of `podman run` that do to a container what its manifest says.

    Args:
        files: volume of a ConfigMap or Secret -> the folder that has its files.
    """
    [own] = [one for one in pod.containers() if one["name"] == container]
    context, security = pod.spec["securityContext"], own["securityContext"]
    options = ["--user", f"{context['runAsUser']}:{context['runAsGroup']}", *LIMITS]
    options += ["--memory", own["resources"]["limits"]["memory"].lower().removesuffix("i")]
    if security.get("readOnlyRootFilesystem"):
        options += ["--read-only", "--read-only-tmpfs=false"]
    if not security["allowPrivilegeEscalation"]:
        options += ["--security-opt", "no-new-privileges"]
    options += [f"--cap-drop={name}" for name in security["capabilities"]["drop"]]
    volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
    for mount in own["volumeMounts"]:
        if "emptyDir" in volumes[mount["name"]]:
            options += ["--mount", f"type=tmpfs,destination={mount['mountPath']},tmpfs-mode=1777"]
        else:
            options += ["--volume", f"{files[mount['name']]}:{mount['mountPath']}:ro"]
    return options

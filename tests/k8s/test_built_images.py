"""The Dockerfile's images: built, and run with what the manifests say. `make images`.

Builds take minutes and download hundreds of megabytes, so they are no part of `make test`. What
podman's containers cannot show: the registry's base image, and CUDA, as torch is a CPU build here.
"""

import asyncio
import os
from importlib.metadata import version
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.k8s import podman
from tests.k8s.kuberay import PROGRAMS, Pod, pods
from tests.k8s.rendering import ROOT, Manifest, named, rendered

from expertmesh.runtime.redis_server import EmbeddedRedis
from expertmesh.runtime.server import LIVENESS
from expertmesh.services.local import free_port

pytestmark = [
    pytest.mark.skipif(os.environ.get("IMAGES") != "1", reason="`make images` builds images"),
    pytest.mark.timeout(3600),
]
PASSWORD = "of the state's Redis"
ALONE = ("podman", "run", "--rm", "--network=none", *podman.LIMITS)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> str:
    return podman.build("gateway", tmp_path_factory.mktemp("pip"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return podman.build("experts", tmp_path_factory.mktemp("pip"))


@pytest.fixture
def documents() -> list[Manifest]:
    return rendered("kind")


def pod_of(documents: list[Manifest], owner: str) -> Pod:
    [pod] = [pod for pod in pods(documents) if pod.owner == owner]
    return pod


@pytest.fixture
def files(documents: list[Manifest], tmp_path: Path) -> dict[str, Path]:
    """Folders that stand for the ConfigMap and the Secrets, readable as fsGroup makes them."""
    contents = {
        "mesh": named(documents, "ConfigMap", "mesh")["data"],
        "redis-password": {"password": PASSWORD},
        "tls": {},
    }
    folders = {}
    for name, own in contents.items():
        folders[name] = tmp_path / name
        folders[name].mkdir(mode=0o755)
        for file, text in own.items():
            (folders[name] / file).write_text(text)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    return folders


def test_the_commands_work_as_the_pod_runs_them(
    gateway: str, documents: list[Manifest], files: dict[str, Path]
) -> None:
    options = podman.as_in(pod_of(documents, "Deployment router"), "router", files)
    command = [*ALONE, *options, gateway]
    assert podman.run(*command, "--version").split()[-1] == version("expertmesh")
    assert "usage: expertmesh router" in podman.run(*command, "router", "--help")
    assert "usage: expertmesh gateway" in podman.run(*command, "gateway", "--help")


def python(image: str, text: str, *options: str) -> str:
    """What a few lines of Python print in a container."""
    return podman.run(*ALONE, *options, "--entrypoint", "python", image, "-c", text).strip()


def test_it_is_nobody_and_writes_nowhere_but_tmp(
    gateway: str, documents: list[Manifest], files: dict[str, Path]
) -> None:
    options = podman.as_in(pod_of(documents, "Deployment gateway"), "gateway", files)
    text = """
import os
print(os.getuid(), os.getgid(), os.environ["HOME"])
for folder in ("/", "/opt/venv", "/opt/expertmesh/demo-moe", "/tmp"):
    try:
        open(f"{folder}/file", "w").close()
        print("wrote", folder)
    except OSError as error:
        print(error.errno)
status = [line.split() for line in open("/proc/self/status")]
print([own[1] for own in status if own[0] in ("CapEff:", "NoNewPrivs:")])
"""
    assert python(gateway, text, *options).splitlines() == [
        "10001 10001 /tmp", "30", "30", "30", "wrote /tmp", "['0000000000000000', '1']",
    ]  # fmt: skip


def test_the_gateways_image_has_no_ray_and_no_cuda(gateway: str) -> None:
    """The build was given a CPU build of torch, and nothing else brought CUDA along."""
    text = """
from importlib.metadata import distributions
print(*sorted(own.metadata["Name"].lower() for own in distributions()))
import torch
print(torch.__version__.split("+")[0], torch.version.cuda)
"""
    names, torch = python(gateway, text).splitlines()
    assert {"expertmesh", "grpcio", "torch", "transformers"} <= set(names.split())
    bad = ("ray", "nvidia", "cuda", "triton", "pytest")
    found = {name for name in names.split() if name.startswith(bad)}
    assert found == {"nvidia-ml-py"}  # asks the driver, where there is one
    [pinned] = [
        own for own in (ROOT / "constraints.txt").read_text().split() if own[:7] == "torch=="
    ]
    assert torch == f"{pinned[7:]} None"


def test_labels_and_users_are_in_the_images(gateway: str, experts: str) -> None:
    for image in (gateway, experts):
        found = podman.inspect(image)
        assert found["Config"]["User"] == "10001:10001"
        labels = found["Labels"]
        assert labels["org.opencontainers.image.version"] == version("expertmesh")
        for secret in ("password", "token"):
            assert secret not in str(found["Config"]["Env"]).lower()


async def health(target: str) -> int:
    """What the liveness probe would see; 0 if nobody answers."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            reply = await stub.Check(health_pb2.HealthCheckRequest(service=LIVENESS), timeout=1)
        except grpc.RpcError:
            return 0
        return int(reply.status)


async def until_alive(process: asyncio.subprocess.Process, target: str) -> None:
    async with asyncio.timeout(120):
        while await health(target) != health_pb2.HealthCheckResponse.SERVING:
            assert process.returncode is None, f"ended with {process.returncode}"
            await asyncio.sleep(0.2)


@pytest.mark.parametrize("name", ["router", "gateway"])
async def test_a_pods_command_serves_and_ends_when_told(
    gateway: str, documents: list[Manifest], files: dict[str, Path], name: str
) -> None:
    """The manifest's arguments, mounts, user, limits and read-only root; only addresses differ."""
    pod, port = pod_of(documents, f"Deployment {name}"), free_port("127.0.0.1")
    [container] = pod.containers()
    async with EmbeddedRedis(password=PASSWORD) as redis:
        env = {
            "EXPERTMESH_REDIS__URL": redis.url,
            f"EXPERTMESH_{name.upper()}__HOST": "127.0.0.1",
            f"EXPERTMESH_{name.upper()}__PORT": str(port),
        }
        options = podman.as_in(pod, name, files)
        own = f"expertmesh-test-{name}-{port}"
        variables = [f"--env={key}={value}" for key, value in env.items()]
        command = ["podman", "run", "--rm", "--name", own, "--network=host", *options, *variables]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, gateway, *container["args"], stdout=pipe, stderr=pipe
        )
        logs = asyncio.create_task(process.communicate())
        try:
            await until_alive(process, f"127.0.0.1:{port}")
            podman.run("podman", "kill", "--signal", "TERM", own)
            said = await asyncio.wait_for(logs, 60)
        finally:
            podman.run("podman", "rm", "--force", "--ignore", own)
    assert process.returncode == 0, said


KUBERAY = """
set -e
id -u
command -v {programs}
ray --version
expertmesh k8s drain --help | head -1
ray start --head --num-cpus=0 --object-store-memory=104857600 --dashboard-host=0.0.0.0 \
  --metrics-export-port=8080 --dashboard-agent-listen-port=52365 > /tmp/start 2>&1 || cat /tmp/start
until wget --tries 1 -T 2 -q -O- http://localhost:52365/api/local_raylet_healthz | grep success; do
  sleep 1
done
python -c 'import expertmesh.experts.deployment as own; print(own.build.__name__)'
"""
"""KubeRay's start of a head and its readiness check."""


@pytest.fixture
def head(documents: list[Manifest], files: dict[str, Path]) -> list[str]:
    [pod] = [pod for pod in pods(documents) if pod.owner.endswith(", head")]
    pod.spec.setdefault("volumes", [])
    pod.spec["containers"][0].setdefault("volumeMounts", [])
    return list(podman.as_in(pod, "ray-head", files))


def test_ray_starts_in_the_image_as_kuberay_starts_it(
    experts: str, documents: list[Manifest], head: list[str]
) -> None:
    script = KUBERAY.format(programs=" ".join((*PROGRAMS, "ps")))
    said = podman.run(*ALONE, *head, "--shm-size=512m", experts, "bash", "-c", script).splitlines()
    cluster = named(documents, "RayService", "experts")["spec"]["rayClusterConfig"]
    assert said[0] == "10001"
    assert said[1:5] == [f"/usr/bin/{name}" for name in (*PROGRAMS, "ps")]
    assert said[5] == f"ray, version {cluster['rayVersion']}"
    assert said[6].startswith("usage: expertmesh k8s drain")
    assert said[7:] == ["success", "build"]

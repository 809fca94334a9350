"""What processes need to run in Pods: a gateway without Ray, secrets in files, bounded ports."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.mesh import HOST, MODEL, MakeCheckpoint, Mesh

from expertmesh.client import AsyncClient
from expertmesh.runtime.errors import ConfigError
from expertmesh.runtime.redis_server import EmbeddedRedis
from expertmesh.runtime.server import LIVENESS
from expertmesh.runtime.state.link import connect
from expertmesh.services.local import free_port
from expertmesh.v1 import generate_pb2

SERVING = health_pb2.HealthCheckResponse.SERVING
PASSWORD = "not the default"


async def health(address: str, service: str = "") -> int:
    """What a probe would see; 0 if nobody answers."""
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            stub = health_pb2_grpc.HealthStub(channel)
            reply = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=1.0)
        except grpc.RpcError:
            return 0
        return int(reply.status)


async def wait_for(address: str, service: str, status: int = SERVING) -> None:
    """Until the check says so."""
    for _ in range(600):
        if await health(address, service) == status:
            return
        await asyncio.sleep(0.1)
    raise TimeoutError(f"{address}: {service} is not {status}")


@asynccontextmanager
async def guarded_redis(folder: Path) -> AsyncIterator[tuple[str, Path]]:
    """A server with a password, and the file that has it."""
    secret = folder / "password"
    secret.write_text(PASSWORD + "\n")
    async with EmbeddedRedis() as server:
        admin = connect(server.url)
        await admin.config_set("requirepass", PASSWORD)
        await admin.aclose()
        yield server.url, secret


@asynccontextmanager
async def process(command: str, config: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """`expertmesh COMMAND` with a mounted configuration, as a Pod has it."""
    args = ("-X", "importtime", "-m", "expertmesh.services.cli", command, "--config", str(config))
    running = await asyncio.create_subprocess_exec(
        sys.executable, *args, stderr=asyncio.subprocess.PIPE, env=dict(os.environ)
    )
    try:
        yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.wait()


def settings_file(folder: Path, **values: Any) -> Path:
    """A mesh.yaml."""
    file = folder / "mesh.yaml"
    file.write_text(yaml.safe_dump({"model_name": MODEL, "mesh": "pods", **values}))
    return file


async def test_a_gateway_without_ray_lives_serves_and_ends(
    tmp_path: Path, checkpoint: MakeCheckpoint, one_thread: None, restored_logging: None
) -> None:
    path, port = checkpoint("mixtral"), free_port(HOST)
    async with guarded_redis(tmp_path) as (url, secret):
        secrets = {"password_file": str(secret)}
        redis = {"url": url, **secrets}
        config = settings_file(tmp_path, model=str(path), redis=redis, gateway={"port": port})
        address = f"{HOST}:{port}"
        async with (
            Mesh(url, "pods", redis_secrets=secrets, ports="23100-23107") as mesh,
            process("gateway", config) as gateway,
        ):
            logs = asyncio.create_task(gateway.communicate())
            await wait_for(address, LIVENESS)
            assert await health(address) == health_pb2.HealthCheckResponse.NOT_SERVING
            await mesh.replica(path)
            await wait_for(address, "expertmesh.v1.GenerateService")
            async with AsyncClient(address) as client:
                request = generate_pb2.GenerateRequest(
                    tokens=generate_pb2.TokenIds(ids=[3, 1, 4]), max_new_tokens=4, ignore_eos=True
                )
                tokens = [t async for chunk in client.generate(request) for t in chunk.tokens]
            assert len(tokens) == 4
            gateway.send_signal(signal.SIGTERM)
            _, stderr = await asyncio.wait_for(logs, 30)
        assert gateway.returncode == 0, stderr.decode()[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in stderr.decode().splitlines()}
    assert "torch" in imported
    assert "ray" not in imported  # the image has none


async def test_replicas_of_an_address_share_a_range_of_ports(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    taken = socket.create_server((HOST, 23110))
    with taken:
        first = await mesh.replica(path, name="g0#1", ports="23110-23112")
        second = await mesh.replica(path, name="g0#2", ports="23110-23112")
        assert [own.address for own in (first, second)] == [f"{HOST}:23111", f"{HOST}:23112"]
        with pytest.raises(ConfigError, match=r"experts.ports: .* got 23110-23112 on 127.0.0.1"):
            await mesh.replica(path, name="g0#3", ports="23110-23112")

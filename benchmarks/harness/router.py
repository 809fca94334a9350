"""A router in a process of its own: `expertmesh router` as Kubernetes runs it."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.harness.mesh import MODEL
from expertmesh.runtime.child import dying_with_parent

_READY_S = 60.0


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def router_process(model_dir: Path, redis_url: str) -> Iterator[tuple[int, str]]:
    """(pid, address) of a router that serves."""
    address = f"127.0.0.1:{free_port()}"
    settings = {
        "model": model_dir,
        "model_name": MODEL,
        "redis.url": redis_url,
        "router.host": "127.0.0.1",
        "router.port": address.rsplit(":", 1)[1],
        "log_level": "WARNING",
    }
    command = [sys.executable, "-m", "expertmesh.services.cli", "router"]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    process = subprocess.Popen(dying_with_parent(command))
    try:
        _wait_serving(address)
        yield process.pid, address
    finally:
        process.terminate()
        process.wait()


def _wait_serving(address: str) -> None:
    end_s = time.monotonic() + _READY_S
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            try:
                reply = stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=5)
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass
            if time.monotonic() > end_s:
                raise SystemExit("error: the router did not become ready")
            time.sleep(0.1)

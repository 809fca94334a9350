"""Probes of the manifests, as a kubelet makes them: from the node, or inside the container."""

import socket
import subprocess
import urllib.error
import urllib.request
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.e2e.rehearsal.containers import Container


def passes(probe: dict[str, Any], address: str, container: Container) -> bool:
    """One try."""
    timeout_s = float(probe.get("timeoutSeconds", 1))
    if "exec" in probe:
        return _runs(container, probe["exec"]["command"], timeout_s)
    if "grpc" in probe:
        return _serves(address, probe["grpc"], timeout_s)
    if "httpGet" in probe:
        return _answers(address, probe["httpGet"], timeout_s)
    return _listens(address, _port(probe["tcpSocket"]["port"], container), timeout_s)


def _port(port: int | str, container: Container) -> int:
    named = {own.get("name"): own["containerPort"] for own in container.spec.get("ports", [])}
    return port if isinstance(port, int) else int(named[port])


def _runs(container: Container, command: list[str], timeout_s: float) -> bool:
    try:
        return container.run(command, timeout_s).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _serves(address: str, probe: dict[str, Any], timeout_s: float) -> bool:
    request = health_pb2.HealthCheckRequest(service=probe.get("service", ""))
    with grpc.insecure_channel(f"{address}:{probe['port']}") as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _answers(address: str, probe: dict[str, Any], timeout_s: float) -> bool:
    url = f"http://{address}:{probe['port']}{probe['path']}"
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return bool(200 <= answer.status < 400)
    except (OSError, urllib.error.URLError):
        return False


def _listens(address: str, port: int, timeout_s: float) -> bool:
    try:
        socket.create_connection((address, port), timeout_s).close()
    except OSError:
        return False
    return True

"""Waiting for a server's health check."""

import asyncio
import contextlib
import subprocess

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertmesh.runtime.channels import connect
from expertmesh.runtime.errors import Unavailable
from expertmesh.runtime.security.access import PLAIN, Access

_POLL_S = 0.1
_IMPATIENT = (
    # gRPC would wait a second and more after a refused connection; servers here are just starting
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
)


async def wait_serving(
    address: str,
    timeout_s: float,
    process: "subprocess.Popen[bytes] | None" = None,
    access: Access = PLAIN,
) -> None:
    """Until the server's health check says SERVING.

    Raises:
        Unavailable: it does not within `timeout_s`, or `process` has ended.
    """
    async with connect(address, access=access, more_options=_IMPATIENT) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        while asyncio.get_running_loop().time() < deadline_s:
            if process is not None and process.poll() is not None:
                raise Unavailable(f"the router process ended with code {process.returncode}")
            with contextlib.suppress(grpc.RpcError):
                reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=1.0)
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(_POLL_S)
    raise Unavailable(f"{address} is not serving after {timeout_s:.0f} s", address=address)

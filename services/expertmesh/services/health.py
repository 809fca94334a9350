"""Waiting for a server's health check."""

import asyncio
import contextlib
import subprocess

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertmesh.runtime.errors import Unavailable

_POLL_S = 0.1


async def wait_serving(
    address: str, timeout_s: float, process: "subprocess.Popen[bytes] | None" = None
) -> None:
    """Until the server's health check says SERVING.

    Raises:
        Unavailable: it does not within `timeout_s`, or `process` has ended.
    """
    async with grpc.aio.insecure_channel(address) as channel:
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

"""Ray Serve with its gRPC proxy, and expert groups called through it as Serve's guide says.

R rows, D hidden size.
"""

import asyncio
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import grpc
import psutil
import torch

from expertmesh.runtime.tensors import from_bytes, to_bytes, wire_dtype
from expertmesh.services.ray_cluster import ray_cluster
from expertmesh.v1 import expert_pb2, expert_pb2_grpc

SERVICER_FUNCTION = "expertmesh.v1.expert_pb2_grpc.add_ExpertServiceServicer_to_server"
"""What the proxy imports to learn of our messages; any existing service would do."""
_READY_S = 60.0
_POLL_S = 0.1


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@contextmanager
def ray_cluster_with_proxy() -> Iterator[str]:
    """As `ray_cluster`, but Serve has its gRPC proxy, whose address this gives."""
    from ray import serve

    grpc_port, http_port = _free_ports(2)
    options: dict[str, Any] = {
        "proxy_location": "HeadOnly",
        "grpc_options": {"port": grpc_port, "grpc_servicer_functions": [SERVICER_FUNCTION]},
        "http_options": {"host": "127.0.0.1", "port": http_port},  # comes with it; nobody calls it
    }
    start = serve.start
    with ExitStack() as stack:
        # where ray_cluster starts Serve without proxies: once it runs, it is too late for them
        with patch.object(serve, "start", lambda **_: start(**options)):
            stack.enter_context(ray_cluster())
        assert proxy_pids(), "Serve runs without a proxy"
        yield f"127.0.0.1:{grpc_port}"


def proxy_pids() -> list[int]:
    """The processes of Serve's proxies: Ray names them, and they descend from this one."""
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if _name(child).startswith("ray::ProxyActor")]


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


class ProxiedGroup:
    """One application behind the proxy, called in unary calls with the generated stub.

    Args:
        application: its name in Serve, by which the proxy chooses.
    """

    def __init__(self, stub: Any, application: str) -> None:
        self._stub = stub
        self._metadata = (("application", application),)

    async def ask(
        self, experts: list[int], rows_per_expert: list[int], rows_RD: torch.Tensor
    ) -> torch.Tensor:
        """[R, D] of rows sorted by expert."""
        request = expert_pb2.ComputeRequest(
            experts=experts,
            rows_per_expert=rows_per_expert,
            dtype=wire_dtype(rows_RD.dtype),
            hidden_size=rows_RD.shape[1],
            rows=bytes(to_bytes(rows_RD)),
        )
        reply = await self._stub.Compute(request, metadata=self._metadata)
        return from_bytes(reply.rows, rows_RD.dtype, rows_RD.shape)


@contextmanager
def proxied_groups(
    loop: asyncio.AbstractEventLoop, address: str, applications: Sequence[str]
) -> Iterator[list[ProxiedGroup]]:
    """The applications through the proxy, once it knows them all; to be called on `loop`."""

    async def connect() -> Any:
        channel = grpc.aio.insecure_channel(address)
        await _wait_known(channel, applications)
        return channel

    channel = asyncio.run_coroutine_threadsafe(connect(), loop).result()
    try:
        stub: Any = expert_pb2_grpc.ExpertServiceStub(channel)
        yield [ProxiedGroup(stub, application) for application in applications]
    finally:
        asyncio.run_coroutine_threadsafe(channel.close(), loop).result()


async def _wait_known(channel: Any, applications: Sequence[str]) -> None:
    from ray.serve.generated import serve_pb2, serve_pb2_grpc

    messages: Any = serve_pb2
    stub_type: Any = serve_pb2_grpc.RayServeAPIServiceStub
    serve_api, request = stub_type(channel), messages.ListApplicationsRequest()
    deadline_s = time.monotonic() + _READY_S
    while True:
        reply = await serve_api.ListApplications(request, wait_for_ready=True)
        if set(applications) <= set(reply.application_names):
            return
        if time.monotonic() > deadline_s:
            raise SystemExit(f"error: Serve's proxy knows only {list(reply.application_names)}")
        await asyncio.sleep(_POLL_S)

"""A whole mesh on this machine: Redis, router process, Ray Serve with expert groups and gateway."""

import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from expertmesh.runtime.child import dying_with_parent
from expertmesh.runtime.redis_server import EmbeddedRedis
from expertmesh.services.health import wait_serving
from expertmesh.services.preflight import check_before_start
from expertmesh.services.ray_cluster import deploy, ray_cluster, wait_running
from expertmesh.services.serve_config import GATEWAY_APP, gateway_args, group_args, serve_config
from expertmesh.services.settings import MeshSettings

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 180.0
T = TypeVar("T")
_STOP_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Endpoints:
    """Where a running mesh is reached."""

    model: str
    router: str
    gateway: str
    redis_url: str
    redis: str
    """What serves Redis, for people."""


def free_port(host: str) -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def with_ports(settings: MeshSettings) -> MeshSettings:
    """The settings with port 0 replaced by free ones, as several processes must agree on them."""
    router, gateway = settings.router, settings.gateway
    if not router.port:
        router = router.model_copy(update={"port": free_port(router.host)})
    if not gateway.port:
        gateway = gateway.model_copy(update={"port": free_port(gateway.host)})
    return settings.model_copy(update={"router": router, "gateway": gateway})


@asynccontextmanager
async def local_mesh(
    settings: MeshSettings, progress: Callable[[str], None]
) -> AsyncIterator[Endpoints]:
    """Start everything, yield the endpoints, and on leaving stop everything in reverse order.

    Raises:
        ExpertMeshError: what is wrong with settings, checkpoint or machine; nothing is left over.
    """
    settings = with_ports(settings)
    plan = check_before_start(settings)
    progress(plan.summary)
    async with AsyncExitStack() as stack:
        redis_url, described = await _redis(stack, settings)
        progress(f"redis: {described}")
        router = stack.enter_context(_router_process(settings, redis_url))
        ray = stack.enter_context(ExitStack())
        await _in_thread(ray.enter_context, ray_cluster())
        progress("ray and ray serve are up")
        groups = group_args(settings, plan.model, redis_url, plan.num_experts)
        gateway = gateway_args(settings, plan.model, redis_url)
        deploy(serve_config(settings, groups, gateway))
        progress(f"starting {len(groups)} expert groups and the gateway")
        names = [*(args.group for args in groups), GATEWAY_APP]
        await wait_running(names, START_TIMEOUT_S, progress)
        addresses = [f"{p.host}:{p.port}" for p in (settings.router, settings.gateway)]
        for address in addresses:
            await wait_serving(address, START_TIMEOUT_S, router)
        progress(f"router at {addresses[0]}, gateway at {addresses[1]}")
        yield Endpoints(plan.model, addresses[0], addresses[1], redis_url, described)
        progress("stopping")
        await asyncio.to_thread(ray.close)


async def _in_thread(function: Callable[[T], object], argument: T) -> None:
    """Run it to its end even when cancelled: half of a Ray cluster cannot be shut down."""
    running = asyncio.ensure_future(asyncio.to_thread(function, argument))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


async def _redis(stack: AsyncExitStack, settings: MeshSettings) -> tuple[str, str]:
    if settings.redis.url:
        return settings.redis.url, settings.redis.url
    server = await stack.enter_async_context(EmbeddedRedis())
    return server.url, server.describe()


@contextlib.contextmanager
def _router_process(settings: MeshSettings, redis_url: str) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "expertmesh.services.cli", "router"]
    with tempfile.TemporaryDirectory(prefix="expertmesh-") as folder:
        config = Path(folder) / "mesh.yaml"
        resolved = settings.model_dump(mode="json") | {"redis": {"url": redis_url}}
        config.write_text(json.dumps(resolved), encoding="utf-8")  # JSON is YAML
        clean = {k: v for k, v in os.environ.items() if not k.startswith("EXPERTMESH_")}
        process = subprocess.Popen(
            dying_with_parent([*command, "--config", str(config)]), env=clean
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

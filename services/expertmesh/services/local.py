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
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from expertmesh.runtime.child import dying_with_parent
from expertmesh.runtime.redis_server import EmbeddedRedis
from expertmesh.services.health import wait_serving
from expertmesh.services.preflight import StartPlan, check_before_start
from expertmesh.services.ray_cluster import (
    deploy,
    ray_cluster,
    remove_application,
    wait_running,
)
from expertmesh.services.serve_config import GATEWAY_APP, gateway_args, group_args, serve_config
from expertmesh.services.settings import MeshSettings
from expertmesh.services.signals import cancelled_by_signals

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 180.0
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
    with cancelled_by_signals() as handle_signals:
        async with AsyncExitStack() as stack:
            redis_url, described = await _redis(stack, settings)
            progress(f"redis: {described}")
            router = stack.enter_context(_router_process(settings, redis_url))
            await _enter_in_thread(stack, ray_cluster())
            handle_signals()  # Ray has put in handlers of its own
            progress("ray and ray serve are up")
            await _deploy(stack, settings, plan, redis_url, progress)
            addresses = [f"{p.host}:{p.port}" for p in (settings.router, settings.gateway)]
            for address in addresses:
                await wait_serving(address, START_TIMEOUT_S, router)
            progress(f"router at {addresses[0]}, gateway at {addresses[1]}")
            yield Endpoints(plan.model, addresses[0], addresses[1], redis_url, described)
            progress("stopping")


async def _deploy(
    stack: AsyncExitStack,
    settings: MeshSettings,
    plan: StartPlan,
    redis_url: str,
    progress: Callable[[str], None],
) -> None:
    """Expert groups and gateway on the running Ray; leaving the stack stops the gateway first, so
    that the text it is generating still finds its experts."""
    groups = group_args(settings, plan.model, redis_url, plan.num_experts)
    gateway = gateway_args(settings, plan.model, redis_url)
    config = serve_config(settings, groups, gateway)
    deploy(config)
    stack.push_async_callback(remove_application, config, GATEWAY_APP)
    progress(f"starting {len(groups)} expert groups and the gateway")
    names = [*(args.group for args in groups), GATEWAY_APP]
    await wait_running(names, START_TIMEOUT_S, progress)


async def _enter_in_thread(stack: AsyncExitStack, context: AbstractContextManager[None]) -> None:
    """Enter to the end even when cancelled: half of a Ray cluster cannot be shut down."""
    inner = ExitStack()
    stack.push_async_callback(asyncio.to_thread, inner.close)
    entering = asyncio.ensure_future(asyncio.to_thread(inner.enter_context, context))
    try:
        await asyncio.shield(entering)
    except asyncio.CancelledError:
        await asyncio.wait([entering])
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

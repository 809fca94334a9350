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
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import token_urlsafe

from expertmesh.runtime.child import dying_with_parent
from expertmesh.runtime.redis_server import EmbeddedRedis
from expertmesh.runtime.security.access import PLAIN, Access
from expertmesh.runtime.security.server import mesh_access
from expertmesh.services.health import wait_serving
from expertmesh.services.preflight import StartPlan, check_before_start
from expertmesh.services.ray_cluster import (
    as_running,
    deploy,
    only,
    ray_cluster,
    remove_application,
    wait_built,
)
from expertmesh.services.security import check_security
from expertmesh.services.settings import MeshSettings, RedisSettings
from expertmesh.services.signals import cancelled_by_signals

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 5.0  # for what comes after the calls


@dataclass(frozen=True)
class Endpoints:
    """Where a running mesh is reached."""

    model: str
    router: str
    gateway: str
    redis_url: str
    redis: str
    """What serves Redis, for people."""
    access: Access = PLAIN
    """How this process reaches router and gateway."""


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
    settings: MeshSettings, progress: Callable[[str], None], token_file: str | None = None
) -> AsyncIterator[Endpoints]:
    """Start everything, yield the endpoints, and on leaving stop everything in reverse order.

    Args:
        token_file: token of this process, for those who will use the endpoints' `access`.

    Raises:
        ExpertMeshError: what is wrong with settings, checkpoint or machine; nothing is left over.
    """
    settings = with_ports(settings)
    check_security(settings)
    access = mesh_access(settings.security.tls, settings.mesh)
    plan = check_before_start(settings)
    progress(plan.summary)
    with cancelled_by_signals() as handle_signals:
        async with AsyncExitStack() as stack:
            redis, described = await _redis(stack, settings.redis)
            redis_url = str(redis.url)
            settings = settings.model_copy(update={"redis": redis})
            progress(f"redis: {described}")
            await _enter_in_thread(stack, ray_cluster())
            handle_signals()  # Ray has put in handlers of its own
            progress("ray and ray serve are up")
            router = await _deploy(stack, settings, plan, redis_url, progress)
            addresses = [f"{p.host}:{p.port}" for p in (settings.router, settings.gateway)]
            for address in addresses:
                await wait_serving(address, START_TIMEOUT_S, router, access)
            progress(f"router at {addresses[0]}, gateway at {addresses[1]}")
            yield Endpoints(
                plan.model,
                addresses[0],
                addresses[1],
                redis_url,
                described,
                replace(access, token_file=token_file),
            )
            progress("stopping")


async def _deploy(
    stack: AsyncExitStack,
    settings: MeshSettings,
    plan: StartPlan,
    redis_url: str,
    progress: Callable[[str], None],
) -> "subprocess.Popen[bytes]":
    """Expert groups and gateway on the running Ray, and the router process, which is returned.

    Leaving the stack stops the gateway before the groups, so that the text it is generating still
    finds its experts.
    """
    # it imports Ray Serve, which no one needs before Ray runs
    from expertmesh.services.gateway.args import gateway_args
    from expertmesh.services.serve_config import GATEWAY_APP, group_args, serve_config

    groups = group_args(settings, plan.model, redis_url, plan.num_experts)
    gateway = gateway_args(settings, plan.model, redis_url)
    config = serve_config(settings, groups, gateway)
    # the gateway imports most and is ready last: it gets a head start, with one group beside it
    deploy(only(config, GATEWAY_APP, groups[0].group))
    await wait_built(GATEWAY_APP, START_TIMEOUT_S)
    deploy(config)
    stack.push_async_callback(remove_application, config, GATEWAY_APP, settings.gateway.drain_s)
    progress(f"starting {len(groups)} expert groups and the gateway")
    names = [*(args.group for args in groups), GATEWAY_APP]
    num_running, router = 0, None
    # the gateway serves when every expert has a replica; asking it is cheaper than asking Serve
    own = settings.gateway
    access = mesh_access(settings.security.tls, settings.mesh)
    served = asyncio.create_task(
        wait_serving(f"{own.host}:{own.port}", START_TIMEOUT_S, access=access)
    )
    stack.callback(served.cancel)
    async for name in as_running(names, START_TIMEOUT_S, served):
        num_running += 1
        progress(f"{name} is running ({num_running} of {len(names)})")
        if router is None:  # not earlier: until then cores are short
            router = stack.enter_context(_router_process(settings))
    assert router, "there are at least a group and the gateway"
    return router


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


async def _redis(stack: AsyncExitStack, redis: RedisSettings) -> tuple[RedisSettings, str]:
    """(settings that can be handed on, what serves Redis): a password is in a file by then."""
    if redis.url is None:
        server = await stack.enter_async_context(EmbeddedRedis(password=token_urlsafe()))
        found = {"url": server.url, "password_file": server.password_file}
        return RedisSettings.model_validate(found), server.describe()
    if redis.password is None:
        return redis, redis.url
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="expertmesh-"))  # mode 0700
    file = Path(folder) / "redis-password"
    file.write_text(redis.password.get_secret_value(), encoding="utf-8")
    update = {"password": None, "password_file": str(file)}
    return redis.model_copy(update=update), redis.url


@contextlib.contextmanager
def _router_process(settings: MeshSettings) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "expertmesh.services.cli", "router"]
    with tempfile.TemporaryDirectory(prefix="expertmesh-") as folder:
        config = Path(folder) / "mesh.yaml"
        resolved = settings.model_dump(mode="json")
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
                process.wait(settings.router.drain_s + _STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

"""A gateway that is a process of its own instead of a replica of Ray Serve."""

import asyncio
import os
from collections.abc import Callable

import uvloop

from expertmesh.services.checkpoints import model_name
from expertmesh.services.gateway.args import gateway_args
from expertmesh.services.gateway.gateway import Gateway
from expertmesh.services.settings import MeshSettings
from expertmesh.services.signals import cancelled_by_signals

_CHECK_PERIOD_S = 2.0  # as Serve would


def run_gateway(settings: MeshSettings, redis_url: str) -> None:
    """Serve until SIGTERM or SIGINT, then finish running calls and return.

    Raises:
        CheckpointError, ConfigError: it cannot serve.
        Unavailable: the engine has ended; whoever started the process should start it again.
    """
    uvloop.run(_serve(settings, redis_url))


async def _serve(settings: MeshSettings, redis_url: str) -> None:
    args = gateway_args(settings, model_name(settings), redis_url)
    with cancelled_by_signals():
        try:
            gateway = await Gateway.start(args)
        except asyncio.CancelledError:
            os._exit(0)  # the thread that reads weights cannot be stopped, and holds nothing
        try:
            await _until_stopped(gateway.check_health)
        finally:
            await gateway.stop()


async def _until_stopped(check_health: Callable[[], None]) -> None:
    task = asyncio.current_task()
    assert task
    try:
        while True:
            check_health()
            await asyncio.sleep(_CHECK_PERIOD_S)
    except asyncio.CancelledError:
        task.uncancel()

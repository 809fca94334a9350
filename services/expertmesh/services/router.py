"""The router process: RouterService and ControlService over one router core."""

import asyncio
import logging
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import torch
import uvloop

from expertmesh.router import control, servicer
from expertmesh.router.core import RouterCore
from expertmesh.router.selection import check_ranks
from expertmesh.router.selector import Selector
from expertmesh.router.served_model import ServedModel
from expertmesh.runtime.checkpoint import Checkpoint
from expertmesh.runtime.errors import ExpertMeshError
from expertmesh.runtime.heap import keep_freed_memory
from expertmesh.runtime.hf_config import load_config
from expertmesh.runtime.in_flight import InFlight
from expertmesh.runtime.json_logs import setup_logging
from expertmesh.runtime.missing_experts import Policy
from expertmesh.runtime.security.server import mesh_access
from expertmesh.runtime.server import MeshServer
from expertmesh.runtime.state import MeshWatcher
from expertmesh.runtime.state.scaling import ScalingBoard
from expertmesh.runtime.telemetry import Telemetry, configure
from expertmesh.services.checkpoints import model_dtype, model_name
from expertmesh.services.security import public_security
from expertmesh.services.settings import MeshSettings, SelectionSettings
from expertmesh.v1 import control_pb2_grpc, router_pb2_grpc

logger = logging.getLogger(__name__)

COMPLETE_WARNING_S = 60.0


def run_router(settings: MeshSettings, redis_url: str) -> None:
    """Serve until SIGTERM or SIGINT, then finish running calls and return."""
    setup_logging(settings.log_level)
    torch.set_num_threads(1)  # the gate is small; cores belong to replicas and gateway
    keep_freed_memory()
    uvloop.run(_serve(settings, redis_url))


async def _serve(settings: MeshSettings, redis_url: str) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopping.set)
    telemetry = configure("router", settings.otlp_endpoint, sample_frac=settings.trace_sample_frac)
    async with AsyncExitStack() as stack:
        stack.callback(telemetry.shutdown)
        model = _model(settings)
        core = RouterCore(
            model.name,
            model.num_experts,
            telemetry,
            max_message_bytes=settings.max_message_bytes,
            failover=settings.failover,
            access=mesh_access(settings.security.tls, settings.mesh),
        )
        stack.push_async_callback(core.close)
        watcher = await stack.enter_async_context(
            MeshWatcher(
                redis_url, settings.mesh, core.on_state, core.on_gone, secrets=settings.redis
            )
        )
        board = await stack.enter_async_context(
            ScalingBoard(redis_url, settings.mesh, settings.redis)
        )
        server = _server(settings, model, core, watcher, board, telemetry)
        await server.start(settings.router.host, settings.router.port, serving=False)
        stack.push_async_callback(server.stop, settings.router.drain_s)
        ready = asyncio.create_task(serve_when_complete(core, server))
        stack.callback(ready.cancel)
        logger.info("router listens on %s:%d", settings.router.host, server.port)
        await stopping.wait()
        await server.set_not_serving()


async def serve_when_complete(core: RouterCore, server: MeshServer) -> None:
    """Report SERVING as soon as every expert has a replica; until then say what is missing."""
    while True:
        try:
            await core.wait_complete(COMPLETE_WARNING_S)
        except ExpertMeshError as error:
            logger.warning("not serving yet: %s", error.message)
        else:
            await server.set_serving()
            return


def _model(settings: MeshSettings) -> ServedModel:
    path = Path(settings.model)
    checkpoint, config = Checkpoint.open(path), load_config(path)
    name = model_name(settings)
    return ServedModel(name, checkpoint, config, model_dtype(settings.dtype, config))


def selector_for(
    selection: SelectionSettings,
    model: ServedModel,
    core: RouterCore,
    telemetry: Telemetry,
    missing_experts: Policy = "strict",
) -> Selector:
    """Selects as configured.

    Raises:
        InvalidInput, UnsupportedCheckpoint: the model's gates cannot do what is configured.
    """
    frac = selection.exact_sample_frac
    selector = Selector(model, core, telemetry.metrics, selection, frac)
    if not selection.is_exact:
        for layer, count in model.num_experts.items():
            selector.check(layer)
            check_ranks(selection, count)
    if missing_experts == "substitute":
        for layer in model.num_experts:
            selector.check(layer, "missing_experts.policy")
    return selector


def _server(
    settings: MeshSettings,
    model: ServedModel,
    core: RouterCore,
    watcher: MeshWatcher,
    board: ScalingBoard,
    telemetry: Telemetry,
) -> MeshServer:
    missing_experts = settings.missing_experts.policy
    selector = selector_for(settings.selection, model, core, telemetry, missing_experts)
    routing = servicer.RouterServicer(
        model,
        core,
        telemetry,
        selector,
        call_timeout_s=settings.router.call_timeout_s,
        reject_nonfinite=settings.experts.reject_nonfinite,
        missing_experts=missing_experts,
        in_flight=InFlight(
            settings.router.max_calls, settings.router.max_calls_bytes, time.monotonic
        ),
    )
    redis = lambda: (watcher.connected, watcher.redis_age_s)  # noqa: E731
    view = control.ControlServicer(settings.mesh, core, board, redis)

    def add(server: Any) -> None:
        router_pb2_grpc.add_RouterServiceServicer_to_server(routing, server)
        control_pb2_grpc.add_ControlServiceServicer_to_server(view, server)

    return MeshServer(
        [servicer.SERVICE, control.SERVICE],
        add,
        max_message_bytes=settings.max_message_bytes,
        security=public_security(settings.security, settings.mesh),
        connection_age=settings.router,
    )

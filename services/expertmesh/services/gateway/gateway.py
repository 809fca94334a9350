"""The gateway: the dense part of the model, an engine over it, and GenerateService.

Composed here; Serve (deployment.py) and tests start it the same way.
"""

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoTokenizer

from expertmesh.client.skeleton import load_skeleton, share_skeleton
from expertmesh.router import control
from expertmesh.router.core import RouterCore
from expertmesh.router.lenient import LenientCalls
from expertmesh.router.selector import Selector
from expertmesh.router.served_model import ServedModel as RoutedModel
from expertmesh.runtime.checkpoint import Checkpoint
from expertmesh.runtime.errors import Unavailable
from expertmesh.runtime.heap import keep_freed_memory
from expertmesh.runtime.hf_config import load_config
from expertmesh.runtime.json_logs import setup_logging
from expertmesh.runtime.security.server import mesh_access
from expertmesh.runtime.server import MeshServer
from expertmesh.runtime.state import MeshWatcher
from expertmesh.runtime.state.scaling import ScalingBoard
from expertmesh.runtime.telemetry import Telemetry, configure
from expertmesh.services.callers import CoreCaller
from expertmesh.services.checkpoints import model_dtype
from expertmesh.services.gateway.args import GatewayArgs
from expertmesh.services.gateway.continuous import ContinuousEngine
from expertmesh.services.gateway.engine import Engine, EngineKind, choose_engine
from expertmesh.services.gateway.engine_config import EngineConfig
from expertmesh.services.gateway.request_routing import RequestRouting
from expertmesh.services.gateway.sampling import limits_of
from expertmesh.services.gateway.servicer import SERVICE, GenerateServicer, ServedModel
from expertmesh.services.router import selector_for, serve_when_complete
from expertmesh.services.security import public_security
from expertmesh.v1 import control_pb2_grpc, generate_pb2_grpc

logger = logging.getLogger(__name__)

_ENGINE_GRACE_S = 10.0
MAX_REQUEST_BYTES = 4 << 20
"""Of a prompt, or of tokens to score: more than a million tokens. Only answers are larger."""


class Gateway:
    """A running gateway. Create with `await Gateway.start(args)`."""

    def __init__(self, args: GatewayArgs) -> None:
        self._args = args
        self._resources = AsyncExitStack()
        self.address = ""

    @classmethod
    async def start(cls, args: GatewayArgs) -> Self:
        """Load the dense part and listen; report SERVING once every expert has a replica.

        Raises:
            CheckpointError, ConfigError: it cannot serve; nothing is left over.
        """
        setup_logging(args.log_level)
        torch.set_num_threads(args.threads)
        gateway = cls(args)
        started_s = time.monotonic()
        async with AsyncExitStack() as stack:
            gateway.address = await gateway._open(stack)
            gateway._resources = stack.pop_all()
        took_s = time.monotonic() - started_s
        logger.info("gateway listens on %s after %.1f s", gateway.address, took_s)
        return gateway

    async def _open(self, stack: AsyncExitStack) -> str:
        args = self._args
        telemetry = configure("gateway", args.otlp_endpoint, sample_frac=args.trace_sample_frac)
        stack.callback(telemetry.shutdown)
        caller = CoreCaller(asyncio.get_running_loop())
        model = await asyncio.to_thread(_load, args, caller)
        keep_freed_memory()
        scorer = share_skeleton(model)  # before the engine changes the model's attention
        core = await self._open_core(stack, model, telemetry)
        routed = RoutedModel(args.model, Checkpoint.open(args.model_dir), model.config, model.dtype)
        selector = selector_for(args.selection, routed, core, telemetry, args.missing_experts)
        caller.core, caller.selector, caller.policy = core, selector, args.missing_experts
        caller.lenient = LenientCalls(core, telemetry.metrics)
        engine = choose_engine(model, _engine_kind(args), _engine_config(args), caller.serving)
        await engine.start()
        stack.push_async_callback(engine.close, _ENGINE_GRACE_S)
        self._engine = engine
        servicer = GenerateServicer(
            _served(args, routed, scorer, engine),
            telemetry,
            max_response_bytes=args.max_message_bytes,
            routing=_routing(args, selector, core, engine),
            serving=caller.serving,
        )
        running = servicer.running
        caller.callers, caller.origin = running.traceparents, running.origin
        stack.callback(servicer.close)
        return await self._listen(stack, servicer, core)

    async def _listen(
        self, stack: AsyncExitStack, servicer: GenerateServicer, core: RouterCore
    ) -> str:
        args = self._args
        board = await stack.enter_async_context(
            ScalingBoard(args.redis_url, args.mesh, args.redis_secrets)
        )
        server = self._server(servicer, core, board)
        port = await server.start(args.host, args.port, serving=False)
        stack.push_async_callback(server.stop, args.drain_s)
        ready = asyncio.create_task(serve_when_complete(core, server))
        stack.callback(ready.cancel)
        return f"{args.host}:{port}"

    async def _open_core(
        self, stack: AsyncExitStack, model: Any, telemetry: Telemetry
    ) -> RouterCore:
        args = self._args
        core = RouterCore(
            args.model,
            experts_of(model),
            telemetry,
            max_message_bytes=args.max_message_bytes,
            failover=args.failover,
            access=mesh_access(args.security.tls, args.mesh),
        )
        stack.push_async_callback(core.close)
        self._watcher = await stack.enter_async_context(
            MeshWatcher(
                args.redis_url,
                args.mesh,
                core.on_state,
                core.on_gone,
                secrets=args.redis_secrets,
            )
        )
        return core

    def _server(
        self, servicer: GenerateServicer, core: RouterCore, board: ScalingBoard
    ) -> MeshServer:
        watcher = self._watcher
        view = control.ControlServicer(
            self._args.mesh, core, board, lambda: (watcher.connected, watcher.redis_age_s)
        )

        def add(server: Any) -> None:
            generate_pb2_grpc.add_GenerateServiceServicer_to_server(servicer, server)
            control_pb2_grpc.add_ControlServiceServicer_to_server(view, server)

        return MeshServer(
            [SERVICE, control.SERVICE],
            add,
            max_message_bytes=self._args.max_message_bytes,
            max_request_bytes=MAX_REQUEST_BYTES,
            security=public_security(self._args.security, self._args.mesh),
            connection_age=self._args,
        )

    def check_health(self) -> None:
        """Raises Unavailable when the engine cannot take requests any more."""
        if not self._engine.is_alive():
            raise Unavailable("the generation engine has ended; the gateway's log says why")

    async def stop(self) -> None:
        """Finish running calls, then close everything."""
        await self._resources.aclose()


def _load(args: GatewayArgs, caller: CoreCaller) -> Any:
    config = load_config(Path(args.model_dir))
    model = load_skeleton(args.model_dir, caller, dtype=model_dtype(args.dtype, config))
    return model.to("cuda") if args.num_gpus and torch.cuda.is_available() else model


def experts_of(model: Any) -> dict[int, int]:
    """Number of routed experts of each layer whose experts are remote."""
    return {m.layer: m.num_experts for m in model.modules() if hasattr(m, "caller")}


def _engine_kind(args: GatewayArgs) -> EngineKind:
    return "exact" if args.deterministic and args.engine == "auto" else args.engine


def _engine_config(args: GatewayArgs) -> EngineConfig:
    return EngineConfig(
        max_batch_tokens=args.max_batch_tokens,
        kv_cache_tokens=args.kv_cache_tokens,
        max_running=args.max_running,
        max_waiting=args.max_waiting,
        max_prompt_tokens=args.max_prompt_tokens,
        stream_interval_s=args.stream_interval_s,
    )


def _routing(
    args: GatewayArgs, selector: Selector, core: RouterCore, engine: Engine
) -> RequestRouting:
    is_batched = isinstance(engine, ContinuousEngine)
    return RequestRouting(args.missing_experts, selector, core.num_experts, is_batched=is_batched)


def _served(args: GatewayArgs, routed: RoutedModel, scorer: Any, engine: Engine) -> ServedModel:
    return ServedModel(
        info=routed.info(),
        engine=engine,
        scorer=scorer,
        limits=limits_of(scorer, engine.max_positions),
        tokenizer=_tokenizer(args.model_dir),
    )


def _tokenizer(model_dir: str) -> Any | None:
    """The checkpoint's tokenizer; without one only token ids are served."""
    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("no tokenizer in %s (%s): prompts must be token ids", model_dir, error)
        return None

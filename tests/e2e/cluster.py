"""One Ray with Serve and one Redis for a whole session of tests, and applications on them."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from expertmesh.experts.assignment import split_evenly
from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.experts.reader import ExpertReader
from expertmesh.router.core import RouterCore
from expertmesh.router.served_model import ServedModel
from expertmesh.router.servicer import SERVICE, RouterServicer
from expertmesh.runtime.channels import DEFAULT_MAX_MESSAGE_BYTES
from expertmesh.runtime.checkpoint import Checkpoint
from expertmesh.runtime.hf_config import load_config
from expertmesh.runtime.redis_server import EmbeddedRedis
from expertmesh.runtime.server import MeshServer
from expertmesh.runtime.state import MeshWatcher
from expertmesh.runtime.telemetry import configure
from expertmesh.services.checkpoints import model_dtype
from expertmesh.services.ray_cluster import deploy, ray_cluster, wait_running
from expertmesh.services.router import selector_for
from expertmesh.services.serve_config import EXPERTS_IMPORT_PATH, application
from expertmesh.services.settings import SelectionSettings
from expertmesh.v1 import router_pb2_grpc

START_TIMEOUT_S = 240.0
COMPLETE_S = 30.0
T = TypeVar("T")


class LoopThread:
    """An event loop that runs in a thread of its own for the length of the block."""

    def __enter__(self) -> "LoopThread":
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="test-loop")
        self._thread.start()
        return self

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def __exit__(self, *exc_info: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@dataclass
class Cluster:
    """Ray Serve, Redis and a loop for in-process routers."""

    redis_url: str
    loop: LoopThread
    applications: dict[str, dict[str, Any]] = field(default_factory=dict)
    cores: dict[str, RouterCore] = field(default_factory=dict)
    """Of the routers that run, by model."""

    @contextmanager
    def running(
        self, groups: list[ExpertGroupArgs], deployments: Mapping[str, dict[str, Any]] | None = None
    ) -> Iterator[None]:
        """The groups' applications, beside those already there.

        Args:
            deployments: what Serve's config says of a group's deployment.
        """
        names = [args.group for args in groups]
        for args in groups:
            own = [{"name": args.group, **deployments[args.group]}] if deployments else []
            self.applications[args.group] = application(args.group, EXPERTS_IMPORT_PATH, args, own)
        self._deploy()
        try:
            asyncio.run(wait_running(names, START_TIMEOUT_S, lambda text: None))
            yield
        finally:
            for name in names:
                del self.applications[name]
            self._deploy()

    def change(self, changed: dict[str, Any]) -> None:
        """Deploy everything again with one application changed."""
        self.applications[changed["name"]] = changed
        self._deploy()

    def _deploy(self) -> None:
        deploy({"proxy_location": "Disabled", "applications": [*self.applications.values()]})

    @contextmanager
    def router(self, path: Path, model: str) -> Iterator[str]:
        """A RouterService of this process over real gRPC; yields its address."""
        stack = AsyncExitStack()
        try:
            core, address = self.loop.run(_open_router(stack, self.redis_url, path, model))
            self.cores[model] = core
            yield address
        finally:
            self.cores.pop(model, None)
            self.loop.run(stack.aclose())

    def group_args(
        self, path: Path, model: str, num_groups: int, **changes: Any
    ) -> list[ExpertGroupArgs]:
        """Groups of a checkpoint, in a mesh of the model's name."""
        reader = ExpertReader(Checkpoint.open(path))
        num_experts = max(reader.num_experts(layer) for layer in reader.layers())
        return [
            ExpertGroupArgs(
                group=f"{model}-g{index}",
                model_dir=str(path),
                model=model,
                mesh=model,
                experts=ids,
                redis_url=self.redis_url,
                host="127.0.0.1",
                log_level="WARNING",
                **changes,
            )
            for index, ids in enumerate(split_evenly(num_experts, num_groups))
        ]


async def _open_router(
    stack: AsyncExitStack, redis_url: str, path: Path, model: str
) -> tuple[RouterCore, str]:
    config = load_config(path)
    served = ServedModel(model, Checkpoint.open(path), config, model_dtype("auto", config))
    telemetry = configure("router")
    core = RouterCore(
        model, served.num_experts, telemetry, max_message_bytes=DEFAULT_MAX_MESSAGE_BYTES
    )
    stack.push_async_callback(core.close)
    await stack.enter_async_context(MeshWatcher(redis_url, model, core.on_state, core.on_gone))
    selector = selector_for(SelectionSettings(), served, core, telemetry)
    servicer = RouterServicer(served, core, telemetry, selector, call_timeout_s=30.0)

    def add(server: Any) -> None:
        router_pb2_grpc.add_RouterServiceServicer_to_server(servicer, server)

    server = MeshServer([SERVICE], add)
    port = await server.start("127.0.0.1")
    stack.push_async_callback(server.stop, 1.0)
    await core.wait_complete(COMPLETE_S)
    return core, f"127.0.0.1:{port}"


@contextmanager
def open_cluster() -> Iterator[Cluster]:
    """Start everything; stop it in reverse order."""
    torch.set_num_threads(1)
    redis = EmbeddedRedis()
    with LoopThread() as loop:
        loop.run(redis.__aenter__())
        try:
            with ray_cluster():
                yield Cluster(redis.url, loop)
        finally:
            loop.run(redis.__aexit__(None, None, None))

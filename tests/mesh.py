"""A mesh inside the test's process and event loop: real replicas and routers, real gRPC; and what
goes wrong in one: a replica that dies, one that stalls."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from expertmesh.experts.assignment import split_evenly
from expertmesh.experts.batch import PackedRows
from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.experts.replica import Replica
from expertmesh.router import control, servicer
from expertmesh.router.core import RouterCore
from expertmesh.router.failover import FailoverSettings
from expertmesh.router.served_model import ServedModel
from expertmesh.runtime.channels import DEFAULT_MAX_MESSAGE_BYTES
from expertmesh.runtime.checkpoint import Checkpoint
from expertmesh.runtime.hf_config import load_config
from expertmesh.runtime.in_flight import InFlight
from expertmesh.runtime.missing_experts import Policy
from expertmesh.runtime.security.server import mesh_access
from expertmesh.runtime.security.settings import SecuritySettings
from expertmesh.runtime.server import MeshServer
from expertmesh.runtime.state import MeshWatcher
from expertmesh.runtime.state.scaling import ScalingBoard
from expertmesh.runtime.telemetry import configure
from expertmesh.services.checkpoints import model_dtype
from expertmesh.services.router import selector_for
from expertmesh.services.security import public_security
from expertmesh.services.settings import SelectionSettings
from expertmesh.v1 import control_pb2, control_pb2_grpc, router_pb2_grpc

MakeCheckpoint = Callable[..., Path]
"""Of the fixture `checkpoint`."""
MODEL = "tiny"
HOST = "127.0.0.1"
LEASE_S = 10.0
"""Everything here shares one event loop and one GIL: on a busy machine heartbeats come late."""


@dataclass(frozen=True)
class Router:
    """A running router."""

    target: str
    core: RouterCore
    watcher: MeshWatcher
    model: ServedModel

    def in_flight_rows(self, replica: str) -> int:
        """Rows sent to a replica and not yet answered."""
        return self.core.in_flight_rows(self.core.snapshot.replicas[replica].life)

    def set_aside(self, replica: str) -> str:
        """Why a replica gets no work now, or ""."""
        return self.core.snapshot.replicas[replica].set_aside


class Mesh:
    """Replicas and routers of one mesh; leaving the block stops routers first, then replicas."""

    def __init__(self, redis_url: str, name: str, **args: Any) -> None:
        self.redis_url = redis_url
        self.name = name
        self._args = args
        """Of all replicas."""
        self._replicas: list[Replica] = []
        self._routers = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._routers.aclose()
        await self.stop_replicas()

    async def stop_replicas(self) -> None:
        """All of them; they send their last telemetry."""
        await asyncio.gather(*(replica.drain_and_stop() for replica in self._replicas))
        self._replicas.clear()

    async def replica(
        self, path: Path, experts: str = "0-7", name: str = "g0#1", **args: Any
    ) -> Replica:
        """One replica; its group is the part of `name` before the #."""
        fields: dict[str, Any] = {
            "group": name.split("#")[0],
            "model_dir": str(path),
            "model": MODEL,
            "experts": experts,
            "redis_url": self.redis_url,
            "mesh": self.name,
            "host": HOST,
            "lease_s": LEASE_S,
            **self._args,
        }
        started = await Replica.start(ExpertGroupArgs(**(fields | args)), name)
        self._replicas.append(started)
        return started

    async def replicas(
        self, path: Path, groups: int, copies: int = 1, *, num_experts: int = 8, **args: Any
    ) -> dict[str, Replica]:
        """All experts split evenly over groups, by replica name: g0#1, g0#2, g1#1, ..."""
        shares = split_evenly(num_experts, groups)
        return {
            name: await self.replica(path, share, name, **args)
            for group, share in enumerate(shares)
            for name in (f"g{group}#{copy}" for copy in range(1, copies + 1))
        }

    async def router(
        self,
        path: Path,
        *,
        complete: bool = True,
        call_timeout_s: float = 10.0,
        reject_nonfinite: bool = False,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        otlp_endpoint: str | None = None,
        selection: SelectionSettings | None = None,
        failover: FailoverSettings | None = None,
        missing_experts: Policy = "strict",
        security: SecuritySettings | None = None,
        in_flight: InFlight | None = None,
    ) -> Router:
        """A router of this mesh, as services/router.py composes it.

        Args:
            complete: return only when every expert has a replica.
        """
        stack = self._routers
        telemetry = configure("router", otlp_endpoint)
        stack.callback(telemetry.shutdown)
        config = load_config(path)
        model = ServedModel(MODEL, Checkpoint.open(path), config, model_dtype("auto", config))
        security = security or SecuritySettings()
        core = RouterCore(
            MODEL,
            model.num_experts,
            telemetry,
            max_message_bytes=max_message_bytes,
            failover=failover,
            access=mesh_access(security.tls, self.name),
        )
        stack.push_async_callback(core.close)
        watcher = await stack.enter_async_context(
            MeshWatcher(self.redis_url, self.name, core.on_state, core.on_gone)
        )
        selector = selector_for(
            selection or SelectionSettings(), model, core, telemetry, missing_experts
        )
        routing = servicer.RouterServicer(
            model,
            core,
            telemetry,
            selector,
            call_timeout_s=call_timeout_s,
            reject_nonfinite=reject_nonfinite,
            missing_experts=missing_experts,
            in_flight=in_flight,
        )
        board = await stack.enter_async_context(ScalingBoard(self.redis_url, self.name))
        view = control.ControlServicer(
            self.name, core, board, lambda: (watcher.connected, watcher.redis_age_s)
        )

        def add(server: Any) -> None:
            router_pb2_grpc.add_RouterServiceServicer_to_server(routing, server)
            control_pb2_grpc.add_ControlServiceServicer_to_server(view, server)

        services = [servicer.SERVICE, control.SERVICE]
        server = MeshServer(
            services,
            add,
            max_message_bytes=max_message_bytes,
            security=public_security(security, self.name),
        )
        target = f"{HOST}:{await server.start(HOST)}"
        stack.push_async_callback(server.stop, 1.0)
        if complete:
            await core.wait_complete(5.0)
        return Router(target, core, watcher, model)

    @asynccontextmanager
    async def view(self) -> AsyncIterator[dict[str, control_pb2.ReplicaState]]:
        """The newest state of every replica, as a router hears it."""
        states: dict[str, control_pb2.ReplicaState] = {}

        def on_state(state: control_pb2.ReplicaState) -> None:
            states[state.replica] = state

        on_gone = states.__delitem__
        async with MeshWatcher(self.redis_url, self.name, on_state, on_gone) as watcher:
            await asyncio.wait_for(watcher.synced.wait(), 5)
            yield states

    async def kill(self, replica: Replica) -> None:
        """As if its process had died: connections cut, heartbeats end, no goodbye."""
        self._replicas.remove(replica)
        publisher = replica._publisher
        assert publisher is not None
        assert publisher._task is not None
        publisher._leaving = True  # ends the loop; redis-py may swallow a cancellation
        publisher._task.cancel()
        await asyncio.wait([publisher._task])
        await replica._local_server.stop(0)
        await replica._server._server.stop(None)
        await publisher._redis.aclose()
        await replica._batcher.__aexit__(None, None, None)


class Stall:
    """Holds the batches of a replica back until it is released; then they are computed."""

    def __init__(self, compute: Callable[[PackedRows], torch.Tensor]) -> None:
        self._compute = compute
        self._released = threading.Event()
        self.num_batches = 0
        """Batches that have reached the device."""

    def compute(self, rows: PackedRows) -> torch.Tensor:
        self.num_batches += 1
        assert self._released.wait(60), "never released"
        return self._compute(rows)

    def release(self) -> None:
        """Let everything through from now on."""
        self._released.set()


@contextmanager
def stalled(replica: Replica) -> Iterator[Stall]:
    """A replica whose device does nothing until released, or until the block ends."""
    batcher = replica._batcher
    original, limits = batcher._compute, batcher.limits
    stall = Stall(original)
    batcher._compute = stall.compute
    # on the spot it would stall the event loop, which here is the test's own
    batcher.limits = limits.model_copy(update={"at_once_s": 0})
    try:
        yield stall
    finally:
        stall.release()
        batcher._compute, batcher.limits = original, limits

"""A mesh on this machine: Redis, replicas in processes of their own, a router core in this one.

The calling thread plays the gateway's model thread; the core runs on a uvloop thread, as in the
gateway.
"""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvloop

from expertmesh.experts.assignment import split_evenly
from expertmesh.router.core import RouterCore
from expertmesh.runtime.channels import DEFAULT_MAX_MESSAGE_BYTES
from expertmesh.runtime.child import dying_with_parent
from expertmesh.runtime.heap import keep_freed_memory
from expertmesh.runtime.redis_server import EmbeddedRedis
from expertmesh.runtime.security.access import PLAIN, Access
from expertmesh.runtime.state import MeshWatcher
from expertmesh.runtime.telemetry import configure
from expertmesh.services.callers import CoreCaller
from expertmesh.services.settings import MeshSettings

MODEL = "bench"
_READY_S = 120.0


class BenchMesh:
    """A running mesh. Create with `bench_mesh`."""

    def __init__(self, redis_url: str, caller: CoreCaller, replicas: Sequence[Any]) -> None:
        self.redis_url = redis_url
        self.caller = caller
        """Blocking calls from any other thread than the core's."""
        self._replicas = replicas

    def pids(self) -> list[int]:
        """The replicas' processes; the router core is in this one."""
        return [process.pid for process in self._replicas]


@contextmanager
def event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A uvloop running in a thread of its own."""
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="event loop")
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def start_replica(fields: dict[str, Any], env: dict[str, str] | None = None) -> Any:
    """A replica process that has announced itself."""
    module = [sys.executable, "-m", "benchmarks.harness.replica", json.dumps(fields)]
    return subprocess.Popen(dying_with_parent(module), stdout=subprocess.PIPE, text=True, env=env)


@contextmanager
def bench_mesh(
    model_dir: Path,
    num_experts: int,
    num_layers: int,
    groups: int,
    slowdowns: Sequence[int] = (1,),
    access: Access = PLAIN,
    **args: Any,
) -> Iterator[BenchMesh]:
    """All experts split evenly over `groups`, a process each.

    Args:
        slowdowns: of each copy of a group, see `benchmarks.harness.replica`.
        access: how the router connects to replicas.
        args: of `ExpertGroupArgs`, like threads.
    """
    keep_freed_memory()  # as every process with a router core does
    with event_loop() as loop, redis_server(loop) as redis_url:
        replicas = [
            start_replica(
                {
                    "group": f"g{number}",
                    "model_dir": str(model_dir),
                    "model": MODEL,
                    "experts": experts,
                    "redis_url": redis_url,
                    "host": "127.0.0.1",
                    "lease_s": 30,
                    "log_level": "WARNING",
                    "replica": f"g{number}#{copy}",
                    "slowdown": slowdown,
                    **args,
                }
            )
            for number, experts in enumerate(split_evenly(num_experts, groups))
            for copy, slowdown in enumerate(slowdowns, 1)
        ]
        try:
            for process in replicas:
                assert process.stdout.readline() == "ready\n", "a replica did not start"
            layers = dict.fromkeys(range(num_layers), num_experts)
            with router_core(
                loop, redis_url, layers, args.get("otlp_endpoint"), access=access
            ) as caller:
                assert caller.core is not None
                _wait_for(caller.core, len(replicas))
                yield BenchMesh(redis_url, caller, replicas)
        finally:
            for process in replicas:
                process.terminate()
            for process in replicas:
                process.wait()


def _wait_for(core: RouterCore, num_replicas: int) -> None:
    """Complete is a mesh with one copy of each expert; here all copies are wanted."""
    end_s = time.monotonic() + _READY_S
    while len(core.snapshot.replicas) < num_replicas:
        assert time.monotonic() < end_s, "some replica is not heard of"
        time.sleep(0.01)


@contextmanager
def _entered(loop: asyncio.AbstractEventLoop, stack: AsyncExitStack) -> Iterator[None]:
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(stack.aclose(), loop).result()


@contextmanager
def redis_server(loop: asyncio.AbstractEventLoop) -> Iterator[str]:
    """The URL of an embedded server."""
    stack = AsyncExitStack()

    async def start() -> str:
        return (await stack.enter_async_context(EmbeddedRedis())).url

    with _entered(loop, stack):
        yield asyncio.run_coroutine_threadsafe(start(), loop).result()


@contextmanager
def router_core(
    loop: asyncio.AbstractEventLoop,
    redis_url: str,
    layers: dict[int, int],
    otlp_endpoint: str | None = None,
    mesh: str = "default",
    access: Access = PLAIN,
) -> Iterator[CoreCaller]:
    """Blocking calls to a router core on `loop`, once every expert of `layers` has a replica."""
    stack = AsyncExitStack()
    caller = CoreCaller(loop)

    async def start() -> None:
        sample_frac = MeshSettings.model_fields["trace_sample_frac"].default
        telemetry = configure("router", otlp_endpoint, sample_frac=sample_frac)
        stack.callback(telemetry.shutdown)
        core = RouterCore(
            MODEL, layers, telemetry, max_message_bytes=DEFAULT_MAX_MESSAGE_BYTES, access=access
        )
        stack.push_async_callback(core.close)
        await stack.enter_async_context(MeshWatcher(redis_url, mesh, core.on_state, core.on_gone))
        await core.wait_complete(_READY_S)
        caller.core = core

    with _entered(loop, stack):
        asyncio.run_coroutine_threadsafe(start(), loop).result()
        yield caller

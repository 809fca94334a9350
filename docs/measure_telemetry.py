"""What telemetry costs a router and its replica: one call of one token, switched off and on.

`python docs/measure_telemetry.py MODEL_DIR` starts an embedded Redis, a collector that throws
everything away in a process of its own, and in this process a replica and a router core, twice.
"""

import asyncio
import statistics
import subprocess
import sys
import time
import timeit
from contextlib import AsyncExitStack

import torch

from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.experts.replica import Replica
from expertmesh.router.core import RouterCore
from expertmesh.router.served_model import ServedModel
from expertmesh.runtime.channels import DEFAULT_MAX_MESSAGE_BYTES
from expertmesh.runtime.checkpoint import Checkpoint
from expertmesh.runtime.hf_config import load_config
from expertmesh.runtime.redis_server import EmbeddedRedis
from expertmesh.runtime.state import MeshWatcher
from expertmesh.runtime.telemetry import configure

NUM_ROUNDS = 30
NUM_CALLS = 50
NUM_STEPS = 100_000
_SINK = """
import grpc
from concurrent.futures import ThreadPoolExecutor
class Sink(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
server = grpc.server(ThreadPoolExecutor(2), handlers=[Sink()])
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
server.wait_for_termination()
"""


async def open_core(
    stack: AsyncExitStack, model_dir: str, redis_url: str, endpoint: str | None
) -> tuple[RouterCore, torch.Tensor]:
    """A router core with one replica that holds everything, and one token for it, [1, D]."""
    config, checkpoint = load_config(model_dir), Checkpoint.open(model_dir)
    model = ServedModel("model", checkpoint, config, config.get_text_config().dtype)
    telemetry = configure("router", endpoint)
    mesh = "on" if endpoint else "off"
    core = RouterCore(
        model.name, model.num_experts, telemetry, max_message_bytes=DEFAULT_MAX_MESSAGE_BYTES
    )
    args = ExpertGroupArgs(
        group="g0",
        model_dir=model_dir,
        model=model.name,
        experts=f"0-{max(model.num_experts.values()) - 1}",
        redis_url=redis_url,
        mesh=mesh,
        host="127.0.0.1",
        otlp_endpoint=endpoint,
        log_level="ERROR",
    )
    replica = await Replica.start(args, mesh)
    stack.push_async_callback(replica.drain_and_stop)
    stack.push_async_callback(core.close)
    await stack.enter_async_context(MeshWatcher(redis_url, mesh, core.on_state, core.on_gone))
    await core.wait_complete(10.0)
    return core, torch.ones(1, model.hidden_size, dtype=model.dtype)


async def measure(core: RouterCore, hidden_TD: torch.Tensor, num_calls: int) -> float:
    """Microseconds per call."""
    layer = next(iter(core.num_experts))
    experts_TK, weights_TK = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]])
    started_s = time.perf_counter()
    for _ in range(num_calls):
        await core.dispatch(layer, hidden_TD, experts_TK, weights_TK, "slot_sum")
    return (time.perf_counter() - started_s) / num_calls * 1e6


async def compare(model_dir: str, endpoint: str) -> None:
    """Alternate both, so that a busy machine slows both alike; print the medians."""
    times_us: dict[str, list[float]] = {"off": [], "on": []}
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(EmbeddedRedis())
        off = await open_core(stack, model_dir, redis.url, None)
        on = await open_core(stack, model_dir, redis.url, endpoint)
        for _ in range(NUM_ROUNDS):
            times_us["off"].append(await measure(*off, NUM_CALLS))
            times_us["on"].append(await measure(*on, NUM_CALLS))
    for name, values in times_us.items():
        sys.stdout.write(f"telemetry {name}: {statistics.median(values):.0f} us per call\n")


def measure_silent() -> None:
    """Print what one span and one count cost where nothing is exported."""
    silent = configure("router")

    def span() -> None:
        with silent.span("router.dispatch"):
            pass

    for name, step in (("span", span), ("count", lambda: silent.metrics.tokens.add(1, "router"))):
        took_s = min(timeit.repeat(step, number=NUM_STEPS, repeat=5))
        sys.stdout.write(f"one {name} while off: {took_s / NUM_STEPS * 1e6:.2f} us\n")


def main() -> None:
    """Start the collector, then measure."""
    torch.set_num_threads(1)
    measure_silent()
    sink = subprocess.Popen([sys.executable, "-c", _SINK], stdout=subprocess.PIPE, text=True)
    try:
        assert sink.stdout
        asyncio.run(compare(sys.argv[1], f"127.0.0.1:{int(sink.stdout.readline())}"))
    finally:
        sink.kill()
        sink.wait()


if __name__ == "__main__":
    main()

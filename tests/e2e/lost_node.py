"""A Ray cluster of a head and two nodes, one of which is lost while calls go on. Run as a script.

Two groups of two replicas. Every answer is compared bit by bit with that of before. Prints one JSON
object; the test is test_lost_node.py.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import torch
from tests.e2e.two_nodes import config, hosts, nodes
from tests.mesh import Mesh, Router
from tests.router_caller import RouterCaller

from expertmesh.client.failures import error_of
from expertmesh.runtime.redis_server import EmbeddedRedis
from expertmesh.services.ray_cluster import deploy, wait_running

GROUPS = ("g0", "g1")
REPLICAS = len(GROUPS) * 2
START_S, PERIOD_S = 150.0, 0.02


@dataclass
class Calls:
    """Layer calls one after the other, for as long as they are wanted."""

    exact: int = 0
    inexact: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    last_error_s: float = 0.0
    longest_s: float = 0.0
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def go_on(self, target: str, stop: asyncio.Event) -> None:
        """Call until told to stop."""
        hidden_TD = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
        async with RouterCaller(target) as caller:
            right_TD = (await caller.forward(0, hidden_TD)).hidden_TD
            while not stop.is_set():
                began_s = time.monotonic()
                try:
                    found_TD = (await caller.forward(0, hidden_TD)).hidden_TD
                except grpc.aio.AioRpcError as error:
                    self.errors[type(error_of(error)).__name__] += 1
                    self.last_error_s = time.monotonic()
                else:
                    self.begun.set()
                    self.exact += torch.equal(found_TD, right_TD)
                    self.inexact += not torch.equal(found_TD, right_TD)
                self.longest_s = max(self.longest_s, time.monotonic() - began_s)
                await asyncio.sleep(PERIOD_S)


async def until_on(router: Router, host: str | None) -> None:
    """All replicas there are to be take work, on that host if one is given."""
    async with asyncio.timeout(START_S):
        while True:
            now = hosts(router)
            if len(now) == REPLICAS and (host is None or set(now) == {host}):
                return
            await asyncio.sleep(PERIOD_S)


async def lost(cluster: Any, router: Router) -> dict[str, Any]:
    """Lose a node, and wait until the other one has its replicas."""
    await until_on(router, None)
    calls, stop, before = Calls(), asyncio.Event(), sorted(hosts(router))
    calling = asyncio.create_task(calls.go_on(router.target, stop))
    await calls.begun.wait()
    gone, left = cluster.worker_nodes
    lost_s = time.monotonic()
    await asyncio.to_thread(cluster.remove_node, gone, False)
    await until_on(router, left.node_ip_address)
    replaced_s = time.monotonic() - lost_s
    stop.set()
    await calling
    return {
        "before": before,
        "after": sorted(hosts(router)),
        "replaced_s": round(replaced_s, 2),
        "exact": calls.exact,
        "inexact": calls.inexact,
        "errors": dict(calls.errors),
        "errors_until_s": round(max(0.0, calls.last_error_s - lost_s), 2),
        "longest_call_s": round(calls.longest_s, 2),
    }


async def main(model_dir: str) -> dict[str, Any]:
    """The whole story."""
    async with EmbeddedRedis() as redis:
        cluster = nodes(num_cpus=REPLICAS)
        more = {"experts.groups": len(GROUPS), "experts.replicas": 2}
        deploy(config(model_dir, redis.url, {**more, "deterministic": "true"}))
        await wait_running(list(GROUPS), START_S, lambda _: None)
        async with Mesh(redis.url, "default") as mesh:
            return await lost(cluster, await mesh.router(Path(model_dir)))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(main(sys.argv[1]))) + "\n")

"""A Ray cluster of a head and two nodes; the node that serves a group is drained. Run as a script.

Prints one JSON object: where the group was before, how many layer calls failed meanwhile, and where
it was afterwards. The test is test_drain.py; Ray's test cluster must have a process of its own.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from tests.mesh import MODEL, Mesh, Router
from tests.router_caller import RouterCaller

from expertmesh.runtime.redis_server import EmbeddedRedis
from expertmesh.services.ray_cluster import deploy, wait_running

PORTS = "23200-23203"
STORE_BYTES = 80 << 20
CLI = (sys.executable, "-W", "ignore", "-m", "expertmesh.services.cli")


def nodes(num_cpus: int = 2) -> Any:
    """The cluster, with Serve running; both nodes have so many CPUs, on paper."""
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "object_store_memory": STORE_BYTES,
        },
    )
    for host in ("127.0.0.2", "127.0.0.3"):
        cluster.add_node(num_cpus=num_cpus, node_ip_address=host, object_store_memory=STORE_BYTES)
    ray.init(address=cluster.address, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    return cluster


def config(
    model_dir: str, redis_url: str, more: Mapping[str, object] | None = None
) -> dict[str, Any]:
    """What a RayService would deploy, without its proxies."""
    values = {
        "model": model_dir,
        "model_name": MODEL,
        "redis.url": redis_url,
        "experts.ports": PORTS,
        "experts.num_cpus": "1",
        "experts.host": "''",
        "experts.groups": "1",
        **(more or {}),
    }
    flags = [flag for name, value in values.items() for flag in ("--set", f"{name}={value}")]
    command = [*CLI, "k8s", "serve-config", *flags]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    document: dict[str, Any] = yaml.safe_load(text)
    return {"proxy_location": "Disabled", "applications": document["applications"]}


async def call_until(stop: asyncio.Event, target: str) -> int:
    """Layer calls, one after the other; how many. One that fails ends the script."""
    num_calls = 0
    hidden_TD = torch.ones(3, 64)
    async with RouterCaller(target) as caller:
        while not stop.is_set() or not num_calls:
            await caller.forward(0, hidden_TD)
            num_calls += 1
    return num_calls


def hosts(router: Router) -> list[str]:
    """Where the replicas are that take work."""
    replicas = router.core.snapshot.replicas.values()
    return [own.state.address.rpartition(":")[0] for own in replicas if own.takes_work]


async def drained(cluster: Any, router: Router) -> dict[str, Any]:
    """Drain the replica's node by the command of a Pod's preStop, while calls go on."""
    before, stop = hosts(router), asyncio.Event()
    calls = asyncio.create_task(call_until(stop, router.target))
    flags = ("--address", cluster.address, "--host", before[0], "--ports", PORTS)
    drain = await asyncio.create_subprocess_exec(
        *CLI, "k8s", "drain", *flags, stdout=subprocess.PIPE
    )
    said, _ = await drain.communicate()
    stop.set()
    return {
        "before": before,
        "after": hosts(router),
        "calls": await calls,
        "code": drain.returncode,
        "said": said.decode(),
    }


async def main(model_dir: str) -> dict[str, Any]:
    """The whole story."""
    async with EmbeddedRedis() as redis:
        cluster = nodes()
        deploy(config(model_dir, redis.url))
        await wait_running(["g0"], 90.0, lambda _: None)
        async with Mesh(redis.url, "default") as mesh:
            return await drained(cluster, await mesh.router(Path(model_dir)))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(main(sys.argv[1]))) + "\n")

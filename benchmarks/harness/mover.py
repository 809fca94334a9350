"""A controller's hands in a process of its own: `python -m benchmarks.harness.mover REDIS_URL`.

Each line of its input is a step, like `add 0 3 g1#1` (layer, expert, replica); what became of it is
a line of its output.
"""

import asyncio
import sys

from expertmesh.runtime.state import Lease, MeshWatcher
from expertmesh.services.controller.executor import Executor
from expertmesh.services.controller.mesh import Replicas
from expertmesh.v1 import placement_pb2 as pb

_LEASE_S = 30.0
_LINGER_S = 0.3


async def _main(redis_url: str) -> None:
    replicas, lease = Replicas(), Lease(redis_url, "default", _LEASE_S)
    async with MeshWatcher(redis_url, "default", replicas.on_state, replicas.on_gone) as watcher:
        await watcher.synced.wait()
        executor = Executor(replicas, lease, _LINGER_S, _LEASE_S)
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            kind, layer, expert, replica = line.split()
            step = pb.PlacementStep(
                add=kind == "add", layer=int(layer), expert=int(expert), replica=replica
            )
            await lease.refresh()
            print(await executor.run(pb.PlacementMove(steps=[step])), flush=True)
    await lease.leave()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))

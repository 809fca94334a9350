"""The drill of `chaos.drills.hosts`, in a network namespace of its own.

`python -m chaos.two_hosts` prints what it found as JSON.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from chaos.drills.hosts import status_of
from chaos.drills.processes import CALLERS, DEVICE_S, GROUPS, healthy_s
from chaos.link import Link
from chaos.mesh import NUM_EXPERTS, ChaosMesh, Kept, ReplicaProcess, chaos_mesh, kept
from chaos.watch import Drilled, Watch
from expertmesh.experts.assignment import split_evenly

_HERE, _THERE = "10.77.0.1", "10.77.0.2"
_AWAY_S, _QUICK_AWAY_S = 8.0, 2.0
_PAUSE_S = 4.0


async def _ip(*args: str) -> None:
    if await status_of("ip", *args):
        raise RuntimeError(f"ip {' '.join(args)} failed")


@asynccontextmanager
async def _other_host() -> AsyncIterator[str]:
    """The network namespace of another host, at `_THERE`; this one is `_HERE`."""
    name = f"expertmesh-{os.getpid()}"
    await _ip("link", "set", "lo", "up")
    await _ip("netns", "add", name)
    try:
        await _ip("link", "add", "here", "type", "veth", "peer", "name", "there", "netns", name)
        await _ip("address", "add", f"{_HERE}/24", "dev", "here")
        await _ip("link", "set", "here", "up")
        await _ip("-n", name, "address", "add", f"{_THERE}/24", "dev", "there")
        await _ip("-n", name, "link", "set", "there", "up")
        yield name
    finally:
        await _ip("netns", "delete", name)


async def _drill(own: Kept, quick: bool) -> Drilled:
    """Run in a network namespace of our own."""
    async with (
        _other_host() as namespace,
        chaos_mesh(own, GROUPS, 1, 0, device_s=DEVICE_S) as mesh,
        Link(f"127.0.0.1:{mesh.redis.port}", _HERE) as redis,
    ):
        there = [
            await mesh.replica(
                group,
                experts,
                host=_THERE,
                netns=namespace,
                redis_url=f"redis://{redis.address}/0",
            )
            for group, experts in enumerate(split_evenly(NUM_EXPERTS, GROUPS))
        ]
        await mesh.router()
        await mesh.known()
        watch = Watch("host_loss", await mesh.load(callers=CALLERS))
        await watch.healthy(healthy_s(quick))
        await _lose(mesh, watch, there, quick)
        drilled = await watch.finish()
    drilled.bars = [watch.none_failed(), watch.none_wrong()]
    if not quick:
        drilled.bars.append(watch.hedged_stalls())
    return drilled


async def _lose(mesh: ChaosMesh, watch: Watch, there: list[ReplicaProcess], quick: bool) -> None:
    away_s = _QUICK_AWAY_S if quick else _AWAY_S
    with watch.fault():
        await _ip("link", "set", "here", "down")
        await asyncio.sleep(away_s)
        await _ip("link", "set", "here", "up")
    await mesh.known()
    await asyncio.sleep(1.0 if quick else _PAUSE_S)
    with watch.fault():
        await _ip("link", "set", "here", "down")
        for replica in there:
            replica.kill()
        await asyncio.sleep(away_s)
        for replica in there:
            await mesh.replacement(replica, GROUPS)
    await asyncio.sleep(1.0 if quick else _PAUSE_S)


async def _main(quick: bool) -> None:
    async with kept() as own:
        drilled = await _drill(own, quick)
    print(drilled.to_json())


if __name__ == "__main__":
    asyncio.run(_main(json.loads(sys.argv[1])))

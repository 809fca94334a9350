"""Routers that die under callers with the client's own service config."""

import asyncio
import time

from chaos.drills.processes import (
    CALLERS,
    COPIES,
    DEVICE_S,
    DOWN_S,
    GROUPS,
    KILL_EVERY_S,
    healthy_s,
)
from chaos.mesh import Kept, chaos_mesh
from chaos.watch import Drilled, Watch


async def router_kill(own: Kept, quick: bool) -> Drilled:
    """One of two routers is SIGKILLed every 5 s and started again at its address."""
    async with chaos_mesh(own, GROUPS, COPIES, routers=2, device_s=DEVICE_S) as mesh:
        target = "ipv4:" + ",".join(router.name for router in mesh.routers)
        watch = Watch("router_kill", await mesh.load(target, callers=CALLERS, retries=True))
        await watch.healthy(healthy_s(quick))
        for _ in range(1 if quick else 8):
            next_s = time.monotonic() + KILL_EVERY_S
            victim = mesh.routers.pop(0)
            with watch.fault():
                victim.kill()
                await asyncio.sleep(DOWN_S)
                await mesh.router(victim.name)
            await asyncio.sleep(max(next_s - time.monotonic(), 0.5))
        drilled = await watch.finish()
    drilled.bars = [watch.none_failed(), watch.none_wrong()]
    if not quick:
        drilled.bars.append(watch.stalls())
    return drilled

"""Redis goes away, forgets everything, or freezes."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

from redis.asyncio import Redis

from chaos.drills.processes import CALLERS, COPIES, DEVICE_S, GROUPS, healthy_s
from chaos.mesh import ChaosMesh, Kept, chaos_mesh
from chaos.watch import Drilled, Watch

_AWAY_S, _QUICK_AWAY_S = 60.0, 3.0
_FROZEN_S, _QUICK_FROZEN_S = 15.0, 2.0
_AFTER_S = 3.0

Trouble = Callable[[ChaosMesh, Watch], Awaitable[None]]


async def redis_kill(own: Kept, quick: bool) -> Drilled:
    """Redis is killed and comes back empty a minute later."""

    async def away(mesh: ChaosMesh, watch: Watch) -> None:
        with watch.fault():
            os.kill(mesh.redis.pid, signal.SIGKILL)
            await asyncio.sleep(_QUICK_AWAY_S if quick else _AWAY_S)
        await mesh.restart_redis()

    return await _drill("redis_kill", own, quick, away)


async def redis_flush(own: Kept, quick: bool) -> Drilled:
    """FLUSHALL, five times."""

    async def flush(mesh: ChaosMesh, watch: Watch) -> None:
        client = Redis.from_url(mesh.redis.url)
        for _ in range(2 if quick else 5):
            with watch.fault():
                await client.flushall()
                await asyncio.sleep(1.0)
        await client.aclose()

    return await _drill("redis_flush", own, quick, flush)


async def redis_pause(own: Kept, quick: bool) -> Drilled:
    """Redis is frozen (SIGSTOP) and let go."""

    async def freeze(mesh: ChaosMesh, watch: Watch) -> None:
        with watch.fault():
            os.kill(mesh.redis.pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(_QUICK_FROZEN_S if quick else _FROZEN_S)
            finally:
                os.kill(mesh.redis.pid, signal.SIGCONT)

    return await _drill("redis_pause", own, quick, freeze)


async def _drill(name: str, own: Kept, quick: bool, trouble: Trouble) -> Drilled:
    async with chaos_mesh(own, GROUPS, COPIES, device_s=DEVICE_S) as mesh:
        watch = Watch(name, await mesh.load(callers=CALLERS))
        await watch.healthy(healthy_s(quick))
        await trouble(mesh, watch)
        await asyncio.sleep(1.5 if quick else _AFTER_S)
        await mesh.known()
        drilled = await watch.finish()
    drilled.bars = [watch.none_failed(), watch.none_wrong()]
    if not quick:
        drilled.bars.append(watch.stalls())
    return drilled

"""Networks between router and replica that are late, slow, silent, cut, or change bytes."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from random import Random

from chaos.drills.processes import CALLERS, COPIES, DEVICE_S, GROUPS, healthy_s
from chaos.link import Link, Way, flips
from chaos.mesh import Kept, chaos_mesh
from chaos.watch import Drilled, Watch

_FAULT_S, _QUICK_FAULT_S = 6.0, 1.5
_PAUSE_S = 3.0
_DELAY_S = 0.1
_THROTTLED_BYTES_PER_S = 50_000
_FLIP_FRAC = 0.02

Trouble = Callable[[Link, float], Awaitable[None]]
"""Does something to a link for so many seconds."""


async def _linked(
    name: str, own: Kept, quick: bool, *troubles: Trouble, hedged: bool = True
) -> Drilled:
    """Each trouble in turn on the link of another replica."""
    fault_s = _QUICK_FAULT_S if quick else _FAULT_S
    async with chaos_mesh(own, GROUPS, COPIES, device_s=DEVICE_S, linked=True) as mesh:
        watch = Watch(name, await mesh.load(callers=CALLERS))
        await watch.healthy(healthy_s(quick))
        for trouble, victim in zip(troubles * COPIES, mesh.replicas, strict=False):
            assert victim.link
            with watch.fault():
                await trouble(victim.link, fault_s)
            await asyncio.sleep(0.5 if quick else _PAUSE_S)
        drilled = await watch.finish()
    drilled.bars = [watch.none_failed(), watch.none_wrong()]
    if not quick and hedged:
        drilled.bars.append(watch.hedged_stalls())
    return drilled


async def _silent(way: Way, seconds: float) -> None:
    way.silence()
    await asyncio.sleep(seconds)
    way.flow()


async def _answers_lost(link: Link, seconds: float) -> None:
    await _silent(link.back, seconds)


async def _requests_lost(link: Link, seconds: float) -> None:
    await _silent(link.there, seconds)


async def _all_lost(link: Link, seconds: float) -> None:
    link.silence()
    await asyncio.sleep(seconds)
    link.flow()


async def _cut(link: Link, seconds: float) -> None:
    await link.cut()
    await asyncio.sleep(seconds)
    await link.mend()


async def _late(link: Link, seconds: float) -> None:
    link.there.delay_s = link.back.delay_s = _DELAY_S / 2
    await asyncio.sleep(seconds)
    link.there.delay_s = link.back.delay_s = 0.0


async def _throttled(link: Link, seconds: float) -> None:
    link.back.bytes_per_s = _THROTTLED_BYTES_PER_S
    await asyncio.sleep(seconds)
    link.back.bytes_per_s = math.inf


async def _flipping(link: Link, seconds: float) -> None:
    link.back.change = flips(_FLIP_FRAC, Random(0))
    await asyncio.sleep(seconds)
    link.back.change = bytes


async def partition(own: Kept, quick: bool) -> Drilled:
    """Bytes get through one way only: answers are lost, or requests. Heartbeats go on."""
    return await _linked("partition", own, quick, _answers_lost, _requests_lost)


async def stall(own: Kept, quick: bool) -> Drilled:
    """Nothing gets through to a replica or back, and nothing is closed."""
    return await _linked("stall", own, quick, _all_lost)


async def cut(own: Kept, quick: bool) -> Drilled:
    """Connections to a replica are reset and refused; its heartbeats go on."""
    return await _linked("cut", own, quick, _cut)


async def delay(own: Kept, quick: bool) -> Drilled:
    """The way to a replica and back takes 100 ms longer."""
    return await _linked("delay", own, quick, _late)


async def throttle(own: Kept, quick: bool) -> Drilled:
    """A replica's answers come at 50 kB/s."""
    return await _linked("throttle", own, quick, _throttled)


async def corrupt(own: Kept, quick: bool) -> Drilled:
    """One bit is turned over in one of fifty pieces of what a replica sends."""
    return await _linked("corrupt", own, quick, _flipping)

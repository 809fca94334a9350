"""Text that is being generated while replicas die, or gateways."""

import asyncio
import time

from chaos.batches import write_prompts
from chaos.drills.processes import COPIES, GROUPS, KILL_EVERY_S
from chaos.mesh import Kept, chaos_mesh
from chaos.watch import Drilled, Watch


async def gateway(own: Kept, quick: bool) -> Drilled:
    """GenerateService: a replica SIGKILLed every 5 s and replaced. Rows are tokens here, and the
    longest wait is that for the next token."""
    prompts = _prompts(own)
    async with chaos_mesh(own, GROUPS, COPIES) as mesh:
        own_gateway = await mesh.gateway()
        load = await mesh.load(
            own_gateway.name,
            batches=prompts,
            method="Generate",
            callers=2,
            timeout_s=30.0,
            warm_up=4,
        )
        watch = Watch("gateway", load)
        await watch.healthy(2.0 if quick else 10.0)
        for _ in range(1 if quick else 8):
            next_s = time.monotonic() + KILL_EVERY_S
            victim = mesh.replicas[0]
            with watch.fault():
                victim.kill()
                await asyncio.sleep(0.5)
                await mesh.replacement(victim, GROUPS)
            await asyncio.sleep(next_s - time.monotonic())
        drilled = await watch.finish()
    drilled.bars = [watch.none_failed(), watch.none_wrong()]
    if not quick:
        drilled.bars.append(watch.hedged_stalls())
    return drilled


async def gateway_kill(own: Kept, quick: bool) -> Drilled:
    """One of two gateways is SIGKILLed while it streams text, and started again at its address.
    Callers use the package's client."""
    prompts = _prompts(own)
    async with chaos_mesh(own, GROUPS, 1, routers=0) as mesh:
        gateways = [await mesh.gateway() for _ in range(2)]
        target = "ipv4:" + ",".join(gateway.name for gateway in gateways)
        load = await mesh.load(
            target, batches=prompts, method="Client", callers=2, timeout_s=30.0, warm_up=4
        )
        watch = Watch("gateway_kill", load)
        await watch.healthy(2.0 if quick else 10.0)
        for _ in range(1 if quick else 8):
            victim = gateways.pop(0)
            with watch.fault():
                victim.kill()
                await asyncio.sleep(0.5)
                gateways.append(await mesh.gateway(victim.name))
            await asyncio.sleep(2.0)
        drilled = await watch.finish()
    drilled.bars = [watch.none_failed(), watch.none_wrong()]
    return drilled


def _prompts(own: Kept) -> str:
    prompts = own.dir / "prompts"
    if not prompts.exists():
        write_prompts(own.reference, prompts)
    return str(prompts)

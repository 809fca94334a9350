"""A replica that answers, but wrongly."""

import asyncio

from benchmarks.harness.report import Bar

from chaos.drills.processes import CALLERS, COPIES, DEVICE_S, GROUPS, healthy_s
from chaos.garbage import KINDS
from chaos.mesh import NUM_EXPERTS, Kept, chaos_mesh
from chaos.watch import Drilled, Watch
from expertmesh.experts.assignment import split_evenly

_GARBLED_S, _QUICK_GARBLED_S = 5.0, 1.5


async def garbage(own: Kept, quick: bool) -> Drilled:
    """A third copy of a group garbles a fifth of its answers: a kind of garbage after the other."""
    drilled = Drilled()
    for kind in ("flip",) if quick else KINDS:
        one = await _garbage(kind, own, quick)
        drilled.rows += one.rows[1:] if drilled.rows else one.rows
        drilled.bars += one.bars
    return drilled


async def _garbage(kind: str, own: Kept, quick: bool) -> Drilled:
    tally = own.dir / f"garbled-{kind}"
    tally.write_bytes(b"")
    async with chaos_mesh(own, GROUPS, COPIES, device_s=DEVICE_S) as mesh:
        watch = Watch(f"garbage: {kind}", await mesh.load(callers=CALLERS))
        await watch.healthy(healthy_s(quick) / 2)
        with watch.fault():
            experts = split_evenly(NUM_EXPERTS, GROUPS)[0]
            liar = await mesh.replica(0, experts, garbage=kind, tally=str(tally))
            await asyncio.sleep(_QUICK_GARBLED_S if quick else _GARBLED_S)
        liar.kill()
        drilled = await watch.finish()
    num_garbled = tally.stat().st_size
    garbled = Bar(f"{watch.name}: answers that were", num_garbled, 1, unit="answers")
    drilled.bars = [watch.none_failed(), watch.none_wrong(), garbled]
    return drilled

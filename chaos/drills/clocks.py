"""The wall clock of every process of a mesh jumps by an hour, forwards and backwards."""

import asyncio
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.harness.report import Bar

from chaos.drills.processes import CALLERS, COPIES, DEVICE_S, GROUPS, healthy_s
from chaos.mesh import ChaosMesh, Kept, chaos_mesh, snapshot_of
from chaos.nursery import Nursery
from chaos.watch import Drilled, Watch

_JUMPS_S = (3600, -3600, 0)
_AFTER_S, _QUICK_AFTER_S = 6.0, 2.0
_SEEN_S = 1.5
"""libfaketime reads its file once a second here."""
_NO_LIBRARY = (
    "skipped: it needs libfaketime (Debian: `apt-get install libfaketime`, or its file named by "
    "LIBFAKETIME)"
)
_NOTE = (
    "libfaketime moves CLOCK_REALTIME of routers and replicas while they run; CLOCK_MONOTONIC goes "
    "on, as when an administrator or NTP sets the clock. The library makes everything slower, "
    "before the jumps as well"
)


async def clock_jump(own: Kept, quick: bool) -> Drilled:
    """The clocks go an hour ahead, then two hours back, then right again; each time a replica is
    killed and replaced by one that was born in that time."""
    library = next(_libraries(), None)
    if library is None:
        return Drilled(notes=[_NO_LIBRARY])
    clock = own.dir / "clock"
    _set(clock, 0)
    env = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    async with Nursery(env) as nursery:
        return await _drill(replace(own, nursery=nursery), clock, quick)


def _libraries() -> Iterator[Path]:
    """Where libfaketime may be."""
    if named := os.environ.get("LIBFAKETIME"):
        yield Path(named)
    yield from Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")


def _set(clock: Path, ahead_s: int) -> None:
    clock.write_text(f"{ahead_s:+d}")


async def _drill(own: Kept, clock: Path, quick: bool) -> Drilled:
    offs_s = []
    async with chaos_mesh(own, GROUPS, COPIES, device_s=DEVICE_S) as mesh:
        watch = Watch("clock_jump", await mesh.load(callers=CALLERS))
        await watch.healthy(healthy_s(quick))
        for jump_s in _JUMPS_S:
            with watch.fault():
                _set(clock, jump_s)
                await asyncio.sleep(_SEEN_S)
                offs_s.append(abs(await _born_off_s(mesh) - jump_s))
                await asyncio.sleep(_QUICK_AFTER_S if quick else _AFTER_S)
        drilled = await watch.finish()
    drilled.notes = [_NOTE]
    wrong = Bar("clock_jump: replacement's clock beside the jump", max(offs_s), 60, True, "s")
    drilled.bars = [watch.none_failed(), watch.none_wrong(), wrong]
    if not quick:
        drilled.bars.append(watch.hedged_stalls())
    return drilled


async def _born_off_s(mesh: ChaosMesh) -> float:
    """Kill and replace a replica. By how much its successor's clock is ahead of ours."""
    victim = mesh.replicas[0]
    victim.kill()
    born = await mesh.replacement(victim, GROUPS)
    snapshot = await snapshot_of(mesh.routers[0].name)
    [incarnation] = [
        view.state.incarnation for view in snapshot.replicas if view.state.replica == born.name
    ]
    return incarnation / 1e6 - time.time()  # it is the wall clock at the start, in us

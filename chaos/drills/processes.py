"""Replicas that die, freeze, or become slow."""

import asyncio
import itertools
import signal
import time

from benchmarks.harness.report import Bar

from chaos.collector import Collector, collecting
from chaos.mesh import ChaosMesh, Kept, ReplicaProcess, chaos_mesh
from chaos.watch import Drilled, Watch

DEVICE_S = 0.012
"""A batch takes that long on the device, so that replicas, not this machine's cores, are what
limits throughput."""
GROUPS, COPIES, CALLERS = 2, 2, 3
KILL_EVERY_S = 5.0
DOWN_S = 1.0
"""Until a replacement is started: what Serve takes to notice."""
LEAST_CALLS, LEAST_LOCAL_CALLS = 20_000, 5_000
_FROZEN_S = (1.0, 2.0, 5.0, 10.0, 20.0)
_PAUSE_S = 3.0
_HEALTHY_S, _QUICK_HEALTHY_S = 8.0, 1.0
_SETTLE_S = 1.0
_EXPORT_S = 6.0
"""Telemetry is sent every 5 s."""
_SLOW_S = 20.0
_KNOWN_S = 0.5
"""After which every router knows of a death, or of a return."""
_TYPED = "EXPERT_UNAVAILABLE"


def healthy_s(quick: bool) -> float:
    """How long drills are healthy first."""
    return _QUICK_HEALTHY_S if quick else _HEALTHY_S


async def kill(own: Kept, quick: bool) -> Drilled:
    """A replica SIGKILLed every 5 s and replaced, over gRPC as between hosts."""
    return await _kill("kill", own, quick, LEAST_CALLS, local_socket=False)


async def kill_local(own: Kept, quick: bool) -> Drilled:
    """The same over Unix sockets, as on one host."""
    return await _kill("kill_local", own, quick, LEAST_LOCAL_CALLS, local_socket=True)


async def _kill(name: str, own: Kept, quick: bool, least: int, *, local_socket: bool) -> Drilled:
    every_s = 1.5 if quick else KILL_EVERY_S
    async with chaos_mesh(
        own, GROUPS, COPIES, device_s=DEVICE_S, local_socket=local_socket
    ) as mesh:
        watch = Watch(name, await mesh.load(callers=CALLERS))
        await watch.healthy(healthy_s(quick))
        if not quick:
            await _reduce(mesh, watch)
        target = watch.load.num_calls + (200 if quick else least)
        while watch.load.num_calls < target or len(watch.faults) < 2:
            next_s = time.monotonic() + every_s
            victim = mesh.replicas[0]  # the oldest
            with watch.fault():
                victim.kill()
                await asyncio.sleep(0.3 if quick else DOWN_S)
                await mesh.replacement(victim, GROUPS)
            await asyncio.sleep(next_s - time.monotonic())
        drilled = await watch.finish()
    drilled.bars = [watch.none_failed(), watch.none_wrong()]
    if not quick:
        share = Bar(f"{name}: throughput in faults against a replica less", watch.throughput, 0.9)
        enough = Bar(f"{name}: calls", len(watch.fault_calls), least, unit="calls")
        drilled.bars += [enough, watch.stalls(), share]
    return drilled


async def _reduce(mesh: ChaosMesh, watch: Watch) -> None:
    """Measure what is left without one replica, then start another for it."""
    leaver = mesh.replicas[0]
    leaver.signal(signal.SIGTERM)
    await asyncio.sleep(_SETTLE_S)
    await watch.reduced(healthy_s(quick=False))
    await mesh.replacement(leaver, GROUPS)
    await asyncio.sleep(_SETTLE_S)


async def stop(own: Kept, quick: bool) -> Drilled:
    """A replica frozen for 1 to 20 s (SIGSTOP), then let go."""
    async with chaos_mesh(own, GROUPS, COPIES, device_s=DEVICE_S) as mesh:
        watch = Watch("stop", await mesh.load(callers=CALLERS))
        await watch.healthy(healthy_s(quick))
        victims = itertools.cycle(mesh.replicas)
        for frozen_s in (1.5,) if quick else _FROZEN_S:
            with watch.fault():
                await _freeze(next(victims), frozen_s)
            await asyncio.sleep(_PAUSE_S if not quick else 0.5)
        drilled = await watch.finish()
    drilled.bars = [watch.none_failed(), watch.none_wrong()]
    if not quick:
        drilled.bars.append(watch.hedged_stalls())
    return drilled


async def _freeze(victim: ReplicaProcess, seconds: float) -> None:
    victim.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        victim.signal(signal.SIGCONT)


async def slow(own: Kept, quick: bool) -> Drilled:
    """One of two copies becomes ten times slower."""
    with collecting() as (collector, endpoint):
        async with chaos_mesh(own, 1, COPIES, 0, device_s=DEVICE_S) as mesh:
            await mesh.router(otlp_endpoint=endpoint)
            await mesh.known()
            watch = Watch("slow", await mesh.load(callers=2))
            await watch.healthy(healthy_s(quick))
            with watch.fault():
                mesh.replicas[0].signal(signal.SIGUSR1)
                await asyncio.sleep(1.0 if quick else _EXPORT_S)
                before = _sent(collector)
                await asyncio.sleep(1.0 if quick else _SLOW_S)
                hedged, sent = (
                    now - then for now, then in zip(_sent(collector), before, strict=True)
                )
            mesh.replicas[0].signal(signal.SIGUSR2)
            drilled = await watch.finish()
    drilled.bars = [watch.none_failed(), watch.none_wrong()]
    if not quick:
        times = watch.fault_calls.percentile_s(0.99) / watch.healthy_calls.percentile_s(0.99)
        drilled.bars.append(Bar("slow: p99 against healthy", times, 1.5, True))
        now_hedged, now_sent = _sent(collector)
        extra = 100 * (now_hedged - hedged) / (now_sent - sent)
        drilled.bars.append(Bar("slow: messages sent twice", extra, 5, True, "%"))
    return drilled


def _sent(collector: Collector) -> tuple[float, float]:
    """Messages that the router has sent twice, and answers that came, at its last export."""
    found = collector.metrics
    hedges = found.get("expertmesh.hedges")
    answers = found.get("expertmesh.transport_time")
    return (
        sum(point.as_int or point.as_double for point in hedges.sum.data_points) if hedges else 0,
        sum(point.count for point in answers.histogram.data_points) if answers else 0,
    )


async def gone(own: Kept, quick: bool) -> Drilled:
    """Every replica of a group is killed at once; a second later they are replaced."""
    away_s = 1.5 if quick else 5.0
    async with chaos_mesh(own, GROUPS, COPIES, device_s=DEVICE_S) as mesh:
        watch = Watch("gone", await mesh.load(callers=CALLERS, pause_s=0.01))
        await watch.healthy(healthy_s(quick))
        lost = [replica for replica in mesh.replicas if replica.group == 1]
        with watch.fault():
            for replica in lost:
                replica.kill()
            await asyncio.sleep(away_s)
        from_s, until_s = watch.faults[0]
        for replica in lost:
            await mesh.replacement(replica, GROUPS)
        back_s = time.monotonic()
        await asyncio.sleep(1.0)
        drilled = await watch.finish()
    known = watch.calls.started(from_s + _KNOWN_S, until_s)
    late = watch.calls.started(back_s + _KNOWN_S, float("inf"))
    drilled.bars = [
        watch.none_wrong(),
        Bar("gone: calls that get an error, once known", known.num_failed / len(known), 1.0),
        Bar("gone: of them ExpertUnavailable", known.share_of(_TYPED), 1.0),
        Bar("gone: failed calls once replaced", late.num_failed, 0, True, "calls"),
    ]
    if not quick:
        drilled.bars.append(
            Bar("gone: longest wait for the error, once known", known.longest_s, 0.1, True, "s")
        )
    return drilled

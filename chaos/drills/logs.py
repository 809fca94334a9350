"""Nowhere to write to: log files on a full disk, a telemetry collector that takes nothing."""

import asyncio
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.harness.report import Bar

from chaos.drills.processes import CALLERS, COPIES, DEVICE_S, GROUPS, healthy_s
from chaos.mesh import ChaosMesh, Kept, chaos_mesh
from chaos.watch import Drilled, Watch

_FULL_S, _QUICK_FULL_S = 15.0, 2.0
_NOTE = (
    "the log files of router and replicas cannot grow (RLIMIT_FSIZE, every write fails with EFBIG; "
    "a replacement logs to /dev/full). Spans and metrics never touch a disk here: they go to a "
    "collector, which takes connections and says nothing"
)


async def disk_full(own: Kept, quick: bool) -> Drilled:
    """Log files cannot grow and the collector is silent; then a replica dies, of which everybody
    wants to write."""
    async with (
        _silent_collector() as endpoint,
        chaos_mesh(
            own, GROUPS, COPIES, 0, device_s=DEVICE_S, otlp_endpoint=endpoint, log_level="DEBUG"
        ) as mesh,
    ):
        await mesh.router(otlp_endpoint=endpoint, log_level="DEBUG", trace_sample_frac=1.0)
        await mesh.known()
        watch = Watch("disk_full", await mesh.load(callers=CALLERS))
        await watch.healthy(healthy_s(quick))
        with watch.fault():
            grown = await _fill(own, mesh, _QUICK_FULL_S if quick else _FULL_S)
        drilled = await watch.finish()
    drilled.notes = [_NOTE]
    unwritten = Bar("disk_full: written to the logs", grown, 0, True, "bytes")
    drilled.bars = [watch.none_failed(), watch.none_wrong(), unwritten]
    if not quick:
        drilled.bars.append(watch.stalls())
    return drilled


async def _fill(own: Kept, mesh: ChaosMesh, seconds: float) -> int:
    """Let the logs not grow for a time in which a replica is killed. Bytes by which they did."""
    for process in [*mesh.routers, *mesh.replicas]:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    before = _sizes(own.logs)
    victim = mesh.replicas[0]
    victim.kill()
    await mesh.replacement(victim, GROUPS, log="/dev/full")
    await asyncio.sleep(seconds)
    return _sizes(own.logs) - before


def _sizes(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


@asynccontextmanager
async def _silent_collector() -> AsyncIterator[str]:
    """ "host:port" of a server that takes everything and answers nothing."""

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1 << 16):
            pass
        writer.close()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()

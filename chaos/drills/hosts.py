"""Drills that need a network of their own: a host that vanishes, the head of a Ray cluster."""

import asyncio
import json
import os
import secrets
import shutil
import sys
import tempfile

from chaos.mesh import Kept
from chaos.watch import Drilled
from expertmesh.runtime.child import dying_with_parent

_NEEDS_ROOT = "skipped: it needs root, `unshare` and `ip`"
_NO_NAMESPACES = "skipped: this machine makes no network namespaces (`unshare --net` fails)"
_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_AUTH_MODE": "token",
    "OMP_NUM_THREADS": "1",
}
"""Ray reads them when it is imported."""


async def host_loss(own: Kept, quick: bool) -> Drilled:
    """A copy of every group is on another host. The link to it goes down and comes back; then it
    goes down and the host dies, so that no connection is ever closed."""
    return await _elsewhere("chaos.two_hosts", json.dumps(quick))


async def ray_head(own: Kept, quick: bool) -> Drilled:
    """Replicas run under Ray Serve; all processes of the cluster's head node are SIGKILLed, and 20
    s later there is a new one. Takes as long when it is to be quick: Ray takes its time."""
    with tempfile.TemporaryDirectory(prefix="ray-") as directory:
        token = secrets.token_hex(32)
        return await _elsewhere(
            "chaos.ray_head", **_RAY, RAY_TMPDIR=directory, RAY_AUTH_TOKEN=token
        )


async def _elsewhere(module: str, *args: str, **env: str) -> Drilled:
    """What a module finds that runs a drill in a network namespace of its own and prints it."""
    unshare = shutil.which("unshare")
    if os.geteuid() or not unshare or not shutil.which("ip"):
        return Drilled(notes=[_NEEDS_ROOT])
    if await status_of("unshare", "--net", "ip", "link", "set", "lo", "up"):
        return Drilled(notes=[_NO_NAMESPACES])
    command = [unshare, "--net", sys.executable, "-m", module, *args]
    process = await asyncio.create_subprocess_exec(
        *dying_with_parent(command), stdout=asyncio.subprocess.PIPE, env=os.environ | env
    )
    out, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{module} failed")
    return Drilled.from_json(out.decode().splitlines()[-1])


async def status_of(*command: str) -> int:
    """The exit status of a command."""
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    return await process.wait()

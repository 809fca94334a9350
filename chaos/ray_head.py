"""The drill of `chaos.drills.rays`: replicas under Ray Serve, and the head of the cluster dies.

`python -m chaos.ray_head` prints what it found as JSON. A process of its own, as Ray's settings are
those of a process.
"""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from benchmarks.harness.report import Bar
from benchmarks.harness.router import free_port

from chaos.drills.hosts import status_of
from chaos.drills.processes import CALLERS, GROUPS
from chaos.mesh import (
    MODEL,
    MODEL_DIR,
    NUM_EXPERTS,
    ChaosMesh,
    Kept,
    chaos_mesh,
    in_use,
    kept,
    snapshot_of,
)
from chaos.watch import Drilled, Watch
from expertmesh.experts.assignment import split_evenly
from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.runtime.child import dying_with_parent
from expertmesh.runtime.redis_server import EmbeddedRedis
from expertmesh.services.ray_cluster import deploy, wait_running
from expertmesh.services.serve_config import EXPERTS_IMPORT_PATH, application

_ADDRESS = "10.78.0.1"
"""Ray replaces 127.0.0.1 by an address that others can reach; here there is none but this."""
_COPIES = 2
_HEALTHY_S, _AWAY_S, _AFTER_S = 8.0, 20.0, 5.0
_START_S = 240.0
_STORE_BYTES = 80 << 20
_NOTE = (
    "a head (GCS, Serve's controller) and a worker node with the replicas on this machine; the "
    "head keeps its tables in a Redis (RAY_REDIS_ADDRESS), without which Ray ends a worker node "
    "60 s after its head; the head is killed for 20 s, and after its return a replica, which "
    "Serve has to replace"
)


@dataclass(frozen=True)
class Ray:
    """A cluster of a head and a worker node on this machine.

    Args:
        port: of the head.
        redis: "host:port" where the head keeps what it must not lose.
    """

    port: int
    redis: str

    @property
    def address(self) -> str:
        """Where the head is."""
        return f"{_ADDRESS}:{self.port}"

    @contextmanager
    def head(self) -> Iterator["subprocess.Popen[bytes]"]:
        """A head that runs nothing but what Ray and Serve put there."""
        # else Ray takes the worker node for a head that runs already
        (Path(os.environ["RAY_TMPDIR"]) / "ray" / "ray_current_cluster").unlink(missing_ok=True)
        own = ["--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false"]
        with _node({"RAY_REDIS_ADDRESS": self.redis}, *own) as process:
            yield process

    @contextmanager
    def worker(self) -> Iterator["subprocess.Popen[bytes]"]:
        """A node for replicas."""
        with _node({}, f"--address={self.address}", "--num-cpus=8") as process:
            yield process


@contextmanager
def _node(env: dict[str, str], *args: str) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *args]
    command += [f"--node-ip-address={_ADDRESS}", f"--object-store-memory={_STORE_BYTES}"]
    process = subprocess.Popen(
        dying_with_parent(command),
        env={**os.environ, **env},
        stdout=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        kill_all(process)


def kill_all(process: "subprocess.Popen[bytes]") -> None:
    """A process and all that it has started, at once."""
    with suppress(psutil.NoSuchProcess):
        every = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for own in every:
            with suppress(psutil.NoSuchProcess):
                own.kill()
    process.wait()


def _listening(port: int) -> None:
    end_s = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection((_ADDRESS, port), 1.0).close()
        except OSError:
            assert time.monotonic() < end_s, "the head of the cluster does not start"
            time.sleep(0.2)
        else:
            return


@contextmanager
def driver(address: str) -> Iterator[None]:
    """This process as a client of the cluster."""
    import ray
    from ray import serve

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        try:
            serve.start(proxy_location="Disabled")
            yield
        finally:
            ray.shutdown()


def applications(redis_url: str) -> list[dict[str, Any]]:
    """Serve applications of the groups, some copies each."""
    groups = [
        ExpertGroupArgs(
            group=f"g{number}",
            model_dir=str(MODEL_DIR),
            model=MODEL,
            experts=experts,
            redis_url=redis_url,
            host="127.0.0.1",
            num_cpus=0.1,
            local_socket=False,
            deterministic=True,
            log_level="WARNING",
        )
        for number, experts in enumerate(split_evenly(NUM_EXPERTS, GROUPS))
    ]
    return [
        application(
            args.group,
            EXPERTS_IMPORT_PATH,
            args,
            [{"name": args.group, "num_replicas": _COPIES}],
        )
        for args in groups
    ]


async def _until(
    mesh: ChaosMesh, num_replicas: int, besides: AbstractSet[str] = frozenset()
) -> float:
    """Wait until the router uses so many replicas, `besides` not counted. How long that took."""
    started_s = time.monotonic()
    while len(await in_use(mesh.routers[0].name) - besides) < num_replicas:
        assert time.monotonic() < started_s + _START_S, "replicas do not come"
        await asyncio.sleep(0.1)
    return time.monotonic() - started_s


async def _drill(own: Kept) -> Drilled:
    """A cluster whose head keeps its state in Redis, as Ray's fault tolerance wants it."""
    async with EmbeddedRedis() as redis, chaos_mesh(own, 1, 0, 0) as mesh:
        cluster = Ray(free_port(), f"127.0.0.1:{redis.port}")
        with ExitStack() as stack:
            head = stack.enter_context(cluster.head())
            await asyncio.to_thread(_listening, cluster.port)
            stack.enter_context(cluster.worker())
            with driver(cluster.address):
                deploy({"proxy_location": "Disabled", "applications": applications(mesh.redis.url)})
                await wait_running([f"g{n}" for n in range(GROUPS)], _START_S, lambda text: None)
            await mesh.router()
            await _until(mesh, GROUPS * _COPIES)
            watch = Watch("ray_head", await mesh.load(callers=CALLERS))
            await watch.healthy(_HEALTHY_S)
            with watch.fault():
                kill_all(head)
                await asyncio.sleep(_AWAY_S)
            stack.enter_context(cluster.head())
            replaced_s = await _replaced(mesh)
            await asyncio.sleep(_AFTER_S)
            drilled = await watch.finish()
    drilled.notes = [_NOTE]
    back = Bar(
        "ray_head: a replica killed after its return is replaced after", replaced_s, 60, True, "s"
    )
    drilled.bars = [watch.none_failed(), watch.none_wrong(), watch.stalls(), back]
    return drilled


async def _replaced(mesh: ChaosMesh) -> float:
    """Kill a replica that Serve started. How long until there is another for it."""
    snapshot = await snapshot_of(mesh.routers[0].name)
    before = {view.state.replica for view in snapshot.replicas}
    os.kill(snapshot.replicas[0].state.pid, signal.SIGKILL)
    return await _until(mesh, 1, before)


async def _main() -> None:
    for args in (("link", "set", "lo", "up"), ("address", "add", f"{_ADDRESS}/32", "dev", "lo")):
        assert not await status_of("ip", *args), "not in a network namespace of its own"
    async with kept() as own:
        drilled = await _drill(own)
    print(drilled.to_json())


if __name__ == "__main__":
    asyncio.run(_main())

"""A mesh of real processes to break: Redis, replicas, routers, callers, and links between them."""

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from benchmarks.harness.gateway import start_gateway
from benchmarks.harness.router import free_port

from chaos.batches import load_reference, write_batches
from chaos.caller import CallerArgs
from chaos.link import Link
from chaos.load import WARM_UP_CALLS, Load, start_caller
from chaos.nursery import Nursery
from expertmesh.experts.assignment import split_evenly
from expertmesh.runtime.redis_server import EmbeddedRedis
from expertmesh.services.health import wait_serving
from expertmesh.v1 import control_pb2, control_pb2_grpc

MODEL_DIR = Path(__file__).parents[1] / "examples" / "demo-moe"
MODEL = "bench"
NUM_EXPERTS = 8
TOKENS = 16
"""Of a call."""
_POLL_S = 0.01
_KNOWN_S = 60.0


@dataclass(frozen=True)
class Kept:
    """What is made once for all drills."""

    nursery: Nursery
    reference: Any
    """The model in transformers."""
    batches: Path
    dir: Path

    @property
    def logs(self) -> list[Path]:
        """Of all replicas, of all routers."""
        return [self.dir / "replicas.log", self.dir / "routers.log"]


@asynccontextmanager
async def kept() -> AsyncIterator[Kept]:
    """The nursery, and the reference's answers."""
    with tempfile.TemporaryDirectory(prefix="expertmesh-chaos-") as name:
        async with Nursery() as nursery:
            reference = load_reference(MODEL_DIR)
            write_batches(reference, TOKENS, Path(name) / "batches")
            yield Kept(nursery, reference, Path(name) / "batches", Path(name))


@dataclass(frozen=True)
class Running:
    """A process of the mesh."""

    name: str
    """Of a router or gateway, its address."""
    pid: int

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """At once and without a goodbye."""
        self.signal(signal.SIGKILL)

    @property
    def lives(self) -> bool:
        """Whether it is there."""
        return Path(f"/proc/{self.pid}").exists()


@dataclass(frozen=True)
class ReplicaProcess(Running):
    """A replica, and the link its callers go through, if there is one."""

    group: int
    link: Link | None


class ChaosMesh:
    """Everything of one drill. Create with `chaos_mesh`."""

    def __init__(self, own: Kept, stack: AsyncExitStack, redis: EmbeddedRedis, **args: Any) -> None:
        self.own = own
        self.redis = redis
        self.replicas: list[ReplicaProcess] = []
        """Those that were not replaced."""
        self.routers: list[Running] = []
        self._stack = stack
        self._args = args
        """Of all replicas."""
        self._num_started = 0

    async def replica(self, group: int, experts: str, **changes: Any) -> ReplicaProcess:
        """Start one; it is not yet known to routers.

        Args:
            changes: of `ExpertGroupArgs` and `Troubles`; with `linked=True` callers reach it over a
                link.
        """
        self._num_started += 1
        fields = {
            "group": f"g{group}",
            "model_dir": str(MODEL_DIR),
            "model": MODEL,
            "experts": experts,
            "redis_url": self.redis.url,
            "host": "127.0.0.1",
            "local_socket": False,
            "deterministic": True,
            "log_level": "WARNING",
            "log": str(self.own.logs[0]),
            **self._args,
            **changes,
        }
        link = await self._link(fields) if fields.pop("linked", False) else None
        name = f"{self.redis.port}/g{group}#{self._num_started}"
        pid = await self.own.nursery.replica(name, fields)
        started = ReplicaProcess(name, pid, group, link)
        self.replicas.append(started)
        self._stack.callback(_kill, pid)
        return started

    async def _link(self, fields: dict[str, Any]) -> Link:
        port = free_port()
        link = await self._stack.enter_async_context(Link(f"127.0.0.1:{port}"))
        fields |= {"port": port, "announce": link.address}
        return link

    async def grow(self, groups: int, copies: int) -> None:
        """All experts split evenly over groups, several copies of each."""
        for group, experts in enumerate(split_evenly(NUM_EXPERTS, groups)):
            for _ in range(copies):
                await self.replica(group, experts)

    async def replacement(
        self, gone: ReplicaProcess, groups: int, **changes: Any
    ) -> ReplicaProcess:
        """Another replica of a group, known to all routers when this returns."""
        if gone in self.replicas:
            self.replicas.remove(gone)
        experts = split_evenly(NUM_EXPERTS, groups)[gone.group]
        started = await self.replica(gone.group, experts, **changes)
        await self.known(started.name)
        return started

    async def router(self, address: str = "", **settings: Any) -> Running:
        """A router that serves.

        Args:
            address: default a free port.
        """
        address = address or f"127.0.0.1:{free_port()}"
        own = {
            "model": MODEL_DIR,
            "model_name": MODEL,
            "redis.url": self.redis.url,
            "router.host": "127.0.0.1",
            "router.port": address.rpartition(":")[2],
            "log_level": "WARNING",
        }
        args = [f"--set={name}={value}" for name, value in (own | settings).items()]
        pid = await self.own.nursery.router(address, args, str(self.own.logs[1]))
        started = Running(address, pid)
        self.routers.append(started)
        self._stack.callback(_kill, pid)
        await wait_serving(address, _KNOWN_S)
        return started

    async def gateway(self, address: str = "", **changes: Any) -> Running:
        """A gateway that serves.

        Args:
            address: default a free port.
            changes: of `GatewayArgs`.
        """
        port = int(address.rpartition(":")[2] or 0)
        process, wait = start_gateway(
            MODEL_DIR, self.redis.url, deterministic=True, port=port, **changes
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return Running(await asyncio.to_thread(wait), process.pid)

    async def known(self, *names: str) -> None:
        """Until every live router sends work to these replicas; without names, to all."""
        wanted = set(names or (replica.name for replica in self.replicas))
        end_s = time.monotonic() + _KNOWN_S
        for router in self.routers:
            while router.lives and not wanted <= await in_use(router.name):
                assert time.monotonic() < end_s, f"{router.name} does not know all of {wanted}"
                await asyncio.sleep(_POLL_S)

    async def restart_redis(self) -> None:
        """Another Redis, empty, where the killed one was."""
        await self._stack.enter_async_context(EmbeddedRedis(port=self.redis.port))

    async def load(self, target: str = "", *, warm_up: int = WARM_UP_CALLS, **changes: Any) -> Load:
        """A caller process that has made its first calls.

        Args:
            target: default the first router.
            warm_up: how many calls those are.
            changes: of `CallerArgs`.
        """
        records = self.own.dir / f"calls-{time.monotonic_ns()}"
        fields = {"batches": str(self.own.batches), "records": str(records)} | changes
        args = CallerArgs(target or self.routers[0].name, **fields)
        process = start_caller(args)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        load = Load(process, records)
        await load.until(warm_up, _KNOWN_S)
        return load


@asynccontextmanager
async def chaos_mesh(
    own: Kept, groups: int = 2, copies: int = 2, routers: int = 1, **args: Any
) -> AsyncIterator[ChaosMesh]:
    """A mesh whose routers know every replica.

    Args:
        args: of all replicas, see `ChaosMesh.replica`.
    """
    async with AsyncExitStack() as stack:
        redis = EmbeddedRedis(port=free_port())
        await stack.enter_async_context(redis)
        mesh = ChaosMesh(own, stack, redis, **args)
        await mesh.grow(groups, copies)
        for _ in range(routers):
            await mesh.router()
        await mesh.known()
        yield mesh


async def snapshot_of(address: str) -> control_pb2.GetSnapshotResponse:
    """The mesh as a router sees it."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        return await stub.GetSnapshot(control_pb2.GetSnapshotRequest(), timeout=5.0)


async def in_use(address: str) -> set[str]:
    """Names of the replicas that a router sends work to; none while it does not answer."""
    try:
        snapshot = await snapshot_of(address)
    except grpc.aio.AioRpcError:
        return set()
    return {view.state.replica for view in snapshot.replicas if not view.set_aside}


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)

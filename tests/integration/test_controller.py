"""The controller with real Redis, replicas and routers, under load; killed wherever it can be."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from tests.mesh import MakeCheckpoint, Mesh, Router
from tests.packing import random_hidden
from tests.router_caller import Routed, RouterCaller
from tests.waiting import until

from expertmesh.runtime.state import Lease
from expertmesh.services.controller.process import controlling
from expertmesh.services.settings import ControllerSettings
from expertmesh.v1 import placement_pb2 as pb
from expertmesh.v1 import placement_pb2_grpc

ROOT = Path(__file__).parents[2]
EXPERT_BYTES = 3 * 64 * 96 * 4
POINTS = (
    "written",
    "before drop",
    "after drop",
    "1 steps left",
    "before add",
    "after add",
    "0 steps left",
)
HOT = Routed(torch.tensor([[0, 1 + token % 7] for token in range(28)]), torch.full((28, 2), 0.5))
"""Half of all rows want expert 0."""


def settings(**changed: object) -> ControllerSettings:
    fields = {
        "mode": "execute",
        "port": 0,
        "window_s": 0.3,
        "lease_s": 1.0,
        "linger_s": 0.3,
        "threshold": 1.1,
        "windows": 1,
        "half_life_windows": 0.5,
        "speeds": "equal",
    }
    return ControllerSettings.model_validate(fields | changed)


class Load:
    """Callers that compare every answer, bit by bit, with the first one."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.num_calls = 0
        self._enough = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with RouterCaller(self.router.target) as caller:
            hidden_TD = random_hidden(len(HOT.experts_TK))
            expected_TD = await caller.dispatch(0, hidden_TD, HOT)

            async def keep_calling() -> None:
                while not self._enough.is_set():
                    out_TD = await caller.dispatch(0, hidden_TD, HOT)
                    assert torch.equal(out_TD, expected_TD)
                    self.num_calls += 1

            async with asyncio.TaskGroup() as callers:
                for _ in range(3):
                    callers.create_task(keep_calling())
                try:
                    yield
                finally:
                    self._enough.set()

    def holders(self, expert: int) -> tuple[str, ...]:
        return self.router.core.snapshot.holders[0, expert]


@asynccontextmanager
async def loaded(mesh: Mesh, path: Path, **args: Any) -> AsyncIterator[Load]:
    """Two groups in deterministic mode, under a load of which g0 gets most."""
    async with Mesh(mesh.redis_url, f"{mesh.name}-controlled", deterministic=True) as own:
        await own.replicas(path, 2, guest_memory_bytes=EXPERT_BYTES, **args)
        load = Load(await own.router(path))
        async with load.running():
            yield load


async def take_on(load: Load, replica: str, expert: int) -> None:
    """A guest from before, brought by a controller of the oldest epoch."""
    address = load.router.core.snapshot.replicas[replica].state.address
    async with grpc.aio.insecure_channel(address) as channel:
        stub = placement_pb2_grpc.PlacementServiceStub(channel)
        await stub.AddExpert(pb.AddExpertRequest(epoch=0, layer=0, expert=expert))
    await until(lambda: len(load.holders(expert)) == 2)


async def plan_at(address: str) -> pb.PlacementPlan:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = placement_pb2_grpc.ControllerServiceStub(channel)
        found: pb.PlacementPlan = await stub.GetPlan(pb.GetPlanRequest())
        return found


async def plan_when(
    address: str, condition: Callable[[pb.PlacementPlan], bool]
) -> pb.PlacementPlan:
    """The first plan of which that holds."""
    async with asyncio.timeout(30):
        while not condition(plan := await plan_at(address)):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return plan


@asynccontextmanager
async def process(
    mesh: Mesh, own: ControllerSettings, *point: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A controller of its own process, which is killed at the end of the block if it lives."""
    command = [sys.executable, str(ROOT / "tests/controller_process.py"), mesh.redis_url]
    arguments = [f"{mesh.name}-controlled", own.model_dump_json(), *point]
    running = await asyncio.create_subprocess_exec(
        *command, *arguments, stdout=asyncio.subprocess.PIPE, env=dict(os.environ)
    )
    try:
        yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.wait()


async def test_an_adviser_tells_and_changes_nothing(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    async with loaded(mesh, checkpoint("mixtral")) as load:
        name = f"{mesh.name}-controlled"
        async with controlling(settings(mode="advisory"), mesh.redis_url, name) as address:
            plan = await plan_when(address, lambda plan: bool(plan.moves))
            assert (plan.epoch, plan.executes, plan.last_move) == (1, False, "")
            assert plan.reason == "layers 0 stay uneven with dispatch solved anew"
            assert plan.layers[0].ratio > 1.3
            # the bound is that of as many copies as there are; the move makes one more
            assert 1 <= plan.layers[0].bound < 1.1
            assert 1 <= plan.layers[0].ratio_after < 1.1
            [move] = plan.moves
            [step] = move.steps
            assert (step.add, step.layer, step.expert) == (True, 0, 0)
            assert (step.replica, move.num_bytes) == ("g1#1", EXPERT_BYTES)
            reader = Lease(mesh.redis_url, name, 1.0)
            recorded = pb.PlacementPlan.FromString(await reader.read("plan"))
            assert recorded.window >= plan.window
            assert await reader.read("move") == b""
            await reader.leave()
        assert load.holders(0) == ("g0#1",)


async def test_it_moves_what_helps_and_then_rests(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    async with loaded(mesh, checkpoint("mixtral")) as load:
        name = f"{mesh.name}-controlled"
        async with controlling(settings(), mesh.redis_url, name) as address:
            await until(lambda: load.holders(0) == ("g0#1", "g1#1"), deadline_s=20)
            calls = load.num_calls
            before = await plan_at(address)
            plan = await plan_when(address, lambda plan: plan.window >= before.window + 3)
            assert plan.last_move == "done"
            assert not plan.moves
            assert plan.reason.startswith("dispatch balances every layer")
            assert load.num_calls > calls


@pytest.mark.parametrize("point", POINTS)
async def test_killed_anywhere_the_mesh_serves_and_the_next_one_finishes(
    mesh: Mesh, checkpoint: MakeCheckpoint, point: str
) -> None:
    """A move in two steps: a guest that is not needed leaves, and the hot expert comes."""
    async with loaded(mesh, checkpoint("mixtral")) as load:
        await take_on(load, "g1#1", 1)
        async with process(mesh, settings(), point) as first:
            assert await asyncio.wait_for(first.wait(), 60) == -9, "it ended where it was to"
            assert first.stdout
            reached = (await first.stdout.read()).decode().split("\n")
            assert reached[:-1] == list(POINTS[: POINTS.index(point) + 1])
        calls = load.num_calls
        await until(lambda: load.num_calls > calls + 20, deadline_s=30)
        assert load.router.core.missing() == [], "nobody is in charge, and all is there"
        async with process(mesh, settings()) as _:
            await until(
                lambda: load.holders(0) == ("g0#1", "g1#1") and load.holders(1) == ("g0#1",),
                deadline_s=60,
            )
            reader = Lease(mesh.redis_url, f"{mesh.name}-controlled", 1.0)
            async with asyncio.timeout(20):
                while await reader.read("move"):  # noqa: ASYNC110  # another process writes it
                    await asyncio.sleep(0.05)
            await reader.leave()


async def test_one_that_wakes_up_late_is_refused(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    """Stopped before a step, past its lease; the next one finishes; then it goes on."""
    async with loaded(mesh, checkpoint("mixtral")) as load:
        await take_on(load, "g1#1", 1)
        async with process(mesh, settings(), "before add", "SIGSTOP") as late:
            assert late.stdout
            while await late.stdout.readline() != b"before add\n":
                pass
            async with process(mesh, settings()):
                await until(lambda: len(load.holders(0)) == 2, deadline_s=60)
                calls = load.num_calls
                late.send_signal(signal.SIGCONT)
                await until(lambda: load.num_calls > calls + 50, deadline_s=30)
                assert late.returncode is None
                late.kill()
                assert await late.stdout.read() == b"", "its step was not done"
                assert load.holders(0) == ("g0#1", "g1#1")


async def test_an_epoch_that_redis_has_forgotten_is_outbid(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    async with loaded(mesh, checkpoint("mixtral")) as load:
        address = load.router.core.snapshot.replicas["g1#1"].state.address
        async with grpc.aio.insecure_channel(address) as channel:
            stub = placement_pb2_grpc.PlacementServiceStub(channel)
            await stub.Survey(pb.SurveyRequest(epoch=41))
        name = f"{mesh.name}-controlled"
        async with controlling(settings(mode="advisory"), mesh.redis_url, name) as own:
            plan = await plan_when(own, lambda plan: plan.window > 0)
            assert plan.epoch == 42


async def test_two_controllers_take_turns(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    async with loaded(mesh, checkpoint("mixtral")):
        name = f"{mesh.name}-controlled"
        advisory = settings(mode="advisory", threshold=9.0)
        async with controlling(advisory, mesh.redis_url, name) as second:
            async with process(mesh, advisory) as first:
                await plan_when(second, lambda plan: plan.epoch == 1)
                assert first.returncode is None
            async with process(mesh, advisory):
                await asyncio.sleep(1.0)
                assert (await plan_at(second)).epoch == 1, "a newcomer waits"


async def test_a_replica_that_has_left_ends_its_move(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    """A move left over that cannot be finished is given up, and planning goes on."""
    async with loaded(mesh, checkpoint("mixtral")):
        name = f"{mesh.name}-controlled"
        writer = Lease(mesh.redis_url, name, 1.0)
        assert await writer.refresh() == 1
        steps = [pb.PlacementStep(add=True, layer=0, expert=1, replica="g9#1")]
        assert await writer.write("move", pb.PlacementMove(steps=steps).SerializeToString())
        await writer.leave()
        async with controlling(settings(threshold=9.0), mesh.redis_url, name) as address:
            plan = await plan_when(address, lambda plan: plan.window > 0)
            assert plan.epoch == 2
            assert plan.last_move == (
                "given up with 1 steps left: replica g9#1 is not there any more"
            )
            reader = Lease(mesh.redis_url, name, 1.0)
            assert await reader.read("move") == b""
            await reader.leave()

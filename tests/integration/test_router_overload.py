"""Calls that are cancelled, too late or too many leave what they share as it was."""

import asyncio
import time

import pytest
import torch
from tests.mesh import MakeCheckpoint, Mesh, stalled
from tests.packing import random_hidden
from tests.router_caller import RouterCaller, random_routing, refusal
from tests.waiting import until

from expertmesh.runtime.errors import DeadlineExceeded, QueueFull

ROUTING = random_routing(5, 4)
"""Rows for most experts of both groups."""


async def test_a_cancelled_call_leaves_the_shared_stream_alone(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    replica = await mesh.replica(path)
    router = await mesh.router(path)
    async with RouterCaller(router.target) as caller, RouterCaller(router.target) as other:
        hidden_TD = random_hidden(5)
        expected_TD = await caller.dispatch(0, hidden_TD, ROUTING)
        with stalled(replica) as stall:
            stays = asyncio.ensure_future(other.dispatch(0, hidden_TD, ROUTING))
            await until(lambda: replica.load().queued_rows == 20)
            gone = [
                asyncio.ensure_future(caller.dispatch(0, random_hidden(5, seed), ROUTING))
                for seed in range(5)
            ]
            await until(lambda: replica.load().queued_rows == 120)
            for call in gone:
                call.cancel()
            await until(lambda: router.in_flight_rows("g0#1") == 20)
            assert replica.load().queued_rows == 20, "nobody computes what nobody wants"
            stall.release()
            assert torch.equal(await stays, expected_TD)
        assert router.set_aside("g0#1") == ""
        assert torch.equal(await caller.dispatch(0, hidden_TD, ROUTING), expected_TD)


@pytest.mark.parametrize("whose", ["the caller's", "the router's"])
async def test_a_stalled_replica_costs_the_deadline_and_no_more(
    whose: str, mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    replica = await mesh.replica(path)
    router = await mesh.router(path, call_timeout_s=0.1 if whose == "the router's" else 20)
    timeout_s = 0.1 if whose == "the caller's" else None
    async with RouterCaller(router.target) as caller:
        hidden_TD = random_hidden(5)
        expected_TD = await caller.dispatch(0, hidden_TD, ROUTING)
        with stalled(replica):
            for call in (
                caller.dispatch(0, hidden_TD, ROUTING, timeout_s=timeout_s),
                caller.forward(0, hidden_TD, timeout_s=timeout_s),
            ):
                started_s = time.monotonic()
                error = await refusal(call)
                assert type(error) is DeadlineExceeded
                assert 0.05 < time.monotonic() - started_s < 5
            await until(lambda: router.in_flight_rows("g0#1") == 0)
        assert torch.equal(await caller.dispatch(0, hidden_TD, ROUTING), expected_TD)
        assert router.set_aside("g0#1") == ""
        await until(lambda: replica.load().queued_rows == 0)


async def test_a_full_replica_hands_on_to_its_copy(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("mixtral")
    first = await mesh.replica(path, name="g0#1")
    router = await mesh.router(path)
    first.set_live({"max_queue_rows": 10})
    async with RouterCaller(router.target) as caller:
        hidden_TD = random_hidden(5)
        assert type(await refusal(caller.dispatch(0, hidden_TD, ROUTING))) is QueueFull
        second = await mesh.replica(path, name="g0#2")
        await until(lambda: "g0#2" in router.core.snapshot.replicas)
        for _ in range(10):
            await caller.dispatch(0, hidden_TD, ROUTING)
        assert router.set_aside("g0#1") == ""
        assert second.load().done_rows >= 100, "of 20 rows a call the first takes 10 at most"
        second.set_live({"max_queue_rows": 10})
        error = await refusal(caller.dispatch(0, hidden_TD, ROUTING))
        assert type(error) is QueueFull
        assert error.fields["max_queue_rows"] == "10"
        first.set_live({})
        await caller.dispatch(0, hidden_TD, ROUTING)

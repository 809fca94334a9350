"""More work than a mesh can do, over real gRPC: who waits, who is refused, what they are told."""

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tests.mesh import MakeCheckpoint, Mesh, Router, stalled
from tests.packing import random_hidden
from tests.router_caller import RouterCaller, random_routing, refusal
from tests.waiting import until

from expertmesh.client.router import RouterClient
from expertmesh.experts.batch import PackedRows
from expertmesh.experts.cost_fit import BatchCost, CostFit
from expertmesh.experts.replica import Replica
from expertmesh.runtime.errors import CannotMakeIt, QueueFull
from expertmesh.runtime.in_flight import InFlight
from expertmesh.v1 import priority_pb2

ROUTING = random_routing(5, 4)
CALL_ROWS = 20
SECOND_US = 1e6


class KnownCost(CostFit):
    """A device that needs so long for a row, whatever is measured."""

    def __init__(self, row_us: float) -> None:
        super().__init__()
        self.cost = BatchCost(row_us=row_us)

    def observe(self, num_experts: int, num_rows: int, compute_us: float) -> None:
        """Nothing is learned."""


async def slow_replica(mesh: Mesh, path: Path, name: str = "g0#1", **args: Any) -> Replica:
    """It says that a row takes a second."""
    replica = await mesh.replica(path, name=name, **args)
    replica._batcher.stats.fit = KnownCost(SECOND_US)
    replica._batcher.stats.drift = 1.0
    return replica


def row_cost_us(router: Router, replica: str) -> float:
    """As the router has heard."""
    return router.core.snapshot.replicas[replica].load.row_cost_us


async def test_a_greedy_caller_does_not_delay_a_modest_one(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    replica = await mesh.replica(path)
    replica.set_live({"max_batch_rows": CALL_ROWS})
    router = await mesh.router(path)
    modest_TD = random_hidden(5, 1)
    computed: list[str] = []  # in the replica's order: answers race on two connections

    async with RouterCaller(router.target) as greedy, RouterCaller(router.target) as modest:
        await greedy.dispatch(0, random_hidden(5), ROUTING)
        with stalled(replica) as stall:

            def compute(rows: PackedRows) -> torch.Tensor:
                is_modest = bool((rows.rows_RD == modest_TD[0]).all(1).any())
                computed.append("modest" if is_modest else "greedy")
                return stall.compute(rows)

            replica._batcher._compute = compute
            calls = [
                asyncio.ensure_future(greedy.dispatch(0, random_hidden(5), ROUTING))
                for _ in range(8)
            ]
            await until(lambda: replica.load().queued_rows == 8 * CALL_ROWS)
            calls.append(asyncio.ensure_future(modest.dispatch(0, modest_TD, ROUTING)))
            await until(lambda: replica.load().queued_rows == 9 * CALL_ROWS)
            stall.release()
            await asyncio.gather(*calls)
    assert len(computed) == 9
    assert computed.index("modest") <= 2, "after what was computed already, and one batch"


async def test_batch_work_lets_interactive_work_pass(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    replica = await mesh.replica(path)
    replica.set_live({"max_batch_rows": CALL_ROWS, "ageing_s": 600})
    router = await mesh.router(path)
    ends: list[int] = []

    async def ends_as(caller: RouterCaller, priority: int) -> None:
        await caller.dispatch(0, random_hidden(5), ROUTING, priority=priority)
        ends.append(priority)

    async with RouterCaller(router.target) as caller:
        await caller.dispatch(0, random_hidden(5), ROUTING)
        with stalled(replica) as stall:
            calls = []
            for priority in [priority_pb2.PRIORITY_BATCH] * 5 + [
                priority_pb2.PRIORITY_INTERACTIVE
            ] * 5:
                calls.append(asyncio.ensure_future(ends_as(caller, priority)))
                await until(lambda: replica.load().queued_rows == CALL_ROWS * len(calls))
            stall.release()
            await asyncio.gather(*calls)
    assert ends == [2, 1, 1, 1, 1, 1, 2, 2, 2, 2], "the first was being computed already"


async def test_who_cannot_make_it_is_refused_and_the_next_copy_is_asked(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    # its heartbeats are rare: routers believe that it is idle and fast
    first = await mesh.replica(path, heartbeat_s=60, lease_s=600)
    second = await mesh.replica(path, name="g0#2")
    second._batcher.stats.fit = KnownCost(SECOND_US / 100)
    second.set_live({})  # and says so
    router = await mesh.router(path)
    await until(lambda: row_cost_us(router, "g0#2") == SECOND_US / 100)
    first._batcher.stats.fit = KnownCost(SECOND_US)
    refused = first._telemetry.metrics.errors
    async with RouterCaller(router.target) as caller:
        hidden_TD = random_hidden(5)
        with stalled(first) as stall:
            rows = PackedRows(0, (0,), (CALL_ROWS,), random_hidden(CALL_ROWS))
            long_queue = asyncio.ensure_future(first._batcher.submit(rows))
            await until(lambda: first.load().queued_rows == CALL_ROWS)
            answers = [await caller.dispatch(0, hidden_TD, ROUTING, timeout_s=15) for _ in range(3)]
            assert refused.get("expert", "RESOURCE_EXHAUSTED") == 3
            stall.release()
            await long_queue
        expected_TD = await caller.dispatch(0, hidden_TD, ROUTING)
        assert refused.get("expert", "RESOURCE_EXHAUSTED") == 3
        assert router.set_aside("g0#1") == ""
    assert all(torch.equal(answer_TD, expected_TD) for answer_TD in answers)


async def test_a_stock_client_reads_when_to_come_again(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    replica = await slow_replica(mesh, path)
    router = await mesh.router(path, call_timeout_s=600)
    async with RouterCaller(router.target) as caller:
        with stalled(replica) as stall:
            waiting = asyncio.ensure_future(
                caller.dispatch(0, random_hidden(5), ROUTING, timeout_s=None)
            )
            await until(lambda: replica.load().queued_rows == CALL_ROWS)
            started_s = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await caller.dispatch(0, random_hidden(5), ROUTING, timeout_s=15)
            assert time.monotonic() - started_s < 10, "at once, and not when the time is over"
            stall.release()
            await waiting
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    status: Any = rpc_status.from_call(caught.value)
    retry, info = error_details_pb2.RetryInfo(), error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    assert info.reason == "CANNOT_MAKE_IT"
    assert retry.retry_delay.ToMilliseconds() > 0


async def test_the_smallest_delay_of_all_copies_is_passed_on(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    replicas = [await slow_replica(mesh, path, name) for name in ("g0#1", "g0#2")]
    replicas[1]._batcher.stats.fit = KnownCost(SECOND_US / 2)
    router = await mesh.router(path, call_timeout_s=600)
    await until(lambda: len(router.core.snapshot.replicas) == 2)
    async with RouterCaller(router.target) as caller:
        with stalled(replicas[0]) as one, stalled(replicas[1]) as two:
            rows = random_hidden(5)
            waiting = [
                asyncio.ensure_future(caller.dispatch(0, rows, ROUTING, timeout_s=None))
                for _ in range(4)
            ]
            await until(lambda: sum(own.load().queued_rows for own in replicas) == 4 * CALL_ROWS)
            await until(lambda: all(own.load().queued_rows for own in replicas))
            error = await refusal(caller.dispatch(0, rows, ROUTING, timeout_s=5))
            assert type(error) is CannotMakeIt
            assert error.retry_after_s is not None
            one.release()
            two.release()
            await asyncio.gather(*waiting)


async def test_a_client_that_asked_for_it_tries_again_when_told(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    replica = await mesh.replica(path)
    router = await mesh.router(path)
    hidden_TD = random_hidden(5)
    async with RouterCaller(router.target) as caller:
        expected_TD = await caller.dispatch(0, hidden_TD, ROUTING)
        replica.set_live({"max_queue_rows": 30})
        with stalled(replica) as stall:
            waiting = asyncio.ensure_future(caller.dispatch(0, hidden_TD, ROUTING))
            await until(lambda: replica.load().queued_rows == CALL_ROWS)
            call = (0, hidden_TD, ROUTING.experts_TK, ROUTING.weights_TK)
            with (
                RouterClient(router.target) as once,
                RouterClient(router.target, retries=99) as client,
            ):
                with pytest.raises(QueueFull):
                    await asyncio.to_thread(once.dispatch, *call)
                refused = replica._telemetry.metrics.errors
                before = refused.get("expert", "RESOURCE_EXHAUSTED")
                trying = asyncio.ensure_future(asyncio.to_thread(client.dispatch, *call))
                await until(lambda: refused.get("expert", "RESOURCE_EXHAUSTED") >= before + 2)
                stall.release()
                assert torch.equal(await trying, expected_TD)
            await waiting


async def test_a_router_bounds_its_calls_and_keeps_room_for_others(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    replica = await mesh.replica(path)
    router = await mesh.router(path, in_flight=InFlight(4, 1 << 20, time.monotonic))
    hidden_TD = random_hidden(5)
    async with RouterCaller(router.target) as greedy, RouterCaller(router.target) as modest:
        await greedy.dispatch(0, hidden_TD, ROUTING)
        with stalled(replica) as stall:
            calls = [asyncio.ensure_future(greedy.forward(0, hidden_TD)) for _ in range(2)]
            await until(lambda: router.in_flight_rows("g0#1") == 2 * 5 * 2)
            for call in (greedy.forward(0, hidden_TD), greedy.dispatch(0, hidden_TD, ROUTING)):
                error = await refusal(call)
                assert type(error) is QueueFull
                assert error.fields == {"max_calls": "4", "calls": "3"}
                assert error.retry_after_s is not None
            other = asyncio.ensure_future(modest.dispatch(0, hidden_TD, ROUTING))
            await until(lambda: router.in_flight_rows("g0#1") == 2 * 5 * 2 + CALL_ROWS)
            stall.release()
            await asyncio.gather(*calls, other)


async def test_a_stalled_replica_holds_no_more_than_its_bytes(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    replica = await mesh.replica(path)
    router = await mesh.router(path)
    call_bytes = CALL_ROWS * 64 * 4
    replica.set_live({"max_queue_bytes": 10 * call_bytes})
    async with RouterCaller(router.target) as caller:
        hidden_TD = random_hidden(5)
        await caller.dispatch(0, hidden_TD, ROUTING)
        with stalled(replica) as stall:
            calls = [
                asyncio.ensure_future(caller.dispatch(0, hidden_TD, ROUTING)) for _ in range(40)
            ]
            await until(lambda: sum(call.done() for call in calls) == 30)
            assert replica._batcher.stats.queued_bytes == 10 * call_bytes
            assert router.in_flight_rows("g0#1") == 10 * CALL_ROWS
            stall.release()
            ended = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(own, torch.Tensor) for own in ended) == 10
        assert (replica.load().queued_rows, replica._batcher.stats.queued_bytes) == (0, 0)

"""A replica over real gRPC: its numbers, its stream, its health, its heartbeat."""

import asyncio
import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tests.mesh import MODEL, MakeCheckpoint, Mesh, stalled
from tests.packing import HIDDEN_SIZE, ExpertCaller, pack, random_hidden, random_request
from tests.reference_experts import expert_modules, load_model, reference
from tests.waiting import until

from expertmesh.experts.ffn import ExpertFFN
from expertmesh.runtime.errors import (
    InternalError,
)
from expertmesh.v1 import control_pb2, expert_pb2, tensor_pb2

READY = control_pb2.REPLICA_STATUS_READY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
async def test_unary_compute_has_the_bits_of_transformers(
    family: str, dtype: torch.dtype, mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint(family, dtype=dtype)
    replica = await mesh.replica(path)
    async with ExpertCaller(replica.address) as caller:
        for layer, module in expert_modules(load_model(path, dtype)).items():
            for num_tokens in (1, 2, 5, 37):
                hidden_TD = random_hidden(num_tokens, dtype=dtype)
                experts_T = torch.randint(8, (num_tokens,))
                packed = pack(hidden_TD, experts_T, layer=layer, model=MODEL, id=7)
                response = await caller.stub.Compute(packed.request)
                with torch.inference_mode():
                    expected_TD = reference(module, hidden_TD, experts_T)
                assert torch.equal(packed.unpack(response), expected_TD), (layer, num_tokens)
                assert response.id == 7
                assert response.load.done_rows > 0
                assert response.compute_us > 0


def openmp_threads() -> int:
    """Of this thread, without making torch set it."""
    path = next(word for word in Path("/proc/self/maps").read_text().split() if "libgomp" in word)
    return int(ctypes.CDLL(path).omp_get_max_threads())


@pytest.mark.skipif(sys.platform != "linux", reason="looks OpenMP up in /proc")
async def test_products_run_on_the_threads_of_the_replica(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    replica = await mesh.replica(checkpoint("mixtral"), threads=3)
    compute, seen = replica._batcher._compute, []

    def watched(rows: Any) -> torch.Tensor:
        seen.append(openmp_threads())
        return compute(rows)

    replica._batcher._compute = watched
    await replica.check_health()
    assert seen == [3]


async def test_many_interleaved_requests_are_answered_by_id(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    replica = await mesh.replica(checkpoint("mixtral"))
    asked = {
        index: random_request(index, 1 + index % 7, layer=index % 2, id=index)
        for index in range(1, 101)
    }
    async with ExpertCaller(replica.address) as caller:
        alone = {
            index: packed.unpack(await caller.stub.Compute(packed.request))
            for index, packed in asked.items()
        }
        with stalled(replica) as stall:
            for packed in asked.values():
                await caller.stream.write(packed.request)
            num_rows = sum(len(packed.order_R) for packed in asked.values())
            await until(lambda: replica.load().queued_rows == num_rows)
            stall.release()
            answers = [await caller.stream.read() for _ in asked]
    assert sorted(answer.id for answer in answers) == sorted(asked)
    assert stall.num_batches < len(asked) / 10, "rows of one layer share batches"
    for answer in answers:
        assert not answer.HasField("error")
        rows_TD = asked[answer.id].unpack(answer)
        torch.testing.assert_close(rows_TD, alone[answer.id], rtol=0, atol=1e-5)


async def test_describe_tells_what_the_heartbeat_tells(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    replica = await mesh.replica(checkpoint("mixtral"), "0-2,5")
    async with ExpertCaller(replica.address) as caller, mesh.view() as states:
        state: Any = await caller.stub.Describe(expert_pb2.DescribeRequest())
        await until(lambda: "g0#1" in states)
        for field in ("group", "replica", "address", "model", "holds", "dtype", "weight_bytes"):
            assert getattr(state, field) == getattr(states["g0#1"], field), field
        assert [list(held.experts) for held in state.holds] == [[0, 1, 2, 5]] * 2


async def test_the_heartbeat_says_what_it_holds_and_how_it_is(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    async with mesh.view() as states:
        replica = await mesh.replica(checkpoint("mixtral"), "0-3", lease_s=4)
        assert await until(lambda: "g0#1" in states) < 1
        state = states["g0#1"]
        assert (state.group, state.replica, state.model) == ("g0", "g0#1", MODEL)
        assert (state.address, state.status) == (replica.address, READY)
        assert (state.dtype, state.hidden_size) == (tensor_pb2.DTYPE_FLOAT32, HIDDEN_SIZE)
        assert state.weight_bytes == 2 * 4 * (3 * 64 * 96) * 4
        device, process = state.device, psutil.Process()
        assert (state.pid, device.kind, device.source) == (os.getpid(), "cpu", "process")
        assert abs(device.used_bytes - process.memory_info().rss) < 256 << 20
        assert 0 < device.free_bytes < device.total_bytes
        assert state.load.free_bytes == device.free_bytes
        assert state.lease_ms == 4000
        async with ExpertCaller(replica.address) as caller:
            done_rows = state.load.done_rows
            with stalled(replica):
                await caller.stream.write(random_request(0, 5, id=1).request)  # 5 rows of 8
                await caller.stream.write(pack(random_hidden(6), torch.arange(6) % 4, id=2).request)
                await until(lambda: states["g0#1"].load.queued_rows == 6)
            await until(lambda: states["g0#1"].load.queued_rows == 0)
            load = states["g0#1"].load
            assert load.done_rows == done_rows + 6
            assert load.row_time_us > 0
            assert load.queue_time_us >= 0


async def test_health_runs_a_real_row(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    replica = await mesh.replica(checkpoint("mixtral"))
    await replica.check_health()
    assert replica.load().done_rows == 0, "a health check says nothing about load"
    first = replica._loaded.layers[0]
    assert isinstance(first, ExpertFFN)
    first.stack.down_SDF.fill_(torch.nan)
    with pytest.raises(InternalError, match=r"an expert gave .* not finite"):
        await replica.check_health()


async def test_a_health_check_changes_nobodys_bits(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    replica = await mesh.replica(checkpoint("mixtral"))
    first_expert = pack(random_hidden(1), torch.zeros(1).long(), id=1)  # the one it tries
    async with ExpertCaller(replica.address) as caller:
        alone = (await caller.ask(first_expert.request)).rows
        with stalled(replica) as stall:
            await caller.stream.write(random_request(0, 5, layer=1, id=2).request)
            await until(lambda: stall.num_batches == 1)
            checks = [asyncio.create_task(replica.check_health())]
            await caller.stream.write(first_expert.request)
            await until(lambda: replica.load().queued_rows == 7)
            checks.append(asyncio.create_task(replica.check_health()))
            await until(lambda: replica.load().queued_rows == 8)
            stall.release()
            await asyncio.gather(*checks)
            answers = {answer.id: answer for answer in [await caller.stream.read() for _ in "12"]}
        assert answers[1].rows == alone
        assert stall.num_batches == 4


async def test_a_device_that_fails_is_not_healthy(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    replica = await mesh.replica(checkpoint("mixtral"))

    def fails(rows: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: device-side assert triggered")

    replica._batcher._compute = fails
    with pytest.raises(InternalError, match="the batch failed"):
        await replica.check_health()


async def test_an_overloaded_replica_is_healthy(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    replica = await mesh.replica(checkpoint("mixtral"))
    replica.set_live({"max_queue_rows": 4})
    async with ExpertCaller(replica.address) as caller:
        with stalled(replica):
            await caller.stream.write(random_request(0, 4, id=1).request)
            await until(lambda: replica.load().queued_rows == 4)
            await asyncio.wait_for(replica.check_health(), 1)


async def test_a_replica_with_a_long_queue_is_healthy(
    mesh: Mesh, checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve would replace it, and its queue with it, for a check that waits for its turn."""
    monkeypatch.setattr("expertmesh.experts.trials._PATIENCE_S", 0.01)
    replica = await mesh.replica(checkpoint("mixtral"))
    replica.set_live({"max_batch_rows": 1, "at_once_s": 0})
    compute = replica._batcher._compute

    def slowly(rows: Any) -> torch.Tensor:
        time.sleep(0.05)
        return compute(rows)

    async with ExpertCaller(replica.address) as caller:
        with stalled(replica) as stall:
            for number in range(100):
                await caller.stream.write(random_request(0, 1, id=number).request)
            await until(lambda: replica.load().queued_rows == 100)
            check = asyncio.create_task(replica.check_health())
            await until(lambda: replica.load().queued_rows == 101)
            replica._batcher._compute = slowly
            stall.release()
            await asyncio.wait_for(check, 30)
        assert replica.load().done_rows < 100, "it did not wait for its turn"


async def test_a_replica_that_computes_nothing_is_not_healthy(
    mesh: Mesh, checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve's own timeout ends the check."""
    monkeypatch.setattr("expertmesh.experts.trials._PATIENCE_S", 0.01)
    monkeypatch.setattr("expertmesh.experts.load_stats.OVERDUE_S", 0.0)
    replica = await mesh.replica(checkpoint("mixtral"))
    async with ExpertCaller(replica.address) as caller:
        with stalled(replica) as stall:
            await caller.stream.write(random_request(0, 1, id=1).request)
            await until(lambda: stall.num_batches == 1)
            await asyncio.sleep(0.1)  # many times what a row takes here
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(replica.check_health(), 0.5)


async def test_a_replica_within_one_long_batch_is_healthy(
    mesh: Mesh, checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of rows on a slow device take longer than three health checks."""
    monkeypatch.setattr("expertmesh.experts.trials._PATIENCE_S", 0.01)
    replica = await mesh.replica(checkpoint("mixtral"))
    async with ExpertCaller(replica.address) as caller:
        with stalled(replica) as stall:
            await caller.stream.write(random_request(0, 1, id=1).request)
            await until(lambda: stall.num_batches == 1)
            await asyncio.wait_for(replica.check_health(), 5)
            assert stall.num_batches == 1, "nothing was computed meanwhile"

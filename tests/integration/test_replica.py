"""A replica over real gRPC: its numbers, its stream, its health, its heartbeat, its departure."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.torch import load_file, save_file
from tests.fakes import FakeProbe
from tests.mesh import MODEL, MakeCheckpoint, Mesh, stalled
from tests.packing import ExpertCaller, Packed, pack
from tests.reference_experts import expert_modules, load_model, reference
from tests.waiting import until

from expertmesh.experts.replica import Replica
from expertmesh.runtime.errors import (
    ConfigError,
    Draining,
    ExpertMeshError,
    InsufficientMemory,
    InternalError,
    NotACheckpoint,
)
from expertmesh.runtime.redis_server import EmbeddedRedis
from expertmesh.runtime.state import MeshWatcher
from expertmesh.v1 import control_pb2, expert_pb2, tensor_pb2

HIDDEN_SIZE = 64
READY = control_pb2.REPLICA_STATUS_READY
DRAINING = control_pb2.REPLICA_STATUS_DRAINING


def random_rows(num_tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, HIDDEN_SIZE, generator=random).to(dtype)


def random_request(seed: int, num_tokens: int, layer: int = 0, **fields: Any) -> Packed:
    random = torch.Generator().manual_seed(seed)
    experts_T = torch.randint(8, (num_tokens,), generator=random)
    return pack(random_rows(num_tokens, seed), experts_T, layer=layer, **fields)


@asynccontextmanager
async def view_of(mesh: Mesh) -> AsyncIterator[dict[str, control_pb2.ReplicaState]]:
    """The newest state of every replica, as a router hears it."""
    states: dict[str, control_pb2.ReplicaState] = {}

    def on_state(state: control_pb2.ReplicaState) -> None:
        states[state.replica] = state

    async with MeshWatcher(mesh.redis_url, mesh.name, on_state, states.__delitem__) as watcher:
        await asyncio.wait_for(watcher.synced.wait(), 5)
        yield states


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
                hidden_TD = random_rows(num_tokens, dtype=dtype)
                experts_T = torch.randint(8, (num_tokens,))
                packed = pack(hidden_TD, experts_T, layer=layer, model=MODEL, id=7)
                response = await caller.stub.Compute(packed.request)
                with torch.inference_mode():
                    expected_TD = reference(module, hidden_TD, experts_T)
                assert torch.equal(packed.unpack(response), expected_TD), (layer, num_tokens)
                assert response.id == 7
                assert response.load.done_rows > 0
                assert response.compute_us > 0


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
    async with ExpertCaller(replica.address) as caller, view_of(mesh) as states:
        state: Any = await caller.stub.Describe(expert_pb2.DescribeRequest())
        await until(lambda: "g0#1" in states)
        for field in ("group", "replica", "address", "model", "holds", "dtype", "weight_bytes"):
            assert getattr(state, field) == getattr(states["g0#1"], field), field
        assert [list(held.experts) for held in state.holds] == [[0, 1, 2, 5]] * 2


async def test_the_heartbeat_says_what_it_holds_and_how_it_is(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    async with view_of(mesh) as states:
        replica = await mesh.replica(checkpoint("mixtral"), "0-3")
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
        assert state.lease_ms == 1000
        async with ExpertCaller(replica.address) as caller:
            done_rows = state.load.done_rows
            with stalled(replica):
                await caller.stream.write(random_request(0, 5, id=1).request)  # 5 rows of 8
                await caller.stream.write(pack(random_rows(6), torch.arange(6) % 4, id=2).request)
                await until(lambda: states["g0#1"].load.queued_rows == 6)
            await until(lambda: states["g0#1"].load.queued_rows == 0)
            load = states["g0#1"].load
            assert load.done_rows == done_rows + 6
            assert load.row_time_us > 0
            assert load.queue_time_us >= 0


async def test_a_replica_appears_and_vanishes_within_a_second(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    async with view_of(mesh) as states:
        replica = await mesh.replica(checkpoint("mixtral"))
        assert await until(lambda: "g0#1" in states) < 1
        async with ExpertCaller(replica.address) as caller:  # its open stream must not delay that
            await caller.ask(random_request(0, 3, id=1).request)
            leaving = asyncio.create_task(replica.drain_and_stop())
            assert await until(lambda: "g0#1" not in states) < 1
        await asyncio.wait_for(leaving, 5)


async def test_health_runs_a_real_row(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    replica = await mesh.replica(checkpoint("mixtral"))
    before = replica.load().done_rows
    await replica.check_health()
    assert replica.load().done_rows == before + 1
    first = replica._loaded.layers[0]
    first._down_SDF.fill_(torch.nan)
    with pytest.raises(InternalError, match=r"expert 0 gave .* not finite"):
        await replica.check_health()


async def test_a_health_check_changes_nobodys_bits(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    replica = await mesh.replica(checkpoint("mixtral"))
    first_expert = pack(random_rows(1), torch.zeros(1).long(), id=1)  # the one it tries
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
    replica.set_limits({"max_queue_rows": 4})
    async with ExpertCaller(replica.address) as caller:
        with stalled(replica):
            await caller.stream.write(random_request(0, 4, id=1).request)
            await until(lambda: replica.load().queued_rows == 4)
            await asyncio.wait_for(replica.check_health(), 1)


async def test_draining_answers_everything_admitted_and_refuses_the_rest(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    replica = await mesh.replica(checkpoint("mixtral"))
    replica.set_limits({"max_batch_rows": 8})
    asked = {index: random_request(index, 5, id=index) for index in range(1, 11)}
    async with (
        view_of(mesh) as states,
        ExpertCaller(replica.address) as caller,
        ExpertCaller(replica.address) as late,
    ):
        await late.ask(asked[1].request)
        with stalled(replica) as stall:
            for packed in asked.values():
                await caller.stream.write(packed.request)
            unary = asyncio.ensure_future(caller.stub.Compute(asked[1].request))
            await until(lambda: replica.load().queued_rows == 55)
            leaving = asyncio.create_task(replica.drain_and_stop())
            await until(lambda: states["g0#1"].status == DRAINING)
            await until(lambda: replica._batcher._draining)
            assert isinstance(await late.refused(asked[2].request), Draining)
            assert isinstance(await late.refused_unary(asked[2].request), Draining)
            assert await serving_status(replica) == health_pb2.HealthCheckResponse.NOT_SERVING
            assert not leaving.done()
            assert stall.num_batches == 1
            stall.release()
            answers = [await caller.stream.read() for _ in asked]
            assert {answer.id for answer in answers} == asked.keys()
            assert all(len(answer.rows) == 5 * HIDDEN_SIZE * 4 for answer in answers)
            assert len((await unary).rows) == 5 * HIDDEN_SIZE * 4
        await until(lambda: "g0#1" not in states)
    await asyncio.wait_for(leaving, 5)


async def serving_status(replica: Replica) -> int:
    async with grpc.aio.insecure_channel(replica.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        return int((await check).status)


async def test_stopping_twice_is_stopping_once(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    replica = await mesh.replica(checkpoint("mixtral"))
    await asyncio.gather(replica.drain_and_stop(), replica.drain_and_stop())
    await replica.drain_and_stop()


async def test_a_replica_that_cannot_start_leaves_nothing_over(
    mesh: Mesh, checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint("mixtral")
    running = await mesh.replica(path)
    port = int(running.address.rpartition(":")[2])
    async with view_of(mesh) as states:
        failures: dict[type[ExpertMeshError], dict[str, Any]] = {
            NotACheckpoint: {"path": tmp_path},
            ConfigError: {"path": path, "experts": "6-9"},
        }
        for error, args in failures.items():
            with pytest.raises(error):
                await mesh.replica(**args, name="g1#1")
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            await mesh.replica(path, name="g1#1", port=port)
        with monkeypatch.context() as patched:
            tight = FakeProbe(free_bytes=1 << 20)
            patched.setattr("expertmesh.experts.loading.probe_for", lambda kind: tight)
            with pytest.raises(InsufficientMemory, match=r"g1: .*1\.12 MiB.*1\.00 MiB"):
                await mesh.replica(path, name="g1#1")
        with pytest.raises(InternalError, match="not finite"):
            await mesh.replica(sick_checkpoint(path, tmp_path), name="g1#1")
        await until(lambda: "g0#1" in states)
        assert states.keys() == {"g0#1"}
        names = [task.get_name() for task in asyncio.all_tasks()]
        assert names.count("micro-batcher") == names.count("replica-heartbeat") == 1


def sick_checkpoint(path: Path, directory: Path) -> Path:
    """The checkpoint with NaN for weights."""
    (directory / "config.json").write_bytes((path / "config.json").read_bytes())
    file = "model.safetensors"
    sick = {name: torch.full_like(t, torch.nan) for name, t in load_file(path / file).items()}
    save_file(sick, directory / file, metadata={"format": "pt"})
    return directory


async def test_a_replica_computes_without_redis(checkpoint: MakeCheckpoint, mesh: Mesh) -> None:
    async with EmbeddedRedis() as gone:
        url = gone.url
    replica = await mesh.replica(checkpoint("mixtral"), redis_url=url)
    async with ExpertCaller(replica.address) as caller:
        assert (await caller.ask(random_request(0, 3, id=1).request)).rows

"""The life of a replica: it appears, it drains and leaves, or it cannot start."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.torch import load_file, save_file
from tests.fakes import FakeProbe
from tests.mesh import MakeCheckpoint, Mesh, stalled
from tests.packing import HIDDEN_SIZE, ExpertCaller, random_request
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
from expertmesh.v1 import control_pb2

DRAINING = control_pb2.REPLICA_STATUS_DRAINING


async def test_a_replica_appears_and_vanishes_within_a_second(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    async with mesh.view() as states:
        replica = await mesh.replica(checkpoint("mixtral"))
        assert await until(lambda: "g0#1" in states) < 1
        async with ExpertCaller(replica.address) as caller:  # its open stream must not delay that
            await caller.ask(random_request(0, 3, id=1).request)
            leaving = asyncio.create_task(replica.drain_and_stop())
            assert await until(lambda: "g0#1" not in states) < 1
        await asyncio.wait_for(leaving, 5)


async def test_draining_answers_everything_admitted_and_refuses_the_rest(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    replica = await mesh.replica(checkpoint("mixtral"))
    replica.set_live({"max_batch_rows": 8})
    asked = {index: random_request(index, 5, id=index) for index in range(1, 11)}
    async with (
        mesh.view() as states,
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
    async with mesh.view() as states:
        failures: dict[type[ExpertMeshError], dict[str, Any]] = {
            NotACheckpoint: {"path": tmp_path},
            ConfigError: {"path": path, "experts": "6-9"},
        }
        for error, args in failures.items():
            with pytest.raises(error):
                await mesh.replica(**args, name="g1#1")
        with pytest.raises(ConfigError, match=f"experts.ports: .* got {port} on 127.0.0.1"):
            await mesh.replica(path, name="g1#1", ports=str(port))
        with monkeypatch.context() as patched:
            tight = FakeProbe(free_bytes=1 << 16)  # less than one expert
            patched.setattr("expertmesh.experts.loading.probe_for", lambda kind: tight)
            with pytest.raises(InsufficientMemory, match=r"g1: .* 72\.00 KiB, .*57\.60 KiB"):
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

"""A replica whose device holds a part of its experts answers as one that holds them all."""

import asyncio
import os
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fakes import FakeProbe
from tests.mesh import MakeCheckpoint, Mesh
from tests.packing import ExpertCaller, pack, random_hidden, random_request
from tests.waiting import until

from expertmesh.experts.arena import slot_plans
from expertmesh.experts.reader import ExpertReader
from expertmesh.experts.replica import Replica
from expertmesh.experts.residency import ExpertKey
from expertmesh.runtime.checkpoint import Checkpoint
from expertmesh.runtime.errors import ConfigError, WeightsUnavailable
from expertmesh.v1 import control_pb2, expert_pb2

FAMILIES = ["mixtral", "gpt_oss", "dbrx", "qwen3_moe", "deepseek_v3"]
DTYPES = [torch.float32, torch.bfloat16]


def expert_bytes(path: Path, dtype: torch.dtype = torch.float32) -> int:
    """Of one expert on the device."""
    reader = ExpertReader(Checkpoint.open(path))
    held = {layer: tuple(range(reader.num_experts(layer))) for layer in reader.layers()}
    return max(plan.num_bytes for plan in slot_plans(reader, held, dtype).values())


def residency_of(replica: Replica) -> control_pb2.Residency:
    """As the next heartbeat tells it."""
    assert replica.state().HasField("residency")
    return replica.state().residency


async def answers(
    replica: Replica, requests: list[expert_pb2.ComputeRequest]
) -> dict[int, expert_pb2.ComputeResponse]:
    """By id, of requests sent all at once."""
    async with ExpertCaller(replica.address) as caller:
        for request in requests:
            await caller.stream.write(request)
        got = [await caller.stream.read() for _ in requests]
    return {answer.id: answer for answer in got}


def random_requests(
    layers: list[int], dtype: torch.dtype, number: int
) -> list[expert_pb2.ComputeRequest]:
    """Of 1 to 9 rows, for one layer after the other, with ids from 1."""
    return [
        random_request(at, 1 + at % 9, layers[at % len(layers)], dtype, id=at).request
        for at in range(1, number + 1)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
async def test_the_bits_are_those_of_a_replica_that_holds_everything(
    family: str, dtype: torch.dtype, mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint(family, dtype=dtype)
    layers = ExpertReader(Checkpoint.open(path)).layers()
    whole = await mesh.replica(path, deterministic=True)
    for name, num_slots in {"g0#2": 1, "g0#3": 3, "g0#4": 4 * len(layers)}.items():
        budget_bytes = num_slots * expert_bytes(path, dtype)
        part = await mesh.replica(
            path, name=name, deterministic=True, device_memory_bytes=budget_bytes
        )
        requests = random_requests(layers, dtype, 40)
        expected, got = await asyncio.gather(answers(whole, requests), answers(part, requests))
        for index, answer in expected.items():
            assert not got[index].HasField("error"), got[index].error
            assert got[index].rows == answer.rows, (num_slots, index)
        residency = residency_of(part)
        assert residency.budget_bytes == budget_bytes
        assert 0 < residency.resident_bytes <= budget_bytes
        assert residency.misses > 0
        assert residency.load_time_us > 0
        if num_slots > 3:
            assert residency.hits > 0


@pytest.mark.parametrize("options", [{"fused": True}, {"fused": True, "dtype": torch.bfloat16}])
async def test_from_host_memory_the_bits_are_the_same(
    options: dict[str, Any], mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral", **options)
    dtype = options.get("dtype", torch.float32)
    each_bytes = expert_bytes(path, dtype)
    whole = await mesh.replica(path, deterministic=True)
    part = await mesh.replica(
        path,
        name="g0#2",
        deterministic=True,
        device_memory_bytes=2 * each_bytes,
        host_memory_bytes=6 * each_bytes,
    )
    requests = random_requests([0, 1], dtype, 60)
    expected, got = await asyncio.gather(answers(whole, requests), answers(part, requests))
    assert {index: answer.rows for index, answer in expected.items()} == {
        index: answer.rows for index, answer in got.items()
    }


async def test_callers_at_once_get_the_bits_they_get_alone(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("gpt_oss")
    whole = await mesh.replica(path, deterministic=True)
    part = await mesh.replica(
        path, name="g0#2", deterministic=True, device_memory_bytes=5 * expert_bytes(path)
    )
    requests = random_requests([0, 1], torch.float32, 120)
    expected = await answers(whole, requests)
    shares = await asyncio.gather(*(answers(part, requests[at::6]) for at in range(6)))
    got = {index: answer.rows for share in shares for index, answer in share.items()}
    assert got == {index: answer.rows for index, answer in expected.items()}


async def test_what_the_next_layer_needs_is_there_before_it_asks(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    """Two texts take turns, each with its own experts in both layers; five of eight fit."""
    path = checkpoint("mixtral")
    replica = await mesh.replica(path, device_memory_bytes=5 * expert_bytes(path))
    loader = replica._loaded.loader
    assert loader
    calls = [(0, [0, 1]), (1, [4, 5]), (0, [2, 3]), (1, [6, 7])]
    async with ExpertCaller(replica.address) as caller:
        for step in range(80):
            layer, experts = calls[step % 4]
            if step == 20:  # it has seen what follows what
                before = residency_of(replica)
            if step >= 20:
                keys = [ExpertKey(layer, expert) for expert in experts]
                await until(partial(loader.are_resident, keys))
            packed = pack(random_hidden(2), torch.tensor(experts), layer=layer, id=step + 1)
            await caller.ask(packed.request)
    after = residency_of(replica)
    assert (after.misses - before.misses, after.hits - before.hits) == (0, 120)
    assert loader.counts.prefetches >= 60 * 3 / 4


async def test_a_checkpoint_cut_off_is_told_and_survived(
    mesh: Mesh, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    path = shutil.copytree(checkpoint("mixtral"), tmp_path / "own")
    file = path / "model.safetensors"
    whole = file.read_bytes()
    replica = await mesh.replica(path, device_memory_bytes=2 * expert_bytes(path))
    request = pack(random_hidden(8), torch.arange(8), layer=1, id=1).request
    async with ExpertCaller(replica.address) as caller:
        before = await caller.ask(request)
        os.truncate(file, 4096)
        error = await caller.refused(request)
        assert isinstance(error, WeightsUnavailable)
        assert error.fields["layer"] == "1"
        assert "model.safetensors" in error.message
        await replica.check_health()
        with file.open("r+b") as stream:
            stream.write(whole)
        after = await caller.ask(request)
    assert after.rows == before.rows


async def test_another_copy_answers_when_weights_cannot_be_loaded(
    mesh: Mesh, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    path = shutil.copytree(checkpoint("mixtral"), tmp_path / "own")
    await mesh.replica(path, device_memory_bytes=2 * expert_bytes(path))
    router = await mesh.router(path)
    os.truncate(path / "model.safetensors", 4096)
    call = random_hidden(8), torch.arange(8).view(8, 1), torch.ones(8, 1)
    with pytest.raises(WeightsUnavailable, match="layer 1"):
        await router.core.dispatch(1, *call, "slot_sum")
    await mesh.replica(checkpoint("mixtral"), name="g0#2")
    await until(lambda: len(router.core.snapshot.replicas) == 2)
    for _ in range(5):
        assert (await router.core.dispatch(1, *call, "slot_sum")).shape == (8, 64)


async def test_metrics_count_hits_and_misses(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("mixtral")
    budget_bytes = 3 * expert_bytes(path)
    replica = await mesh.replica(path, device_memory_bytes=budget_bytes, prefetch=False)
    await answers(replica, random_requests([0, 1], torch.float32, 20))
    residency, metrics = residency_of(replica), replica._telemetry.metrics
    assert metrics.residency_hits.get("g0") == residency.hits
    assert metrics.residency_misses.get("g0") == residency.misses > 0
    assert metrics.residency_loads.get("g0") > 3
    assert metrics.residency_evictions.get("g0") == metrics.residency_loads.get("g0") - 3
    assert metrics.resident_bytes.get("g0") == residency.resident_bytes == budget_bytes


async def test_what_does_not_fit_the_free_memory_is_swapped(
    mesh: Mesh, checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint("mixtral")
    free_bytes = 8 * expert_bytes(path)
    with monkeypatch.context() as patched:
        tight = FakeProbe(free_bytes=free_bytes)
        patched.setattr("expertmesh.experts.loading.probe_for", lambda kind: tight)
        replica = await mesh.replica(path)
    assert residency_of(replica).budget_bytes == int(free_bytes * 0.9)
    got = await answers(replica, random_requests([0, 1], torch.float32, 20))
    assert not any(answer.HasField("error") for answer in got.values())


async def test_a_health_check_moves_no_weights(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("mixtral")
    budget_bytes = 2 * expert_bytes(path)
    replica = await mesh.replica(path, device_memory_bytes=budget_bytes, prefetch=False)
    loader = replica._loaded.loader
    assert loader
    await answers(replica, [pack(random_hidden(2), torch.tensor([5, 7]), layer=1, id=1).request])
    loads = loader.counts.loads
    for _ in range(3):
        await replica.check_health()
    assert loader.counts.loads == loads
    assert replica._loaded.experts_to_try(1)[0] == 1
    assert replica._loaded.experts_to_try(9) == (1, (5, 7))


async def test_a_stopped_replica_leaves_no_thread(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("mixtral")
    slow: dict[str, Any] = {
        "device_memory_bytes": 2 * expert_bytes(path),
        "simulated_load_bytes_per_s": 1e6,
    }
    replica = await mesh.replica(path, **slow)
    async with ExpertCaller(replica.address) as caller:
        await caller.ask(random_request(1, 1, id=1).request)
        assert "expertmesh-loader" in [thread.name for thread in threading.enumerate()]
        await mesh.stop_replicas()
    assert "expertmesh-loader" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("name", ["device_memory_bytes", "host_memory_bytes"])
async def test_a_budget_below_one_expert_is_refused(
    name: str, mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    least_bytes = expert_bytes(path)
    budgets: dict[str, Any] = {"device_memory_bytes": least_bytes, name: least_bytes - 1}
    with pytest.raises(ConfigError) as caught:
        await mesh.replica(path, **budgets)
    assert caught.value.fields["field"] == f"experts.{name}"
    assert str(least_bytes) in caught.value.fields["expected"]
    assert caught.value.fields["got"] == str(least_bytes - 1)


async def test_the_heartbeat_tells_what_is_resident(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("mixtral")
    async with mesh.view() as states:
        await mesh.replica(path, device_memory_bytes=4 * expert_bytes(path))
        await mesh.replica(path, name="g0#2")
        await until(lambda: states.keys() == {"g0#1", "g0#2"})
        assert not states["g0#2"].HasField("residency"), "it holds everything"
        async with ExpertCaller(states["g0#1"].address) as caller:
            packed = random_request(0, 3, layer=1, id=1)
            await caller.ask(packed.request)
        wanted = set(packed.request.experts)

        def resident() -> set[int]:
            held = states["g0#1"].residency.resident
            return {expert for own in held if own.layer == 1 for expert in own.experts}

        await until(lambda: wanted <= resident())
        assert not states["g0#1"].residency.in_use


async def test_the_budget_changes_while_it_serves(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("mixtral")
    each_bytes = expert_bytes(path)
    requests = random_requests([0, 1], torch.float32, 20)
    whole = await mesh.replica(path, name="g0#whole", deterministic=True)
    expected = await answers(whole, requests)
    replica = await mesh.replica(path, device_memory_bytes=4 * each_bytes, deterministic=True)
    for num in (1, 8, 2):
        replica.set_live({"device_memory_bytes": num * each_bytes})
        got = await answers(replica, requests)
        assert all(own.rows == expected[id].rows for id, own in got.items())
        residency = residency_of(replica)
        assert residency.budget_bytes == num * each_bytes
        assert residency.resident_bytes <= num * each_bytes
    replica.set_live({})
    assert residency_of(replica).budget_bytes == 4 * each_bytes
    with pytest.raises(ConfigError, match="expected at least"):
        replica.set_live({"device_memory_bytes": each_bytes - 1, "max_batch_rows": 5})
    assert replica.state().max_batch_rows != 5, "everything stays as it was"
    with pytest.raises(ConfigError, match="was started to hold all its experts"):
        whole.set_live({"device_memory_bytes": each_bytes})

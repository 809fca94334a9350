"""RouterService over real replicas: the numbers of transformers, for project and stock clients.

T tokens, D hidden size, K experts per token.
"""

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from tests.mesh import MODEL, MakeCheckpoint, Mesh, stalled
from tests.packing import HIDDEN_SIZE, random_hidden
from tests.reference_experts import load_model
from tests.router_caller import Reference, Routed, RouterCaller, random_routing
from tests.waiting import until

from expertmesh.v1 import control_pb2, router_pb2, tensor_pb2

NUM_TOKENS = (1, 2, 3, 5, 33)
TOLERANCE = 1e-5
"""Rows of several callers in one fp32 product: other kernels, other last bits."""
MANY = {"num_experts": 20, "num_experts_per_tok": 16}
FORWARD: dict[str, tuple[str, int, dict[str, Any]]] = {
    "mixtral": ("mixtral", 4, {}),
    "deepseek_v3": ("deepseek_v3", 4, {}),
    "gpt_oss": ("gpt_oss", 3, {}),
    "dbrx": ("dbrx", 2, {}),
    "llama4": ("llama4", 4, {}),
    "qwen3_moe K=16": ("qwen3_moe", 4, MANY),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORWARD)
async def test_forward_and_dispatch_have_the_bits_of_transformers(
    name: str, dtype: torch.dtype, mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    family, groups, options = FORWARD[name]
    path = checkpoint(family, dtype=dtype, **options)
    await mesh.replicas(path, groups, num_experts=options.get("num_experts", 8))
    router = await mesh.router(path)
    reference = Reference(load_model(path, dtype))
    assert router.model.num_experts.keys() == reference.modules.keys()
    async with RouterCaller(router.target) as caller:
        for layer in reference.modules:
            for num_tokens in NUM_TOKENS:
                hidden_TD = random_hidden(num_tokens, dtype=dtype)
                expected = reference.routed(layer, hidden_TD)
                got = await caller.forward(layer, hidden_TD)
                assert torch.equal(got.hidden_TD, expected.hidden_TD), (layer, num_tokens)
                if family == "llama4":
                    continue  # its caller would have to scale the rows
                assert torch.equal(got.experts_TK, expected.experts_TK)
                assert torch.equal(got.weights_TK, expected.weights_TK)
                out_TD = await caller.dispatch(layer, hidden_TD, expected)
                assert torch.equal(out_TD, expected.hidden_TD), (layer, num_tokens)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
async def test_every_number_of_experts_per_token(
    dtype: torch.dtype, weights_dtype: torch.dtype, mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("qwen3_moe", dtype=dtype, **MANY)
    await mesh.replicas(path, 4, num_experts=20)
    router = await mesh.router(path)
    reference = Reference(load_model(path, dtype))
    async with RouterCaller(router.target) as caller:
        for top_k in range(1, 17):
            hidden_TD = random_hidden(7, seed=top_k, dtype=dtype)
            routing = random_routing(7, top_k, 20, seed=top_k, dtype=weights_dtype)
            expected_TD = reference.combined(1, hidden_TD, routing)
            out_TD = await caller.dispatch(1, hidden_TD, routing)
            assert torch.equal(out_TD, expected_TD), top_k
            small = Routed(routing.experts_TK.int(), routing.weights_TK)
            assert torch.equal(await caller.dispatch(1, hidden_TD, small), expected_TD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
async def test_the_eager_order_on_request(
    dtype: torch.dtype, mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("qwen3_moe", dtype=dtype, num_experts_per_tok=6)
    await mesh.replicas(path, 2)
    router = await mesh.router(path)
    reference = Reference(load_model(path, dtype, experts_implementation="eager"))
    async with RouterCaller(router.target) as caller:
        for num_tokens in NUM_TOKENS:
            hidden_TD = random_hidden(num_tokens, dtype=dtype)
            routing = random_routing(num_tokens, 6, dtype=dtype)
            out_TD = await caller.dispatch(0, hidden_TD, routing, router_pb2.COMBINE_EAGER)
            assert torch.equal(out_TD, reference.combined(0, hidden_TD, routing)), num_tokens


async def test_a_token_may_name_an_expert_twice(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("mixtral")
    await mesh.replicas(path, 2)
    router = await mesh.router(path)
    reference = Reference(load_model(path, torch.float32))
    routing = Routed(torch.tensor([[3, 3], [0, 3], [5, 5]]), torch.rand(3, 2))
    async with RouterCaller(router.target) as caller:
        out_TD = await caller.dispatch(0, random_hidden(3), routing)
    assert torch.equal(out_TD, reference.combined(0, random_hidden(3), routing))


async def test_copies_share_the_work_and_change_nothing(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    # deterministic: callers at the same time may meet in a batch, which changes bits otherwise
    replicas = await mesh.replicas(path, 2, copies=2, deterministic=True)
    router = await mesh.router(path)
    await until(lambda: len(router.core.snapshot.replicas) == 4)
    reference = Reference(load_model(path, torch.float32))
    async with RouterCaller(router.target) as caller:
        for seed in range(300):
            hidden_TD = random_hidden(5, seed)
            expected = reference.routed(0, hidden_TD)
            # three at once: alone, all calls may go to the copies that seem the faster ones
            for done in await asyncio.gather(*(caller.forward(0, hidden_TD) for _ in range(3))):
                assert torch.equal(done.hidden_TD, expected.hidden_TD)
            if all(replica.load().done_rows > 10 for replica in replicas.values()):
                return
    raise AssertionError("some copy got no work")


def stock_client(target: str, method: str, hidden: Any, **fields: Any) -> Any:
    """A call of someone who has grpcio, protobuf and numpy, and no file of this project."""
    with grpc.insecure_channel(target) as channel:
        pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        service = pool.FindServiceByName("expertmesh.v1.RouterService")
        described = service.FindMethodByName(method)
        request_class = message_factory.GetMessageClass(described.input_type)
        float32 = pool.FindEnumTypeByName("expertmesh.v1.DType").values_by_name["DTYPE_FLOAT32"]
        request: Any = request_class(layer=1, **fields)
        request.hidden.dtype = float32.number
        request.hidden.shape.extend(hidden.shape)
        request.hidden.data = hidden.tobytes()
        call = channel.unary_unary(
            f"/{service.full_name}/{method}",
            request_serializer=request_class.SerializeToString,
            response_deserializer=message_factory.GetMessageClass(described.output_type).FromString,
        )
        return call(request, timeout=10)


async def test_a_stock_client_needs_reflection_only(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("mixtral")
    await mesh.replicas(path, 3)
    router = await mesh.router(path)
    hidden_TD = random_hidden(5)
    expected = Reference(load_model(path, torch.float32)).routed(1, hidden_TD)
    forwarded = await asyncio.to_thread(
        stock_client, router.target, "Forward", hidden_TD.numpy(), return_routing=True
    )
    experts = {"dtype": 5, "shape": [5, 2], "data": forwarded.experts.data}
    weights = {"dtype": 1, "shape": [5, 2], "data": forwarded.weights.data}
    dispatched = await asyncio.to_thread(
        stock_client,
        router.target,
        "Dispatch",
        hidden_TD.numpy(),
        experts=experts,
        weights=weights,
    )
    for response in (forwarded, dispatched):
        out_TD = np.frombuffer(response.hidden.data, np.float32).reshape(response.hidden.shape)
        assert np.array_equal(out_TD, expected.hidden_TD.numpy())


async def test_models_usage_and_snapshot_are_told(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("deepseek_v3")
    replicas = await mesh.replicas(path, 2)
    router = await mesh.router(path)
    hidden_TD = random_hidden(5)
    async with RouterCaller(router.target) as caller:
        [model] = (await caller.router.ListModels(router_pb2.ListModelsRequest())).models
        assert (model.name, model.model_type) == (MODEL, "deepseek_v3")
        assert (list(model.layers), model.num_experts, model.top_k) == ([1, 2], 8, 3)
        assert (model.hidden_size, model.dtype) == (HIDDEN_SIZE, tensor_pb2.DTYPE_FLOAT32)
        assert model.forward_unavailable == ""
        routing = await caller.forward(2, hidden_TD)
        usage = await caller.control.GetExpertUsage(control_pb2.GetExpertUsageRequest())
        rows = {layer.layer: list(layer.rows) for layer in usage.layers}
        counts = torch.bincount(routing.experts_TK.flatten(), minlength=8).tolist()
        assert rows == {1: [0] * 8, 2: counts}
        snapshot = await caller.snapshot()
    assert (snapshot.mesh, snapshot.redis_connected) == (mesh.name, True)
    assert snapshot.redis_age_ms < 1000
    views = {view.state.replica: view for view in snapshot.replicas}
    assert views.keys() == replicas.keys()
    for name, view in views.items():
        assert view.state.address == replicas[name].address
        assert (view.set_aside, view.in_flight_rows) == ("", 0)
        assert view.age_ms < 1000
        assert view.state.load.done_rows == replicas[name].load().done_rows


@pytest.mark.parametrize("deterministic", [False, True])
async def test_eight_concurrent_callers(
    deterministic: bool, mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    replica = await mesh.replica(path, deterministic=deterministic)
    router = await mesh.router(path)
    async with RouterCaller(router.target) as caller:

        async def call(seed: int) -> torch.Tensor:
            return (await caller.forward(0, random_hidden(1 + seed % 4, seed))).hidden_TD

        alone = [await call(seed) for seed in range(8)]
        with stalled(replica) as stall:
            together = asyncio.gather(*(call(seed) for seed in range(8)))
            await until(lambda: replica.load().queued_rows == 2 * 20)
            stall.release()
            for alone_TD, together_TD in zip(alone, await together, strict=True):
                if deterministic:
                    assert torch.equal(together_TD, alone_TD)
                torch.testing.assert_close(together_TD, alone_TD, rtol=0, atol=TOLERANCE)
        if not deterministic:
            assert stall.num_batches < 8, "callers share batches"

"""The public client against a running router: a user's own transformers model, and typed errors."""

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from tests.mesh import MODEL, MakeCheckpoint, Mesh, stalled
from tests.packing import HIDDEN_SIZE, random_hidden
from tests.reference_experts import load_model
from tests.router_caller import Reference, random_routing

import expertmesh.client
from expertmesh.client import RouterClient
from expertmesh.runtime.errors import (
    DeadlineExceeded,
    ExpertMeshError,
    ExpertUnavailable,
    InvalidInput,
    Unavailable,
    UnknownExpert,
    UnknownModel,
)

T = TypeVar("T")
DTYPES = [torch.float32, torch.bfloat16]


async def blocking(work: Callable[[], T]) -> T:
    """Run a user's blocking code beside the mesh, with the threads a user's main thread would have:
    OpenMP's number of them belongs to the thread."""

    def run() -> T:
        torch.set_num_threads(1)
        return work()

    return await asyncio.wait_for(asyncio.to_thread(run), 60)


def prompts() -> dict[str, torch.Tensor]:
    """Three left-padded prompts."""
    ids_BS = torch.randint(3, 250, (3, 17), generator=torch.Generator().manual_seed(1))
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, :5] = 0
    mask_BS[1, :2] = 0
    return {"input_ids": ids_BS, "attention_mask": mask_BS}


def answers_of(model: Any) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits, and 16 greedy tokens."""
    with torch.no_grad():
        logits_BSV: torch.Tensor = model(**prompts()).logits
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return logits_BSV, model.generate(**prompts(), **options)[:, 17:].tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
async def test_an_attached_model_answers_as_the_plain_one(
    family: str, dtype: torch.dtype, mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint(family, dtype=dtype)
    replicas = await mesh.replicas(path, 4)
    router = await mesh.router(path)
    expected = await blocking(lambda: answers_of(load_model(path, dtype)))
    model = load_model(path, dtype)
    num_parameters = sum(tensor.numel() for tensor in model.parameters())
    attached = expertmesh.client.attach(model, router.target)
    assert attached is model
    assert sum(tensor.numel() for tensor in model.parameters()) < num_parameters / 2
    logits, tokens = await blocking(lambda: answers_of(attached))
    assert torch.equal(logits, expected[0])
    assert tokens == expected[1]
    assert all(replica.load().done_rows > 100 for replica in replicas.values())


async def test_a_model_loaded_with_the_registered_experts(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("qwen3_moe")
    replicas = await mesh.replicas(path, 2)
    router = await mesh.router(path)
    expected = await blocking(lambda: answers_of(load_model(path, torch.float32)))
    expertmesh.client.register(router.target)
    model = load_model(path, torch.float32, experts_implementation="expertmesh")
    logits, tokens = await blocking(lambda: answers_of(model))
    assert torch.equal(logits, expected[0])
    assert tokens == expected[1]
    assert all(replica.load().done_rows > 100 for replica in replicas.values())


async def test_the_router_client_alone(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("mixtral")
    await mesh.replicas(path, 2)
    router = await mesh.router(path)
    hidden_TD = random_hidden(5)
    expected = Reference(load_model(path, torch.float32)).routed(1, hidden_TD)
    with RouterClient(router.target, MODEL) as client:
        [model] = await blocking(client.models)
        assert (model.name, model.hidden_size) == (MODEL, HIDDEN_SIZE)
        forwarded = await blocking(lambda: client.forward(1, hidden_TD))
        assert torch.equal(forwarded.hidden_TD, expected.hidden_TD)
        assert torch.equal(forwarded.experts_TK, expected.experts_TK)
        assert torch.equal(forwarded.weights_TK, expected.weights_TK)
        out_TD = await blocking(
            lambda: client.dispatch(1, hidden_TD, expected.experts_TK, expected.weights_TK)
        )
        assert torch.equal(out_TD, expected.hidden_TD)
        out_TD.add_(1.0)  # its own memory, as a model needs it


async def failure(call: Callable[[], object]) -> ExpertMeshError:
    with pytest.raises(ExpertMeshError) as caught:
        await blocking(call)
    assert caught.value.__cause__ is None, "the user sees our error, not gRPC's"
    return caught.value


async def test_errors_come_back_as_what_they_were(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("mixtral")
    replicas = await mesh.replicas(path, 2)
    router = await mesh.router(path)
    hidden_TD, routing = random_hidden(3), random_routing(3, 4)

    def dispatch(client: RouterClient, layer: int = 0, to: Any = torch.float32) -> torch.Tensor:
        return client.dispatch(layer, hidden_TD.to(to), routing.experts_TK, routing.weights_TK)

    with (
        RouterClient(router.target) as client,
        RouterClient(router.target, "other") as other,
        RouterClient(router.target, timeout_s=0.1) as hasty,
    ):
        expected_TD = await blocking(lambda: dispatch(client))
        assert type(await failure(lambda: dispatch(other))) is UnknownModel
        assert type(await failure(lambda: other.forward(0, hidden_TD))) is UnknownModel
        error = await failure(lambda: dispatch(client, layer=7))
        assert type(error) is UnknownExpert
        assert error.fields == {"layer": "7"}
        error = await failure(lambda: dispatch(client, to=torch.bfloat16))
        assert type(error) is InvalidInput
        assert error.fields["field"] == "hidden.dtype"
        assert type(await failure(lambda: dispatch(client, to=torch.float64))) is InvalidInput
        with stalled(replicas["g0#1"]):
            assert type(await failure(lambda: dispatch(hasty))) is DeadlineExceeded
        assert torch.equal(await blocking(lambda: dispatch(client)), expected_TD)
        await mesh.kill(replicas["g1#1"])
        error = await failure(lambda: dispatch(client))
        assert type(error) is ExpertUnavailable
        assert error.fields.keys() >= {"model", "layer", "expert", "cause"}


async def test_a_failed_forward_leaves_the_model_usable(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    replicas = await mesh.replicas(path, 2)
    router = await mesh.router(path)
    model = expertmesh.client.attach(load_model(path, torch.float32), router.target)
    expected = await blocking(lambda: answers_of(model))
    await mesh.kill(replicas["g0#1"])
    assert type(await failure(lambda: answers_of(model))) is ExpertUnavailable
    await mesh.replica(path, "0-3", "g0#2")
    await router.core.wait_complete(5)
    logits, tokens = await blocking(lambda: answers_of(model))
    assert torch.equal(logits, expected[0])
    assert tokens == expected[1]


async def test_a_client_says_what_to_do_without_experts_and_hears_what_it_cost(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral", num_experts_per_tok=4)
    replicas = await mesh.replicas(path, 4)
    router = await mesh.router(path)
    with RouterClient(router.target, missing_experts="renormalise") as client:
        model = expertmesh.client.attach(load_model(path, torch.float32), client)
        exact, tokens = await blocking(lambda: answers_of(model))
        assert (client.degraded.largest, client.degraded.mean) == (0, 0)
        assert (await blocking(lambda: client.forward(0, random_hidden(3)))).degraded_mass == [
            0.0
        ] * 3
        await mesh.kill(replicas["g1#1"])
        logits, other_tokens = await blocking(lambda: answers_of(model))
        assert logits.isfinite().all()
        assert not torch.equal(logits, exact)
        assert 0 < client.degraded.mean < client.degraded.largest < 1
        assert len(other_tokens) == len(tokens)
        forwarded = await blocking(lambda: client.forward(0, random_hidden(50)))
        assert max(forwarded.degraded_mass) > 0
        assert int(forwarded.experts_TK.min()) == -1
    with pytest.raises(InvalidInput, match="missing_experts: expected one of strict, substitute"):
        RouterClient(router.target, missing_experts="hope")


async def test_nobody_at_the_target(checkpoint: MakeCheckpoint, one_thread: None) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{unused.getsockname()[1]}"
        model = expertmesh.client.attach(load_model(checkpoint("mixtral"), torch.float32), target)
        with RouterClient(target) as client:
            for call in (client.models, lambda: answers_of(model)):
                started_s = time.monotonic()
                error = await failure(call)
                assert type(error) is Unavailable
                assert target.rpartition(":")[2] in error.message
                assert time.monotonic() - started_s < 5
